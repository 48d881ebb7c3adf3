"""One micro-batch of a recipe, run on fake tensors through the same policy that training uses.

The UNet is built on the meta device and gets fake weights on the CPU, so that every operator, cast, attention
kernel, checkpoint and hook takes the path it takes in training, and nothing is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastpref.config import Config
from fastpref.config_rules import STEPWISE_METHODS
from fastpref.models.loading import DTYPES, open_part
from fastpref.models.policy import Conditioning, Policy, make_policy, master_dtype
from fastpref.models.time_ids import target_time_ids
from fastpref.objectives import build_objective
from fastpref.plan.meter import Operations, PeakMemory
from fastpref_kernels import implicit_reward

_CPU, META = torch.device("cpu"), torch.device("meta")
# fp32 tensors of a parameter's size that are alive while it is updated: of bitsandbytes' CPU path the dequantised
# moments, the gradient twice, the weight, and two of the quotient
_UPDATE_TENSORS = {"adamw8bit": 7, "paged_adamw8bit": 7, "lion8bit": 6, "adafactor": 5, "adamw": 3}


@dataclass(frozen=True)
class StepCount:
    """Bytes, and operations, of one process with everything in it."""

    frozen: int  # weights that are not trained, the reference's copy among them
    trained: int
    trained_values: int
    shapes: list[torch.Size]  # of the trained tensors
    gradients: int
    activations: int  # peak of what is neither weight nor gradient
    peak: int  # peak of what is no weight: gradients, activations and the work space of an update in the backward
    flops: int  # of the micro-batch, forward, recomputation and backward
    rollout_flops: int  # of one pool
    forward_flops: int = 0  # of the policy's forward alone


@dataclass(frozen=True)
class Shapes:
    """Sizes of the model and of what it is given."""

    unet: dict[str, Any]  # the UNet's configuration
    latent: tuple[int, int, int]  # C, h, w
    tokens: int  # of a prompt

    def inputs(self, policy: Policy, rows: int) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
        """What ``rows`` of a forward take."""
        dtype = torch.float64 if policy.base_dtype == torch.float64 else torch.float32
        timesteps = torch.zeros(rows, dtype=torch.int64)
        return torch.empty(rows, *self.latent, dtype=dtype), timesteps, self.conditioning(rows, dtype)

    def conditioning(self, rows: int, dtype: torch.dtype) -> Conditioning:
        """Of ``rows`` rows."""
        pooled = time_ids = None
        if self.unet.get("addition_embed_type") == "text_time":
            width = self.unet["projection_class_embeddings_input_dim"] - 6 * self.unet["addition_time_embed_dim"]
            pooled = torch.empty(rows, width, dtype=dtype)
            time_ids = target_time_ids(self.latent[1:], rows).to(dtype)  # in latents: no shape depends on the values
        prompt = torch.empty(rows, self.tokens, self.unet["cross_attention_dim"], dtype=dtype)
        return Conditioning(prompt, pooled, time_ids)


def count_step(config: Config, shapes: Shapes, pairs: int, *, several: bool = False) -> StepCount:
    """Count a micro-batch of ``pairs`` pairs (transitions for spo and lpo).

    Args:
        several: it is one of several in a step, so that gradients wait beside its activations.
    """
    stepwise = config.method in STEPWISE_METHODS
    objective = None if stepwise else build_objective(config)
    needs_reference = objective is None or (objective.uses_reference and config.reference != "ledger")
    made = _meta_policy(config, shapes.unet, needs_reference=needs_reference)
    with FakeTensorMode():
        policy = with_fake_policy(made)
        known = policy.tensors()
        memory, flops, rolled = PeakMemory(known), Operations(), Operations()
        with memory, _gradient_hooks(config, policy, memory):
            if objective is None:
                with rolled:
                    _roll_out(config, policy, shapes)
            for parameter in policy.trainable.values() if several else ():
                parameter.grad = torch.empty_like(parameter)
                memory.set_aside(parameter.grad)
            with flops:
                forward = 0
                if objective is None:
                    _transitions(config, policy, shapes, pairs)
                else:
                    rows = pairs * (2 if objective.uses_losers else 1)
                    forward = _offline(policy, shapes, rows, with_reference=needs_reference)
    parameters = list(policy.trainable.values())
    trained = sum(p.nbytes for p in parameters)
    return StepCount(
        frozen=sum(t.nbytes for t in known) - trained,
        trained=trained,
        trained_values=sum(p.numel() for p in parameters),
        shapes=[p.shape for p in parameters],
        gradients=trained,
        activations=memory.rest_peak,
        peak=memory.peak,
        flops=flops.total,
        rollout_flops=rolled.total,
        forward_flops=forward,
    )


def fake_policy(config: Config, settings: dict[str, Any], mode: FakeTensorMode) -> Policy:
    """The policy that ``config`` trains, of a UNet of these ``settings``, with the fake weights of ``mode``."""
    made = _meta_policy(config, settings, needs_reference=False)
    with mode:
        return with_fake_policy(made)


def _offline(policy: Policy, shapes: Shapes, rows: int, *, with_reference: bool) -> int:
    """As :mod:`fastpref.train.offline` treats a micro-batch; the operations of the policy's forward."""
    noisy, timesteps, conditioning = shapes.inputs(policy, rows)
    target, error = torch.empty_like(noisy), None
    if with_reference:
        error = -implicit_reward(policy.predict_reference(noisy, timesteps, conditioning), target)
    with Operations() as forward:
        prediction = policy.predict(noisy, timesteps, conditioning)
    implicit_reward(prediction, target, ref_error=error).sum().backward()
    policy.masters.collect()
    return forward.total


def _transitions(config: Config, policy: Policy, shapes: Shapes, pairs: int) -> None:
    """As :mod:`fastpref.train.transitions` does: win and lose apart unless no inner step is trained on."""
    rows = pairs * (2 if config.inner_steps else 1) * _guided(config)
    noisy, timesteps, conditioning = shapes.inputs(policy, rows)
    prediction = policy.predict(noisy, timesteps, conditioning)
    reference = policy.predict_reference(noisy, timesteps, conditioning)
    (prediction.to(noisy.dtype) - reference.to(noisy.dtype)).square().sum().backward()
    policy.masters.collect()


@torch.no_grad()
def _roll_out(config: Config, policy: Policy, shapes: Shapes) -> None:
    """The largest UNet call of a pool, that of all candidates."""
    rows = config.rollout_batch_size * config.candidates * _guided(config)
    merged = config.merges_rollout
    with policy.merged() if merged else nullcontext():
        policy.predict(*shapes.inputs(policy, rows))


def _guided(config: Config) -> int:
    return 2 if config.guidance_scale != 1.0 else 1


def _meta_policy(config: Config, settings: dict[str, Any], *, needs_reference: bool) -> Policy:
    from diffusers import UNet2DConditionModel

    frozen = DTYPES[config.precision] if config.train == "lora" else master_dtype(config)
    build = partial(UNet2DConditionModel.from_config, settings)
    unet = open_part(lambda: meta_model(build, frozen), Path(config.model))
    return make_policy(unet, config, META, needs_reference=needs_reference)


def meta_model(build: Callable[[], Any], dtype: torch.dtype) -> Any:
    """What ``build`` makes, in ``dtype`` and ready for inference, without memory for its weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with META:
            return build().eval()
    finally:
        torch.set_default_dtype(before)


def with_fake_weights(model: Any) -> Any:
    """The same model, its parameters and buffers moved from the meta device to fake ones on the CPU."""
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                fake = torch.empty(value.shape, dtype=value.dtype, device=_CPU)
                module._parameters[name] = torch.nn.Parameter(fake, requires_grad=value.requires_grad)
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device=_CPU)
    return model


def with_fake_policy(made: Policy) -> Policy:
    """The same policy with the fake weights of the mode it is called in."""
    for model in (made.unet, made.reference_unet):
        if model is not None:
            with_fake_weights(model)
    return Policy(made.unet, made.config, _CPU, made.reference_unet)


@contextmanager
def _gradient_hooks(config: Config, policy: Policy, memory: PeakMemory) -> Iterator[None]:
    """Tell gradients apart; with the step inside the backward they go after an update of their size."""

    def held(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:  # else its master has it by now
            memory.set_aside(parameter.grad)

    def updated(parameter: torch.Tensor) -> None:
        wide = config.pure_bf16 or "8bit" in config.optimizer
        for_update = range(_UPDATE_TENSORS[config.optimizer] if wide else parameter.itemsize == 2)
        held_meanwhile = [torch.empty(parameter.shape, dtype=torch.float32) for _ in for_update]
        parameter.grad = None
        del held_meanwhile

    hook = updated if config.step_in_backward else held
    if not config.step_in_backward:
        policy.masters.watch(collected=memory.set_aside)
    handles = [p.register_post_accumulate_grad_hook(hook) for p in policy.masters.copies.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
