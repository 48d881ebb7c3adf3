"""The training loop of the bundled models: resuming is exact, the average is the average, augmentations do as named."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from fastpref.emoji.style import StyleOutput, load_style_encoder
from fastpref.emoji.style_training import (
    MAX_NOISE_STD,
    Labelled,
    augment,
    degrade_known,
    fit_style_encoder,
    style_loss,
)
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
from fastpref.errors import UserError

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


def test_degradations_are_known_and_augmentation_leaves_the_styles_apart() -> None:
    generator = stage_generator(0, "style", 0)
    clean = torch.rand(256, 3, 32, 32, generator=generator).round()
    images, amounts = degrade_known(clean, generator)
    noise, blurred = amounts.T
    assert float(amounts.min()) == 0.0 and float(amounts.max()) <= 1.0
    assert 0.4 < float((noise > 0).double().mean()) < 0.6 and 0.23 < float((blurred > 0).double().mean()) < 0.43
    untouched = (noise == 0) & (blurred == 0)
    assert torch.equal(images[untouched], clean[untouched])
    only_noise = (noise > 0.1) & (blurred == 0)
    # Of black and white pixels half of the noise is clipped away: a mean change of std / sqrt(2 pi).
    changed = (images - clean).abs().mean((1, 2, 3))[only_noise]
    torch.testing.assert_close(changed, MAX_NOISE_STD * noise[only_noise] / (2 * torch.pi) ** 0.5, rtol=0.15, atol=1e-3)
    detail = images.diff(dim=3).abs().mean((1, 2, 3))
    sharp, soft = detail[untouched], detail[(noise == 0) & (blurred > 0.8)]
    assert float(soft.max()) < 0.5 * float(sharp.min())
    coloured = torch.zeros(400, 3, 16, 16)
    coloured[:, 0] = 0.9
    coloured[:, :, :, :8] *= 0.5
    changed = augment(coloured, generator)
    grey = (changed.amax(1) - changed.amin(1)).amax((1, 2)) < 1e-6
    assert 0.12 < float(grey.double().mean()) < 0.28
    mirrored = changed[:, 0, :, 0].mean(1) > changed[:, 0, :, 15].mean(1)
    assert 0.4 < float(mirrored.double().mean()) < 0.6


def test_style_loss_by_hand() -> None:
    logits = torch.tensor([[2.0, 0.0]])
    output = StyleOutput(torch.zeros(1, 4), logits, torch.zeros(1, 5), torch.tensor([[0.5, 0.0]]))
    parts = style_loss(output, torch.tensor([0]), torch.tensor([3]), torch.tensor([[0.0, 0.0]]))
    assert float(parts["style"]) == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-5)
    assert float(parts["concept"]) == pytest.approx(math.log(5), rel=1e-5)
    assert float(parts["degradation"]) == pytest.approx(0.125)
    expected = float(parts["style"]) + 0.3 * math.log(5) + 4 * 0.125
    assert float(parts["loss"]) == pytest.approx(expected, rel=1e-5)


def test_a_style_encoder_is_exported_whole_and_reads_pictures_of_any_size(tmp_path: Path) -> None:
    """Black is style 0, white style 1: learned in a few steps, stated, and the same after loading."""
    pictures = torch.cat([torch.zeros(16, 3, 16, 16), torch.ones(16, 3, 16, 16)])
    labelled = Labelled(pictures, torch.arange(2).repeat_interleave(16), torch.arange(16).repeat(2))
    settings = FitSettings("style", steps=15, learning_rate=5e-3, warmup=2, ema_decay=0.5, log_every=5)
    work = Workspace(tmp_path / "work", seed=0, resume=False)
    result = fit_style_encoder(labelled, labelled, tmp_path / "encoder", work, settings, batch=16, extra={"mark": 7})
    assert result.metrics["style_accuracy_heldout_clean"] == 1.0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["encoder", "work"]
    encoder = load_style_encoder(tmp_path / "encoder")
    assert (encoder.config["image_size"], encoder.config["mark"]) == (16, 7)
    assert encoder.config["style_accuracy"]["heldout"]["noisy"] > 0.9
    small, large = encoder(pictures[::16]), encoder(torch.ones(1, 3, 50, 40))
    assert small.style_logits.argmax(1).tolist() == [0, 1] and large.style_logits.argmax(1).tolist() == [1]
    torch.testing.assert_close(large.features, small.features[1:], atol=1e-4, rtol=1e-3)
    (tmp_path / "encoder" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot read the style encoder"):
        load_style_encoder(tmp_path / "encoder")
