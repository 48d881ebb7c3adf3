"""What the same UNet module is called by diffusers, by kohya's sd-scripts, by ComfyUI, and in older LoRA files.

kohya joins a module's path with underscores behind ``lora_unet_``; LyCORIS does behind ``lycoris_``. For SD1.5 the path
is diffusers' own; for SDXL it is the path in Stability's original UNet (``input_blocks``, ``middle_block``,
``output_blocks``), which ComfyUI writes with dots behind ``diffusion_model.``. Readers take both paths.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

KOHYA_PREFIX = "lora_unet_"
Part = Literal["A", "B", "alpha"]
# How the name of a text encoder's tensor begins, and which encoder that is: by diffusers, by kohya for SD1.5 and SDXL,
# by ComfyUI.
TEXT_ENCODERS = {
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
}

_PREFIX = re.compile(r"^(?:unet\.|base_model\.model\.|(?:model\.)?diffusion_model\.)+")
_JOINED = (KOHYA_PREFIX, "lycoris_")
_KEYS = [
    re.compile(tail)
    for tail in (
        r"^(?P<module>.+)\.lora_(?P<part>[AB])(?:\.[A-Za-z0-9_-]+)?\.weight$",  # peft, diffusers
        r"^(?P<module>.+)\.lora_(?P<part>down|up)\.weight$",  # kohya, ComfyUI
        r"^(?P<module>.+?)(?:\.processor)?(?P<leaf>\.to_q|\.to_k|\.to_v|\.to_out)_lora\.(?P<part>down|up)\.weight$",
        r"^(?P<module>.+)\.lora(?:_linear_layer)?\.(?P<part>down|up)\.weight$",  # diffusers before peft
        r"^(?P<module>.+?)(?:\.processor)?(?P<leaf>\.to_q|\.to_k|\.to_v|\.to_out)_lora\.(?P<part>alpha)$",
        r"^(?P<module>.+?)(?:\.lora)?\.(?P<part>alpha)$",
    )
]
_PARTS: dict[str, Part] = {"A": "A", "down": "A", "B": "B", "up": "B", "alpha": "alpha"}
_SGM_ROOTS = ("input_blocks", "middle_block", "output_blocks")
_IN_TRANSFORMER = ("proj_in", "proj_out", "transformer_blocks")

_TOP_TO_SGM = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET_TO_SGM = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_TOP_FROM_SGM = {v: k for k, v in _TOP_TO_SGM.items()}
_RESNET_FROM_SGM = {v: k for k, v in _RESNET_TO_SGM.items()}

# Path elements that contain an underscore themselves, longest first so that none hides another.
_COMPOUND = (
    "transformer_blocks|time_embedding|add_embedding|input_blocks|middle_block|output_blocks|down_blocks|mid_block|up_blocks"
    "|skip_connection|time_emb_proj|conv_shortcut|time_embed|label_emb|in_layers|out_layers|emb_layers|linear_1|linear_2"
    "|conv_in|conv_out|proj_in|proj_out|to_out|to_q|to_k|to_v"
)
_ELEMENT = re.compile(f"{_COMPOUND}|[a-z]+[0-9]*|[0-9]+")


@dataclass(frozen=True)
class Numbering:
    """The numbers of Stability's UNet, which counts the layers of all blocks through.

    Attributes:
        layers: resnets of each down block; the up blocks have one more each, in the reverse order.
        attention: of each up block, whether it has attention: the upsampler stands behind it.
    """

    layers: tuple[int, ...]
    attention: tuple[bool, ...]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Numbering:
        """Of the UNet with this config; an empty one is that of the public models."""
        ups = config.get("up_block_types", ("CrossAttnUpBlock2D",) * 4)
        layers = config.get("layers_per_block", 2)
        return cls(
            tuple(layers) if isinstance(layers, list | tuple) else (layers,) * len(ups),
            tuple("Attn" in kind for kind in ups),
        )

    def first(self, side: str) -> list[int]:
        """The number of each block's first layer; ``side`` is ``down_blocks`` or ``up_blocks``."""
        layers = self.layers if side == "down_blocks" else self.layers[::-1]
        return list(accumulate((n + 1 for n in layers[:-1]), initial=int(side == "down_blocks")))

    def place(self, side: str, number: int) -> tuple[int, int]:
        """(block, layer in it) of a layer's number.

        Raises:
            ValueError: the UNet has no such layer.
        """
        layers = self.layers if side == "down_blocks" else self.layers[::-1]
        for block, (first, count) in enumerate(zip(self.first(side), layers, strict=True)):
            if first <= number <= first + count:
                return block, number - first
        raise ValueError(f"the UNet has no layer {number} in its {side.replace('_', ' ')}")


PUBLIC = Numbering.of({})


def kohya_name(module: str, *, sgm: bool, numbering: Numbering = PUBLIC) -> str:
    """A diffusers module path as a kohya LoRA name; ``sgm`` for SDXL.

    Raises:
        ValueError: the module has no place in Stability's UNet.
    """
    return KOHYA_PREFIX + (_to_sgm(module, numbering) if sgm else module).replace(".", "_")


def module_name(name: str, *, numbering: Numbering = PUBLIC) -> str:
    """The diffusers path of a UNet module in any naming: with dots, or joined by underscores as kohya's.

    Raises:
        ValueError: not the name of a UNet module.
    """
    path = _PREFIX.sub("", name)
    for prefix in _JOINED:
        if path.startswith(prefix):
            path = _split(path.removeprefix(prefix), name)
            break
    if path in _TOP_FROM_SGM:
        return _TOP_FROM_SGM[path]
    if path.split(".")[0] not in _SGM_ROOTS:
        return path
    try:
        return _from_sgm(path, numbering)
    except (IndexError, ValueError) as error:
        raise ValueError(f"'{name}' is not the name of a module of this UNet: {error}") from None


def lora_key(key: str, *, numbering: Numbering = PUBLIC) -> tuple[str, Part]:
    """The module, in diffusers' naming, that a tensor of a LoRA file belongs to, and which of its tensors it is.

    Raises:
        ValueError: the tensor is not a UNet LoRA's.
    """
    for pattern in _KEYS:
        if found := pattern.match(key):
            leaf = found.groupdict().get("leaf") or ""
            module = found["module"] + (".to_out.0" if leaf == ".to_out" else leaf)
            return module_name(module, numbering=numbering), _PARTS[found["part"]]
    raise ValueError(f"'{key}' is not a UNet LoRA weight")


def text_encoder_of(key: str) -> tuple[str, str] | None:
    """(encoder, the rest of the key) of a text encoder's tensor in any naming; None for every other."""
    for prefix, encoder in TEXT_ENCODERS.items():
        if key.startswith(prefix):
            return encoder, key.removeprefix(prefix)
    return None


def _split(joined: str, name: str) -> str:
    rest, elements = joined, []
    while rest:
        found = _ELEMENT.match(rest)
        if found is None:
            raise ValueError(f"'{name}' is not the LoRA name of a UNet module")
        elements.append(found.group())
        rest = rest[found.end() :].removeprefix("_")
    return ".".join(elements)


def _to_sgm(module: str, numbering: Numbering) -> str:
    if module in _TOP_TO_SGM:
        return _TOP_TO_SGM[module]
    nowhere = ValueError(f"'{module}' has no place in Stability's UNet")
    parts = module.split(".")
    if parts[0] == "mid_block" and len(parts) > 3 and parts[1] in ("resnets", "attentions"):
        kind, layer = parts[1], int(parts[2])
        inner = _inner_to_sgm(kind, ".".join(parts[3:]))
        if inner is None:
            raise nowhere
        # Stability's middle block alternates resnet, attention, resnet.
        return f"middle_block.{2 * layer + (kind == 'attentions')}.{inner}"
    if parts[0] not in ("down_blocks", "up_blocks") or len(parts) < 5:
        raise nowhere
    side, block, kind, layer, rest = parts[0], int(parts[1]), parts[2], int(parts[3]), ".".join(parts[4:])
    inner = _inner_to_sgm(kind, rest)
    if inner is None or block >= len(numbering.layers):
        raise nowhere
    first = numbering.first(side)[block]
    root = "input_blocks" if side == "down_blocks" else "output_blocks"
    if kind == "downsamplers":
        return f"{root}.{first + numbering.layers[block]}.0.{inner}"
    if kind == "upsamplers":
        return f"{root}.{first + numbering.layers[::-1][block]}.{1 + numbering.attention[block]}.{inner}"
    return f"{root}.{first + layer}.{int(kind == 'attentions')}.{inner}"


def _from_sgm(path: str, numbering: Numbering) -> str:
    parts = path.split(".")
    if parts[0] == "middle_block":
        number, rest = int(parts[1]), ".".join(parts[2:])
        kind = "attentions" if number % 2 else "resnets"
        return f"mid_block.{kind}.{number // 2}.{_inner_from_sgm(kind, rest)}"
    number, inner, rest = int(parts[1]), int(parts[2]), ".".join(parts[3:])
    side = "down_blocks" if parts[0] == "input_blocks" else "up_blocks"
    block, layer = numbering.place(side, number)
    if rest in ("op", "conv"):
        return f"{side}.{block}.{'downsamplers' if side == 'down_blocks' else 'upsamplers'}.0.conv"
    kind = "attentions" if inner else "resnets"
    return f"{side}.{block}.{kind}.{layer}.{_inner_from_sgm(kind, rest)}"


def _inner_to_sgm(kind: str, rest: str) -> str | None:
    """The end of a path; None for a layer that Stability's UNet does not have."""
    if kind == "resnets":
        return _RESNET_TO_SGM.get(rest)
    if kind == "attentions":
        return rest if rest.split(".")[0] in _IN_TRANSFORMER else None
    return {"downsamplers": "op", "upsamplers": "conv"}.get(kind) if rest == "conv" else None


def _inner_from_sgm(kind: str, rest: str) -> str:
    return _RESNET_FROM_SGM.get(rest, rest) if kind == "resnets" else rest
