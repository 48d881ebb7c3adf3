"""LoRA files: one normal form in memory, read from every naming in use, written in diffusers' and in kohya's.

The change a LoRA makes to a weight is ``alpha / rank * B @ A``. Files differ in what they call A and B (``lora_A``/
``lora_B``, ``lora.down``/``lora.up``, ``lora_down``/``lora_up``) and in where alpha is: a peft configuration (see
:mod:`fastpref.models.lora_strength`), a tensor beside the weights, or nowhere, which means alpha = rank. Two places
that disagree are an error. kohya's ``ss_network_alpha`` and ``ss_network_args`` tell how the training was set up; no
program scales by them, and LyCORIS has ``rs_lora`` in its alpha tensors already.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from fastpref.atomic import write_tensors
from fastpref.errors import UserError
from fastpref.models.lora_form import Lora, make_lora
from fastpref.models.lora_naming import Numbering, kohya_name, text_encoder_of
from fastpref.models.lora_strength import METADATA_KEY, config_alphas, folder_config, metadata_config, read_config
from fastpref.models.lora_unet import fitted, lora_of
from fastpref.models.state_dict import check_finite

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
PEFT_WEIGHTS_NAME = "adapter_model.safetensors"
Layout = Literal["diffusers", "kohya"]

_OTHER_ADAPTERS = [
    (re.compile(mark), kind)
    for mark, kind in (
        (r"\.dora_scale$|lora_magnitude_vector", "a DoRA"),
        (r"\.lokr_", "a LoKr"),
        (r"\.hada_", "a LoHa"),
        (r"\.lora_mid\.", "a LoCon in Tucker form"),
        (r"\.oft_", "an OFT adapter"),
        (r"\.lora_embedding_[AB]", "a LoRA of embeddings"),
        (r"\.lora_\w+(\.\w+)?\.bias$", "a LoRA with biases"),
        (r"\.diff(_b)?$|\.[wb]_norm$", "a full difference"),
    )
]


def resolve_lora(path: Path) -> Path:
    """The LoRA file that a path means: itself, or the one in a folder.

    In a folder that is ``pytorch_lora_weights.safetensors`` or peft's ``adapter_model.safetensors``, else the only
    .safetensors file.

    Raises:
        UserError: no file there, or more than one that could be meant.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError("no such LoRA file", str(path), f"give a .safetensors file or a folder with {WEIGHTS_NAME}")
    found = [path / name for name in (WEIGHTS_NAME, PEFT_WEIGHTS_NAME) if (path / name).is_file()]
    found = found or sorted(file for file in path.glob("*.safetensors") if file.is_file())
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:3]) + (", …" if len(found) > 3 else "")
        raise UserError(f"the folder holds {len(found)} LoRA files ({names})", str(path), "give the one you mean")
    if not found:
        pickled = next(iter(sorted(path.glob("*.bin"))), None)
        has = f"only {pickled.name}, a pickle" if pickled else "none"
        raise UserError(f"a LoRA in safetensors is needed, and there is {has}", str(path), f"expected {WEIGHTS_NAME}")
    return found[0]


def lora_sources(path: Path) -> list[Path]:
    """The files that decide what a LoRA does: the weights and, where peft wrote them, ``adapter_config.json``."""
    file = resolve_lora(path)
    config = folder_config(file, list(read_tensors(file, header_only=True)[0]))
    return [file] if config is None else [file, config]


def read_lora(
    path: Path,
    *,
    unet_config: Mapping[str, Any] | None = None,
    text_encoders: Literal["refuse", "ignore"] = "refuse",
) -> Lora:
    """Read a LoRA file, or the one in a folder (see :func:`resolve_lora`).

    Args:
        path: a safetensors file in any naming (see :mod:`fastpref.models.lora_naming`), or a folder.
        unet_config: of the UNet it is for, by which Stability's layer numbers are read; default: the public models'.
        text_encoders: what to do about text-encoder weights, of which fastpref trains none.

    Raises:
        UserError: missing or damaged file, no LoRA, DoRA or another kind of adapter, a strength that is not known.
    """
    file = resolve_lora(Path(path))
    where = str(file)
    tensors, metadata = read_tensors(file)
    for key in tensors:
        for mark, kind in _OTHER_ADAPTERS:
            if mark.search(key):
                raise UserError(f"'{key}' belongs to {kind}, not to a plain LoRA", where, "only plain LoRAs are read")
    if any(text_encoder_of(key) for key in tensors):
        if text_encoders == "refuse":
            raise UserError("the LoRA has text-encoder weights", where, "only UNet LoRAs can be trained on or merged")
        check_finite(tensors.items(), where, "a LoRA with such numbers is broken: save it again")
        tensors = {key: tensor for key, tensor in tensors.items() if text_encoder_of(key) is None}
    numbering = Numbering.of(unet_config or {})
    lora = make_lora(tensors, None, where, numbering)
    said = _configured(file, tensors, metadata, lora.ranks)
    return lora if said is None else make_lora(tensors, said, where, numbering)


def save_lora(
    source: Lora | Mapping[str, torch.Tensor] | torch.nn.Module,
    path: Path,
    alpha: float | Mapping[str, float] | None = None,
    layout: Layout = "diffusers",
    *,
    family: str = "sd15",
    unet_config: Mapping[str, Any] | None = None,
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
        unet_config: of the UNet, by which kohya's naming numbers SDXL's layers; default: the public model's.
        adapter: name of the UNet's adapter.

    Returns:
        The file.

    Raises:
        UserError: numbers that are not finite, or a module that has no name in the layout; nothing is written.
    """
    path = Path(path)
    file = path / WEIGHTS_NAME if path.is_dir() else path
    if isinstance(source, torch.nn.Module):
        source = lora_of(source, adapter)
    lora = source if isinstance(source, Lora) else make_lora(source, alpha)
    check_finite(lora.state.items(), str(file), "the LoRA is not written")
    if layout == "kohya":
        tensors, metadata = _kohya_tensors(lora, family, Numbering.of(unet_config or {}), str(file))
    else:
        tensors = {f"unet.{key}": tensor for key, tensor in lora.state.items()}
        config = {f"unet.{key}": value for key, value in lora.peft_config().items()}
        metadata = {"format": "pt", METADATA_KEY: json.dumps(config, indent=2, sort_keys=True)}
    write_tensors(file, tensors, metadata)
    return file


def load_adapter(
    unet: Any, path: Path, adapter: str = "default", *, text_encoders: Literal["refuse", "ignore"] = "refuse"
) -> Lora:
    """Put a LoRA file onto a UNet as a peft adapter of that name, and return it.

    Raises:
        UserError: a bad file, or a LoRA for another architecture.
    """
    lora = read_lora(path, unet_config=unet.config, text_encoders=text_encoders)
    lora = fitted(lora, unet, str(path))
    state = {f"unet.{key}": tensor for key, tensor in lora.state.items()}
    metadata = {f"unet.{key}": value for key, value in lora.peft_config().items()}
    unet.load_lora_adapter(state, prefix="unet", adapter_name=adapter, metadata=metadata)
    return lora


def _configured(
    file: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], ranks: Mapping[str, int]
) -> dict[str, float] | None:
    """Alphas by the peft configurations of a file, of which there may be two: in it and beside it."""
    said = []
    if (config := metadata_config(metadata, str(file))) is not None:
        said.append(config_alphas(config, ranks, str(file)))
    if (beside := folder_config(file, tensors)) is not None:
        said.append(config_alphas(read_config(beside), ranks, str(beside)))
    if said and said[0] != said[-1]:
        raise UserError(f"its metadata and {beside} give the LoRA two strengths", str(file), "remove the wrong one")
    return said[0] if said else None


def _kohya_tensors(
    lora: Lora, family: str, numbering: Numbering, where: str
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    tensors: dict[str, torch.Tensor] = {}
    for module, alpha in lora.alphas.items():
        try:
            name = kohya_name(module, sgm=family == "sdxl", numbering=numbering)
        except ValueError as error:
            raise UserError(str(error), where, "use the diffusers layout") from None
        down = lora.state[f"{module}.lora_A.weight"]
        tensors[f"{name}.lora_down.weight"] = down
        tensors[f"{name}.lora_up.weight"] = lora.state[f"{module}.lora_B.weight"]
        short = torch.tensor(alpha, dtype=down.dtype)
        tensors[f"{name}.alpha"] = short if float(short) == alpha else torch.tensor(alpha, dtype=torch.float32)
    config = lora.peft_config()
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config["r"]),
        "ss_network_alpha": str(config["lora_alpha"]),
        "ss_base_model_version": "sdxl_base_v1-0" if family == "sdxl" else "sd_v1",
    }
    return tensors, metadata


def read_tensors(file: Path, *, header_only: bool = False) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors by key, metadata) of a safetensors file; with ``header_only`` the tensors are empty."""
    try:
        with safe_open(str(file), framework="pt") as opened:
            keys = list(opened.keys())
            tensors = {key: torch.empty(0) if header_only else opened.get_tensor(key) for key in keys}
            return tensors, opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError("cannot read the LoRA file", str(file), f"it must be safetensors: {error}") from None
