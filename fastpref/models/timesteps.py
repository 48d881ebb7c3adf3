"""The denoising steps of a sampler, and the scheduler that takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from fastpref.models.loading import _open


class DenoisingStep(NamedTuple):
    """From timestep t to t_prev; the last step ends at timestep 0."""

    t: int
    t_prev: int


def sampling_scheduler(noise_scheduler: Any) -> Any:
    """DDIM over the pipeline's own noise schedule, prediction type and timestep spacing.

    Configs that lack ``clip_sample`` and ``set_alpha_to_one`` get False for both: latents have no range to clip to.
    """
    from diffusers import DDIMScheduler

    config = dict(noise_scheduler.config)
    return DDIMScheduler.from_config({"clip_sample": False, "set_alpha_to_one": False, **config})


def denoising_steps(model_dir: Path, sample_steps: int) -> list[DenoisingStep]:
    """The steps that ``fastpref sample`` takes with this model, from noise to picture.

    The last one leads to timestep 0, whose noise level the public SPO code and diffusers' DDIM
    (``set_alpha_to_one=False``) end at alike.
    """
    from diffusers import DDPMScheduler

    own = _open(lambda: DDPMScheduler.from_pretrained(model_dir, subfolder="scheduler"), model_dir)
    scheduler = sampling_scheduler(own)
    scheduler.set_timesteps(sample_steps)
    timesteps = [int(t) for t in scheduler.timesteps]
    stride = scheduler.config.num_train_timesteps // sample_steps
    return [DenoisingStep(t, max(t - stride, 0)) for t in timesteps]
