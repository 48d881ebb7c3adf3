"""The latent reward model: what it pools, guidance, text rows, gradients, and its folder with its faults."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastpref.config import load_config
from fastpref.errors import UserError
from fastpref.models.latent_reward import LatentRewardModel, text_rows
from fastpref.models.latent_reward_file import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    LatentRewardConfig,
    check_latent_reward,
    load_latent_reward,
    open_latent_reward,
    save_latent_reward,
)
from fastpref.models.loading import load_unet
from fastpref.models.policy import Conditioning
from fastpref.models.recompute import MODES, set_recomputation
from fastpref.models.text import load_text_stack

CAPTIONS = ["a red cat on the moon", "blue heart", " ".join(["yellow dog"] * 60)]
CPU = torch.device("cpu")
Opened = tuple[LatentRewardModel, LatentRewardConfig]


def inputs(model_dir: Path) -> tuple[Tensor, Tensor, Conditioning, Conditioning]:
    """Three noisy latents at three timesteps, their prompts, and the empty prompt; fp64."""
    stack = load_text_stack(model_dir, torch.float64, CPU)
    embeds, pooled = stack.encode(CAPTIONS)
    empty, empty_pooled = stack.encode([""])
    g = torch.Generator().manual_seed(1)
    noisy = torch.randn(3, 4, 8, 8, generator=g, dtype=torch.float64)
    ids = None if pooled is None else torch.tensor([[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]]).double().repeat(3, 1)
    return noisy, torch.tensor([1, 501, 951]), Conditioning(embeds, pooled, ids), Conditioning(empty, empty_pooled)


def opened(model_dir: Path, *overrides: str, dtype: torch.dtype = torch.float64) -> Opened:
    config = load_config("", ["method=lrm", "train=full", f"model={model_dir}", *overrides])
    return open_latent_reward(
        config, model_dir, CPU, dtype=dtype, text_width=32, sizes=[(16, 16)], model_fingerprint="f" * 64
    )


def scores(model: LatentRewardModel, model_dir: Path) -> Tensor:
    noisy, timesteps, conditioning, empty = inputs(model_dir)
    tokenizer = load_text_stack(model_dir, torch.float64, CPU).tokenizers[0]
    with torch.no_grad():
        texts = model.embed_texts(text_rows(conditioning, CAPTIONS, tokenizer))
        return model.score(model.embed_latents(noisy, timesteps, conditioning, empty), texts)


@pytest.fixture(params=["sdxl", "sd15"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_it_pools_what_the_whole_unet_computes_on_the_way(folder: Path) -> None:
    """Against hooks in diffusers' own forward: each stage before its downsampler, and the mid block."""
    noisy, timesteps, conditioning, _ = inputs(folder)
    whole: Any = load_unet(folder, torch.float64).eval()
    seen: list[Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).mean(dim=(2, 3)))

    for block in whole.down_blocks:
        (block.attentions if hasattr(block, "attentions") else block.resnets)[-1].register_forward_hook(keep)
    whole.mid_block.register_forward_hook(keep)
    model, _ = opened(folder)
    with torch.no_grad():
        whole(noisy, timesteps, **conditioning.kwargs(torch.float64))
        means = model.pooled(noisy, timesteps, conditioning)
    assert len(means) == len(seen) == 3
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(means, seen, strict=True))
    assert not any("up_blocks" in name or "conv_out" in name for name in model.state_dict())


def test_guidance_enhances_the_mid_block_only(folder: Path) -> None:
    noisy, timesteps, conditioning, empty = inputs(folder)
    none = Conditioning(
        empty.prompt_embeds.expand_as(conditioning.prompt_embeds),
        None if empty.pooled_prompt_embeds is None else empty.pooled_prompt_embeds.expand(3, -1),
        conditioning.time_ids,
    )
    rows = []
    with torch.no_grad():
        for scale in (1.0, 7.5):
            model, _ = opened(folder, f"guidance_scale={scale}")
            *stages, prompted = model.pooled(noisy, timesteps, conditioning)
            without = model.pooled(noisy, timesteps, none)[-1]
            features = torch.cat([*stages, without + scale * (prompted - without)], dim=1)
            expected = features @ model.visual_projection.weight.T
            expected = expected / expected.norm(dim=1, keepdim=True)
            rows.append(model.embed_latents(noisy, timesteps, conditioning, empty))
            assert (rows[-1] - expected).abs().max() < 1e-12
            assert model.rows(5) == (5 if scale == 1.0 else 10)
    assert (rows[0] - rows[1]).abs().max() > 1e-3


@pytest.mark.parametrize("key", [77, 150])
def test_the_text_row_is_what_the_encoder_pools(sdxl: Path, sd15: Path, key: int) -> None:
    """SD1.5: transformers' pooler_output, for short, long and empty captions; SDXL: the pooled embedding.

    Of the first block, where there are two.
    """
    captions = [*CAPTIONS, "", "red cat " * 20]
    stack = load_text_stack(sd15, torch.float64, CPU, key)
    embeds, pooled = stack.encode(captions)
    tokens = stack.tokenizers[0](captions, padding="max_length", truncation=True, return_tensors="pt")
    expected = stack.encoders[0](tokens.input_ids).pooler_output
    found = text_rows(Conditioning(embeds, pooled), captions, stack.tokenizers[0])
    torch.testing.assert_close(found, expected, rtol=0, atol=0 if key == 77 else 1e-12)  # a batch of twice the rows
    stack = load_text_stack(sdxl, torch.float64, CPU, key)
    embeds, pooled = stack.encode(captions)
    assert text_rows(Conditioning(embeds, pooled), captions, stack.tokenizers[0]) is pooled


def test_at_first_the_text_row_is_the_encoder_s_own(folder: Path) -> None:
    """P_t is the identity, so a score is exp(2.6592), about 1/0.07, times a cosine to the raw text row."""
    model, _ = opened(folder)
    noisy, timesteps, conditioning, empty = inputs(folder)
    raw = text_rows(conditioning, CAPTIONS, load_text_stack(folder, torch.float64, CPU).tokenizers[0])
    with torch.no_grad():
        rows = model.embed_latents(noisy, timesteps, conditioning, empty)
    cosines = torch.nn.functional.cosine_similarity(rows, raw)
    assert (scores(model, folder) - math.exp(2.6592) * cosines).abs().max() < 1e-6 and cosines.std() > 0.01
    assert torch.equal(scores(model, folder), scores(opened(folder)[0], folder))
    assert not torch.equal(scores(model, folder), scores(opened(folder, "seed=1")[0], folder))


def test_an_sd15_model_may_start_from_a_clip_s_text_projection(sd15: Path, tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    from fastpref.emoji.random_models import make_random_clip

    narrow = make_random_clip(tmp_path / "clip")
    with pytest.raises(UserError, match=r"text projection is \(24, 32\)"):
        opened(sd15, f"clip={narrow}")
    config = CLIPConfig.from_pretrained(narrow)
    config.text_config.projection_dim = config.vision_config.projection_dim = config.projection_dim = 32
    clip = CLIPModel(config)
    clip.save_pretrained(tmp_path / "wide")
    model, _ = opened(sd15, f"clip={tmp_path / 'wide'}")
    assert torch.equal(model.text_projection.weight.float(), clip.text_projection.weight)


def test_every_weight_has_a_gradient_and_recomputing_keeps_it(folder: Path) -> None:
    noisy, timesteps, conditioning, empty = inputs(folder)
    gradients = []
    for mode in MODES:
        model, _ = opened(folder, "guidance_scale=3")
        set_recomputation(model.unet, mode)
        texts = model.embed_texts(
            text_rows(conditioning, CAPTIONS, load_text_stack(folder, torch.float64, CPU).tokenizers[0])
        )
        model.score(model.embed_latents(noisy, timesteps, conditioning, empty), texts).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.trainable.items()})
    for name, gradient in gradients[0].items():
        assert gradient is not None and bool(gradient.abs().sum() > 0), name
        assert all(torch.equal(gradient, other[name]) for other in gradients[1:]), name


def test_what_is_saved_is_what_is_loaded(folder: Path, tmp_path: Path) -> None:
    model, facts = opened(folder, "guidance_scale=7.5", dtype=torch.float32)
    with torch.no_grad():
        model.logit_scale.add_(0.5)
        model.text_projection.weight.mul_(0.9).add_(0.01)
    save_latent_reward(model, facts, tmp_path / "lrm")
    again, read = load_latent_reward(tmp_path / "lrm")
    assert read == facts and again.guidance_scale == 7.5
    assert torch.equal(scores(again, folder), scores(model, folder))
    assert all(p.requires_grad and p.device == CPU for p in again.parameters())
    assert math.isclose(again.logit_scale.item(), 3.1592, rel_tol=1e-6)
    continued, _ = opened(folder, f"scorer={tmp_path / 'lrm'}", "guidance_scale=7.5", dtype=torch.float32)
    assert torch.equal(scores(continued, folder), scores(model, folder))
    assert str(folder) not in (tmp_path / "lrm" / CONFIG_NAME).read_text(), "a path of this machine was written"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lrm"], "a draft was left"
    half, _ = load_latent_reward(tmp_path / "lrm", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and (scores(half, folder) - scores(model, folder)).abs().max() < 0.5


def _weights(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def damage(lrm: Path) -> None:
        state = load_file(lrm / WEIGHTS_NAME)
        change(state)
        save_file(state, lrm / WEIGHTS_NAME)

    return damage


def _config(**changes: Any) -> Callable[[Path], None]:
    def damage(lrm: Path) -> None:
        settings = json.loads((lrm / CONFIG_NAME).read_text()) | changes
        (lrm / CONFIG_NAME).write_text(json.dumps(settings))

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (lambda lrm: (lrm / WEIGHTS_NAME).write_bytes(b"x" * 100), "cannot read the checkpoint"),
    "lacking": (_weights(lambda s: s.pop("logit_scale")), "lacks logit_scale"),
    "unknown": (_weights(lambda s: s.update(extra=torch.zeros(1))), "has the unknown extra"),
    "shape": (_weights(lambda s: s.update({"logit_scale": torch.zeros(2)})), "wrong shape for logit_scale"),
    "kind": (_config(kind="clip"), "no configuration of a latent reward model, kind"),
    "foreign": (lambda lrm: (lrm / CONFIG_NAME).write_text("{}"), "no configuration of a latent reward model, family"),
    "no json": (lambda lrm: (lrm / CONFIG_NAME).write_text("{"), "cannot read the file"),
    "no config": (lambda lrm: (lrm / CONFIG_NAME).unlink(), "cannot read the file"),
    "no weights": (lambda lrm: (lrm / WEIGHTS_NAME).unlink(), "no latent reward model there"),
    "unet": (_config(unet={"in_channels": 4, "block_out_channels": [8]}), "cannot load the model"),
    "gone": (shutil.rmtree, "no latent reward model there"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_folder_is_one_line(sdxl: Path, tmp_path: Path, damage: str) -> None:
    model, facts = opened(sdxl, dtype=torch.float32)
    save_latent_reward(model, facts, tmp_path / "lrm")
    spoil, says = DAMAGES[damage]
    spoil(tmp_path / "lrm")
    with pytest.raises(UserError, match=says) as error:
        load_latent_reward(tmp_path / "lrm")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"family": "sd15"}, "is one for sdxl, the model is sd15"),
        ({"channels": 16}, "4 latent channels and text rows of 32, the model has 16 and 32"),
        ({"text_width": 1280}, "the model has 4 and 1280"),
        ({"sizes": [(16, 16), (16, 24)]}, "pictures of 16x16 pixels, these are of 24x16"),
        ({"model_fingerprint": "0" * 64}, "another VAE or other text encoders"),
        ({"max_caption_tokens": 150}, "trained with max_caption_tokens=77, not 150"),
    ],
)
def test_a_model_for_other_latents_is_refused(sdxl: Path, other: dict[str, Any], says: str) -> None:
    _, facts = opened(sdxl)
    own = {"family": "sdxl", "channels": 4, "text_width": 32, "sizes": [(16, 16)], "model_fingerprint": "f" * 64}
    own["max_caption_tokens"] = 77
    check_latent_reward(facts, "lrm", **own)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=says) as error:
        check_latent_reward(facts, "lrm", **(own | other))  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
