"""The bundled AutoencoderKL: 32x32 RGB to 4x16x16 latents, whitened so that scaled latents have mean 0 and std 1."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from fastpref.emoji.records import EmojiImages
from fastpref.emoji.training import Fit, FitResult, FitSettings, Workspace, random_shift, to_tensor
from fastpref.errors import UserError

KL_WEIGHT = 3e-4
BATCH = 32
SETTINGS = FitSettings("vae", steps=1800, learning_rate=2e-3, warmup=100, ema_decay=0.998, log_every=100)


def new_vae(seed: int) -> AutoencoderKL:
    """An untrained autoencoder with one halving and four latent channels."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(24, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        force_upcast=False,
        mid_block_add_attention=False,
    )


def train_vae(images: EmojiImages, work: Workspace) -> tuple[AutoencoderKL, FitResult]:
    """Train on both styles: L1 + MSE + a tiny KL; returns the whitened autoencoder in eval mode."""
    pictures = to_tensor(images.flat), to_tensor(images.line)
    pixels = torch.cat(pictures) * 2.0 - 1.0
    vae = new_vae(work.seed)

    def loss(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        batch = pixels[torch.randint(len(pixels), (BATCH,), generator=generator)]
        batch = random_shift(batch, 2, generator).contiguous(memory_format=torch.channels_last)
        if step % 2:
            batch = batch.flip(-1)
        posterior = vae.encode(batch).latent_dist
        output = vae.decode(posterior.sample(generator)).sample
        mse = nn.functional.mse_loss(output, batch)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return {
            "loss": nn.functional.l1_loss(output, batch) + mse + KL_WEIGHT * kl,
            "mse": mse.detach(),
            "kl": kl.detach(),
        }

    vae.to(memory_format=torch.channels_last)
    result = Fit(vae, SETTINGS, work).run(loss)
    vae.to(memory_format=torch.contiguous_format)
    whiten(vae, pixels)
    result.metrics["psnr"] = reconstruction_psnr(vae, pixels)
    return vae.requires_grad_(False), result


@torch.no_grad()
def encode_mean(vae: AutoencoderKL, pixels: Tensor, batch: int = 128) -> Tensor:
    """Posterior means (N, 4, H/2, W/2), not scaled, of pixels in [-1, 1]."""
    return torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(batch)])


@torch.no_grad()
def whiten(vae: AutoencoderKL, pixels: Tensor) -> None:
    """Fold the latents' channel means and relative stds into the 1x1 convolutions around them; set scaling_factor.

    Afterwards every channel of the latents has mean 0 and the same std s, and scaling_factor is 1 / s. What is decoded
    does not change.
    """
    latents = encode_mean(vae, pixels)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    common = std.pow(2).mean().sqrt()
    ratio = common / std
    channels = len(mean)
    before, after = vae.quant_conv, vae.post_quant_conv
    before.weight[:channels] *= ratio[:, None, None, None]
    before.bias[:channels] = (before.bias[:channels] - mean) * ratio
    before.bias[channels:] += 2.0 * ratio.log()
    after.bias += (after.weight[:, :, 0, 0] * mean).sum(1)
    after.weight /= ratio[None, :, None, None]
    vae.register_to_config(scaling_factor=round(float(1.0 / common), 5))


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, pixels: Tensor) -> float:
    """Mean over pictures of the PSNR in dB (peak 1.0) of decode(encode(x)); ``pixels`` are (N, 3, H, W) in [-1, 1]."""
    errors = [
        ((vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1) - part) / 2).pow(2).mean((1, 2, 3))
        for part in pixels.split(128)
    ]
    return float((-10.0 * torch.cat(errors).clamp_min(1e-8).log10()).mean())


def build_vae(train: EmojiImages, heldout: EmojiImages, work: Workspace) -> FitResult:
    """Train, whiten and keep the autoencoder in the workspace; states the PSNR on pictures it has not seen."""
    vae, result = train_vae(train, work)
    for style, images in (("flat", heldout.flat), ("line", heldout.line)):
        result.metrics[f"psnr_heldout_{style}"] = reconstruction_psnr(vae, to_tensor(images) * 2.0 - 1.0)
    vae.save_pretrained(work.file("vae"))
    return result


def finished_vae(work: Workspace) -> AutoencoderKL:
    """The autoencoder that the vae stage left in the workspace, frozen."""
    folder = work.path / "vae"
    if not folder.is_dir():
        raise UserError("no trained autoencoder", str(folder), "run python -m fastpref.emoji.build vae first")
    return AutoencoderKL.from_pretrained(folder).eval().requires_grad_(False)
