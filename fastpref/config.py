"""Every setting once: its type, default, bounds and one line saying what it does.

One flat model serves ``prepare``, ``train``, ``sample`` and ``evaluate``; a recipe in ``configs/`` is a YAML file of
these keys, and ``key=value`` on the command line overrides it.
"""

from __future__ import annotations

import difflib
import reprlib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fastpref.config_rules import METHOD_DEFAULTS, PRESETS, check_config
from fastpref.errors import UserError

Method = Literal["sft", "dpo", "rpo", "spm", "lrm", "spo", "lpo"]
MAX_DEFAULT_GROUP = 64
_SHORT = reprlib.Repr()  # a few aliases in YAML can stand for more text than fits in memory
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 80, 80


class Config(BaseModel):
    """The settings of a run. Units are in the field descriptions; every bound is checked on load."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    # What to run
    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="run directory below output_dir")
    method: Method = Field(
        "rpo", description="sft, dpo, rpo; spo, lpo: step-wise; spm, lrm: their step-aware or latent reward model"
    )
    preset: Literal["default", "reference"] = Field(
        "default", description="reference: what the recipe leaves open is as in the method's official code (spo, lpo)"
    )
    model: str = Field(
        "emoji",
        description="SDXL or SD1.5: a diffusers folder, or one .safetensors file as published; 'emoji' is bundled",
    )
    prediction_type: Literal["auto", "epsilon", "v_prediction", "v_prediction_zero_snr"] = Field(
        "auto", description="what a model in one file predicts; auto: what the file says, else epsilon"
    )
    unet: str | None = Field(
        None, description="start from this UNet instead of model's: a folder, or a .safetensors file in any naming"
    )
    init_lora: str | None = Field(None, description="start from this LoRA file; the reference is that start")
    records: str = Field("emoji", description="parquet, folder, tar, jsonl or csv of pairs; 'emoji' is bundled")
    store: str = Field("stores/emoji", description="prepared store: written by prepare, read by train")
    output_dir: str = Field("runs", description="parent of the run directory")
    seed: int = Field(0, ge=0, lt=2**63, description="key of all randomness")
    steps: int = Field(1000, ge=1, description="optimizer steps")
    resume: Literal["never", "auto"] = Field("never", description="auto: continue from the newest intact checkpoint")
    overwrite: bool = Field(False, description="delete an existing run directory of this name first")
    evaluate: bool = Field(True, description="sample and score before and after training, write report.html")

    # Batch
    batch_size: int = Field(16, ge=1, description="global batch, in pairs, over all micro-batches and ranks")
    micro_batch_size: int | None = Field(None, ge=1, description="pairs per forward; default: the whole batch")
    engine: Literal["local", "deepspeed"] = Field(
        "local", description="local: every rank holds all weights and states; deepspeed: they are split (ZeRO)"
    )
    zero_stage: Literal[1, 2, 3] | None = Field(
        None, description="deepspeed: split optimizer states (1), gradients too (2), weights too (3); default 2"
    )
    deepspeed: str | None = Field(
        None, description="DeepSpeed JSON for what the recipe does not say: offload, buckets, communication"
    )
    rank_timeout: float = Field(1800.0, gt=0, description="seconds a rank may keep the others waiting")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda if present")
    threads: int | None = Field(None, ge=1, le=4096, description="CPU threads; default: torch's choice")
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = Field(
        "fp32",
        description="of the UNet's pass and its frozen weights; trained weights have fp32 masters "
        "(fp64 is for exactness tests)",
    )
    gradient_checkpointing: Literal["auto", "none", "selective", "full"] = Field(
        "auto",
        description="what the backward computes again: selective, norms and activations; full (true), whole blocks; "
        "none (false); auto: the first of none, selective, full that fits the free memory (spm, lrm: none)",
    )
    attention: Literal["auto", "sdpa", "xformers", "flash", "sliced"] = Field(
        "auto", description="auto: sdpa, sliced if a CPU is short of memory; xformers and flash need their packages"
    )
    fused_ops: bool | Literal["auto"] = Field(
        "auto",
        description="the kernels' GroupNorm+SiLU, GEGLU and LoRA in the UNet; auto: where that was measured faster",
    )
    compile: bool | Literal["unet"] = Field(
        False,
        description="torch.compile of the UNet; true: by blocks; unet: as one, slower to start, then fastest",
    )
    cuda_graphs: bool | Literal["auto"] = Field(
        "auto", description="on a GPU, record passes and optimizer once a shape and replay them; auto: where possible"
    )
    accumulation: Literal["rewards_first", "keep_graphs"] = Field(
        "rewards_first", description="RPO over several micro-batches: one more forward, or all graphs in memory"
    )

    # Objective
    beta: float = Field(2000.0, gt=0, description="strength of the KL term, for mean squared errors")
    temperature: float = Field(0.1, gt=0, description="RPO: tau of the similarity softmax")
    weight: Literal["outside", "inside", "uniform"] = Field("outside", description="RPO: where omega enters the loss")
    embedding: Literal["text", "image", "text+image"] = Field("text+image", description="RPO: what relates two pairs")
    group_size: int | None = Field(
        None,
        ge=1,
        description="pairs that share a timestep (RPO: and are contrasted); default 1, RPO min(batch, 64)",
    )
    sampling: Literal["random", "related"] = Field("random", description="what fills a group: any, or related prompts")
    safeguard: float | None = Field(None, gt=0, le=1, description="Diffusion-SDPO's mu: scales the loser's gradient")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="DPO: assumed share of wrong labels")
    label_noise: float = Field(
        0.0, ge=0, le=1, description="share of pairs whose winner and loser are exchanged, for experiments"
    )
    sft_weight: float = Field(0.0, ge=0, description="weight of an SFT term on the winners, added to DPO or RPO")
    caption_dropout: float = Field(0.0, ge=0, lt=1, description="share of pairs trained with the empty prompt")
    size_conditioning: Literal["target", "winner"] = Field(
        "target",
        description="the size that SDXL is told of both pictures of a pair: target, the training resolution, as in "
        "sampling; winner, the size and crop of the winner's file (sft, dpo, rpo)",
    )
    timestep_range: tuple[int, int] | None = Field(
        None, description="draw timesteps from [low, high); spo, lpo: pools there, the rollout ends below; default: all"
    )
    relabel: float | None = Field(
        None, ge=0, lt=1, description="spm: label by the CLIP's own scores of the real pictures, |p_w - p_l| <= it ties"
    )
    ratio_clip: float | None = Field(
        0.1, gt=0, description="spo, lpo: bound of the likelihood ratios around 1; beyond it no gradient; null: off"
    )
    reference: Literal["auto", "adapter", "copy", "ledger"] = Field(
        "auto",
        description="the adapter switched off (LoRA), a frozen copy (full), or what prepare --reference wrote",
    )
    ledger_precision: Literal["fp32", "training"] = Field(
        "fp32",
        description="bf16, fp16: the ledger's arithmetic: fp32, which leaves less noise; training, the training's own",
    )
    draws: int | None = Field(
        None, ge=1, description="different draws of noise, timestep and order; then they repeat; default: never"
    )

    # Step-wise preference optimization
    prompts: str | None = Field(
        None, description="spo, lpo: prompts from txt, json, jsonl or parquet; default: the captions of records"
    )
    rollout_prompts: int = Field(16, ge=1, description="prompts of a rollout, over all ranks; trained on in one pass")
    rollout_batch_size: int = Field(8, ge=1, description="prompts at once in the rollout")
    candidates: int = Field(4, ge=2, le=1024, description="K: candidates of a pool")
    plain_steps: int = Field(4, ge=0, description="denoising steps before the first pool")
    inner_steps: int = Field(0, ge=0, description="plain steps of every candidate before it is scored (SPO on SDXL: 3)")
    score_threshold: float | tuple[float, float] = Field(
        0.3,
        description="keep a pair if p_w - p_l exceeds it; [low, high]: from low to high with the step's sigma (LPO)",
    )
    score_at: Literal["next", "current"] = Field(
        "next",
        description="lpo: score candidates at their own timestep (next) or that of the step before (current, official)",
    )
    eta: float = Field(1.0, gt=0, le=1, description="DDIM's noise in the rollout; 1 is DDPM's")
    rollout_lora: Literal["auto", "merged", "adapter"] = Field(
        "auto", description="LoRA in the rollout: merged into the weights (auto: in fp32 and fp64) or beside them"
    )

    # Preference model
    scorer: str | None = Field(
        None,
        description="CLIP folder, folder of spm or lrm, published .bin, or package.module:callable; default: clip",
    )
    small_decoder: str | None = Field(
        None, description="score through this AutoencoderTiny folder, not the VAE; its agreement is reported"
    )
    decode_batch_size: int = Field(
        16, ge=1, description="latents decoded and scored together; the VAE gets at most one of 1024 px at once"
    )

    # Trained weights and optimizer
    train: Literal["lora", "full"] = Field("lora", description="what is trained")
    lora_rank: int = Field(8, ge=1, le=4096, description="LoRA rank")
    lora_alpha: float | None = Field(None, gt=0, description="LoRA alpha; default: the rank")
    lora_targets: list[str] = Field(
        ["to_q", "to_k", "to_v", "to_out.0"], min_length=1, description="module names that get a LoRA"
    )
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw8bit", "lion8bit", "adafactor"] = Field(
        "adamw", description="optimizer; the 8-bit ones need bitsandbytes, paged is plain 8-bit on a CPU"
    )
    step_in_backward: bool = Field(
        False, description="full, one process: update each tensor in the backward, clipped on its own; saves gradients"
    )
    pure_bf16: bool = Field(False, description="step_in_backward: weights in bf16 alone, rounded stochastically")
    learning_rate: float = Field(1e-4, gt=0, description="peak learning rate")
    lr_scheduler: Literal["constant", "linear", "cosine"] = Field("constant", description="after the warm-up")
    warmup_steps: int = Field(0, ge=0, description="linear warm-up, in optimizer steps")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW beta1")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW beta2")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW epsilon")
    weight_decay: float = Field(1e-2, ge=0, description="decoupled weight decay")
    max_grad_norm: float | None = Field(1.0, gt=0, description="clip the global gradient norm; null: off")
    ema_decay: float | None = Field(None, gt=0, lt=1, description="keep and export an EMA of the trained weights")
    max_skipped_steps: int = Field(10, ge=0, description="steps with a non-finite loss skipped before giving up")

    # Checkpoints and logs
    checkpoint_every: int = Field(500, ge=1, description="optimizer steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints kept")
    keep_best: Literal["loss", "accuracy", "margin"] | None = Field(
        None,
        description="keep the best checkpoint too, and its weights in best/: lowest loss, highest accuracy or margin, "
        "mean over the training pairs of all steps since the checkpoint before it",
    )
    checkpoint_async: Literal["auto", True, False] = Field(
        "auto",
        description="write a copy in host memory while training goes on; auto: if all ranks' copies take less than a "
        "quarter of what is free; the last checkpoint and a signal's are waited for",
    )
    export_checkpoints: bool = Field(False, description="with each checkpoint its weights, as at the end, in exports/")
    profile: bool = Field(False, description="trace a few steps: profile/ in the run directory, and a table")
    log_every: int = Field(1, ge=1, description="steps between lines of metrics.jsonl")
    tracker: Literal["tensorboard", "wandb", "none"] = Field(
        "tensorboard", description="live curves beside metrics.jsonl"
    )

    # Prepare
    resolution: int = Field(
        32, ge=8, le=16384, multiple_of=8, description="pixels; with buckets the square root of the area"
    )
    buckets: bool = Field(False, description="aspect-ratio buckets instead of one centre-cropped square")
    ties: Literal["drop", "half", "keep"] = Field(
        "drop", description="label 0.5: leave out; label of one half; or keep jpg_0 as winner with label 0.5 recorded"
    )
    identical: Literal["drop", "keep"] = Field(
        "drop", description="pairs whose two pictures have the same pixels: leave out, or keep"
    )
    posterior: bool = Field(False, description="store the VAE posterior's std and sample it in training")
    flips: bool = Field(False, description="store mirrored latents too and flip half the draws")
    vae_precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="auto: fp32, but on a GPU bf16 for pictures that are scored in bf16; what overflows in "
        "fp16 is computed again in fp32",
    )
    clip: str | None = Field(None, description="CLIP folder for RPO's embeddings, spm and spo; 'emoji' is bundled")
    max_reject_share: float = Field(0.05, ge=0, le=1, description="prepare fails above this share of bad records")
    max_caption_tokens: Literal[77, 150, 225] = Field(
        77,
        description="longer captions are cut; 150, 225: encode captions in 2, 3 blocks of 75, in training and drawing",
    )
    shard_size: int = Field(1024, ge=1, description="rows in a shard of the store")
    prepare_batch_size: int = Field(16, ge=1, description="images, captions or (ledger) pairs a call")
    max_enlargement: float | None = Field(
        4.0, ge=1, description="pictures that have to be enlarged more than this many times are rejected; null: off"
    )
    max_image_pixels: int = Field(64_000_000, ge=1024, description="larger images are rejected as decompression bombs")

    # Sampling and evaluation
    guidance_scale: float = Field(
        5.0,
        ge=1,
        description="guidance: sampling; spm: one-step prediction; lrm: features; spo, lpo: rollout, loss",
    )
    sample_steps: int = Field(20, ge=1, le=1000, description="denoising steps when sampling (DDIM)")
    eval_records: str = Field("emoji", description="held-out records whose captions are sampled; 'emoji' is bundled")
    eval_target_images: str | None = Field(
        None, description="folder of real pictures in the target style, NAME.txt or metadata.jsonl beside them"
    )
    eval_base_images: str | None = Field(None, description="folder of real pictures in the base style, same captions")
    eval_style: str | None = Field(
        None, description="style encoder folder; 'fit' trains one on half of the real pictures (default for folders)"
    )
    eval_clip: str | None = Field(None, description="CLIP folder for prompt_retrieval; default: clip")
    eval_prompts: int = Field(32, ge=1, description="held-out prompts sampled by evaluate")
    eval_timesteps: list[int] = Field(
        [0, 251, 501, 701, 951],
        min_length=1,
        description="spm, lrm: timesteps of held-out pair accuracy; 0: as it is",
    )
    eval_seeds: int = Field(2, ge=1, description="seeds per prompt")
    eval_batch_size: int = Field(32, ge=1, description="pictures per sampling batch")

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def _was_yes_or_no(cls, value: Any) -> Any:
        return {True: "full", False: "none"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        check_config(self)
        return self

    @property
    def micro_batch(self) -> int:
        """Pairs per forward."""
        return self.micro_batch_size or self.batch_size

    @property
    def group(self) -> int:
        """Pairs that share a timestep."""
        if self.group_size is not None:
            return self.group_size
        return min(self.batch_size, MAX_DEFAULT_GROUP) if self.method == "rpo" else 1

    @property
    def merges_rollout(self) -> bool:
        """Whether the LoRA is part of the weights in the rollout."""
        merged = self.precision in ("fp32", "fp64") if self.rollout_lora == "auto" else self.rollout_lora == "merged"
        return merged and self.train == "lora"

    @property
    def run_dir(self) -> Path:
        """Where ``train`` writes."""
        return Path(self.output_dir) / self.name


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a recipe and apply ``key=value`` overrides (values are YAML).

    Raises:
        UserError: the file is missing or no YAML mapping, a key is unknown, a value is out of bounds.
    """
    settings: dict[str, Any] = {} if str(path) == "" else _read_yaml(Path(path))
    for override in overrides or []:
        key, sign, value = override.partition("=")
        if not sign:
            raise UserError(f"'{override}' is no key=value", "command line", "write e.g. steps=100")
        try:
            settings[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"the value of '{key}' is no YAML", "command line", "quote it") from None
    return parse_config(settings, where=str(path) or "command line")


def parse_config(settings: dict[str, Any], where: str = "config") -> Config:
    """A checked :class:`Config`; raises :class:`UserError` naming the first bad key."""
    for key in settings:
        if key not in Config.model_fields:
            near = difflib.get_close_matches(str(key), Config.model_fields, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else "see 'fastpref train --keys' for the known ones"
            raise UserError(f"unknown key '{key}'", where, hint)
    method, preset = (value if isinstance(value := settings.get(key), str) else "" for key in ("method", "preset"))
    settings = {**METHOD_DEFAULTS.get(method, {}), **PRESETS.get((method, preset), {}), **settings}
    try:
        return Config.model_validate({k: _number(k, v) for k, v in settings.items()})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        if not key:
            raise UserError(message, where) from None
        field = Config.model_fields[str(first["loc"][0])]
        shown = _SHORT.repr(first["input"])
        raise UserError(f"{key} is {shown}: {message}", where, f"{key}: {field.description}") from None


def save_config(config: Config, path: Path) -> None:
    """Write every setting, defaults included, as YAML that :func:`load_config` reads back."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError("no such config file", str(path), "the bundled recipes are in configs/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("cannot read the config file", str(path), str(error)) from None
    except yaml.YAMLError as error:
        raise UserError("the config file is no YAML", str(path), " ".join(str(error).split())) from None
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise UserError("the config file is no mapping of keys to values", str(path), "write 'key: value' lines")
    return settings


def _number(key: str, value: Any) -> Any:
    """YAML 1.1 reads ``1e-4`` as a string; take it for the number it is where a number is due."""
    if isinstance(value, str) and "float" in str(Config.model_fields[key].annotation):
        try:
            return float(value)
        except ValueError:
            return value
    return value
