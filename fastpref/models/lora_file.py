"""LoRA files: one normal form in memory, read from every naming in use, written in diffusers' and in kohya's.

The change a LoRA makes to a weight is ``alpha / rank * B @ A``. Files differ in what they call A and B (``lora_A``/
``lora_B``, ``lora.down``/``lora.up``, ``lora_down``/``lora_up``) and in where alpha is: peft metadata, a tensor beside
the weights, or nowhere, which means alpha = rank.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from fastpref.atomic import write_tensors
from fastpref.errors import UserError
from fastpref.models.lora_naming import KOHYA_PREFIX, alpha_module, diffusers_key, kohya_name, weight_key

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
Layout = Literal["diffusers", "kohya"]

_METADATA_KEY = "lora_adapter_metadata"
_TEXT_ENCODERS = ("text_encoder", "lora_te_", "lora_te1_", "lora_te2_")


@dataclass(frozen=True)
class Lora:
    """A UNet's LoRA in normal form.

    Attributes:
        state: ``<module>.lora_A.weight`` ``(r, in[, k, k])`` and ``<module>.lora_B.weight`` ``(out, r[, 1, 1])``;
            module paths are diffusers'.
        alphas: alpha of every module.
    """

    state: dict[str, torch.Tensor]
    alphas: dict[str, float]

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of every module."""
        return {module: self.state[f"{module}.lora_A.weight"].shape[0] for module in self.alphas}

    def peft_config(self) -> dict[str, Any]:
        """Arguments of ``peft.LoraConfig`` under which these weights mean what they say."""
        rank = Counter(self.ranks.values()).most_common(1)[0][0]
        alpha = Counter(self.alphas.values()).most_common(1)[0][0]
        return {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {module: r for module, r in self.ranks.items() if r != rank},
            "alpha_pattern": {module: a for module, a in self.alphas.items() if a != alpha},
            "target_modules": sorted(self.alphas),
            "use_dora": False,
            "lora_bias": False,
        }


def make_lora(
    state: Mapping[str, torch.Tensor], alpha: float | Mapping[str, float] | None = None, where: str = ""
) -> Lora:
    """Any UNet LoRA state dict in normal form.

    Args:
        state: keys in peft's naming (with or without ``unet.`` and the adapter's name) or diffusers' older ones;
            tensors ``….alpha`` are taken as alphas.
        alpha: alpha of all or of each module, over what the state dict says; by default the module's rank.

    Raises:
        UserError: keys that are no LoRA's, half a pair, ranks that do not match.
    """
    weights: dict[str, torch.Tensor] = {}
    alphas: dict[str, float] = {}
    for key, tensor in state.items():
        if key.endswith(".alpha"):
            alphas[alpha_module(key)] = float(tensor)
            continue
        found = weight_key(key)
        if found is None:
            raise UserError(
                f"'{key}' is no UNet LoRA weight", where, "LoRA files in diffusers', peft's or kohya's naming are read"
            )
        weights[found] = tensor
    modules = sorted({key.rsplit(".lora_", 1)[0] for key in weights})
    if not modules:
        raise UserError("no LoRA weights in it", where, f"expected keys like unet.….lora_A.weight or {KOHYA_PREFIX}…")
    for module in modules:
        down, up = weights.get(f"{module}.lora_A.weight"), weights.get(f"{module}.lora_B.weight")
        if down is None or up is None or down.shape[0] != up.shape[1]:
            raise UserError(
                f"the two LoRA factors of {module} are not both there or differ in rank", where, "the file is damaged"
            )
        given = alpha.get(module) if isinstance(alpha, Mapping) else alpha
        alphas[module] = float(given if given is not None else alphas.get(module, down.shape[0]))
    return Lora(weights, {module: alphas[module] for module in modules})


def read_lora(path: Path, *, layers_per_block: int = 2, text_encoders: Literal["refuse", "ignore"] = "refuse") -> Lora:
    """Read a LoRA file, or the ``pytorch_lora_weights.safetensors`` of a folder.

    Args:
        path: a safetensors file, keys ``unet.*`` as ``lora_A/B`` or ``lora.down/up`` or in kohya's naming, or a folder.
        layers_per_block: of the UNet, by which kohya's SDXL layer numbers are read.
        text_encoders: what to do about text-encoder weights, of which fastpref trains none.

    Raises:
        UserError: missing or damaged file, no LoRA, DoRA or another kind of adapter.
    """
    path = Path(path)
    file = path / WEIGHTS_NAME if path.is_dir() else path
    tensors, metadata = _read_file(file)
    if any(key.startswith(_TEXT_ENCODERS) for key in tensors):
        if text_encoders == "refuse":
            raise UserError(
                "the LoRA has text-encoder weights", str(file), "only UNet LoRAs can be trained on or merged"
            )
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(_TEXT_ENCODERS)}
    if any(mark in key for key in tensors for mark in ("dora_scale", "lora_magnitude_vector", "lokr_", "hada_")):
        raise UserError("a DoRA, LoKr or LoHa adapter, not a LoRA", str(file), "only plain LoRAs are read")
    try:
        tensors = {diffusers_key(key, layers_per_block): tensor for key, tensor in tensors.items()}
    except ValueError as error:
        raise UserError(str(error), str(file)) from None
    return make_lora(tensors, _metadata_alphas(tensors, metadata, str(file)), str(file))


def save_lora(
    source: Lora | Mapping[str, torch.Tensor] | torch.nn.Module,
    path: Path,
    alpha: float | Mapping[str, float] | None = None,
    layout: Layout = "diffusers",
    *,
    family: str = "sd15",
    layers_per_block: int = 2,
    adapter: str = "default",
) -> Path:
    """Write a LoRA file atomically.

    Args:
        source: a normal form, a state dict (see :func:`make_lora`) or a UNet that carries a peft adapter.
        path: the file, or an existing folder that gets ``pytorch_lora_weights.safetensors``.
        alpha: see :func:`make_lora`; a UNet's adapter knows its own.
        layout: ``diffusers``: for ``pipe.load_lora_weights``, alpha in the metadata. ``kohya``: for ComfyUI, A1111 and
            sd-scripts, alpha as tensors.
        family: ``sdxl`` or ``sd15``: which paths kohya's naming uses.
        layers_per_block: of the UNet.
        adapter: name of the UNet's adapter.

    Returns:
        The file.
    """
    path = Path(path)
    file = path / WEIGHTS_NAME if path.is_dir() else path
    if isinstance(source, torch.nn.Module):
        source = lora_of(source, adapter)
    lora = source if isinstance(source, Lora) else make_lora(source, alpha)
    if layout == "kohya":
        tensors, metadata = _kohya_tensors(lora, family, layers_per_block, str(file))
    else:
        tensors = {f"unet.{key}": tensor for key, tensor in lora.state.items()}
        config = {f"unet.{key}": value for key, value in lora.peft_config().items()}
        metadata = {"format": "pt", _METADATA_KEY: json.dumps(config, indent=2, sort_keys=True)}
    write_tensors(file, tensors, metadata)
    return file


def lora_of(unet: torch.nn.Module, adapter: str = "default") -> Lora:
    """The LoRA that a UNet carries as a peft adapter, with the alpha each layer really uses."""
    from peft.tuners.lora import LoraLayer

    state: dict[str, torch.Tensor] = {}
    alphas: dict[str, float] = {}
    for module, layer in unet.named_modules():
        if isinstance(layer, LoraLayer) and adapter in layer.lora_A:
            state[f"{module}.lora_A.weight"] = layer.lora_A[adapter].weight.detach()
            state[f"{module}.lora_B.weight"] = layer.lora_B[adapter].weight.detach()
            alphas[module] = float(layer.lora_alpha[adapter])
    if not alphas:
        raise UserError(f"the UNet has no LoRA named '{adapter}'")
    return Lora(state, alphas)


def load_adapter(unet: Any, path: Path, adapter: str = "default") -> Lora:
    """Put a LoRA file onto a UNet as a peft adapter of that name, and return it.

    Raises:
        UserError: a bad file, or a LoRA for another architecture.
    """
    lora = read_lora(path, layers_per_block=layers_per_block_of(unet.config))
    check_fits(lora, unet, str(path))
    state = {f"unet.{key}": tensor for key, tensor in lora.state.items()}
    metadata = {f"unet.{key}": value for key, value in lora.peft_config().items()}
    unet.load_lora_adapter(state, prefix="unet", adapter_name=adapter, metadata=metadata)
    return lora


def check_fits(lora: Lora, unet: torch.nn.Module, where: str) -> None:
    """Raise a UserError unless every module of the LoRA is in the UNet, in the same size."""
    modules = dict(unet.named_modules())
    for module in lora.alphas:
        layer = modules.get(module)
        layer = getattr(layer, "base_layer", layer)
        weight = getattr(layer, "weight", None)
        down, up = lora.state[f"{module}.lora_A.weight"], lora.state[f"{module}.lora_B.weight"]
        if weight is None or down.shape[1] != weight.shape[1] or up.shape[0] != weight.shape[0]:
            raise UserError("the LoRA is for another UNet", where, f"{module} is missing here or of another size")


def layers_per_block_of(config: Mapping[str, Any]) -> int:
    """The one number of a UNet config by which kohya numbers layers; uneven blocks have none."""
    layers = config.get("layers_per_block", 2)
    distinct = set(layers) if isinstance(layers, list | tuple) else {layers}
    if len(distinct) != 1:
        raise UserError(f"layers_per_block is {layers}", "UNet config", "kohya's naming needs equal blocks")
    return int(distinct.pop())


def _metadata_alphas(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], where: str
) -> dict[str, float] | None:
    """Alphas out of diffusers' peft metadata; patterns match the end of a module's path, as in peft."""
    if _METADATA_KEY not in metadata:
        return None
    try:
        config = {key.removeprefix("unet."): value for key, value in json.loads(metadata[_METADATA_KEY]).items()}
        common, patterns = config.get("lora_alpha"), dict(config.get("alpha_pattern") or {})
    except (ValueError, AttributeError, TypeError):
        raise UserError(f"the metadata '{_METADATA_KEY}' is damaged", where, "save the LoRA again") from None
    alphas = {}
    for key in tensors:
        located = weight_key(key)
        if located is None or not located.endswith(".lora_A.weight"):
            continue
        module = located.removesuffix(".lora_A.weight")
        matching = [value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)]
        value = matching[0] if matching else common
        if value is not None:
            alphas[module] = float(value)
    return alphas


def _kohya_tensors(
    lora: Lora, family: str, layers_per_block: int, where: str
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    tensors: dict[str, torch.Tensor] = {}
    for module, alpha in lora.alphas.items():
        try:
            name = kohya_name(module, sgm=family == "sdxl", layers_per_block=layers_per_block)
        except ValueError as error:
            raise UserError(str(error), where, "use the diffusers layout") from None
        down = lora.state[f"{module}.lora_A.weight"]
        tensors[f"{name}.lora_down.weight"] = down
        tensors[f"{name}.lora_up.weight"] = lora.state[f"{module}.lora_B.weight"]
        tensors[f"{name}.alpha"] = torch.tensor(alpha, dtype=down.dtype)
    config = lora.peft_config()
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config["r"]),
        "ss_network_alpha": str(config["lora_alpha"]),
        "ss_base_model_version": "sdxl_base_v1-0" if family == "sdxl" else "sd_v1",
    }
    return tensors, metadata


def _read_file(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    if not file.is_file():
        raise UserError("no such LoRA file", str(file), f"give a .safetensors file or a folder with {WEIGHTS_NAME}")
    try:
        with safe_open(str(file), framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError("cannot read the LoRA file", str(file), f"it must be safetensors: {error}") from None
