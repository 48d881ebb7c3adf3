"""What a peft configuration makes of a LoRA's weights: alpha by alpha, or a refusal.

peft keeps it in ``adapter_config.json`` beside the weights, diffusers in the file's metadata. A layer's change is
``scale * B @ A`` with ``scale = alpha / rank``, or ``alpha / sqrt(rank)`` with ``use_rslora`` (arXiv 2312.03732). Here
alpha is always that of ``alpha / rank``. What else changes the result is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastpref.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"
METADATA_KEY = "lora_adapter_metadata"

# Settings under which the weights in the file mean the same, whatever their value.
_HARMLESS = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("runtime_config", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("lora_dropout", "megatron_config", "megatron_core", "qalora_group_size", "ensure_weight_tying"),
    "eva_config",  # its ranks are in rank_pattern
    "fan_in_fan_out",  # of layers that a UNet does not have
    "loftq_config",  # of an init_lora_weights that is refused
}
_APPLIED = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
# Every other start than these takes something off the base weights.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def metadata_config(metadata: Mapping[str, str], where: str, part: str = "unet") -> dict[str, Any] | None:
    """The peft configuration of a part (``unet``, ``text_encoder``, …) in a file's metadata, if there is one.

    Raises:
        UserError: it is damaged.
    """
    if METADATA_KEY not in metadata:
        return None
    every = _parsed(metadata[METADATA_KEY], f"the metadata '{METADATA_KEY}' is damaged", where)
    own = {key.removeprefix(f"{part}."): value for key, value in every.items() if key.startswith(f"{part}.")}
    if not own and part == "unet":
        own = {key: value for key, value in every.items() if not key.startswith("text_encoder")}
    return own or None


def folder_config(file: Path, keys: Mapping[str, Any] | list[str]) -> Path | None:
    """The ``adapter_config.json`` that belongs to a LoRA file with these keys; None for a file that peft did not write.

    Raises:
        UserError: peft wrote the file, and the configuration that states its strength is missing.
    """
    if file.name != "adapter_model.safetensors" and not any(key.startswith("base_model.model.") for key in keys):
        return None
    config = file.with_name(ADAPTER_CONFIG)
    if not config.is_file():
        todo = f"put its {ADAPTER_CONFIG}, which states alpha, beside it"
        raise UserError("the strength of this LoRA, which peft wrote, is not known", str(file), todo)
    return config


def read_config(path: Path) -> dict[str, Any]:
    """An ``adapter_config.json``."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError("cannot read the file", str(path), str(error)) from None
    return _parsed(text, f"{ADAPTER_CONFIG} is not a JSON object", str(path))


def config_alphas(config: Mapping[str, Any], ranks: Mapping[str, int], where: str) -> dict[str, float]:
    """The alpha of every module in ``ranks`` (module to rank), such that ``alpha / rank`` is peft's scale.

    Raises:
        UserError: a setting that a plain LoRA does not have, or a rank that the weights do not have.
    """
    _refuse_others(config, where)
    try:
        common_rank, common_alpha = int(config["r"]), float(config["lora_alpha"])
        rank_pattern = {str(key): int(value) for key, value in (config.get("rank_pattern") or {}).items()}
        alpha_pattern = {str(key): float(value) for key, value in (config.get("alpha_pattern") or {}).items()}
        alphas = {}
        for module, rank in ranks.items():
            said = _matching(rank_pattern, module, common_rank)
            if said != rank:
                what = f"the LoRA's configuration says rank {said} for {module}, its weights have {rank}"
                raise UserError(what, where, "the two are not of one LoRA")
            alpha = _matching(alpha_pattern, module, common_alpha)
            alphas[module] = alpha * math.sqrt(rank) if config.get("use_rslora") else alpha
    except (KeyError, ValueError, TypeError, AttributeError, re.error) as error:
        what = f"the LoRA's configuration is damaged ({type(error).__name__}: {error})"
        raise UserError(what, where, "save the LoRA again") from None
    return alphas


def _matching(patterns: Mapping[str, Any], module: str, common: Any) -> Any:
    """As peft: a pattern matches the end of a module's path, the first that does counts."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return common


def _refuse_others(config: Mapping[str, Any], where: str) -> None:
    for key, value in config.items():
        if key in _HARMLESS or key in _APPLIED:
            continue
        if key == "peft_type":
            plain = value is None or str(value).upper() == "LORA"
        elif key == "init_lora_weights":
            plain = value in _STARTS
        else:
            plain = not value or (key == "bias" and value == "none")
        if not plain:
            what = f"the LoRA was made with {key}={json.dumps(value, default=str)[:60]}"
            raise UserError(what, where, "only plain LoRAs are read: merge it into the model where it was made")


def _parsed(text: str, fault: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(fault, where, "save the LoRA again")
    return value
