"""A LoRA's text-encoder weights. fastpref trains none, but draws with those that a published LoRA has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastpref.errors import UserError
from fastpref.models.lora_file import read_tensors
from fastpref.models.lora_form import Lora, make_lora
from fastpref.models.lora_naming import text_encoder_of
from fastpref.models.lora_strength import config_alphas, metadata_config
from fastpref.models.lora_unet import fitted

if TYPE_CHECKING:
    from torch import Tensor

_WRAPPER = "text_model"  # around the layers of an encoder, in some versions of transformers and in all files
# What diffusers called the layers before it used peft.
_OLD = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out.0": "out_proj"}


def load_text_adapters(pipeline: Any, file: Path) -> None:
    """Put a LoRA file's text-encoder weights onto a pipeline's encoders, at the strength that the file says.

    Raises:
        UserError: weights that the pipeline's encoders have no place for, or a strength that is not known.
    """
    tensors, metadata = read_tensors(file)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if found := text_encoder_of(key):
            parts.setdefault(found[0], {})[found[1]] = tensor
    for part, state in parts.items():
        encoder = getattr(pipeline, part, None)
        if encoder is None:
            raise UserError(f"the LoRA has weights for {part}, the model has none", str(file), "is it an SDXL LoRA?")
        lora = _renamed(_normal(state, metadata, part, str(file)), wrapped=hasattr(encoder, _WRAPPER))
        _inject(encoder, fitted(lora, encoder, str(file), part))


def _normal(state: Mapping[str, Tensor], metadata: Mapping[str, str], part: str, where: str) -> Lora:
    """The normal form, modules named as in the file."""
    lora = make_lora(state, None, where)
    config = metadata_config(metadata, where, part)
    return lora if config is None else make_lora(state, config_alphas(config, lora.ranks, where), where)


def _inject(encoder: Any, lora: Lora) -> None:
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    inject_adapter_in_model(LoraConfig(**lora.peft_config()), encoder)
    set_peft_model_state_dict(encoder, lora.state)


def _renamed(lora: Lora, *, wrapped: bool) -> Lora:
    """With the modules' paths in the encoder."""
    state, alphas = {}, {}
    for module, alpha in lora.alphas.items():
        name = _layer(module, wrapped=wrapped)
        alphas[name] = alpha
        for factor in ("lora_A.weight", "lora_B.weight"):
            state[f"{name}.{factor}"] = lora.state[f"{module}.{factor}"]
    return Lora(state, alphas)


def _layer(module: str, *, wrapped: bool) -> str:
    """A module's path in the encoder; what joins its parts, dots or underscores, stays."""
    for old, new in _OLD.items():
        module = module.removesuffix(old) + new if module.endswith(f".{old}") else module
    plain = module.removeprefix(f"{_WRAPPER}.").removeprefix(f"{_WRAPPER}_")
    return f"{_WRAPPER}.{plain}" if wrapped and plain.startswith(("encoder", "embeddings", "final")) else plain
