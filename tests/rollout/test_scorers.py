"""The scorers: equal to their models on what they are shown, each prompt encoded once, and one line for bad input."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref.config import Config, load_config
from fastpref.errors import UserError
from fastpref.models.latent_reward import text_rows
from fastpref.models.latent_reward_file import load_latent_reward, open_latent_reward, save_latent_reward
from fastpref.models.loading import DTYPES, load_vae, model_fingerprint
from fastpref.models.one_step import LatentDecoder
from fastpref.models.prompt_book import PromptBook
from fastpref.models.step_preference_file import (
    load_clip_scorer,
    load_step_preference,
    resolve_step_preference,
    save_step_preference,
)
from fastpref.models.text import load_text_stack
from fastpref.models.work import Work
from fastpref.rollout.scorers import import_callable, open_scorer
from fastpref.rollout.step_scorers import CallableScorer, LatentScorer, PreferenceScorer, agreement

CPU = torch.device("cpu")
PROMPTS = ["a red cat on the moon", "blue heart", "a red cat on the moon", "blue heart", "the black sun"]
TIMESTEPS = [951, 451, 0]


def candidates(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Five noisy latents and their x̂0, fp64."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, 5, 4, 8, 8, generator=g, dtype=torch.float64).unbind(0)


def opened(model_dir: Path, *overrides: str, size: int = 16) -> tuple[Any, Config, Work]:
    config = load_config("", ["precision=fp64", f"model={model_dir}", "decode_batch_size=2", *overrides])
    work = Work()
    texts = load_text_stack(model_dir, DTYPES[config.precision], CPU)
    book = PromptBook(texts, model_dir, (size, size), CPU, work)
    return open_scorer(config, model_dir, CPU, TIMESTEPS, book, work), config, work


def perturbed(model: torch.nn.Module) -> Any:
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p += (0.05 * torch.randn(p.shape, generator=g, dtype=torch.float64)).to(p.dtype)
    return model


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory, clip: Path) -> Path:
    """A folder as ``method: spm`` writes it, of a model that knows the timestep."""
    files = resolve_step_preference(None, str(clip))
    folder = tmp_path_factory.mktemp("spm") / "step_preference_model"
    save_step_preference(perturbed(load_step_preference(files)), files, folder)
    return folder


@pytest.fixture(scope="module")
def lrm(tmp_path_factory: pytest.TempPathFactory, sdxl: Path) -> Path:
    """A folder as ``method: lrm`` writes it."""
    return make_lrm(sdxl, tmp_path_factory.mktemp("lrm") / "latent_reward_model")


def make_lrm(model_dir: Path, folder: Path) -> Path:
    config = load_config("", ["method=lrm", "train=full", "guidance_scale=7.5", f"model={model_dir}"])
    model, facts = open_latent_reward(
        config,
        model_dir,
        CPU,
        dtype=torch.float32,
        text_width=32,
        sizes=[(16, 16)],
        model_fingerprint=model_fingerprint(model_dir),
    )
    save_latent_reward(perturbed(model), facts, folder)
    return folder


def decoded(model_dir: Path, latents: Tensor) -> Tensor:
    vae = load_vae(model_dir, "fp64", CPU)
    with torch.no_grad():
        return vae.decode(latents / vae.config.scaling_factor).sample


def judged(model: Any, images: Tensor, t: int, prompts: Sequence[str] = PROMPTS) -> Tensor:
    with torch.no_grad():
        rows = model.embed_images(images, torch.full((len(images),), t))
        return model.score(rows, model.embed_texts(prompts))


def count(module: torch.nn.Module) -> list[int]:
    """Rows of every call from now on."""
    rows: list[int] = []

    def keep(_: Any, args: Any, kwargs: Any) -> None:
        rows.append(len(args[0] if args else next(iter(kwargs.values()))))

    module.register_forward_pre_hook(keep, with_kwargs=True)
    return rows


def test_a_step_aware_scorer_is_the_unfolded_model_on_decoded_pictures(sdxl: Path, spm: Path) -> None:
    scorer, _, work = opened(sdxl, f"scorer={spm}", "method=spo")
    assert isinstance(scorer, PreferenceScorer) and scorer.needs_x0
    text, vision, decoder = (
        count(module)
        for module in (scorer.model.clip.text_model, scorer.model.clip.vision_model, scorer.decoder.vae.decoder)
    )
    model = load_step_preference(resolve_step_preference(str(spm), None), dtype=torch.float64)
    found = []
    for call, t in enumerate(TIMESTEPS):
        latents, x0 = candidates(call)
        found.append(scorer.score(latents, x0, t, PROMPTS))
        assert (found[-1] - judged(model, decoded(sdxl, x0), t)).abs().max() < 1e-10
    latents, x0 = candidates(0)
    assert (scorer.score(latents, x0, 451, PROMPTS) - found[0]).abs().max() > 1e-3, "the timestep is not seen"
    scorer.score(latents[:1], x0[:1], 0, ["a new prompt"])
    assert sum(text) == work.text_forwards == 4, "three prompts and a new one, each once"
    assert sum(vision) == work.scorer_forwards == 21 and sum(decoder) == work.vae_decodes == 21
    assert max(decoder) == max(vision) == 2, "pictures exist a chunk at a time"


def test_a_plain_clip_scores_without_the_timestep(sd15: Path, clip: Path) -> None:
    latents, x0 = candidates()
    model = load_clip_scorer(resolve_step_preference(None, str(clip)), dtype=torch.float64)
    expected = judged(model, decoded(sd15, x0), 0)
    for key in ("scorer", "clip"):
        scorer, _, _ = opened(sd15, f"{key}={clip}", "method=spo")
        for t in (951, 0):
            assert (scorer.score(latents, x0, t, PROMPTS) - expected).abs().max() < 1e-10


def test_a_picture_that_is_not_a_number_has_no_score(sdxl: Path, spm: Path) -> None:
    scorer, _, _ = opened(sdxl, f"scorer={spm}", "method=spo")
    latents, x0 = candidates()
    x0[3] = float("nan")
    assert scorer.score(latents, x0, 451, PROMPTS).isnan().tolist() == [False, False, False, True, False]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small(tmp_path_factory.mktemp("small") / "taesd")


def make_small(folder: Path, channels: int = 4, levels: int = 2) -> Path:
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    sizes, counts = (8,) * levels, (1,) * levels
    AutoencoderTiny(
        latent_channels=channels,
        encoder_block_out_channels=sizes,
        decoder_block_out_channels=sizes,
        num_encoder_blocks=counts,
        num_decoder_blocks=counts,
    ).save_pretrained(folder)
    return folder


def test_a_small_decoder_stands_in_for_the_vae(sdxl: Path, spm: Path, small: Path) -> None:
    """Latents as the UNet takes them, pictures in [-1, 1]; the exact scorer is at hand, with the same prompts."""
    from diffusers import AutoencoderTiny

    scorer, _, work = opened(sdxl, f"scorer={spm}", f"small_decoder={small}", "method=spo")
    latents, x0 = candidates()
    tiny = AutoencoderTiny.from_pretrained(small).double()
    with torch.no_grad():
        pictures = tiny.decode(x0).sample
    model = load_step_preference(resolve_step_preference(str(spm), None), dtype=torch.float64)
    found = scorer.score(latents, x0, 451, PROMPTS)
    assert (found - judged(model, pictures, 451)).abs().max() < 1e-10
    assert scorer.exact is not None
    exact = scorer.exact.score(latents, x0, 451, PROMPTS)
    assert (exact - judged(model, decoded(sdxl, x0), 451)).abs().max() < 1e-10
    assert work.text_forwards == 3 and (exact - found).abs().max() > 1e-3


def test_agreement_counts_the_same_pairs_and_correlates_ranks() -> None:
    nan = float("nan")
    exact = torch.tensor([[1.0, 2, 3, 4], [1.0, 2, 3, 4], [1.0, 2, 3, 4], [1.0, nan, 3, 4]])
    other = torch.tensor([[10.0, 20, 30, 99], [1.0, 3, 2, 4], [4.0, 3, 2, 1], [1.0, 2, 3, 4]])
    found = agreement(exact, other)  # ranks: alike; two exchanged, 1 - 6·2/60; the other way round
    assert found["pools"] == 3 and found["same_pair"] == pytest.approx(2 / 3)
    assert found["spearman"] == pytest.approx((1 + 0.8 - 1) / 3)
    assert agreement(exact, exact) == {"pools": 3.0, "same_pair": 1.0, "spearman": pytest.approx(1.0)}
    ties = agreement(torch.tensor([[1.0, 1.0, 2.0]]), torch.tensor([[1.0, 1.5, 2.0]]))
    assert ties["spearman"] == pytest.approx(1.5 / 3**0.5)  # average ranks 1.5, 1.5, 3 against 1, 2, 3
    none = agreement(exact[3:], other[3:])
    assert none["pools"] == 0 and none["same_pair"] != none["same_pair"]


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_a_latent_scorer_is_its_model_on_the_noisy_candidates(
    request: pytest.FixtureRequest, tmp_path: Path, family: str
) -> None:
    model_dir: Path = request.getfixturevalue(family)
    folder = make_lrm(model_dir, tmp_path / "lrm")
    scorer, _, work = opened(model_dir, f"scorer={folder}", "method=lpo", "plain_steps=0")
    assert isinstance(scorer, LatentScorer) and not scorer.needs_x0
    rows, texts = count(scorer.model.unet.conv_in), count(scorer.book.texts.encoders[0])
    model, _ = load_latent_reward(folder, dtype=torch.float64)
    book, empty = scorer.book, scorer.book.conditioning([""])
    for call, t in enumerate((951, 0)):
        latents, _ = candidates(call)
        with torch.no_grad():
            known = book.conditioning(PROMPTS)
            seen = model.embed_latents(latents, torch.full((5,), t), known, empty)
            expected = model.score(seen, model.embed_texts(text_rows(known, PROMPTS, book.texts.tokenizers[0])))
        found = scorer.score(latents, None, t, PROMPTS)
        assert (found - expected).abs().max() < 1e-12 and found.std() > 1e-3
    assert sum(rows) == work.scorer_forwards == 20, "two rows a candidate, for its guidance"
    assert work.vae_decodes == 0 and sum(texts) == 3 and work.text_forwards == 4, "the empty prompt was known before"
    assert not torch.equal(scorer.score(candidates(0)[0], None, 951, PROMPTS[::-1]), expected)


def brightness(images: Tensor, prompts: list[str], t: int) -> Tensor:
    assert images.min() >= 0 and images.max() <= 1 and images.shape[1] == 3 and len(prompts) == len(images)
    return images.mean(dim=(1, 2, 3)) + t


def mean_latent(latents: Tensor, prompts: list[str], t: int) -> list[float]:
    return (latents.mean(dim=(1, 2, 3)) + len(prompts[0])).tolist()


mean_latent.takes = "latents"  # type: ignore[attr-defined]
NOT_CALLABLE = 3


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """This module under a name of its own."""
    monkeypatch.setitem(sys.modules, "scorers_of_mine", sys.modules[__name__])
    yield "scorers_of_mine"


def test_a_callable_gets_pictures_in_the_unit_range_or_latents(sdxl: Path, named: str) -> None:
    latents, x0 = candidates()
    scorer, _, work = opened(sdxl, f"scorer={named}:brightness", "method=spo")
    expected = (decoded(sdxl, x0) / 2 + 0.5).clamp(0, 1).mean(dim=(1, 2, 3)) + 451
    assert scorer.needs_x0 and (scorer.score(latents, x0, 451, PROMPTS) - expected).abs().max() < 1e-12
    assert work.scorer_forwards == work.vae_decodes == 5
    scorer, _, work = opened(sdxl, f"scorer={named}:mean_latent", "method=spo")
    found = scorer.score(latents, None, 451, PROMPTS)
    assert not scorer.needs_x0 and torch.allclose(found.double(), latents.mean(dim=(1, 2, 3)) + len(PROMPTS[0]))
    assert work.vae_decodes == 0


def test_a_callable_s_nan_is_passed_on_and_what_is_no_score_is_one_line() -> None:
    latents, _ = candidates()

    def scorer(fn: Callable[..., Any]) -> CallableScorer:
        return CallableScorer(fn, None, Work(), "mine:fn")

    def some_nan(latents: Tensor, prompts: list[str], t: int) -> Tensor:
        return torch.tensor([1.0, float("nan"), 3.0, 4.0, 5.0])

    found = scorer(some_nan).score(latents, None, 0, PROMPTS)
    assert found.isnan().tolist() == [False, True, False, False, False]

    def fails(*_: Any) -> Tensor:
        raise RuntimeError("no such\ncolour")

    for fn, says in (
        (lambda x, p, t: torch.zeros(5, 1), r"returned \(5, 1\) of float32, must be \(5,\) of floats"),
        (lambda x, p, t: torch.zeros(4), r"returned \(4,\) of float32"),
        (lambda x, p, t: torch.zeros(5, dtype=torch.int64), r"returned \(5,\) of int64"),
        (lambda x, p, t: 1.0, r"returned \(\) of float32"),
        (lambda x, p, t: "good", "the scorer failed with"),
        (lambda x, p: torch.zeros(5), "the scorer failed with TypeError"),
        (fails, "the scorer failed with RuntimeError: no such colour .*test_scorers.py, line"),
    ):
        with pytest.raises(UserError, match=says) as error:
            scorer(fn).score(latents, None, 0, PROMPTS)
        assert "\n" not in str(error.value) and "mine:fn" in str(error.value)


def test_what_cannot_be_imported_is_one_line(named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_scorer.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert import_callable(f"{named}:brightness") is brightness
    for source, says in (
        ("no_such_module:fn", "cannot import the scorer's module: ModuleNotFoundError"),
        ("broken_scorer:fn", "ZeroDivisionError"),
        (f"{named}:nothing", "the module has no nothing"),
        (f"{named}:NOT_CALLABLE", "is a int, not a callable"),
    ):
        with pytest.raises(UserError, match=says) as error:
            import_callable(source)
        assert "\n" not in str(error.value)


def test_a_scorer_for_another_method_or_model_is_one_line(
    sdxl: Path, sd15: Path, clip: Path, spm: Path, lrm: Path, small: Path, named: str, tmp_path: Path
) -> None:
    from fastpref.emoji.random_models import make_random_sdxl

    other = make_random_sdxl(tmp_path / "other", seed=1, vae_factor=2)
    wide, deep = make_small(tmp_path / "wide", channels=16), make_small(tmp_path / "deep", levels=3)
    lpo = ["method=lpo", "plain_steps=0"]
    for model_dir, overrides, says in (
        (sdxl, ["method=spo"], "no preference model is given"),
        (sdxl, ["method=spo", f"scorer={tmp_path}/none"], "no such preference model"),
        (sdxl, ["method=spo", f"scorer={lrm}"], "does not judge pictures, as method spo needs .*: set method=lpo"),
        (
            sdxl,
            [*lpo, f"scorer={spm}"],
            "method lpo needs a latent reward model, this is none .*train one with method=lrm",
        ),
        (sdxl, [*lpo, f"clip={clip}"], "method lpo needs a latent reward model"),
        (sdxl, [*lpo, f"scorer={lrm}", f"small_decoder={small}"], "a latent reward model decodes nothing"),
        (sd15, [*lpo, f"scorer={lrm}"], "is one for sdxl, the model is sd15"),
        (other, [*lpo, f"scorer={lrm}"], "another VAE or other text encoders"),
        (sdxl, ["method=spo", f"clip={clip}", f"small_decoder={tmp_path}"], "no small decoder there"),
        (sdxl, ["method=spo", f"clip={clip}", f"small_decoder={sdxl}/vae"], "the small decoder is a AutoencoderKL"),
        (sdxl, ["method=spo", f"clip={clip}", f"small_decoder={wide}"], "takes 16 latent channels, the VAE has 4"),
        (sdxl, ["method=spo", f"clip={clip}", f"small_decoder={deep}"], "makes 4 pixels a latent, the VAE 2"),
        (sdxl, ["method=spo", f"scorer={named}:brightness", f"small_decoder={small}"], "a scorer of one's own"),
    ):
        with pytest.raises(UserError, match=says) as error:
            opened(model_dir, *overrides)
        assert "\n" not in str(error.value), error.value
    with pytest.raises(UserError, match="trained on pictures of 16x16 pixels, these are of 32x32"):
        opened(sdxl, *lpo, f"scorer={lrm}", size=32)


def test_a_clip_whose_positions_do_not_fit_its_image_processor_is_one_line(sdxl: Path, tmp_path: Path) -> None:
    import json

    from fastpref.emoji.random_models import make_random_clip

    folder = make_random_clip(tmp_path / "clip", image_size=64)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings["crop_size"] = {"height": 32, "width": 32}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="makes pictures of 32 pixels, the CLIP takes 64"):
        opened(sdxl, "method=spo", f"scorer={folder}")


def test_a_scorer_of_another_picture_size_resizes(sdxl: Path, tmp_path: Path) -> None:
    """Pictures of 16 pixels, a CLIP that takes 64: the picture is what its image processor makes of it."""
    from fastpref.emoji.random_models import make_random_clip

    folder = make_random_clip(tmp_path / "clip", image_size=64)
    scorer, _, _ = opened(sdxl, "method=spo", f"scorer={folder}")
    latents, x0 = candidates()
    large = torch.nn.functional.interpolate(decoded(sdxl, x0), size=(64, 64), mode="bicubic", align_corners=False)
    expected = judged(load_clip_scorer(resolve_step_preference(str(folder), None), dtype=torch.float64), large, 0)
    assert (scorer.score(latents, x0, 0, PROMPTS) - expected).abs().max() < 1e-10


def test_the_decoder_of_a_callable_is_in_chunks() -> None:
    class Decoder(LatentDecoder):
        def images(self, latents: Tensor) -> Tensor:
            return latents[:, :3] * 4

    seen: list[tuple[int, list[str]]] = []

    def fn(images: Tensor, prompts: list[str], t: int) -> Tensor:
        seen.append((len(images), prompts))
        assert images.min() == 0 and images.max() == 1
        return images.sum(dim=(1, 2, 3))

    latents, x0 = candidates()
    found = CallableScorer(fn, Decoder(None, 2, Work()), Work()).score(latents, x0, 0, PROMPTS)
    assert seen == [(2, PROMPTS[:2]), (2, PROMPTS[2:4]), (1, PROMPTS[4:])]
    assert torch.allclose(found, (2 * x0[:, :3] + 0.5).clamp(0, 1).sum(dim=(1, 2, 3)))
