"""The denoising steps of a sampler, and the scheduler that takes them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from fastpref.errors import UserError
from fastpref.models.loading import scheduler_settings
from fastpref.models.noise_schedule import ddim_settings


class DenoisingStep(NamedTuple):
    """From timestep t to t_prev, where the next step begins; the last step ends at timestep 0."""

    t: int
    t_prev: int


def sampling_scheduler(noise_scheduler: Any, sample_steps: int) -> Any:
    """DDIM over a pipeline's own noise schedule, prediction type and timestep spacing.

    The grid is the one of :func:`denoising_steps`. A pipeline sets the timesteps itself; they are looked at here first.

    Raises:
        UserError: the scheduler has no DDPM schedule, or no grid of ``sample_steps`` steps.
    """
    config = {**noise_scheduler.config, "_class_name": type(noise_scheduler).__name__}
    return _ddim(ddim_settings(config, "the pipeline's scheduler"), sample_steps)


def denoising_steps(model_dir: Path, sample_steps: int) -> list[DenoisingStep]:
    """The steps that ``fastpref sample`` takes with this model; see :func:`chain`."""
    return chain(scheduler_settings(model_dir), sample_steps)


def chain(settings: dict[str, Any], sample_steps: int) -> list[DenoisingStep]:
    """The steps from noise to picture, each from one timestep of the grid to the next.

    The last one leads to timestep 0, whose noise level ᾱ_0 the public SPO code and diffusers' DDIM
    (``set_alpha_to_one=False``) end at alike. A grid that has timestep 0 itself (``steps_offset`` 0, linspace) gives
    one step less: from ᾱ_0 to ᾱ_0 the sampler changes nothing, and there is no noise to draw candidates with.

    Args:
        settings: those of :func:`fastpref.models.noise_schedule.ddim_settings`.

    Raises:
        UserError: no grid of ``sample_steps`` steps.
    """
    timesteps = [t for t in _ddim(settings, sample_steps).timesteps.tolist() if t > 0]
    return [DenoisingStep(*pair) for pair in zip(timesteps, [*timesteps[1:], 0], strict=True)]


def _ddim(settings: dict[str, Any], sample_steps: int) -> Any:
    from fastpref.models.ddim import ChainedDDIMScheduler

    scheduler, end = ChainedDDIMScheduler(**settings), settings["num_train_timesteps"]
    if sample_steps > end:
        raise UserError(f"sample_steps is {sample_steps}, the model has {end} timesteps", "sample_steps", "lower it")
    scheduler.set_timesteps(sample_steps)
    levels = [end, *scheduler.timesteps.tolist(), -1]
    if len(levels) != sample_steps + 2 or any(now <= then for now, then in pairwise(levels)):
        spacing, offset = settings["timestep_spacing"], settings["steps_offset"]
        what = f"{sample_steps} steps of the {spacing} grid with steps_offset {offset} do not fit {end} timesteps"
        raise UserError(what, "sample_steps", "lower it")
    if levels[1] == 0:
        raise UserError("the only denoising step is at timestep 0, where no noise is left", "sample_steps", "raise it")
    return scheduler
