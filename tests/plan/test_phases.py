"""Memory of prepare, prepare --reference and scoring: predicted on fake tensors, measured by the same meter around the
real calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from fastpref.config import Config, load_config
from fastpref.data.encode import Encoders
from fastpref.data.job import make_job
from fastpref.data.records import open_records
from fastpref.models.loading import model_dir_of, model_family
from fastpref.models.public import VAES
from fastpref.models.vae import decode, encode
from fastpref.plan import report
from fastpref.plan.count import meta_model, with_fake_weights
from fastpref.plan.meter import PeakMemory
from fastpref.plan.models import models_of
from fastpref.plan.phases import Parts, count_prepare, count_scoring, round_bytes
from fastpref.plan.render import render
from fastpref.plan.report import make_plan
from fastpref.rollout.pool import Pool
from fastpref.train import reference
from fastpref.train.job import TrainJob
from fastpref.train.reference import prepare_reference

MakeConfig = Callable[..., Config]
CPU = torch.device("cpu")


def measured(models: list[Any], run: Callable[[], Any], mapped: Iterable[torch.Tensor] = ()) -> int:
    """Bytes of the models and the peak of what is alive beside them and the ``mapped`` files."""
    known = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    with torch.no_grad(), PeakMemory([*known, *mapped]) as memory:
        run()
    return sum(tensor.nbytes for tensor in known) + memory.peak


def within_a_tenth(predicted: int, found: int) -> bool:
    return abs(predicted / found - 1) < 0.1


def parts_of(config: Config) -> Parts:
    folder = model_dir_of(config)
    return Parts.of_folder(folder, model_family(folder))


@pytest.mark.parametrize("more", [[], ["posterior=true", "flips=true", "precision=bf16", "vae_precision=bf16"]])
@pytest.mark.parametrize("clip", ["emoji", None])
def test_prepare_needs_what_the_plan_says(few_records: Path, more: list[str], clip: str | None) -> None:
    """Of the bundled model, once in pictures and once in captions of which there are more than a call's."""
    own = [f"records={few_records}", "prepare_batch_size=64", *([] if clip is None else [f"clip={clip}"])]
    config = load_config("", [*own, *more])
    encoders = Encoders(make_job(config, open_records(config.records)), CPU)
    pictures, captions = [Image.new("RGB", (32, 32), (9, 99, 199))] * 64, [f"a red heart {n}" for n in range(64)]
    encoders.text(captions[:1]), encoders.images(pictures[:1])
    clips = [] if clip is None else [encoders._clip.model]
    text = measured([*encoders._text_stack.encoders, *clips], lambda: encoders.text(captions))
    images = measured([encoders._vae, *clips], lambda: encoders.images(pictures))
    need, not_counted = count_prepare(config, parts_of(config), "cpu")
    assert within_a_tenth(need.total, max(text, images)) and not not_counted


@pytest.mark.parametrize("more", [["prepare_batch_size=8"], ["precision=bf16", "micro_batch_size=4"]])
def test_the_reference_ledger_needs_what_the_plan_says(
    sdxl_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    config, found = sdxl_config("method=dpo", "reference=ledger", "steps=1", *more), []

    def metered(self: Any, *arguments: Any) -> None:
        shards = [self.store._shard(name) for name in self.store.manifest.files if name.endswith(".safetensors")]
        mapped = [tensor for shard in shards for tensor in shard.values()]
        found.append(measured([self.reference.unet], lambda: write(self, *arguments), mapped))

    write = reference._Writer.write
    monkeypatch.setattr(reference._Writer, "write", metered)
    prepare_reference(config, progress=False)
    assert within_a_tenth(make_plan(config, 1, "h100").preparing["prepare --reference"].total, found[0])


SPO = ["method=spo", "resolution=16", "sample_steps=6", "plain_steps=2", "candidates=4", "rollout_prompts=4"]


@pytest.mark.parametrize("more", [[], ["precision=bf16", "vae_precision=bf16"]])
def test_scoring_needs_what_the_plan_says(
    sdxl_config: MakeConfig, clip: Path, few_records: Path, more: list[str]
) -> None:
    """And a round what its pools hold."""
    config = sdxl_config(*SPO, "decode_batch_size=16", f"clip={clip}", f"records={few_records}", *more)
    trainer = TrainJob.open(config).trainer
    collector = trainer.collector
    scorer, book = collector.scorer, collector.book
    models = [scorer.decoder.vae, scorer.model.clip, *book.texts.encoders]
    prompts, latents = trainer.prompts[:1] * 16, torch.randn(16, *collector.shape)
    scorer.score(latents, latents, 0, prompts)
    scoring = count_scoring(config, parts_of(config), models_of(config).shapes, "cpu", 4)
    found = measured(models, lambda: scorer.score(latents.clone(), latents.clone(), 0, prompts))
    assert within_a_tenth(scoring.resident + scoring.activations, found)
    pools = [pool for pool in collector._roll_out(trainer.prompts[:4], 0) if isinstance(pool, Pool)]
    kept = sum(t.nbytes for pool in pools for t in (pool.start, pool.paths, pool.x0) if t is not None)
    assert within_a_tenth(round_bytes(config, len(pools), collector.shape, 4), kept)


def test_scoring_by_a_latent_reward_model_needs_what_the_plan_says(
    sdxl_config: MakeConfig, clip: Path, few_records: Path, tmp_path: Path
) -> None:
    TrainJob.open(sdxl_config("method=lrm", "train=full")).trainer.export(tmp_path)
    more = [f"scorer={tmp_path / 'latent_reward_model'}", "decode_batch_size=16", f"records={few_records}"]
    config = sdxl_config(*[s.replace("spo", "lpo").replace("=16", "=32") for s in SPO], *more)
    trainer = TrainJob.open(config).trainer
    scorer, book, prompts = trainer.collector.scorer, trainer.collector.book, trainer.prompts[:1] * 16
    latents = torch.randn(16, *trainer.collector.shape)
    scorer.score(latents, None, 0, prompts)
    scorer._last = None
    found = measured([scorer.model, *book.texts.encoders], lambda: scorer.score(latents.clone(), None, 0, prompts))
    scoring = count_scoring(config, parts_of(config), models_of(config).shapes, "cpu", 4)
    assert within_a_tenth(scoring.resident + scoring.activations, found)


def test_sdxls_vae_is_counted_as_it_is_measured_and_takes_pictures_one_by_one() -> None:
    """Real weights at 128 px; at 1024 px the decoder's widest tensors are 1024² x 256 in fp32, three at once."""

    def peak(vae: AutoencoderKL, rows: int, side: int, call: Any) -> int:
        shape = (rows, 4, side // 8, side // 8) if call is decode else (rows, 3, side, side)
        return measured([vae], lambda: call(vae, torch.zeros(shape))) - sum(p.nbytes for p in vae.parameters())

    real = AutoencoderKL.from_config(VAES["sdxl"]).eval()
    calls = (encode, decode)
    found = [peak(real, 2, 128, call) for call in calls]
    with FakeTensorMode():
        fake = with_fake_weights(meta_model(lambda: AutoencoderKL.from_config(VAES["sdxl"]), torch.float32))
        assert all(within_a_tenth(peak(fake, 2, 128, call), own) for call, own in zip(calls, found, strict=True))
        one, four = (peak(fake, rows, 1024, decode) for rows in (1, 4))
        assert 3.0 < one / (1024**2 * 256 * 4) < 3.3
        assert four - one < 9 * 1024**2 * 3 * 4  # the four pictures, joined
        fake = with_fake_weights(meta_model(lambda: AutoencoderKL.from_config(VAES["sdxl"]), torch.bfloat16))
        assert 0.45 < peak(fake, 1, 1024, decode) / one < 0.55


@pytest.mark.parametrize("phase", ["prepare", "prepare --reference", "scoring"])
def test_the_largest_phase_decides_what_fits(
    sdxl_config: MakeConfig, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    """A device that the step fits on, and the phase does not; the suggestion, taken, fits."""
    settings = {
        "prepare": ["method=dpo", f"store={tmp_path / 'new'}", "prepare_batch_size=512", "micro_batch_size=1"],
        "prepare --reference": ["method=dpo", "reference=ledger", "prepare_batch_size=256", "micro_batch_size=1"],
        "scoring": [*SPO, f"clip={clip}", "decode_batch_size=512", "rollout_batch_size=1", "micro_batch_size=1"],
    }[phase]
    whole = make_plan(sdxl_config(*settings), 1, "h100")
    need = whole.scoring_total(whole.best) if phase == "scoring" else whole.preparing[phase].total
    limit = int((need + whole.best.total) / 2)
    assert whole.best.total < 0.9 * limit < 0.9 * need and not whole.nearest
    monkeypatch.setattr(report, "device_bytes", lambda _: limit)
    plan = make_plan(sdxl_config(*settings), 1, "h100")
    assert f"{phase}: {need / 1e9:.2f} GB, of which" in " ".join(map(str, render(plan).renderables))
    changes, _, _ = plan.nearest.partition("on ")
    assert ("decode_batch_size=1" if phase == "scoring" else "prepare_batch_size=1") in changes
    assert make_plan(sdxl_config(*settings, *changes.split()), 1, "h100").nearest == ""


def test_what_is_not_on_disk_is_said_to_be_left_out() -> None:
    """The public SDXL; on a GPU its decoder is in bf16 for a scorer in bf16, its encoder in fp32."""
    sdxl = ["model=stabilityai/sdxl", "resolution=1024", "clip=nowhere"]
    spo, dpo = (
        load_config("", ["method=spo", *sdxl, "scorer=nowhere.bin", "precision=bf16"]),
        load_config("", ["method=dpo", *sdxl, "prepare_batch_size=4"]),
    )
    models, widest = models_of(spo, "sdxl"), 1024**2 * 4
    scoring = count_scoring(spo, models.parts, models.shapes, "cuda", models.segments)
    assert scoring.not_counted == ["the scorer, which is not on disk"]
    assert 3.0 < scoring.activations / (256 * widest // 2) < 4.0
    need, not_counted = count_prepare(dpo, models.parts, "cuda")
    assert not_counted == ["the CLIP, which is not on disk"]
    encoders = 4 * (123_060_480 + 694_659_840)  # of captions, in fp32: more than the VAE's for pictures one by one
    assert need.weights == pytest.approx(encoders, rel=1e-6) and need.total > 83_653_863 * 4 + 5 * 128 * widest
