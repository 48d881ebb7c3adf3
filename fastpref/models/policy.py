"""Policy and reference as one object: a UNet, what of it is trained, and how to predict as it was before training."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastpref.config import Config
from fastpref.errors import UserError
from fastpref.models.attention import set_attention
from fastpref.models.compiled import compile_unet
from fastpref.models.fused_ops import fuses
from fastpref.models.half_pass import computes_in_half, set_half_pass, wide_names
from fastpref.models.lean_unet import make_lean
from fastpref.models.loading import DTYPES, load_unet
from fastpref.models.masters import Masters
from fastpref.models.recompute import set_recomputation
from fastpref.models.shared_prompt import share_prompts
from fastpref_kernels import patch_unet

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

POLICY_ADAPTER, REFERENCE_ADAPTER = "default", "reference"


@dataclass
class Conditioning:
    """What a UNet row is conditioned on; SD1.5 has no pooled embeddings and no time ids."""

    prompt_embeds: torch.Tensor  # (N, L, D)
    pooled_prompt_embeds: torch.Tensor | None = None  # (N, P)
    time_ids: torch.Tensor | None = None  # (N, 6)

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """Its fields, in the order in which they are declared."""
        return self.prompt_embeds, self.pooled_prompt_embeds, self.time_ids

    def kwargs(self, dtype: torch.dtype, pooled: torch.dtype | None = None) -> dict[str, Any]:
        """Arguments of UNet2DConditionModel.forward: prompts in ``dtype``, pooled ones in ``pooled`` if given."""
        arguments: dict[str, Any] = {"encoder_hidden_states": self.prompt_embeds.to(dtype)}
        if self.pooled_prompt_embeds is not None and self.time_ids is not None:
            arguments["added_cond_kwargs"] = {
                "text_embeds": self.pooled_prompt_embeds.to(pooled or dtype),
                "time_ids": self.time_ids,  # pixel counts, which bf16 would round
            }
        return arguments


Predict = Callable[[torch.Tensor, torch.Tensor, Conditioning], torch.Tensor]


class Policy:
    """A UNet in training and its frozen reference.

    The reference is the adapter switched off (LoRA), a frozen second adapter (LoRA started from a file), or a frozen
    copy (full fine-tuning). Rows that pass through the UNet are counted.

    In half precision nothing runs under autocast (:mod:`fastpref.models.half_pass`) and what is trained has fp32
    ``masters``, but for ``pure_bf16``. DeepSpeed keeps masters itself: under it, weights in training are fp32 and the
    pass is autocast.
    """

    def __init__(self, unet: UNet2DConditionModel, config: Config, device: torch.device, reference: Any = None) -> None:
        self.unet: Any = unet
        self.config = config
        self.device = device
        self.base_dtype = DTYPES[config.precision]
        self.reference_unet = reference
        trained = {n: p for n, p in unet.named_parameters() if p.requires_grad}
        copied = computes_in_half(unet) and not config.pure_bf16
        self.masters = Masters(trained, self.base_dtype if copied else None, wide_names(unet))
        self.forwards = self.recomputed = self.backwards = 0
        self.repeat: Callable[..., Any] | None = None  # runs (name, function, inputs) without gradients, as a graph
        self.holds_merged = False
        self._adapters = _adapter_layers(unet) if config.train == "lora" else []
        self._has_reference_adapter = config.init_lora is not None and config.train == "lora"

    @property
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """What the optimizer updates, by name: the masters."""
        return self.masters.named

    def tensors(self) -> list[torch.Tensor]:
        """Every weight and buffer once, masters and the reference's included."""
        models = [model for model in (self.unet, self.reference_unet) if model is not None]
        found = [*self.trainable.values(), *(t for m in models for t in (*m.parameters(), *m.buffers()))]
        return list({id(tensor): tensor for tensor in found}.values())

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """The policy's prediction ``(N, C, H, W)``; builds a graph if gradients are enabled."""
        self.forwards += len(noisy)
        return self._repeated("policy", self.forward_pass, noisy, timesteps, conditioning)

    def predict_reference(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """The same from the reference, never with a graph."""
        self.forwards += len(noisy)
        with torch.no_grad():
            return self._repeated("reference", self.reference_pass, noisy, timesteps, conditioning)

    def forward_pass(self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """:meth:`predict` without counting, which a recorded graph would not repeat."""
        with self._autocast():
            return call_unet(self.unet, noisy, timesteps, conditioning, self.base_dtype)

    @torch.no_grad()
    def reference_pass(self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """:meth:`predict_reference` without counting."""
        with self._autocast(), self._as_reference():
            return call_unet(self.reference_unet or self.unet, noisy, timesteps, conditioning, self.base_dtype)

    def _repeated(
        self, name: str, predict: Predict, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """``predict``, by a recorded graph where nothing but its inputs differs from call to call."""
        if self.repeat is None or self.holds_merged or torch.is_grad_enabled():
            return predict(noisy, timesteps, conditioning)
        inputs = noisy, timesteps, *conditioning.tensors()
        return self.repeat(name, lambda x, t, *rest: predict(x, t, Conditioning(*rest)), inputs)

    def merged(self) -> AbstractContextManager[Any]:
        """Inside, the LoRA is part of the weights: no low-rank products; afterwards the weights are as before, bit for
        bit. In half precision the sum is rounded. The targeted layers' weights are held twice meanwhile."""
        return _Merged(self)

    def share_prompts(self) -> None:
        """Every forward from now on is of pairs, [winners; losers], whose prompts are computed on once."""
        for unet in {self.unet, self.reference_unet} - {None}:
            share_prompts(unet)

    def count_backward(self, rows: int) -> None:
        """Book a backward through ``rows`` rows; with full recomputation a whole forward is part of it. Norms and
        activations that are computed again are no forward."""
        self.backwards += rows
        self.recomputed += rows if self.config.gradient_checkpointing == "full" else 0

    def _autocast(self) -> AbstractContextManager[Any]:
        if not autocasts(self.config):
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.base_dtype)

    def _as_reference(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.reference_unet is not None else _ReferenceAdapter(self)


def autocasts(config: Config) -> bool:
    """Whether a recipe's half precision is autocast's; else it is :mod:`fastpref.models.half_pass`."""
    return config.precision in ("bf16", "fp16") and config.engine == "deepspeed"


def call_unet(
    unet: Any, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning, dtype: torch.dtype
) -> torch.Tensor:
    """The prediction ``(N, C, H, W)`` of a UNet that computes in ``dtype``; fp32 if its ends are."""
    ends = torch.float32 if computes_in_half(unet) else dtype
    return unet(noisy.to(ends), timesteps, **conditioning.kwargs(dtype, ends), return_dict=False)[0]


class _ReferenceAdapter:
    """Inside, the LoRA layers act as before training."""

    def __init__(self, policy: Policy) -> None:
        self.layers, self.second = policy._adapters, policy._has_reference_adapter

    def __enter__(self) -> None:
        for layer in self.layers:
            if self.second:
                layer.set_adapter(REFERENCE_ADAPTER)
            else:
                layer.enable_adapters(False)

    def __exit__(self, *_: object) -> None:
        for layer in self.layers:
            if self.second:
                layer.set_adapter(POLICY_ADAPTER)
            else:
                layer.enable_adapters(True)


class _Merged:
    """Inside, the weights of the targeted layers have the LoRA added."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.layers = policy, policy._adapters
        self._before: list[torch.Tensor] = []

    @torch.no_grad()
    def __enter__(self) -> None:
        self.policy.holds_merged = True
        with self.policy.masters.in_place():
            for layer in self.layers:
                weight = layer.get_base_layer().weight
                self._before.append(weight.data)
                wide = torch.promote_types(weight.dtype, torch.float32)
                delta = layer.get_delta_weight(POLICY_ADAPTER).to(wide)
                weight.data = (weight.data.to(wide) + delta).to(weight.dtype)
                layer.enable_adapters(False)

    def __exit__(self, *_: object) -> None:
        for layer, before in zip(self.layers, self._before, strict=True):
            layer.get_base_layer().weight.data = before
            layer.enable_adapters(True)
        self._before = []
        self.policy.holds_merged = False


def load_policy(config: Config, model_dir: Path, device: torch.device, *, needs_reference: bool) -> Policy:
    """The UNet of ``model_dir`` (or ``config.unet``) made ready for training.

    Frozen weights are in ``config.precision``; masters of trained ones in fp32 (fp64 for fp64, bf16 for ``pure_bf16``).
    """
    unet = load_unet(model_dir, _read_dtype(config), config.unet)
    return make_policy(unet, config, device, needs_reference=needs_reference)


def _read_dtype(config: Config) -> torch.dtype:
    """In which the UNet's weights are read; what they become later starts from that."""
    return DTYPES[config.precision] if config.train == "lora" else master_dtype(config)


def master_dtype(config: Config) -> torch.dtype:
    """Of the trained weights."""
    if config.precision == "fp64":
        return torch.float64
    return torch.bfloat16 if config.pure_bf16 else torch.float32


def make_policy(unet: Any, config: Config, device: torch.device, *, needs_reference: bool) -> Policy:
    """:func:`load_policy` of a UNet that is already there."""
    unet.requires_grad_(False)
    set_attention(unet, config.attention, device, DTYPES[config.precision])
    reference = None
    if config.train == "lora":
        _add_lora(unet, config, master_dtype(config))
    else:
        if needs_reference:
            reference = _in_precision(copy.deepcopy(unet), config).to(device).eval()
        unet.requires_grad_(True)
    _in_precision(unet, config).to(device)
    set_recomputation(unet, config.gradient_checkpointing)
    for model in (unet, *([] if reference is None else [reference])):
        _speed_up(model, config, device)
    unet.eval()  # a dropout mask would make the rewards of the first pass other than those of the second
    return Policy(unet, config, device, reference)


def load_reference(config: Config, model_dir: Path, device: torch.device) -> Policy:
    """The reference alone: nothing is trained, only :meth:`Policy.predict_reference` is of use."""
    if config.init_lora is not None:
        return load_policy(config.model_copy(update={"reference": "adapter"}), model_dir, device, needs_reference=True)
    return make_reference(load_unet(model_dir, _read_dtype(config), config.unet), config, device)


def make_reference(unet: Any, config: Config, device: torch.device) -> Policy:
    """:func:`load_reference` of a UNet that is already there."""
    unet = _in_precision(unet.requires_grad_(False), config).to(device).eval()
    set_attention(unet, config.attention, device, DTYPES[config.precision])
    _speed_up(unet, config, device)
    return Policy(unet, config, device, reference=unet)


def _in_precision(unet: Any, config: Config) -> Any:
    """``unet``, whose frozen weights are from now on as ``config.precision`` wants them."""
    if config.precision in ("bf16", "fp16") and not autocasts(config):
        set_half_pass(unet, DTYPES[config.precision])
    elif not any(p.requires_grad for p in unet.parameters()):
        unet.to(DTYPES[config.precision])
    return unet


def _speed_up(unet: Any, config: Config, device: torch.device) -> None:
    if fuses(config.fused_ops, device):
        patch_unet(unet)
    make_lean(unet)
    if config.compile:
        compile_unet(unet, whole=config.compile == "unet")


def _add_lora(unet: Any, config: Config, dtype: torch.dtype) -> None:
    from peft import LoraConfig

    given: dict[str, torch.Tensor] = {}
    if config.init_lora is not None:
        from fastpref.models.lora_file import load_adapter

        given = load_adapter(unet, Path(config.init_lora), POLICY_ADAPTER).state
        if config.reference != "ledger":
            with warnings.catch_warnings():  # peft warns of the second adapter, which is meant
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")
                load_adapter(unet, Path(config.init_lora), REFERENCE_ADAPTER)
        unet.set_adapter(POLICY_ADAPTER)
    else:
        check_lora_targets(unet, config.lora_targets)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            lora = LoraConfig(
                r=config.lora_rank,
                lora_alpha=config.lora_alpha or config.lora_rank,
                init_lora_weights="gaussian",
                target_modules=list(config.lora_targets),
            )
            unet.add_adapter(lora, adapter_name=POLICY_ADAPTER)
    for name, parameter in unet.named_parameters():
        if ".lora_" in name:
            parameter.requires_grad_(f".{POLICY_ADAPTER}." in name)
            key = name.replace(f".{POLICY_ADAPTER}.", ".").replace(f".{REFERENCE_ADAPTER}.", ".")
            # peft rounds what it loads to the UNet's dtype
            parameter.data = given[key].to(unet.device, dtype, copy=True) if given else parameter.data.to(dtype)


def check_lora_targets(unet: torch.nn.Module, targets: list[str]) -> None:
    """Raise :class:`UserError` unless each target names linear or convolution layers of the UNet, and only those.

    peft lets a misspelt name pass as long as another one matches, which would train less than was asked for.
    """
    modules = list(unet.named_modules())
    for target in targets:
        found = [module for name, module in modules if name == target or name.endswith(f".{target}")]
        if not found:
            raise UserError(f"no layer of the UNet is named '{target}'", "lora_targets", "use names such as to_q")
        for module in found:
            if not isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                what = f"'{target}' is a {type(module).__name__}"
                raise UserError(what, "lora_targets", "a LoRA goes onto linear and convolution layers")


def _adapter_layers(unet: Any) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
