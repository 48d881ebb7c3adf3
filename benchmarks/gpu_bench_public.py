"""The public script of DPO on SDXL beside ours: as it is, in a process of its own, and its UNet passes alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from devices import forget_peak, peak_device_bytes, seconds
from gpu_bench_measure import Row, guarded, recomputation
from gpu_bench_world import World
from limit import Bare, inputs_of
from reference_repo import run_script

from fastpref.config import Config

PUBLIC_STEPS = 4


class PublicPasses:
    """What diffusers' script does with the UNet: LoRA in fp32, autocast, recomputation, the reference by switch."""

    def __init__(self, world: World, config: Config) -> None:
        from peft import LoraConfig

        trainer = world.trainer(*_public_settings())
        self.batch = Bare(trainer).batches[0]
        del trainer
        self.device = world.device
        unet = world.weights.load_unet(Path(), torch.bfloat16).requires_grad_(False)
        unet.add_adapter(
            LoraConfig(
                r=config.lora_rank,
                lora_alpha=config.lora_rank,
                init_lora_weights="gaussian",
                target_modules=list(config.lora_targets),
            )
        )
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        unet.to(self.device).train().enable_gradient_checkpointing()
        self.unet = unet

    def step(self) -> None:
        """Policy forward, reference forward, backward."""
        loss = self._error()
        self.unet.disable_adapters()
        with torch.no_grad():
            self._error()
        self.unet.enable_adapters()
        loss.backward()
        self.unet.zero_grad()

    def _error(self) -> torch.Tensor:
        noisy, timesteps, conditioning = inputs_of(self.batch)
        with torch.autocast(self.device.type, torch.bfloat16):
            found = self.unet(noisy.bfloat16(), timesteps, **conditioning.kwargs(torch.bfloat16), return_dict=False)[0]
        return (found.float() - self.batch.target).square().mean()


def _public_settings() -> list[str]:
    return ["method=dpo", "batch_size=4", *recomputation("full")]


def public(world: World) -> Iterator[Row]:
    """The public script as it is, in a process of its own, and its UNet passes alone."""
    config = world.config(*_public_settings())
    yield from guarded(world, "public", "its UNet passes", partial(_public_passes, world, config))
    if world.repo is None:
        print("the public script is left out: --reference-repo CHECKOUT times it", flush=True)
        return
    yield from guarded(world, "public", "as it is", partial(_as_it_is, world, config))


def _public_passes(world: World, config: Config) -> Iterator[Row]:
    passes = PublicPasses(world, config)
    forget_peak(world.device)
    for _ in range(2):
        passes.step()
    for repeat in range(world.repeats):
        taken = seconds(passes.step, world.device)
        yield {"repeat": repeat, "ms": round(1e3 * taken, 4), "peak_device_bytes": peak_device_bytes(world.device)}


def _as_it_is(world: World, config: Config) -> Iterator[Row]:
    assert world.repo is not None
    world.free()
    started = config.model_copy(update={"model": str(world.whole())})
    taken = run_script(world.repo, world.python, started, PUBLIC_STEPS, world.folder / "public")
    yield {"repeat": 0, "ms": round(1e3 * taken, 4), "pairs": config.batch_size}
