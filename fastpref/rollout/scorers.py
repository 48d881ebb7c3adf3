"""From a recipe's ``scorer`` to something that scores: which kind it is, what it is made of, and whether it fits."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastpref.config import Config
from fastpref.errors import UserError
from fastpref.models.latent_reward_file import check_latent_reward, is_latent_reward, load_latent_reward
from fastpref.models.loading import DTYPES, model_family, model_fingerprint, open_part, read_part_json
from fastpref.models.one_step import LatentDecoder, load_decoder
from fastpref.models.prompt_book import PromptBook
from fastpref.models.step_preference import ClipScorer
from fastpref.models.step_preference_file import load_clip_scorer, load_step_preference, resolve_step_preference
from fastpref.models.vae import survives_fp16
from fastpref.models.weights import weights_of
from fastpref.models.work import Work
from fastpref.rollout.scoring import StepScorer
from fastpref.rollout.step_scorers import CallableScorer, LatentScorer, PreferenceScorer

_CALLABLE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_RESIDENT_VALUES = 1 << 28  # of folded weights in memory; a CLIP-H is folded anew when the timestep changes


def open_scorer(
    config: Config,
    model_dir: Path,
    device: torch.device,
    timesteps: Sequence[int],
    book: PromptBook,
    work: Work,
) -> StepScorer:
    """The scorer that ``config.scorer`` names, in ``config.precision``.

    Args:
        timesteps: all that it will be asked for; a step-aware preference model is folded at them.
        book: the prompts as the UNet takes them, and the size of the pictures to be drawn.
        work: scored rows, decodes and encoded prompts are counted in it.

    Raises:
        UserError: there is no scorer, it cannot be used, or it is not one for the method or the model.
    """
    source = config.scorer
    if source is not None and is_callable(source):
        return _open_callable(config, source, model_dir, device, work)
    if is_latent_reward(source):
        assert source is not None
        return _open_latent(config, source, model_dir, device, book, work)
    if config.method == "lpo":
        where, todo = source or "scorer", "train one with method=lrm and set scorer to its folder, or use method=spo"
        raise UserError("method lpo needs a latent reward model, this is none", where, todo)
    return _open_preference(config, model_dir, device, timesteps, work)


def _open_preference(
    config: Config, model_dir: Path, device: torch.device, timesteps: Sequence[int], work: Work
) -> PreferenceScorer:
    files = resolve_step_preference(config.scorer, config.clip)
    dtype = DTYPES[config.precision]
    if files.weights is None:
        model: ClipScorer = load_clip_scorer(files, device=device, dtype=dtype)
    else:
        step_aware = load_step_preference(files, device=device, dtype=dtype)
        model = step_aware.fold(timesteps, folded_values(step_aware.clip.config.vision_config)[1]).eval()
    model.requires_grad_(False)
    exact = PreferenceScorer(model, load_decoder(config, model_dir, device, work), work)
    if config.small_decoder is None:
        return exact
    load = partial(load_small_decoder, Path(config.small_decoder), exact.decoder.vae, device=device)
    small = survives_fp16(load(dtype=dtype), partial(load, dtype=torch.float32))
    return PreferenceScorer(model, LatentDecoder(small, config.decode_batch_size, work), work, exact)


def folded_values(vision: Any) -> tuple[int, int]:
    """Values of the weights folded for a timestep, of a CLIP's vision configuration, and for how many they are kept."""
    values = vision.num_hidden_layers * vision.hidden_size * (vision.hidden_size + vision.intermediate_size)
    return values, max(1, _RESIDENT_VALUES // values)


def load_small_decoder(folder: Path, vae: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """An AutoencoderTiny whose decoder stands in for ``vae``'s.

    It has diffusers' conventions: ``decode(latents / scaling_factor)``, with a factor of 1 for the published ones, to
    pictures in about [-1, 1]; :class:`LatentDecoder` reads the factor from either kind.

    Raises:
        UserError: no such folder, another kind of model, other latents, or pictures of another size.
    """
    from diffusers import AutoencoderTiny

    if not (folder / "config.json").is_file():
        raise UserError("no small decoder there", str(folder), "set small_decoder to an AutoencoderTiny folder")
    kind = read_part_json(folder / "config.json").get("_class_name")
    if kind != "AutoencoderTiny":
        raise UserError(f"the small decoder is a {kind}", str(folder), "set small_decoder to an AutoencoderTiny folder")
    options = weights_of(folder).options
    small: Any = open_part(partial(AutoencoderTiny.from_pretrained, folder, torch_dtype=dtype, **options), folder)
    channels, own = small.config.latent_channels, vae.config.latent_channels
    if channels != own:
        what = f"the small decoder takes {channels} latent channels, the VAE has {own}"
        raise UserError(what, str(folder), "use one for this VAE")
    factor = small.config.upsampling_scaling_factor ** (len(small.config.num_decoder_blocks) - 1)
    expected = 2 ** (len(vae.config.block_out_channels) - 1)
    if factor != expected:
        what = f"the small decoder makes {factor} pixels a latent, the VAE {expected}"
        raise UserError(what, str(folder), "use one for this VAE")
    return small.to(device).eval().requires_grad_(False)


def _open_latent(
    config: Config, source: str, model_dir: Path, device: torch.device, book: PromptBook, work: Work
) -> LatentScorer:
    if config.method == "spo":
        todo = "set method=lpo, or scorer to a CLIP or to a folder of method spm"
        raise UserError("a latent reward model does not judge pictures, as method spo needs", source, todo)
    if config.small_decoder is not None:
        raise UserError("small_decoder is set, but a latent reward model decodes nothing", source, "remove it")
    model, facts = load_latent_reward(Path(source), device=device, dtype=DTYPES[config.precision])
    example = book.conditioning([""])
    pooled = example.pooled_prompt_embeds
    check_latent_reward(
        facts,
        source,
        family=model_family(model_dir),
        channels=int(read_part_json(model_dir / "vae" / "config.json").get("latent_channels", 4)),
        text_width=(example.prompt_embeds if pooled is None else pooled).shape[-1],
        sizes=[book.size],
        model_fingerprint=model_fingerprint(model_dir),
        max_caption_tokens=config.max_caption_tokens,
    )
    return LatentScorer(model.requires_grad_(False), book, work)


def _open_callable(config: Config, source: str, model_dir: Path, device: torch.device, work: Work) -> CallableScorer:
    fn = import_callable(source)
    takes = getattr(fn, "takes", "images")
    if takes not in ("images", "latents"):
        raise UserError(f"the scorer's attribute takes is {takes!r}", source, "use 'images' or 'latents'")
    if config.small_decoder is not None:
        raise UserError("small_decoder is set with a scorer of one's own", source, "remove it")
    decoder = load_decoder(config, model_dir, device, work) if takes == "images" else None
    return CallableScorer(fn, decoder, work, source)


def is_callable(source: str) -> bool:
    """Whether a config's ``scorer`` names a Python function."""
    return bool(_CALLABLE.fullmatch(source)) and not Path(source).exists()


def import_callable(source: str) -> Callable[..., Any]:
    """What ``package.module:callable`` names; the module has to be on Python's path.

    Raises:
        UserError: the module cannot be imported, or has nothing of that name that can be called.
    """
    module, _, name = source.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:
        what = f"cannot import the scorer's module: {type(error).__name__}: {error}"
        raise UserError(what, source, "put its folder on PYTHONPATH") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise UserError(f"the module has no {name}", source, "write package.module:callable")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"{name} is a {type(found).__name__}, not a callable", source, "name a function")
    return found
