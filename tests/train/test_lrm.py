"""Training the latent reward model: the loss, counts, resuming, evaluation, the emoji world and bad input."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastpref.config import Config, load_config
from fastpref.errors import UserError
from fastpref.models.latent_reward_file import CONFIG_NAME, FOLDER_NAME, WEIGHTS_NAME
from fastpref.runs import evaluate_run, run_training, trained_scorer
from fastpref.train.job import TrainJob
from fastpref.train.step_preference import LatentRewardTrainer

Recipe = Callable[..., Config]
BASE = ["method=lrm", "train=full", "eval_prompts=3", "learning_rate=1e-3", "checkpoint_every=1000", "tracker=none"]


@pytest.fixture
def lrm(sdxl_config: Recipe) -> Recipe:
    return lambda *more: sdxl_config(*BASE, *more)


@pytest.fixture
def lrm15(sd15_config: Recipe) -> Recipe:
    return lambda *more: sd15_config(*BASE, *more)


def open_trainer(config: Config) -> LatentRewardTrainer:
    trainer = TrainJob.open(config).trainer
    assert isinstance(trainer, LatentRewardTrainer)
    return trainer


def loss_and_gradient(config: Config) -> tuple[dict[str, Any], torch.Tensor, LatentRewardTrainer]:
    trainer = open_trainer(config)
    kept: list[torch.Tensor] = []

    def keep(rate: float, loss: torch.Tensor) -> torch.Tensor:
        kept.append(torch.cat([p.grad.flatten() for p in trainer.model.trainable.values() if p.grad is not None]))
        return torch.zeros(())

    trainer.engine.launch = keep  # type: ignore[method-assign]
    return trainer.step(0), kept[0], trainer


def train(config: Config) -> Path:
    run_training(config)
    return config.run_dir


def lines(run: Path) -> list[dict[str, Any]]:
    text = (run / "metrics.jsonl").read_text()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in text.splitlines()]


@pytest.mark.parametrize("family", ["lrm", "lrm15"])
def test_gradient_equals_a_literal_implementation(request: pytest.FixtureRequest, family: str) -> None:
    """Pair by pair in float64 from the noisy latents on, guidance in rows of their own; any micro-batch size."""
    make: Recipe = request.getfixturevalue(family)
    settings = ["precision=fp64", "guidance_scale=3.5"]
    metrics, gradient, trainer = loss_and_gradient(make(*settings, "micro_batch_size=4"))
    model, store = trainer.model, trainer.batches.store
    plan = trainer.sampler.batch(0)
    batch = trainer.batches.build(plan, slice(0, 8))
    c, (empty, empty_pooled) = batch.conditioning, store.empty_prompt()
    size = 32.0  # pixels, what both pictures are shown to be
    frequency = Counter(store.captions(range(len(store))))

    def means(row: int, prompt: torch.Tensor, pooled: torch.Tensor | None) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        unet, added = model.unet, None
        if pooled is not None:
            added = {"text_embeds": pooled, "time_ids": torch.tensor([[size, size, 0, 0, size, size]]).double()}
        hooks = [
            block.register_forward_hook(lambda _, __, out: seen.append(out if torch.is_tensor(out) else out[0]))
            for block in (
                *((b.attentions if hasattr(b, "attentions") else b.resnets)[-1] for b in unet.down_blocks),
                unet.mid_block,
            )
        ]
        unet.conv_out, unet.conv_norm_out = torch.nn.Identity(), None
        unet(batch.noisy[row][None], batch.timesteps[row], prompt.double(), added_cond_kwargs=added)
        for hook in hooks:
            hook.remove()
        return [hidden.mean(dim=(2, 3))[0] for hidden in seen]

    def score(row: int, caption: str) -> torch.Tensor:
        own = None if c.pooled_prompt_embeds is None else c.pooled_prompt_embeds[row][None]
        *stages, prompted = means(row, c.prompt_embeds[row][None], own)
        none = None if empty_pooled is None else empty_pooled.double()
        without = means(row, empty, none)[-1]
        picture = model.visual_projection(torch.cat([*stages, without + 3.5 * (prompted - without)]))
        words = trainer.tokenizer(caption, truncation=True).input_ids  # ends with the end-of-text token
        text = model.text_projection(c.prompt_embeds[row][len(words) - 1] if own is None else own[0])
        return model.logit_scale.exp() * torch.nn.functional.cosine_similarity(picture, text, dim=0)

    total, weights = torch.zeros((), dtype=torch.float64), 0.0
    for pair, caption in enumerate(store.captions(plan.indices)):
        loss = torch.nn.functional.softplus(score(8 + pair, caption) - score(pair, caption))
        total, weights = total + loss / frequency[caption], weights + 1 / frequency[caption]
    literal = total / weights
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(literal, list(model.trainable.values()))])
    assert abs(metrics["loss"] - literal.item()) < 1e-9 * literal.item()
    assert (gradient - expected).abs().max() <= 1e-8 * expected.abs().max()
    for mode in ("selective", "full"):
        whole, own, _ = loss_and_gradient(make(*settings, f"gradient_checkpointing={mode}"))
        assert abs(whole["loss"] - metrics["loss"]) < 1e-9, mode
        assert (own - gradient).abs().max() <= 1e-9 * gradient.abs().max(), mode


def test_the_work_is_what_hooks_count(lrm: Recipe) -> None:
    """A row of the half UNet a picture, two with guidance; no VAE, no text encoder, no whole UNet."""
    for guidance, each in ((7.5, 2), (1.0, 1)):
        trainer, rows = open_trainer(lrm("micro_batch_size=4", f"guidance_scale={guidance}")), []
        trainer.model.unet.conv_in.register_forward_hook(lambda _, args, out, rows=rows: rows.append(len(out)))
        for step in range(2):
            trainer.step(step)
        work = trainer.work()
        assert work.scorer_forwards == sum(rows) == 2 * 16 * each
        assert (work.unet_forwards, work.vae_decodes, work.text_forwards) == (0, 0, 0)


def test_ten_steps_equal_five_and_five_more(lrm15: Recipe) -> None:
    common = ["ema_decay=0.9", "warmup_steps=3", "micro_batch_size=4"]
    whole = train(lrm15("name=whole", "steps=10", *common))
    train(lrm15("name=parts", "steps=5", *common))
    parts = train(lrm15("name=parts", "steps=10", "resume=auto", *common))
    one, two = (load_file(run / FOLDER_NAME / WEIGHTS_NAME) for run in (whole, parts))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert lines(whole) == lines(parts) and len(lines(whole)) == 10
    counts = [json.loads((run / "summary.json").read_text())["scorer_forwards"] for run in (whole, parts)]
    assert counts == [10 * 32] * 2
    for change, says in (("guidance_scale=2", r"guidance_scale is 2\.0"), ("clip=elsewhere", "clip is 'elsewhere'")):
        with pytest.raises(UserError, match=f"{says} but the run was started with"):
            train(lrm15("name=parts", "steps=11", "resume=auto", change, *common))


@pytest.fixture(scope="module")
def emoji_store(tmp_path_factory: pytest.TempPathFactory, few_records: Path) -> Path:
    """40 pairs prepared for the bundled model."""
    from fastpref.data.prepare import prepare

    store = tmp_path_factory.mktemp("stores") / "emoji"
    prepare(load_config("", ["model=emoji", f"records={few_records}", f"store={store}"]), progress=False)
    return store


def test_it_learns_the_emoji_world_s_preference_in_a_few_steps(emoji_store: Path, tmp_path: Path) -> None:
    """From what tells nothing of line art to nine in ten held-out pairs, also where most is noise."""
    config = load_config(
        "",
        [
            *("name=a", *BASE, f"store={emoji_store}", f"output_dir={tmp_path}", "batch_size=8", "steps=32"),
            *("learning_rate=2e-4", "warmup_steps=4", "guidance_scale=1", "eval_prompts=20", "eval_timesteps=[0, 701]"),
        ],
    )
    run = train(config)
    found = json.loads((run / "summary.json").read_text())["evaluation"]
    before, after = (found[tag]["pair_accuracy"] for tag in ("before", "after"))
    assert min(after.values()) >= 0.9, after
    assert max(before.values()) < 0.8, before
    assert found["after"]["details"]["pairs"] == 20
    work = found["after"]["details"]["work"]
    assert work["vae_encodes"] == 40 and work["scorer_forwards"] == 80 and work["vae_decodes"] == 0
    facts = json.loads((run / FOLDER_NAME / CONFIG_NAME).read_text())
    assert facts["kind"] == "latent_reward_model" and facts["family"] == "sdxl" and facts["sizes"] == [[32, 32]]
    assert (
        trained_scorer(run) == run / FOLDER_NAME and "Accuracy on held-out pairs" in evaluate_run(run, []).read_text()
    )
    again = json.loads((run / "summary.json").read_text())["evaluation"]
    assert again["after"]["pair_accuracy"] == after


def test_a_trained_model_is_where_another_run_starts(lrm: Recipe) -> None:
    run = train(lrm("name=first", "steps=2", "evaluate=true", "eval_timesteps=[501]"))
    first = json.loads((run / "summary.json").read_text())["evaluation"]
    assert not math.isclose(first["before"]["pair_margin"]["501"], first["after"]["pair_margin"]["501"], rel_tol=1e-3)
    config = lrm("name=second", f"scorer={run / FOLDER_NAME}", "steps=1", "evaluate=true", "eval_timesteps=[501]")
    weights = load_file(run / FOLDER_NAME / WEIGHTS_NAME)
    assert torch.equal(open_trainer(config).model.visual_projection.weight, weights["visual_projection.weight"])
    second = json.loads((train(config) / "summary.json").read_text())["evaluation"]
    assert second["before"]["pair_margin"] == pytest.approx(first["after"]["pair_margin"], rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["relabel=0.1"], "relabel needs the scores of a CLIP"),
        (["train=lora"], "set train=full"),
        (["scorer=none/there"], "no latent reward model there"),
        (["scorer=CLIP"], "no latent reward model there"),
        (["store=SD15"], "made for sd15, the model is sdxl"),
        (["unet=SD15"], "the UNet is one of SD1.5"),
        (["caption_dropout=0.1"], "caption_dropout is set with method lrm"),
        (["batch_size=64"], "no bucket of the store has a batch of 64"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    lrm: Recipe, sd15_store: Path, sd15: Path, clip: Path, tmp_path: Path, overrides: list[str], says: str
) -> None:
    known = {"store=SD15": f"store={sd15_store}", "unet=SD15": f"unet={sd15 / 'unet'}", "scorer=CLIP": f"scorer={clip}"}
    with pytest.raises(UserError, match=says) as error:
        train(lrm(*(known.get(override, override) for override in overrides)))
    assert "\n" not in str(error.value) and not (tmp_path / "runs").exists()


def test_a_latent_reward_model_is_no_start_for_a_step_aware_one(lrm: Recipe, clip: Path) -> None:
    run = train(lrm("name=a", "steps=1"))
    with pytest.raises(UserError, match="no start for method spm"):
        train(lrm("name=b", "method=spm", f"clip={clip}", f"scorer={run / FOLDER_NAME}"))


def test_evaluating_an_unfinished_run_is_one_line(lrm: Recipe) -> None:
    run = train(lrm("name=a", "steps=1"))
    (run / FOLDER_NAME / WEIGHTS_NAME).unlink()
    with pytest.raises(UserError, match="no trained preference model there"):
        evaluate_run(run, None)
