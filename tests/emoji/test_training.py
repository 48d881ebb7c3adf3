"""The training loop of the bundled models: resuming is exact, the average is the average, augmentations do as named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fastpref.emoji.tokenizer import train_tokenizer
from fastpref.emoji.training import (
    Fit,
    FitSettings,
    Workspace,
    blur,
    degrade,
    learning_rate_at,
    random_shift,
    stage_generator,
)
from fastpref.emoji.unet import LatentWorld, TextToLatents, new_scheduler
from fastpref.emoji.vae import encode_mean, new_vae, whiten

SETTINGS = FitSettings("toy", steps=12, learning_rate=0.05, warmup=2, ema_decay=0.9, log_every=3)


def fit(folder: Path, stop: int | None = None, resume: bool = False) -> tuple[nn.Module, float]:
    """Train a linear map; ``stop`` interrupts after that many steps, right after a checkpoint."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    work = Workspace(folder, seed=5, resume=resume)

    def loss(step: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        if step == stop:
            run.save()
            raise KeyboardInterrupt
        batch = torch.randn(8, 4, generator=generator)
        return {"loss": (model(batch) - batch.flip(1)).pow(2).mean()}

    run = Fit(model, SETTINGS, work)
    return model, run.run(loss).metrics["loss"]


def test_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, loss = fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "parts", stop=7)
    resumed, resumed_loss = fit(tmp_path / "parts", resume=True)
    assert torch.equal(whole.weight, resumed.weight) and loss == resumed_loss
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "toy.jsonl").read_text().splitlines()]
    assert steps == [3, 6, 9, 12]


def test_schedule_warms_up_and_ends_low() -> None:
    rates = [learning_rate_at(step, SETTINGS) for step in range(SETTINGS.steps)]
    assert rates[0] == pytest.approx(0.025) and rates[1] == pytest.approx(0.05) == max(rates)
    assert rates[2:] == sorted(rates[2:], reverse=True) and rates[-1] < 0.002


def test_shift_moves_whole_pictures_and_blur_keeps_the_mean() -> None:
    generator = stage_generator(0, "x", 0)
    images = torch.zeros(16, 1, 9, 9)
    images[:, :, 4, 4] = 1.0
    shifted = random_shift(images, 2, generator)
    assert torch.equal(shifted.sum((1, 2, 3)), torch.ones(16))
    assert shifted.flatten(1).argmax(1).unique().numel() > 4
    soft = blur(images, torch.full((16,), 1.0))
    assert soft.sum((1, 2, 3)) == pytest.approx(torch.ones(16), abs=1e-5)
    assert float(soft.max()) < 0.2
    noisy = degrade(torch.full((64, 3, 8, 8), 0.5), generator)
    assert float(noisy.min()) >= 0.0 and 8 < int((noisy.std((1, 2, 3)) > 0.005).sum()) < 56


def test_whitening_keeps_the_decoded_pictures() -> None:
    vae = new_vae(0).eval().requires_grad_(False)
    pixels = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    posterior = vae.encode(pixels).latent_dist
    before, std = vae.decode(posterior.mean).sample, posterior.std / posterior.mean.std((0, 2, 3), keepdim=True)
    whiten(vae, pixels)
    latents = encode_mean(vae, pixels) * vae.config.scaling_factor
    assert latents.mean((0, 2, 3)) == pytest.approx(torch.zeros(4), abs=1e-3)
    assert latents.std((0, 2, 3)) == pytest.approx(torch.ones(4), abs=1e-3)
    posterior = vae.encode(pixels).latent_dist
    torch.testing.assert_close(vae.decode(posterior.mean).sample, before, atol=2e-4, rtol=1e-3)
    relative = posterior.std / posterior.mean.std((0, 2, 3), keepdim=True)
    torch.testing.assert_close(relative, std, atol=1e-5, rtol=1e-3)


def test_unet_loss_is_the_noise_when_nothing_is_predicted() -> None:
    tokenizer = train_tokenizer(["red heart", "blue sun"])
    model = TextToLatents(tokenizer, 0)
    model.predict = lambda noisy, *_, **__: (torch.zeros_like(noisy),)
    ids = torch.tensor([[tokenizer.bos_token_id] + [tokenizer.eos_token_id] * 15] * 5)
    world = LatentWorld(torch.randn(2, 5, 4, 16, 16), ids, ids[0], new_scheduler().alphas_cumprod)
    losses = world.loss(model, 64, stage_generator(0, "unet", 0))
    assert float(losses["mse"]) == pytest.approx(1.0, abs=0.05)
    abar = world.alphas_cumprod
    expected = float(((abar / (1 - abar)).clamp_max(5.0) * (1 - abar) / abar).mean())
    assert float(losses["loss"]) == pytest.approx(expected, abs=0.05)
