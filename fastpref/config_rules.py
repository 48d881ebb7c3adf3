"""What settings need of each other, and the settings that come with a method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastpref.config import Config

POLICY_METHODS = ("sft", "dpo", "rpo", "spo", "lpo")
OFFLINE_METHODS = ("sft", "dpo", "rpo")
STEPWISE_METHODS = ("spo", "lpo")
SCORER_METHODS = ("spm", "lrm")
LEDGER_METHODS = ("dpo", "rpo")

# What a recipe that leaves it open gets with its method.
METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "spo": {"beta": 10.0},
    "lpo": {"beta": 500.0, "plain_steps": 0, "score_threshold": [0.35, 0.5]},
}
# What the official codes of SPO (arXiv 2406.04314) and LPO (arXiv 2502.01051) share. Their gradient clipping never
# takes effect, so it is off here.
_OFFICIAL_STEPWISE: dict[str, Any] = {
    "max_grad_norm": None,
    "ratio_clip": 0.1,
    "eta": 1.0,
    "guidance_scale": 5.0,
    "sample_steps": 20,
    "weight_decay": 1e-4,
    "lr_scheduler": "constant",
    "rollout_lora": "adapter",
}
# With preset reference LPO's thresholds also span the σ of all steps (rollout/transitions.py: thresholds).
PRESETS: dict[tuple[str, str], dict[str, Any]] = {
    ("spo", "reference"): {**_OFFICIAL_STEPWISE, "plain_steps": 4},
    ("lpo", "reference"): {**_OFFICIAL_STEPWISE, "plain_steps": 0, "score_at": "current"},
}


def check_config(config: Config) -> None:
    """Raise ValueError, in one line, for settings that do not go together."""
    _check_names(config)
    micro, group = config.micro_batch, config.group
    if config.batch_size % micro and config.method not in STEPWISE_METHODS:
        raise ValueError(f"micro_batch_size is {micro}, must divide batch_size {config.batch_size}")
    if config.batch_size % group:
        raise ValueError(f"group_size is {group}, must divide batch_size {config.batch_size}")
    if config.timestep_range is not None and not 0 <= config.timestep_range[0] < config.timestep_range[1]:
        raise ValueError(f"timestep_range is {list(config.timestep_range)}, must be [low, high) with 0 <= low < high")
    if config.safeguard is not None and config.method == "sft":
        raise ValueError("safeguard is set with method sft, which has no losers: remove it")
    if config.keep_best in ("accuracy", "margin") and config.method == "sft":
        raise ValueError(f"keep_best is {config.keep_best} with method sft, which has no losers: use loss")
    if (config.eval_target_images is None) != (config.eval_base_images is None):
        lacking = "eval_target_images" if config.eval_target_images is None else "eval_base_images"
        raise ValueError(f"{lacking} is not set: evaluation needs a folder of either style")
    if config.init_lora is not None and config.train == "full":
        raise ValueError("init_lora is set with train full, which trains no LoRA: export it merged and set unet")
    if config.reference == "adapter" and config.train == "full":
        raise ValueError("reference is adapter with train full, which has no adapter: use copy")
    if config.size_conditioning == "winner" and config.method not in OFFLINE_METHODS:
        raise ValueError(
            f"size_conditioning is winner with method {config.method}, which tells the target size: use target"
        )
    if config.step_in_backward:
        _check_step_in_backward(config)
    if config.pure_bf16 and not (config.step_in_backward and config.precision == "bf16"):
        raise ValueError("pure_bf16 is set without precision bf16 or without step_in_backward: set both")
    if config.pure_bf16 and config.ema_decay is not None:
        raise ValueError("ema_decay is set with pure_bf16, where an average would be rounded away: remove one")
    if config.reference == "ledger" and config.method not in LEDGER_METHODS:
        raise ValueError(f"reference is ledger with method {config.method}: dpo and rpo have one")
    if config.preset == "reference" and config.method not in STEPWISE_METHODS:
        raise ValueError(f"preset is reference with method {config.method}: there is one for spo and lpo only")
    if config.engine == "deepspeed" and config.optimizer == "adafactor":
        raise ValueError("optimizer is adafactor, which ZeRO's flat partitions change: use adamw, or engine=local")
    if config.engine == "local" and (config.zero_stage or config.deepspeed):
        raise ValueError("zero_stage or deepspeed is set with engine local: set engine=deepspeed")
    if config.method in SCORER_METHODS:
        _check_scorer_method(config)
    if config.method in STEPWISE_METHODS:
        _check_stepwise(config)


def _check_step_in_backward(config: Config) -> None:
    unfit = {
        f"method {config.method}": config.method not in OFFLINE_METHODS,
        "train lora": config.train == "lora",
        "engine deepspeed": config.engine == "deepspeed",
        "precision fp16": config.precision == "fp16",
        f"micro_batch_size {config.micro_batch}": config.micro_batch != config.batch_size,
    }
    for setting, present in unfit.items():
        if present:
            raise ValueError(
                f"step_in_backward is set with {setting}: it is for sft, dpo and rpo, train full, on the local engine, "
                "the batch in one forward, not in fp16"
            )


def _check_names(config: Config) -> None:
    """Texts name files or modules: none may be what no file can be called."""
    for key, value in config:
        if isinstance(value, str) and not _is_path(value):
            raise ValueError(f"{key} is {value[:40]!r}, which no file can be called")


def _is_path(value: str) -> bool:
    try:
        names = value.encode().split(b"/")
    except UnicodeEncodeError:
        return False
    return b"\0" not in value.encode() and max(map(len, names)) <= 255 and len(value) <= 4000


def _refuse(config: Config, keys: tuple[str, ...]) -> None:
    for key in keys:
        if getattr(config, key):
            raise ValueError(f"{key} is set with method {config.method}, which has no use for it: remove it")


def _check_scorer_method(config: Config) -> None:
    if config.train != "full":
        raise ValueError(f"method {config.method} trains all weights of the preference model: set train=full")
    _refuse(config, ("safeguard", "sft_weight", "caption_dropout"))
    if config.relabel is not None and config.label_noise:
        raise ValueError("label_noise is set with relabel, which passes over the records' labels: remove one")
    if min(config.eval_timesteps) < 0:
        raise ValueError(f"eval_timesteps has {min(config.eval_timesteps)}, must be >= 0")


def _check_stepwise(config: Config) -> None:
    unused = ("safeguard", "sft_weight", "caption_dropout", "label_noise", "label_smoothing", "relabel", "draws")
    _refuse(config, unused)
    if config.score_at == "current" and config.method != "lpo":
        raise ValueError(f"score_at is current with method {config.method}: lpo alone has the choice")
    branched = config.sample_steps - config.plain_steps
    if branched < 1:
        raise ValueError(f"plain_steps is {config.plain_steps}, must be below sample_steps {config.sample_steps}")
    if branched % (config.inner_steps + 1):
        raise ValueError(
            f"inner_steps is {config.inner_steps}: {config.inner_steps + 1} must divide the {branched} steps after "
            f"plain_steps"
        )
    threshold = config.score_threshold
    low, high = threshold if isinstance(threshold, tuple) else (threshold, threshold)
    if not 0 <= low <= high < 1:
        raise ValueError(f"score_threshold is {threshold}, must be in [0, 1), low before high")
