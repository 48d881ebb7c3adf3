"""A picture is a function of weights, prompt and seed, and a plain diffusers user gets the same one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler, LCMScheduler
from PIL import Image

from fastpref.config import parse_config
from fastpref.errors import UserError
from fastpref.evaluate.sample import (
    generate,
    initial_latents,
    load_policy_pipeline,
    prompt_id,
    run_sample,
)
from fastpref.models.loading import load_unet
from fastpref.models.text import load_text_stack
from fastpref.models.timesteps import sampling_scheduler
from fastpref.models.work import Work

PROMPTS = ["a red cat", "blue heart in green circle", "yellow dog"]
SHAPE = (4, 8, 8)
_STEPS: dict[str, Any] = {"guidance_scale": 3.0, "sample_steps": 3}


def _config(model: Path, **settings: object) -> object:
    return parse_config({"model": str(model), "sample_steps": 3, "guidance_scale": 3.0, "device": "cpu", **settings})


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.int16)


def test_latents_depend_on_prompt_and_seed_only() -> None:
    both = initial_latents(["a", "b", "a"], [0, 0, 1], SHAPE)
    assert torch.equal(initial_latents(["b"], [0], SHAPE)[0], both[1])
    assert torch.equal(initial_latents(["a"], [1], SHAPE)[0], both[2])
    correlation = torch.corrcoef(both.flatten(1))
    assert (correlation - torch.eye(3)).abs().max() < 0.25
    many = initial_latents([str(i) for i in range(200)], [3] * 200, SHAPE)
    assert abs(many.mean().item()) < 0.02
    assert abs(many.std().item() - 1) < 0.02


def test_prompt_id_is_the_sha256() -> None:
    assert prompt_id("abc") == int("ba7816bf8f01cfea", 16) - 2**64
    assert prompt_id("abc") != prompt_id("abc ")


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_the_same_picture_in_any_batch(models: dict[str, Path], family: str) -> None:
    pipe = load_policy_pipeline(_config(models[family]))
    settings = {"guidance_scale": 3.0, "sample_steps": 3}
    work = Work()
    one = generate(pipe, PROMPTS, [0, 5], batch_size=1, work=work, **settings)
    four = generate(pipe, PROMPTS, [0, 5], batch_size=4, **settings)
    alone = generate(pipe, PROMPTS[1:2], [5], batch_size=8, **settings)
    assert [(p.prompt, p.seed) for p in one] == [(prompt, seed) for prompt in PROMPTS for seed in (0, 5)]
    for a, b in zip(one, four, strict=True):
        assert np.abs(_pixels(a.image) - _pixels(b.image)).max() <= 1
    assert np.abs(_pixels(alone[0].image) - _pixels(one[3].image)).max() <= 1
    assert np.abs(_pixels(one[0].image) - _pixels(one[1].image)).max() > 20
    # 6 pictures, 3 steps, two rows each with guidance
    assert (work.unet_forwards, work.vae_decodes) == (36, 6)
    free = Work()
    generate(pipe, PROMPTS, [0], batch_size=2, work=free, guidance_scale=1.0, sample_steps=4)
    assert (free.unet_forwards, free.vae_decodes, free.text_forwards) == (12, 3, 3)


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_a_plain_diffusers_user_gets_the_same_picture(
    models: dict[str, Path], loras: dict[str, Path], tmp_path: Path, family: str
) -> None:
    config = _config(models[family])
    files = run_sample(config, PROMPTS, [0, 1], loras[family], None, tmp_path / "out", progress=False)
    pipe = DiffusionPipeline.from_pretrained(models[family])
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(loras[family].parent)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    texts = [prompt for prompt in PROMPTS for _ in (0, 1)]
    latents = initial_latents(texts, [0, 1] * 3, SHAPE)
    images = pipe(texts, latents=latents, guidance_scale=3.0, num_inference_steps=3, eta=0.0).images
    assert [file.name for file in files][:3] == [
        "a-red-cat-0.png",
        "a-red-cat-1.png",
        "blue-heart-in-green-circle-0.png",
    ]
    for file, image in zip(files, images, strict=True):
        assert np.array_equal(_pixels(Image.open(file)), _pixels(image))
    bare = generate(load_policy_pipeline(config), PROMPTS[:1], [0], guidance_scale=3.0, sample_steps=3, batch_size=1)
    assert np.abs(_pixels(bare[0].image) - _pixels(images[0])).max() > 5
    assert (tmp_path / "out" / "contact_sheet.png").stat().st_size > 1000


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_long_prompts_are_drawn_as_a_plain_diffusers_user_draws_these_embeddings(
    models: dict[str, Path], loras: dict[str, Path], tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two blocks of the tiny tokenizer's 14 tokens: 20, 3 and 30 tokens, the last of which is cut."""
    prompts = ["a red cat on the moon blue heart in green circle yellow dog " * n + "hat" for n in (1, 0, 3)]
    prompts[0] += " with white hat and the sun"
    config = _config(models[family], max_caption_tokens=150)
    files = run_sample(config, prompts, [0], loras[family], None, tmp_path / "out", progress=False)
    said = capsys.readouterr().err
    assert (
        said == "1 of 3 captions is cut after 28 tokens (the longest has 40): max_caption_tokens=225 takes them whole\n"
    )
    pipe = DiffusionPipeline.from_pretrained(models[family])
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(loras[family].parent)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    stack = load_text_stack(models[family], torch.float32, torch.device("cpu"), 150)
    given = dict(zip(("prompt_embeds", "pooled_prompt_embeds"), stack.encode(prompts), strict=True))
    none = stack.encode([""] * 3)
    if family == "sdxl":  # the folder forces zeros for no prompt
        given["negative_prompt_embeds"], given["negative_pooled_prompt_embeds"] = map(torch.zeros_like, none)
    else:
        del given["pooled_prompt_embeds"]
        given["negative_prompt_embeds"] = none[0]
    assert given["prompt_embeds"].shape[1] == 32
    latents = initial_latents(prompts, [0] * 3, SHAPE)
    images = pipe(**given, latents=latents, guidance_scale=3.0, num_inference_steps=3, eta=0.0).images
    for file, image in zip(files, images, strict=True):
        assert np.array_equal(_pixels(Image.open(file)), _pixels(image))
    short = generate(load_policy_pipeline(config, lora=loras[family]), prompts, [0], **_STEPS, batch_size=3)
    assert np.abs(_pixels(short[0].image) - _pixels(images[0])).max() > 0


def test_another_unet_folder_is_used(models: dict[str, Path], tmp_path: Path) -> None:
    unet = load_unet(models["sdxl"], torch.float32)
    with torch.no_grad():
        unet.conv_out.weight.zero_()
        unet.conv_out.bias.zero_()
    unet.save_pretrained(tmp_path / "unet")
    pipe = load_policy_pipeline(_config(models["sdxl"]), unet=tmp_path / "unet")
    assert torch.count_nonzero(pipe.unet.conv_out.weight) == 0


def test_the_scheduler_is_ddim_over_the_pipelines_own_schedule() -> None:
    own = EulerDiscreteScheduler(
        beta_start=0.001, beta_end=0.02, prediction_type="v_prediction", timestep_spacing="leading", steps_offset=1
    )
    ddim = sampling_scheduler(own, 20)
    torch.testing.assert_close(ddim.alphas_cumprod, own.alphas_cumprod)
    assert (ddim.config.prediction_type, ddim.config.steps_offset) == ("v_prediction", 1)
    for scheduler in (ddim, sampling_scheduler(DDIMScheduler(clip_sample=True, set_alpha_to_one=True), 20)):
        assert not (scheduler.config.clip_sample or scheduler.config.thresholding or scheduler.config.set_alpha_to_one)
    with pytest.raises(UserError, match="the scheduler is LCMScheduler"):
        sampling_scheduler(LCMScheduler(), 20)


def test_prompts_with_one_slug_get_two_files(models: dict[str, Path], tmp_path: Path) -> None:
    files = run_sample(
        _config(models["sdxl"]), ["red cat", "Red, cat!", "!?", "红心" * 60], [0], out_dir=tmp_path, progress=False
    )
    names = [file.name for file in files]
    assert len(set(names)) == 4
    assert names[0].startswith("red-cat-") and names[2] == "prompt-0.png"
    assert all(file.is_file() for file in files)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("prompts", "seeds", "size", "message"),
    [
        ([], [0], None, "no prompts"),
        (["a", " "], [0], None, "empty prompt"),
        (["a"], [], None, "seeds"),
        (["a"], [-1], None, "seeds"),
        (["a"], [0], 30, "size is 30"),
    ],
)
def test_bad_requests(
    models: dict[str, Path], tmp_path: Path, prompts: list[str], seeds: list[int], size: int | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run_sample(_config(models["sdxl"]), prompts, seeds, out_dir=tmp_path / "o", size=size, progress=False)
    assert not (tmp_path / "o").exists()


def test_a_lora_for_another_model_and_a_bad_folder(
    models: dict[str, Path], loras: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="another UNet"):
        run_sample(_config(models["sd15"]), ["a"], [0], loras["sdxl"], None, tmp_path / "o", progress=False)
    assert not (tmp_path / "o").exists(), "nothing is written before the weights are known to be good"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="runs through a file"):
        run_sample(_config(models["sd15"]), ["a"], [0], None, None, tmp_path / "file" / "o", progress=False)
