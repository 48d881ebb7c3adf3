"""DeepSpeed's settings, derived from the recipe.

A DeepSpeed JSON may hold what the recipe has no key for (offload, bucket sizes, communication). What both know is the
recipe's: in the JSON it may be left out, be ``"auto"``, or say the same; anything else is an error.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from fastpref.config import Config
from fastpref.errors import UserError

AUTO = "auto"
_SECTIONS = ("zero_optimization", "bf16", "fp16", "optimizer")
_OURS = ("scheduler", "torch_autocast", "data_types")
_NAMES = {"adamw": ("adamw", "adam"), "adamw8bit": ("adamw8bit",)}
_ALWAYS = {
    "managed_gradient_accumulation": False,  # the trainer says when the batch is complete
    "zero_allow_untested_optimizer": True,  # bitsandbytes
    "zero_force_ds_cpu_optimizer": False,  # offload steps with torch's AdamW, which needs no compiler
    "steps_per_print": None,
}


def read_settings(config: Config) -> dict[str, Any]:
    """The recipe's DeepSpeed JSON, or nothing.

    Raises:
        UserError: the file is missing or no JSON object.
    """
    if config.deepspeed is None:
        return {}
    try:
        found = json.loads(Path(config.deepspeed).read_text())
    except (OSError, ValueError) as error:
        raise UserError("cannot read the DeepSpeed settings", config.deepspeed, str(error)) from None
    if not isinstance(found, dict) or not all(isinstance(found.get(k, {}), dict) for k in _SECTIONS):
        raise UserError(
            "the DeepSpeed settings are no JSON object of sections", config.deepspeed, "see configs/deepspeed"
        )
    return found


def derive(config: Config, settings: dict[str, Any], world_size: int) -> dict[str, Any]:
    """What :func:`deepspeed.initialize` gets: ``settings`` with everything the recipe says put in.

    Trained weights are fp32 and autocast is ours, as in one process, so neither bf16 nor fp16 is on in the result.

    Raises:
        UserError: a setting contradicts the recipe.
    """
    where = str(config.deepspeed)
    settings = json.loads(json.dumps(settings))
    _check_optimizer(config, settings.pop("optimizer", None), where)
    for key in _OURS:
        if key in settings:
            todo = "remove it: lr_scheduler, warmup_steps and precision of the recipe decide"
            raise UserError(f"'{key}' is set", where, todo)
    for key, (value, recipe) in _known(config, settings, world_size).items():
        _agree(settings, key, value, recipe, where)
    zero = settings.setdefault("zero_optimization", {})
    for precision in ("bf16", "fp16"):
        settings.pop(precision, None)
    zero.setdefault("overlap_comm", zero["stage"] == 2)
    if zero["stage"] != 2 and zero["overlap_comm"] is True:
        raise UserError("overlap_comm is true", where, f"remove it with zero_stage {zero['stage']}")
    if config.precision in ("bf16", "fp16"):
        zero.setdefault("memory_efficient_linear", False)  # it rounds before the bias, which autocast does not see
    if config.precision == "fp64":
        zero["reduce_scatter"] = False  # DeepSpeed has it in half and single precision only
    return settings | _ALWAYS


def zero_stage(config: Config, settings: dict[str, Any]) -> int:
    """The ZeRO stage: the recipe's, else the JSON's, else 2."""
    found = settings.get("zero_optimization", {}).get("stage", AUTO)
    if config.zero_stage is not None:
        return config.zero_stage
    if found == AUTO:
        return 2
    if found not in (1, 2, 3):
        raise UserError(
            f"zero_optimization.stage is {found!r}", str(config.deepspeed), "use 1, 2 or 3; or engine=local"
        )
    return int(found)


def _known(config: Config, settings: dict[str, Any], world_size: int) -> dict[str, tuple[Any, str]]:
    """Dotted key in DeepSpeed's settings → (value, what in the recipe says so)."""
    share = math.ceil(config.batch_size / world_size)
    micro = min(config.micro_batch, share)
    rounds = math.ceil(share / micro)
    return {
        "train_batch_size": (micro * rounds * world_size, "batch_size"),
        "train_micro_batch_size_per_gpu": (micro, "micro_batch_size"),
        "gradient_accumulation_steps": (rounds, "batch_size over ranks and micro_batch_size"),
        "gradient_clipping": (config.max_grad_norm or 0.0, "max_grad_norm"),
        "zero_optimization.stage": (zero_stage(config, settings), "zero_stage"),
        "bf16.enabled": (config.precision == "bf16", f"precision={config.precision}"),
        "fp16.enabled": (config.precision == "fp16", f"precision={config.precision}"),
    }


def _agree(settings: dict[str, Any], key: str, value: Any, recipe: str, where: str) -> None:
    *path, last = key.split(".")
    place = settings
    for part in path:
        place = place.setdefault(part, {})
    found = place.get(last, AUTO)
    if found != AUTO and found != value:
        todo = f'write "auto" or leave it out; the recipe says {value} ({recipe})'
        raise UserError(f"{key} is {found}", where, todo)
    place[last] = value


def _check_optimizer(config: Config, section: dict[str, Any] | None, where: str) -> None:
    if section is None:
        return
    kind = str(section.get("type", AUTO)).lower()
    if kind != AUTO and kind not in _NAMES.get(config.optimizer, (config.optimizer,)):
        raise UserError(f"optimizer.type is {kind}", where, f"leave it out; the recipe says {config.optimizer}")
    same = {
        "lr": config.learning_rate,
        "betas": [config.adam_beta1, config.adam_beta2],
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }
    for key, found in section.get("params", {}).items():
        if found != AUTO and found != same.get(key):
            todo = f"leave it out; the recipe says {same.get(key, 'nothing of the kind')}"
            raise UserError(f"optimizer.params.{key} is {found}", where, todo)
