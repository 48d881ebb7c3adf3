"""The quickstart recipe in short: evaluation, report, and its LoRA in a plain diffusers pipeline."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastpref.config import Config, load_config

RECIPE = Path(__file__).parent.parent / "configs" / "emoji_rpo.yaml"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, few_records: Path) -> tuple[Path, Config]:
    """A finished run of two steps on 40 pairs."""
    from fastpref.data.prepare import prepare
    from fastpref.runs import run_training

    folder = tmp_path_factory.mktemp("quickstart")
    config = load_config(
        RECIPE,
        [
            f"records={few_records}",
            f"store={folder}/store",
            f"output_dir={folder}/runs",
            "steps=2",
            "warmup_steps=0",
            "eval_prompts=4",
            "sample_steps=2",
        ],
    )
    prepare(config, progress=False)
    run_training(config)
    return config.run_dir, config


def test_summary_has_the_evaluation_before_and_after(run: tuple[Path, Config]) -> None:
    evaluation = json.loads((run[0] / "summary.json").read_text())["evaluation"]
    for tag in ("before", "after"):
        found = evaluation[tag]
        assert 0 <= found["style_share"] <= 1 and found["style_distance"] > 0
        assert 0 <= found["prompt_retrieval"]["top1"] <= found["prompt_retrieval"]["top5"] <= 1
    assert evaluation["before"] != evaluation["after"]
    lines = (run[0] / "metrics.jsonl").read_text().splitlines()
    assert all(1 <= json.loads(line)["effective_contrasts"] <= 16 for line in lines)


def test_report_holds_every_picture_itself(run: tuple[Path, Config]) -> None:
    page = (run[0] / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', page), "a link out of the file"
    shown = {base64.b64decode(found) for found in re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)}
    for tag in ("before", "after"):
        pictures = list((run[0] / "samples" / tag).glob("*.png"))
        assert len(pictures) == 8
        assert {_pixels(picture.read_bytes()) for picture in pictures} <= {_pixels(png) for png in shown}


def test_the_lora_gives_the_same_pictures_in_a_plain_diffusers_pipeline(
    run: tuple[Path, Config], tmp_path: Path, sampled: Callable[..., list[Path]]
) -> None:
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    from fastpref.emoji import MODEL_DIR
    from fastpref.evaluate.sample import initial_latents

    folder, config = run
    prompts = ["red heart", "cat face"]
    with_lora = sampled(config, prompts, folder / "pytorch_lora_weights.safetensors", tmp_path / "lora")
    without = sampled(config, prompts, None, tmp_path / "base")
    pipe = StableDiffusionXLPipeline.from_pretrained(MODEL_DIR)
    pipe.load_lora_weights(folder)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    pictures = pipe(
        prompt=prompts,
        latents=initial_latents(prompts, [0, 0], (4, 16, 16)).to(torch.float32),
        height=32,
        width=32,
        guidance_scale=config.guidance_scale,
        num_inference_steps=config.sample_steps,
    ).images
    for theirs, ours, base in zip(pictures, with_lora, without, strict=True):
        assert np.array_equal(np.asarray(theirs), np.asarray(Image.open(ours)))
        assert not np.array_equal(np.asarray(Image.open(base)), np.asarray(Image.open(ours))), "the LoRA did nothing"


@pytest.fixture
def sampled() -> Callable[..., list[Path]]:
    """What `fastpref sample` draws, one seed."""
    from fastpref.evaluate.sample import run_sample

    return lambda config, prompts, lora, out: run_sample(config, prompts, [0], lora=lora, out_dir=out, progress=False)


def _pixels(png: bytes) -> bytes:
    import io

    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB").resize((32, 32), Image.Resampling.NEAREST)).tobytes()
