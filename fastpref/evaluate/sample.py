"""Pictures as a function of (weights, prompt, seed): the same in any batch, and the same for any diffusers program.

The initial latents of a picture are keyed noise of (seed, prompt); DDIM with eta = 0 (arXiv 2010.02502) draws nothing
more. The denoising itself is the diffusers pipeline's own call, over the steps of
:func:`fastpref.models.timesteps.denoising_steps`, which rollouts take too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fastpref.atomic import check_writable
from fastpref.config import Config
from fastpref.errors import UserError
from fastpref.evaluate.sheets import contact_sheet, save_png, slugs
from fastpref.models.caption_length import warn_of_cut
from fastpref.models.loading import DTYPES, load_unet, model_dir_of, resolve_device
from fastpref.models.pipeline import load_pipeline
from fastpref.models.prompt_book import prompt_id
from fastpref.models.text import TextStack
from fastpref.models.timesteps import sampling_scheduler
from fastpref.models.work import Work
from fastpref_kernels import derive_keys, keyed_noise


@dataclass(frozen=True)
class Picture:
    """One sample."""

    prompt: str
    seed: int
    image: Image.Image


def initial_latents(prompts: Sequence[str], seeds: Sequence[int], shape: tuple[int, int, int]) -> torch.Tensor:
    """Standard normal noise ``(n, *shape)``, fp32, of n (prompt, seed) pairs; row i depends on pair i only."""
    keys = [
        derive_keys(seed, 0, torch.tensor([prompt_id(prompt)]), 0, "sample")
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    return keyed_noise(torch.cat(keys), shape, torch.float32)


def latent_shape(pipeline: Any, size: int | None = None) -> tuple[int, int, int]:
    """(C, H, W) of the latents for square pictures of ``size`` pixels; None: the model's own size."""
    side = pipeline.unet.config.sample_size if size is None else size // pipeline.vae_scale_factor
    return pipeline.unet.config.in_channels, side, side


def generate(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    guidance_scale: float,
    sample_steps: int,
    batch_size: int,
    size: int | None = None,
    max_caption_tokens: int = 77,
    progress: bool = False,
    work: Work | None = None,
) -> list[Picture]:
    """Every prompt with every seed, prompt by prompt.

    Args:
        pipeline: a diffusers SDXL or SD1.5 pipeline, with or without LoRA.
        guidance_scale: classifier-free guidance; 1 is none.
        sample_steps: DDIM steps.
        batch_size: pictures at once; with guidance the UNet sees twice as many rows. It does not change the pictures.
        size: height and width in pixels; None: the model's own.
        max_caption_tokens: 77, 150 or 225; see :mod:`fastpref.models.text`.
        progress: draw a progress bar.
        work: gets the rows counted.
    """
    pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
    texts, numbers = [prompt for prompt, _ in pairs], [seed for _, seed in pairs]
    shape, images = latent_shape(pipeline, size), []
    stack = TextStack.of_pipeline(pipeline, max_caption_tokens)
    with _ddim(pipeline, sample_steps), _counted(pipeline, work or Work()):
        for start in _steps(len(pairs), batch_size, progress):
            part = slice(start, start + batch_size)
            latents = initial_latents(texts[part], numbers[part], shape)
            images += _draw(pipeline, stack, texts[part], latents, guidance_scale, sample_steps)
    return [Picture(prompt, seed, image) for (prompt, seed), image in zip(pairs, images, strict=True)]


def generate_pairs(
    pipeline: Any,
    first: Sequence[str],
    second: Sequence[str],
    latents: torch.Tensor,
    *,
    guidance_scale: float,
    sample_steps: int,
    max_caption_tokens: int = 77,
) -> tuple[list[Image.Image], list[Image.Image]]:
    """Pictures of two prompts each from one noise: ``first[i]`` and ``second[i]`` from ``latents[i]``, in one batch."""
    stack = TextStack.of_pipeline(pipeline, max_caption_tokens)
    both = torch.cat([latents, latents])
    with _ddim(pipeline, sample_steps):
        images = _draw(pipeline, stack, [*first, *second], both, guidance_scale, sample_steps)
    return images[: len(first)], images[len(first) :]


def _draw(
    pipeline: Any,
    stack: TextStack,
    prompts: Sequence[str],
    latents: torch.Tensor,
    guidance_scale: float,
    sample_steps: int,
) -> list[Image.Image]:
    images: list[Image.Image] = pipeline(
        **prompt_arguments(pipeline, stack, prompts, guided=guidance_scale > 1),
        latents=latents.to(pipeline.device, pipeline.dtype),
        height=latents.shape[2] * pipeline.vae_scale_factor,
        width=latents.shape[3] * pipeline.vae_scale_factor,
        guidance_scale=guidance_scale,
        num_inference_steps=sample_steps,
        eta=0.0,
        output_type="pil",
    ).images
    return images


def prompt_arguments(pipeline: Any, stack: TextStack, prompts: Sequence[str], *, guided: bool) -> dict[str, Any]:
    """What a call of the pipeline takes in place of ``prompt``; with one block a prompt, bit for bit the same."""
    embeds, pooled = stack.encode(prompts)
    found = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    if guided:
        if pooled is not None and pipeline.config.force_zeros_for_empty_prompt:
            embeds, pooled = torch.zeros_like(embeds), torch.zeros_like(pooled)
        else:
            embeds, pooled = stack.encode([""] * len(prompts))
        found |= {"negative_prompt_embeds": embeds, "negative_pooled_prompt_embeds": pooled}
    return {name: rows for name, rows in found.items() if rows is not None}


def load_policy_pipeline(config: Config, *, lora: Path | None = None, unet: Path | None = None) -> Any:
    """The config's pipeline with the trained weights on it, as a diffusers user would put them there.

    Args:
        lora: LoRA file or folder; it goes onto the UNet that the config starts from.
        unet: UNet folder or .safetensors file in place of that one. With neither, what the config starts from, its
            LoRA included.

    Raises:
        UserError: bad model, LoRA or UNet.
    """
    from fastpref.models.lora_file import load_adapter, resolve_lora
    from fastpref.models.lora_text import load_text_adapters
    from fastpref.models.state_dict import check_finite

    folder, device = model_dir_of(config), resolve_device(config.device)
    dtype = torch.float32 if config.precision == "fp64" else DTYPES[config.precision]
    pipeline: Any = load_pipeline(folder, dtype, device)
    if lora is None and unet is None and config.init_lora is not None:
        lora = Path(config.init_lora)
    source = config.unet if unet is None else str(unet)
    if source is not None:
        pipeline.unet = load_unet(folder, dtype, source).to(device)
    check_finite(pipeline.unet.named_parameters(), str(source or folder / "unet"), "such a UNet draws nothing")
    if lora is not None:
        file = resolve_lora(Path(lora))
        load_adapter(pipeline.unet, file, text_encoders="ignore")
        load_text_adapters(pipeline, file)
    return pipeline


def run_sample(
    config: Config,
    prompts: Sequence[str],
    seeds: Sequence[int],
    lora: Path | None = None,
    unet: Path | None = None,
    out_dir: Path = Path("samples"),
    *,
    size: int | None = None,
    progress: bool = True,
    work: Work | None = None,
) -> list[Path]:
    """The body of ``fastpref sample``: one PNG per prompt and seed, ``<slug>-<seed>.png``, and ``contact_sheet.png``.

    Args:
        lora, unet: see :func:`load_policy_pipeline`.
        size: height and width in pixels; None: the model's own.
        work: gets the rows counted.

    Returns:
        The pictures' files, prompt by prompt.

    Raises:
        UserError: nothing to sample, bad weights, an ``out_dir`` that cannot be written.
    """
    if not prompts or any(not prompt.strip() for prompt in prompts):
        raise UserError(
            "an empty prompt" if prompts else "no prompts", "sample", "give at least one prompt, none of them empty"
        )
    if not seeds or any(seed < 0 for seed in seeds):
        raise UserError(f"seeds are {list(seeds)}", "sample", "give at least one, none of them negative")
    if size is not None and (size < 8 or size % 8):
        raise UserError(f"size is {size}", "sample", "use a multiple of 8")
    prompts, seeds = list(dict.fromkeys(prompts)), list(dict.fromkeys(seeds))
    check_writable(out_dir)
    warn_of_cut(model_dir_of(config), config.max_caption_tokens, prompts)
    pipeline = load_policy_pipeline(config, lora=lora, unet=unet)
    pictures = generate(
        pipeline,
        prompts,
        seeds,
        guidance_scale=config.guidance_scale,
        sample_steps=config.sample_steps,
        batch_size=config.eval_batch_size,
        size=size,
        max_caption_tokens=config.max_caption_tokens,
        progress=progress,
        work=work,
    )
    files = save_pictures(pictures, out_dir)
    save_png(contact_sheet(by_prompt(pictures), prompts), out_dir / "contact_sheet.png")
    return files


def save_pictures(pictures: Sequence[Picture], out_dir: Path) -> list[Path]:
    """Write each picture as ``<slug of the prompt>-<seed>.png``, each file whole or not there."""
    names = slugs([picture.prompt for picture in pictures])
    return [save_png(p.image, out_dir / f"{names[p.prompt]}-{p.seed}.png") for p in pictures]


def by_prompt(pictures: Sequence[Picture]) -> list[list[Image.Image]]:
    """The images, a row a prompt."""
    rows: dict[str, list[Image.Image]] = {}
    for picture in pictures:
        rows.setdefault(picture.prompt, []).append(picture.image)
    return list(rows.values())


def _steps(total: int, batch_size: int, progress: bool) -> Iterator[int]:
    starts = range(0, total, batch_size)
    if not progress:
        yield from starts
        return
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        task = bar.add_task("sampling", total=total)
        for start in starts:
            yield start
            bar.advance(task, min(batch_size, total - start))


@contextmanager
def _ddim(pipeline: Any, sample_steps: int) -> Iterator[None]:
    own = pipeline.scheduler
    pipeline.scheduler = sampling_scheduler(own, sample_steps)
    try:
        yield
    finally:
        pipeline.scheduler = own


@contextmanager
def _counted(pipeline: Any, work: Work) -> Iterator[None]:
    def unet(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        work.unet_forwards += len(args[0] if args else kwargs["sample"])

    def decoder(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        work.vae_decodes += len(args[0] if args else kwargs["sample"])

    def text(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        work.text_forwards += len(args[0] if args else kwargs["input_ids"])

    handles = [
        pipeline.unet.register_forward_pre_hook(unet, with_kwargs=True),
        pipeline.vae.decoder.register_forward_pre_hook(decoder, with_kwargs=True),
        pipeline.text_encoder.register_forward_pre_hook(text, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
