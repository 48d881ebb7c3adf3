"""Training the step-aware preference model: loss, weights, layouts, counts, resuming, evaluation and bad input."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from fastpref.config import Config, load_config
from fastpref.errors import UserError
from fastpref.models.guidance import empty_conditioning, predicted_x0
from fastpref.models.step_preference_file import (
    FOLDER_NAME,
    WEIGHTS_NAME,
    load_step_preference,
    resolve_step_preference,
)
from fastpref.objectives.step_preference import preference_cross_entropy, prompt_weights
from fastpref.train.job import TrainJob
from fastpref.train.step_preference import StepPreferenceTrainer

Recipe = Callable[..., Config]
TIES, REPEATED = (3, 8, 15), (4, 5, 6, 7, 8)  # records with label one half; records with the caption of record 4


@pytest.fixture(scope="session")
def tied_records(tmp_path_factory: pytest.TempPathFactory, few_records: Path) -> Path:
    """20 of the pairs: three ties, and five pairs of one prompt."""
    rows = pq.read_table(few_records).slice(0, 20).to_pylist()
    for index in TIES:
        rows[index]["label_0"] = 0.5
    for index in REPEATED:
        rows[index]["caption"] = rows[REPEATED[0]]["caption"]
    path = tmp_path_factory.mktemp("records") / "tied.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture(scope="session")
def tied_store(tmp_path_factory: pytest.TempPathFactory, sdxl: Path, clip: Path, tied_records: Path) -> Path:
    """They, prepared for the random SDXL with ties as halves."""
    from fastpref.data.prepare import prepare

    store = tmp_path_factory.mktemp("stores") / "tied"
    settings = {"model": sdxl, "clip": clip, "records": tied_records, "store": store, "ties": "half", "resolution": 32}
    prepare(load_config("", [f"{key}={value}" for key, value in settings.items()]), progress=False)
    return store


@pytest.fixture
def spm(sdxl_config: Recipe, clip: Path, tied_store: Path) -> Recipe:
    """A small recipe; the whole of it has 20 pairs, a step 8."""
    base = ["method=spm", "train=full", f"clip={clip}", f"store={tied_store}", "eval_prompts=3", "learning_rate=1e-3"]
    return lambda *more: sdxl_config(*base, "checkpoint_every=1000", *more)


def open_trainer(config: Config) -> StepPreferenceTrainer:
    """With every weight of the model moved, so that the timestep counts."""
    trainer = TrainJob.open(config).trainer
    assert isinstance(trainer, StepPreferenceTrainer)
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=g, dtype=torch.float64).to(parameter.dtype)
    return trainer


def loss_and_gradient(config: Config, step: int = 0) -> tuple[dict[str, Any], torch.Tensor, StepPreferenceTrainer]:
    trainer = open_trainer(config)
    kept: list[torch.Tensor] = []

    def keep(rate: float, loss: torch.Tensor) -> torch.Tensor:
        kept.append(torch.cat([p.grad.flatten() for p in trainer.model.trainable.values() if p.grad is not None]))
        return torch.zeros(())

    trainer.engine.launch = keep  # type: ignore[method-assign]
    return trainer.step(step), kept[0], trainer


def test_metrics_a_step_late_are_those_of_waiting_for_each(spm: Recipe) -> None:
    ahead, waiting = open_trainer(spm("micro_batch_size=4")), open_trainer(spm("micro_batch_size=4"))
    launched = [ahead.launch(step) for step in range(2)]
    assert [metrics() for metrics in launched] == [waiting.step(step) for step in range(2)]


def train(config: Config) -> Path:
    from fastpref.runs import run_training

    run_training(config)
    return config.run_dir


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def lines(run: Path) -> list[dict[str, Any]]:
    text = (run / "metrics.jsonl").read_text()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in text.splitlines()]


def test_the_loss_is_two_way_cross_entropy_and_zero_at_best() -> None:
    g = torch.Generator().manual_seed(0)
    winner, loser = 30 * torch.randn(2, 50, generator=g, dtype=torch.float64)
    label = torch.tensor([1.0, 0.0, 0.5, 0.8, 0.25] * 10, dtype=torch.float64)
    losses = preference_cross_entropy(winner, loser, label)
    for s_w, s_l, p, loss in zip(winner.tolist(), loser.tolist(), label.tolist(), losses.tolist(), strict=True):
        log_sum = max(s_w, s_l) + math.log1p(math.exp(-abs(s_w - s_l)))
        entropy = -sum(q * math.log(q) for q in (p, 1 - p) if q)
        assert abs(loss - (-p * (s_w - log_sum) - (1 - p) * (s_l - log_sum) - entropy)) < 1e-12 * (1 + abs(s_w - s_l))
    even = torch.zeros(1, dtype=torch.float64)
    assert preference_cross_entropy(even, even, torch.tensor([0.5])).item() == pytest.approx(0, abs=1e-7)
    far = torch.tensor([1e4], dtype=torch.float64, requires_grad=True)
    preference_cross_entropy(-far, far, torch.ones(1)).sum().backward()
    assert far.grad is not None and far.grad.item() == 2.0, "no overflow where the model is wrong"


def test_prompt_weights_sum_to_one_and_share_a_prompt_s_weight() -> None:
    weights = prompt_weights(torch.tensor([1, 4, 4, 2]))
    assert torch.allclose(weights, torch.tensor([1.0, 0.25, 0.25, 0.5]).double() / 2.0, rtol=1e-15)


def test_gradient_equals_a_literal_implementation(spm: Recipe, sdxl: Path, tied_records: Path) -> None:
    """The published method pair by pair in float64, from the stored latents on; loss, accuracy and all gradients."""
    config = spm("precision=fp64", "micro_batch_size=4", "guidance_scale=3.5")
    metrics, gradient, trainer = loss_and_gradient(config)
    plan = trainer.sampler.batch(0)
    rows = pq.read_table(tied_records).to_pylist()
    pairs_of = Counter(row["caption"] for row in rows)
    batch = trainer.batches.build(plan, slice(0, 8))
    unet, vae = trainer.one_step.unet.unet, trainer.one_step.decoder.vae
    empty, empty_pooled = (row.double() for row in trainer.batches.store.empty_prompt())  # the tiny SDXL forces zeros:
    empty, empty_pooled = torch.zeros_like(empty), torch.zeros_like(empty_pooled)

    def score(row: int, caption: str) -> torch.Tensor:
        x, t, c = batch.noisy[row][None], batch.timesteps[row], batch.conditioning
        assert c.pooled_prompt_embeds is not None and c.time_ids is not None
        own = {"text_embeds": c.pooled_prompt_embeds[row][None], "time_ids": c.time_ids[row][None]}
        none = {"text_embeds": empty_pooled, "time_ids": c.time_ids[row][None]}
        with torch.no_grad():
            prompted = unet(x, t, c.prompt_embeds[row][None], added_cond_kwargs=own).sample
            without = unet(x, t, empty, added_cond_kwargs=none).sample
            alpha = trainer.one_step.schedule.alphas_cumprod[t]
            x0 = (x - (1 - alpha).sqrt() * (without + 3.5 * (prompted - without))) / alpha.sqrt()
            image = vae.decode(x0 / vae.config.scaling_factor).sample
        model = trainer.model
        picture, text = model.embed_images(image, t[None])[0], model.embed_texts([caption])[0]
        return model.clip.logit_scale.exp() * (picture @ text)

    total, weights, right, decided = torch.zeros((), dtype=torch.float64), 0.0, 0, 0
    for pair, index in enumerate(plan.indices.tolist()):
        record = int(trainer.batches.store.record[index])
        caption, label = rows[record]["caption"], 0.5 if rows[record]["label_0"] == 0.5 else 1.0
        winner, loser = score(pair, caption), score(8 + pair, caption)
        chance = torch.stack([winner, loser]).log_softmax(0)
        loss = -label * chance[0] - (1 - label) * chance[1] + (math.log(0.5) if label == 0.5 else 0.0)
        total = total + loss / pairs_of[caption]
        weights += 1 / pairs_of[caption]
        decided += label == 1.0
        right += label == 1.0 and bool(winner > loser)
    literal = total / weights
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(literal, list(trainer.model.trainable.values()))])
    assert 0 < decided < 8 and len({rows[int(r)]["caption"] for r in trainer.batches.store.record[plan.indices]}) < 8
    assert abs(metrics["loss"] - literal.item()) < 1e-9 and metrics["accuracy"] == pytest.approx(right / decided)
    assert (gradient - expected).abs().max() <= 1e-8 * expected.abs().max()


def test_the_micro_batch_size_does_not_matter(spm: Recipe) -> None:
    """8, 4+4 and 2+2+2+2 are one function, ties and repeated prompts included: 1e-9 in float64."""
    metrics, gradient, _ = loss_and_gradient(spm("precision=fp64"))
    assert gradient.norm() > 0
    for extra in (["micro_batch_size=4"], ["micro_batch_size=2", "decode_batch_size=3", "gradient_checkpointing=full"]):
        other, own, _ = loss_and_gradient(spm("precision=fp64", *extra))
        for key in ("loss", "score_winner", "score_loser", "margin", "accuracy"):
            assert abs(other[key] - metrics[key]) <= 1e-9 * max(1.0, abs(metrics[key])), (extra, key)
        assert (own - gradient).abs().max() <= 1e-9 * gradient.abs().max(), extra


def test_a_perfect_prediction_gives_the_picture_back(sdxl_config: Recipe, sd15_config: Recipe, clip: Path) -> None:
    """From x_t and the true ε (SDXL) or v (SD1.5), x̂0 is the stored latent; winner and loser share t and noise."""
    for make in (sdxl_config, sd15_config):
        job = TrainJob.open(make("method=spm", "train=full", f"clip={clip}", "precision=fp64"))
        trainer = job.trainer
        assert isinstance(trainer, StepPreferenceTrainer)
        seen: list[int] = []
        for step in range(4):
            plan = trainer.sampler.batch(step)
            batch = trainer.batches.build(plan, slice(0, 8))
            x0 = predicted_x0(batch.target, batch.noisy, batch.timesteps, trainer.one_step.schedule)
            if not trainer.batches.store.manifest.posterior:
                stored = trainer.batches.store.batch(plan.indices)
                assert (x0 - torch.cat([stored.latents_w, stored.latents_l])).abs().max() < 1e-9
            assert torch.equal(batch.timesteps[:8], batch.timesteps[8:])
            seen += batch.timesteps[:8].tolist()
        assert len(set(seen)) > 24 and min(seen) < 200 and max(seen) > 800, "a timestep of its own for each pair"


def test_the_empty_prompt_of_guidance_is_the_pipeline_s(sdxl: Path, sd15: Path) -> None:
    """Zeros for an SDXL folder that forces them, the encoded empty prompt for SD1.5 and for the bundled SDXL."""
    from fastpref.emoji import MODEL_DIR

    prompt, pooled = torch.ones(1, 5, 4), torch.ones(1, 3)
    assert empty_conditioning(sdxl, prompt, pooled).prompt_embeds.eq(0).all()
    assert empty_conditioning(sdxl, prompt, pooled).pooled_prompt_embeds.eq(0).all()  # type: ignore[union-attr]
    assert empty_conditioning(MODEL_DIR, prompt, pooled).prompt_embeds.eq(1).all()
    assert empty_conditioning(sd15, prompt, None).prompt_embeds.eq(1).all()


def _count(module: torch.nn.Module, rows: list[int]) -> None:
    module.register_forward_hook(lambda _, args, kwargs, out: rows.append(len(_first(out))), with_kwargs=True)


def _first(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def test_the_work_is_what_hooks_count(spm: Recipe) -> None:
    """Per pair 4 UNet rows with guidance and 2 without, 2 decodes, 2 scored pictures; a prompt once a forward."""
    for guidance, unet_rows in ((5.0, 4), (1.0, 2)):
        trainer = open_trainer(spm("micro_batch_size=4", "decode_batch_size=3", f"guidance_scale={guidance}"))
        unet, decoder, vision, text = ([], [], [], [])  # type: list[int], list[int], list[int], list[int]
        _count(trainer.one_step.unet.unet, unet)
        _count(trainer.one_step.decoder.vae.decoder, decoder)
        _count(trainer.model.clip.vision_model.embeddings, vision)
        _count(trainer.model.clip.text_model, text)
        for step in range(2):
            trainer.step(step)
        work = trainer.work()
        assert (sum(unet), sum(decoder), sum(vision)) == (16 * unet_rows, 32, 32) and max(decoder) == 3
        assert (work.unet_forwards, work.vae_decodes, work.scorer_forwards) == (sum(unet), sum(decoder), sum(vision))
        assert work.text_forwards == sum(text) < 16, "a repeated prompt is encoded once"
        assert (work.unet_backwards, work.unet_recomputed, work.vae_encodes) == (0, 0, 0)


def test_ten_steps_equal_five_and_five_more(spm: Recipe) -> None:
    common = ["ema_decay=0.9", "warmup_steps=3", "micro_batch_size=4"]
    whole = train(spm("name=whole", "steps=6", *common))
    train(spm("name=parts", "steps=3", *common))
    parts = train(spm("name=parts", "steps=6", "resume=auto", *common))
    one, two = (load_file(run / FOLDER_NAME / WEIGHTS_NAME) for run in (whole, parts))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert lines(whole) == lines(parts)
    for key in ("unet_forwards", "vae_decodes", "text_forwards", "scorer_forwards"):
        assert summary(whole)[key] == summary(parts)[key] > 0
    with pytest.raises(UserError, match=r"guidance_scale is 2\.0 but the run was started with 5\.0"):
        train(spm("name=parts", "steps=7", "resume=auto", "guidance_scale=2", *common))


def test_a_run_learns_evaluates_and_leaves_a_model_that_loads(spm: Recipe) -> None:
    """Overfitting eight easy pairs: near t = 0 the pictures are there to be told apart."""
    more = ["timestep_range=[0, 40]", "eval_timesteps=[0, 501]", "steps=40", "learning_rate=3e-3", "batch_size=16"]
    config = spm("name=a", "evaluate=true", "guidance_scale=1", *more)
    run = train(config)
    metrics, result = lines(run), summary(run)
    keys = "step loss score_winner score_loser margin accuracy grad_norm lr"
    assert all(set(line) == set(keys.split()) for line in metrics)
    early, late = (np.mean([line["loss"] for line in part]) for part in (metrics[:8], metrics[-8:]))
    assert late < 0.8 * early
    for tag in ("before", "after"):
        found = result["evaluation"][tag]
        assert found["details"]["pairs"] == 3 and found["pair_accuracy"].keys() == {"0", "501"}
        assert all(share in (0.0, 1 / 3, 2 / 3, 1.0) for share in found["pair_accuracy"].values())
    work = result["evaluation"]["after"]["details"]["work"]
    assert (work["unet_forwards"], work["vae_encodes"], work["vae_decodes"]) == (6, 6, 6)
    assert (work["scorer_forwards"], work["text_forwards"]) == (12, 3)
    assert result["evaluation"]["before"]["pair_margin"] != result["evaluation"]["after"]["pair_margin"]
    assert _literal_margin_at_zero(config, run) == pytest.approx(
        result["evaluation"]["after"]["pair_margin"]["0"], rel=1e-4
    )
    assert "Accuracy on held-out pairs" in (run / "report.html").read_text()


def _literal_margin_at_zero(config: Config, run: Path) -> float:
    """Mean s_w - s_l of the held-out pictures themselves, one by one."""
    from fastpref.data.records import Record, read_records
    from fastpref.emoji import HELDOUT_PARQUET
    from fastpref.emoji.records import decode_image
    from fastpref.evaluate.runner import choose_prompts

    model = load_step_preference(resolve_step_preference(str(run / FOLDER_NAME), None))
    records = [record for record in read_records(str(HELDOUT_PARQUET)) if isinstance(record, Record)]
    chosen = choose_prompts([record.caption for record in records], config.eval_prompts)
    margins = []
    for record in records:
        if record.caption in chosen:
            sides = [torch.tensor(decode_image(data)).permute(2, 0, 1) for data in (record.winner, record.loser)]
            images = torch.stack(sides).float() / 127.5 - 1
            with torch.no_grad():
                text = model.embed_texts([record.caption] * 2)
                scores = model.score(model.embed_images(images, torch.tensor([0, 0])), text)
            margins.append(float(scores[0] - scores[1]))
    return sum(margins) / len(margins)


def test_a_trained_model_is_where_another_run_starts(spm: Recipe) -> None:
    run = train(spm("name=first", "steps=2"))
    scorer = run / FOLDER_NAME
    again = TrainJob.open(spm(f"scorer={scorer}", "clip=null")).trainer
    assert isinstance(again, StepPreferenceTrainer)
    weights = load_file(scorer / WEIGHTS_NAME)
    assert torch.equal(again.model.clip.logit_scale, weights["model.logit_scale"])
    assert weights["model.vision_model.adaLN_modulation.1.weight"].abs().sum() > 0, "the timestep was trained"


def test_relabelling_uses_the_clip_s_own_scores(spm: Recipe, clip: Path, tied_store: Path) -> None:
    """p_w - p_l of a softmax over exp(scale)·cos of the stored embeddings, against the threshold."""
    from fastpref.data.store import Store

    threshold = 0.02
    trainer = TrainJob.open(spm(f"relabel={threshold}")).trainer
    assert isinstance(trainer, StepPreferenceTrainer)
    plan = trainer.sampler.batch(0)
    labels = trainer._labels(plan, slice(0, 8), trainer.batches.build(plan, slice(0, 8)))
    stored = Store.open(tied_store).clip_batch(plan.indices)
    scale = trainer.model.clip.logit_scale.detach().exp()
    scores = torch.stack([(rows * stored.text).sum(1) * scale for rows in (stored.image_w, stored.image_l)], dim=1)
    expected = []
    for p_w, p_l in scores.softmax(dim=1).tolist():
        expected.append(1.0 if p_w - p_l > threshold else 0.0 if p_l - p_w > threshold else 0.5)
    assert labels.tolist() == expected and len(set(expected)) == 3


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["clip=null"], "no preference model is given"),
        (["scorer=none/there"], "no such preference model"),
        (["clip=none/there"], "no CLIP model there"),
        (["train=lora"], "set train=full"),
        (["safeguard=0.9"], "safeguard is set with method spm"),
        (["caption_dropout=0.1"], "caption_dropout is set with method spm"),
        (["relabel=0.1", "label_noise=0.2"], "label_noise is set with relabel"),
        (["relabel=0.1", "clip=emoji"], "embeddings by the CLIP that is trained"),
        (["eval_timesteps=[-1]"], "must be >= 0"),
        (["timestep_range=[0, 2000]"], "ends above 1000"),
        (["batch_size=64"], "no bucket of the store has a batch of 64"),
        (["store=SD15"], "made for sd15, the model is sdxl"),
        (["unet=SD15"], "the UNet is one of SD1.5"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    spm: Recipe, sd15_store: Path, sd15: Path, tmp_path: Path, overrides: list[str], says: str
) -> None:
    folders = {"store=SD15": f"store={sd15_store}", "unet=SD15": f"unet={sd15 / 'unet'}"}
    with pytest.raises(UserError, match=says) as error:
        train(spm(*(folders.get(override, override) for override in overrides)))
    assert "\n" not in str(error.value) and not (tmp_path / "runs").exists()


def test_a_timestep_beyond_the_schedule_is_one_line(spm: Recipe) -> None:
    from fastpref.evaluate.pair_accuracy import evaluate_pair_accuracy

    with pytest.raises(UserError, match="eval_timesteps has 1000, the model's last is 999"):
        evaluate_pair_accuracy(spm("eval_timesteps=[1000]"))


def test_a_scorer_of_another_image_size_is_one_line(spm: Recipe, tmp_path: Path) -> None:
    from fastpref.emoji.random_models import make_random_clip

    other = make_random_clip(tmp_path / "clip64", image_size=64)
    file = json.loads((other / "preprocessor_config.json").read_text())
    file["crop_size"] = {"height": 32, "width": 32}
    (other / "preprocessor_config.json").write_text(json.dumps(file))
    with pytest.raises(UserError, match="makes pictures of 32 pixels, the CLIP takes 64"):
        train(spm(f"scorer={other}"))


def test_evaluating_an_unfinished_run_is_one_line(spm: Recipe) -> None:
    from fastpref.cli import evaluate

    run = train(spm("name=a", "steps=1"))
    (run / FOLDER_NAME / WEIGHTS_NAME).unlink()
    with pytest.raises(UserError, match="no trained preference model there"):
        evaluate(run, None)
