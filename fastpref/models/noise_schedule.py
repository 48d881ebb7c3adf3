"""Noise schedules: which scheduler configs describe a DDPM of noise or velocity, and the ᾱ that they mean.

A folder's ``scheduler/`` names the class its authors sample with. Of that class only the forward process matters here:
every class accepted below noises as DDPM does (arXiv 2006.11239), whatever solver it steps with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fastpref.errors import UserError

# Classes of diffusers that noise as DDPM, with the betas they take where their config has none. The inverse schedulers
# are left out: they turn a picture into noise, so a pipeline that holds one draws nothing.
_DDPM, _STABLE_DIFFUSION = (0.0001, 0.02), (0.00085, 0.012)
DEFAULT_BETAS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler"), _DDPM),
    **dict.fromkeys(("PNDMScheduler", "LMSDiscreteScheduler", "DEISMultistepScheduler", "SASolverScheduler"), _DDPM),
    **dict.fromkeys(("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "UniPCMultistepScheduler"), _DDPM),
    **dict.fromkeys(("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"), _DDPM),
    **dict.fromkeys(("HeunDiscreteScheduler", "DPMSolverSDEScheduler"), _STABLE_DIFFUSION),
    **dict.fromkeys(("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"), _STABLE_DIFFUSION),
}
_KINDS = {
    "Flow": "a flow-matching model",
    "EDM": "an EDM model",
    "LCM": "a model distilled to few steps",
    "TCD": "a model distilled to few steps",
}
# Values of other settings that make it another process; any other value is about sampling only.
_OTHER_PROCESSES: dict[str, tuple[Any, ...]] = {
    "use_flow_sigmas": (True,),  # flow matching
    "timestep_type": ("continuous",),  # Euler: the UNet is told ln σ / 4, as in EDM
    "variance_type": ("learned", "learned_range"),  # the UNet predicts the variance as well
}
_CHOICES: dict[str, tuple[Any, ...]] = {
    "prediction_type": ("epsilon", "v_prediction"),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "rescale_betas_zero_snr": (False, True),
}
_TODO = "fastpref trains models that predict the noise or v on a DDPM schedule"


@dataclass(frozen=True)
class NoiseSchedule:
    """The forward process a model was trained with."""

    alphas_cumprod: torch.Tensor  # (T,) float64
    prediction_type: Literal["epsilon", "v_prediction"]

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        return len(self.alphas_cumprod)


def ddim_settings(config: Mapping[str, Any], where: str, pipeline_class: str | None = None) -> dict[str, Any]:
    """A scheduler's config as arguments of diffusers' ``DDIMScheduler``: its noise schedule and its grid of timesteps.

    Latents have no range, so x̂0 is never clipped; the last step ends at ᾱ_0, as in the public SPO code. Both are the
    same whatever ``clip_sample``, ``thresholding`` and ``set_alpha_to_one`` say. ``rescale_betas_zero_snr`` holds for
    every class: configs keep it when a pipeline changes to a class that lacks it.

    Args:
        config: what ``scheduler_config.json`` holds, or the ``config`` of a scheduler.
        where: what an error names.
        pipeline_class: the class that ``model_index.json`` names; diffusers opens this one, whatever the config says.

    Raises:
        UserError: another process than a DDPM of noise or velocity, or values that no schedule can have.
    """
    names = [name for name in (pipeline_class, config.get("_class_name")) if name is not None]
    if not names:
        raise UserError("the scheduler config names no class", where, "copy the scheduler/ of the model again")
    for name in names:
        _check_class(name, where)
    unset = config.get("_use_default_values", [])  # diffusers fills them in and remembers that they were not given
    if not isinstance(unset, list | tuple | set):
        raise UserError("_use_default_values is not a list in the scheduler config", where, "remove it")
    given = {key: value for key, value in config.items() if value is not None and key not in unset}
    for key, values in _OTHER_PROCESSES.items():
        if given.get(key) in values:
            raise UserError(f"{key} is {given[key]} in the scheduler config", where, _TODO)
    start, end = DEFAULT_BETAS[names[0]]
    settings: dict[str, Any] = {
        **{"num_train_timesteps": 1000, "steps_offset": 0, "beta_start": start, "beta_end": end, "trained_betas": None},
        **{"beta_schedule": "linear", "prediction_type": "epsilon", "timestep_spacing": "leading"},
        "rescale_betas_zero_snr": False,
    }
    settings = {key: given.get(key, value) for key, value in settings.items()}
    _check_values(settings, where)
    if settings["rescale_betas_zero_snr"] and settings["prediction_type"] == "epsilon":
        what = "rescale_betas_zero_snr is set with prediction_type epsilon, which says nothing about the last timestep"
        raise UserError(what, where, "models of zero terminal SNR predict v")
    return {**settings, "clip_sample": False, "set_alpha_to_one": False}


def noise_schedule(settings: dict[str, Any], where: str) -> NoiseSchedule:
    """ᾱ and the prediction type of :func:`ddim_settings`, as diffusers computes them.

    Raises:
        UserError: ᾱ does not fall from timestep to timestep, or ends at 0 where the noise is predicted.
    """
    from diffusers import DDIMScheduler

    alphas = DDIMScheduler(**settings).alphas_cumprod.double()
    if not (alphas[:-1] > alphas[1:]).all() or alphas[0] >= 1 or alphas[-1] < 0:
        raise UserError("the noise levels do not rise from every timestep to the next", where, "check the betas")
    if alphas[-1] == 0 and settings["prediction_type"] == "epsilon":
        raise UserError(
            "nothing is left of the picture at the last timestep",
            where,
            "a model with such a schedule has to predict v",
        )
    return NoiseSchedule(alphas, settings["prediction_type"])


def _check_class(name: Any, where: str) -> None:
    if isinstance(name, str) and name in DEFAULT_BETAS:
        return
    kind = next((kind for start, kind in _KINDS.items() if str(name).startswith(start)), None)
    what = f"the scheduler is {name}" + (f", which is for {kind}" if kind else ", which fastpref does not know")
    raise UserError(what, where, _TODO)


def _check_values(settings: Mapping[str, Any], where: str) -> None:
    for key, values in _CHOICES.items():
        if settings[key] not in values:
            known = ", ".join(map(str, values))
            raise UserError(f"{key} is {settings[key]!r} in the scheduler config", where, f"supported: {known}")
    timesteps = settings["num_train_timesteps"]
    for key, least in (("num_train_timesteps", 2), ("steps_offset", 0)):
        if type(settings[key]) is not int or settings[key] < least:
            raise UserError(
                f"{key} is {settings[key]!r} in the scheduler config", where, f"it has to be a whole number >= {least}"
            )
    betas = settings["trained_betas"]
    if betas is None:
        betas = [settings["beta_start"], settings["beta_end"]]
    elif not isinstance(betas, list | tuple) or len(betas) != timesteps:
        size = len(betas) if isinstance(betas, list | tuple) else "no"
        raise UserError(
            f"{size} trained_betas for {timesteps} timesteps in the scheduler config", where, "it takes one a timestep"
        )
    for beta in betas:
        if type(beta) not in (int, float) or not math.isfinite(beta) or not 0 < beta < 1:
            raise UserError(f"a beta is {beta!r} in the scheduler config", where, "betas lie between 0 and 1")
