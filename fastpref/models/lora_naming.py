"""What the same UNet module is called by diffusers, by kohya's sd-scripts, and in older LoRA files.

kohya joins a module's path with underscores behind ``lora_unet_``. For SD1.5 the path is diffusers' own; for SDXL it is
the path in Stability's original UNet (``input_blocks``, ``middle_block``, ``output_blocks``), which numbers the layers
of all blocks through: input layer ``1 + block * (layers_per_block + 1) + layer``, output layer without the 1. ComfyUI
and A1111 read both.
"""

from __future__ import annotations

import re

KOHYA_PREFIX = "lora_unet_"

_PREFIX = re.compile(r"^(?:unet\.|base_model\.model\.)+")
_PEFT = re.compile(r"^(?P<module>.+)\.lora_(?P<part>[AB])(?:\.[A-Za-z0-9_-]+)?\.weight$")
_PROCESSOR = re.compile(
    r"^(?P<module>.+?)(?:\.processor)?\.(?P<leaf>to_q|to_k|to_v|to_out)_lora\.(?P<part>down|up)\.weight$"
)
_OLD = re.compile(r"^(?P<module>.+)\.lora(?:_linear_layer)?\.(?P<part>down|up)\.weight$")
_KOHYA = re.compile(rf"^(?P<module>{KOHYA_PREFIX}[a-z0-9_]+)\.lora_(?P<part>down|up)\.weight$")
_PARTS = {"A": "A", "down": "A", "B": "B", "up": "B"}

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


def kohya_name(module: str, *, sgm: bool, layers_per_block: int = 2) -> str:
    """A diffusers module path as a kohya LoRA name; ``sgm`` for SDXL.

    Raises:
        ValueError: the module has no place in Stability's UNet.
    """
    path = _to_sgm(module, layers_per_block) if sgm else module
    return KOHYA_PREFIX + path.replace(".", "_")


def module_name(kohya: str, *, layers_per_block: int = 2) -> str:
    """The diffusers module path of a kohya LoRA name, in either spelling of the path.

    Raises:
        ValueError: the name is no UNet module's.
    """
    rest, elements = kohya.removeprefix(KOHYA_PREFIX), []
    while rest:
        found = _ELEMENT.match(rest)
        if found is None:
            raise ValueError(f"'{kohya}' is no LoRA name of a UNet module")
        elements.append(found.group())
        rest = rest[found.end() :].removeprefix("_")
    path = ".".join(elements)
    if path in _TOP_FROM_SGM or elements[0] in ("input_blocks", "middle_block", "output_blocks"):
        return _from_sgm(path, layers_per_block)
    return path


def weight_key(key: str) -> str | None:
    """A LoRA weight's key, in any naming with dots, as ``<module>.lora_A.weight`` or ``….lora_B.weight``; else None."""
    bare = _PREFIX.sub("", key)
    if found := _PEFT.match(bare):
        return f"{found['module']}.lora_{found['part']}.weight"
    if found := _PROCESSOR.match(bare):
        leaf = "to_out.0" if found["leaf"] == "to_out" else found["leaf"]
        return f"{found['module']}.{leaf}.lora_{_PARTS[found['part']]}.weight"
    if found := _OLD.match(bare):
        return f"{found['module']}.lora_{_PARTS[found['part']]}.weight"
    return None


def alpha_module(key: str) -> str:
    """The module that a key ``….alpha`` belongs to."""
    bare = _PREFIX.sub("", key).removesuffix(".alpha")
    located = weight_key(bare + ".down.weight") or weight_key(bare + ".lora.down.weight")
    return (located or bare).removesuffix(".lora_A.weight")


def diffusers_key(key: str, layers_per_block: int) -> str:
    """A key in kohya's naming in diffusers'; others as they are. Raises ValueError for what is no LoRA weight."""
    if not key.startswith(KOHYA_PREFIX):
        return key
    name, _, tail = key.partition(".")
    module = module_name(name, layers_per_block=layers_per_block)
    if tail == "alpha":
        return f"{module}.alpha"
    found = _KOHYA.match(key)
    if found is None:
        raise ValueError(f"'{key}' is no LoRA weight")
    return f"{module}.lora_{_PARTS[found['part']]}.weight"


def _to_sgm(module: str, layers_per_block: int) -> str:
    if module in _TOP_TO_SGM:
        return _TOP_TO_SGM[module]
    parts = module.split(".")
    if parts[0] == "mid_block" and len(parts) > 3:
        kind, layer, rest = parts[1], int(parts[2]), ".".join(parts[3:])
        # Stability's middle block alternates resnet, attention, resnet.
        place = f"middle_block.{2 * layer + (kind == 'attentions')}"
        return f"{place}.{_inner_to_sgm(kind, rest)}"
    if parts[0] not in ("down_blocks", "up_blocks") or len(parts) < 5:
        raise ValueError(f"'{module}' has no place in Stability's UNet")
    block, kind, layer, rest = int(parts[1]), parts[2], int(parts[3]), ".".join(parts[4:])
    per_block = layers_per_block + 1
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * per_block}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{block * per_block + layers_per_block}.2.conv"
    inner = f"{int(kind == 'attentions')}.{_inner_to_sgm(kind, rest)}"
    if parts[0] == "down_blocks":
        return f"input_blocks.{1 + block * per_block + layer}.{inner}"
    return f"output_blocks.{block * per_block + layer}.{inner}"


def _from_sgm(path: str, layers_per_block: int) -> str:
    if path in _TOP_FROM_SGM:
        return _TOP_FROM_SGM[path]
    parts, per_block = path.split("."), layers_per_block + 1
    if parts[0] == "middle_block":
        index, rest = int(parts[1]), ".".join(parts[2:])
        kind = "attentions" if index % 2 else "resnets"
        return f"mid_block.{kind}.{index // 2}.{_inner_from_sgm(kind, rest)}"
    index, inner, rest = int(parts[1]), int(parts[2]), ".".join(parts[3:])
    if rest == "op":
        return f"down_blocks.{index // per_block - 1}.downsamplers.0.conv"
    if rest == "conv":
        return f"up_blocks.{index // per_block}.upsamplers.0.conv"
    kind = "attentions" if inner else "resnets"
    side, index = ("down_blocks", index - 1) if parts[0] == "input_blocks" else ("up_blocks", index)
    return f"{side}.{index // per_block}.{kind}.{index % per_block}.{_inner_from_sgm(kind, rest)}"


def _inner_to_sgm(kind: str, rest: str) -> str:
    return _RESNET_TO_SGM[rest] if kind == "resnets" and rest in _RESNET_TO_SGM else rest


def _inner_from_sgm(kind: str, rest: str) -> str:
    return _RESNET_FROM_SGM.get(rest, rest) if kind == "resnets" else rest
