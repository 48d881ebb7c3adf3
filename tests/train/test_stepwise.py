"""SPO and LPO training: the loss against the official formulas, its cost, layouts, resuming and bad input."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler
from safetensors.torch import load_file

from fastpref.config import Config, load_config, save_config
from fastpref.errors import UserError
from fastpref.models.guidance import guided
from fastpref.models.loading import resolve_model_dir
from fastpref.models.recompute import MODES
from fastpref.rollout.transitions import Transitions
from fastpref.runs import run_training
from fastpref.train.job import TrainJob
from fastpref.train.stepwise import StepwiseTrainer, open_trainer
from fastpref.watch import Interrupted, Watch

Recipe = Callable[..., Config]
SCORERS = '''
"""Scorers for the tests: contrast and brightness, NaN for one prompt, and none that differ."""
import torch

def bright(images, prompts, t):
    return 1500 * images.mean(dim=(1, 2, 3)) + 800 * images.std(dim=(1, 2, 3))

def bad(images, prompts, t):
    scores = bright(images, prompts, t)
    scores[torch.tensor([prompt == prompts[0] for prompt in prompts])] = float("nan")
    return scores

def same(images, prompts, t):
    return torch.zeros(len(images))

def noisy(latents, prompts, t):
    return 10 * latents.mean(dim=(1, 2, 3))

noisy.takes = "latents"
'''


@pytest.fixture(scope="module", autouse=True)
def scorers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A module of scorers on Python's path, here and in processes that are started."""
    folder = tmp_path_factory.mktemp("scorers")
    (folder / "tiny_scorers.py").write_text(SCORERS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        yield


@pytest.fixture(scope="module")
def recipe_in(sdxl: Path, one_level_unet: Path, sd15: Path, few_records: Path) -> Callable[[Path], Recipe]:
    """``recipe_in(folder)``: small SPO recipes on a random model, ``family`` sdxl or sd15, writing below the folder."""

    def make(folder: Path, *overrides: str, family: str = "sdxl") -> Config:
        settings = {
            "method": "spo",
            **({"model": sdxl, "unet": one_level_unet} if family == "sdxl" else {"model": sd15}),
            "records": few_records,
            "output_dir": folder / "runs",
            "scorer": "tiny_scorers:bright",
            **{"resolution": 16, "sample_steps": 6, "plain_steps": 2, "candidates": 3, "guidance_scale": 3.0},
            **{"rollout_prompts": 3, "rollout_batch_size": 2, "batch_size": 4, "steps": 4, "score_threshold": 0.05},
            **{"lora_rank": 4, "learning_rate": 1e-3, "evaluate": "false", "tracker": "none", "checkpoint_every": 1},
        }
        return load_config("", [*(f"{key}={value}" for key, value in settings.items()), *overrides])

    return lambda folder: partial(make, folder)


@pytest.fixture
def recipe(recipe_in: Callable[[Path], Recipe], tmp_path: Path) -> Recipe:
    """The same, writing below the test's own folder."""
    return recipe_in(tmp_path)


def opened(config: Config, run_dir: Path) -> StepwiseTrainer:
    trainer = open_trainer(config, resolve_model_dir(config.model), torch.device("cpu"))
    run_dir.mkdir(parents=True, exist_ok=True)
    trainer.begin(run_dir, Watch())
    return trainer


def perturbed(trainer: StepwiseTrainer, std: float) -> StepwiseTrainer:
    """Away from the reference."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for parameter in trainer.policy.trainable.values():
            parameter.add_(torch.randn_like(parameter) * std)
    return trainer


def literal_log_likelihood(trainer: StepwiseTrainer, part: Transitions, side: str, *, policy: bool) -> torch.Tensor:
    """As the official code has it: a forward of its own for either side, mean over the elements of the log density."""
    config, schedule, sampler = trainer.config, trainer.collector.sampler.schedule, trainer.collector.sampler
    start, end = (part.x_t, part.x_w) if side == "win" else (part.x_t_l, part.x_l)
    t, t_prev = (torch.tensor([step[i] for step in sampler.steps])[part.step] for i in (0, 1))
    conditioning = trainer.collector.book.conditioning([trainer.prompts[int(i)] for i in part.prompt])
    predict = trainer.policy.predict if policy else trainer.policy.predict_reference
    prediction = guided(predict, start, t, conditioning, trainer.collector.book.empty(), config.guidance_scale)
    now, before = (schedule.alphas_cumprod[index].view(-1, 1, 1, 1) for index in (t, t_prev))
    if schedule.prediction_type == "v_prediction":
        x0 = now.sqrt() * start - (1 - now).sqrt() * prediction
        noise = now.sqrt() * prediction + (1 - now).sqrt() * start
    else:
        x0, noise = (start - (1 - now).sqrt() * prediction) / now.sqrt(), prediction
    variance = config.eta**2 * (1 - before) / (1 - now) * (1 - now / before)
    mean = before.sqrt() * x0 + (1 - before - variance).sqrt() * noise
    density = -((end - mean) ** 2) / (2 * variance) - variance.sqrt().log() - math.log(math.sqrt(2 * math.pi))
    return density.mean(dim=(1, 2, 3))


def literal_loss(trainer: StepwiseTrainer, part: Transitions) -> tuple[torch.Tensor, torch.Tensor]:
    clip, ratios = trainer.config.ratio_clip, []
    for side in ("win", "lose"):
        own = literal_log_likelihood(trainer, part, side, policy=True)
        with torch.no_grad():
            reference = literal_log_likelihood(trainer, part, side, policy=False)
        ratios.append((own - reference).exp())
    bounded = [ratio if clip is None else ratio.clamp(1 - clip, 1 + clip) for ratio in ratios]
    margin = trainer.config.beta * (bounded[0].log() - bounded[1].log())
    return -torch.nn.functional.logsigmoid(margin).mean(), torch.stack(ratios)


def gradients(trainer: StepwiseTrainer, loss: torch.Tensor) -> torch.Tensor:
    found = torch.autograd.grad(loss, list(trainer.policy.trainable.values()), allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
@pytest.mark.parametrize("inner", [0, 1])
@pytest.mark.parametrize("clipped", [False, True])
def test_loss_ratios_and_gradients_are_the_official_ones(
    recipe: Recipe, tmp_path: Path, family: str, inner: int, clipped: bool
) -> None:
    config = recipe("precision=fp64", f"inner_steps={inner}", "ratio_clip=null", family=family)
    trainer = perturbed(opened(config, tmp_path / "run"), 0.03)
    trainer._next_round(0)
    assert trainer.transitions is not None
    part = trainer.transitions.rows(trainer.batches[0])
    assert bool((~part.shared).any()) == bool(inner)
    if clipped:  # half of the ratios are outside
        bound = float((trainer.objective.loss(part)[1] - 1).abs().quantile(0.5))
        trainer.config = trainer.objective.config = config.model_copy(update={"ratio_clip": bound})
    loss, ratios = trainer.objective.loss(part)
    expected, expected_ratios = literal_loss(trainer, part)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(ratios, expected_ratios, rtol=1e-6, atol=0)
    ours, theirs = gradients(trainer, loss), gradients(trainer, expected)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-6


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_ratio_is_exactly_one_at_the_start(recipe: Recipe, tmp_path: Path, precision: str) -> None:
    trainer = opened(recipe(f"precision={precision}", "inner_steps=1"), tmp_path / "run")
    metrics = trainer.step(0)
    assert metrics["ratio_winner"] == metrics["ratio_loser"] == 1.0
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert trainer.step(1)["ratio_winner"] != 1.0


@pytest.mark.parametrize("inner", [0, 1])
def test_metrics_a_step_late_are_those_of_waiting_for_each(recipe: Recipe, tmp_path: Path, inner: int) -> None:
    settings = (f"inner_steps={inner}", "batch_size=2", "micro_batch_size=1")
    ahead, waiting = (opened(recipe(*settings), tmp_path / name) for name in ("ahead", "waiting"))
    ahead.step(0)
    assert len(ahead.batches) >= 3
    launched = [ahead.launch(step) for step in (1, 2)]
    assert [metrics() for metrics in launched] == [waiting.step(step) for step in range(3)][1:]


def counting(unet: Any, counted: Counter[str]) -> list[Any]:
    """Rows through the UNet, by what they are for."""

    def after(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[torch.Tensor, ...]) -> None:
        rows = len(args[0])
        counted["policy" if torch.is_grad_enabled() else "other"] += rows
        if output[0].requires_grad:

            def seen(gradient: torch.Tensor) -> None:
                counted["backward"] += len(gradient)

            output[0].register_hook(seen)

    return [unet.register_forward_hook(after, with_kwargs=True)]


def test_a_pair_costs_two_rows_each_way(recipe: Recipe, tmp_path: Path) -> None:
    """K = 4, 20 steps, 16 of them branched: 130 rows a prompt, and 2, 2 and 2 a kept pair (the official code: 4)."""
    config = recipe("sample_steps=20", "plain_steps=4", "candidates=4", "rollout_prompts=2", "batch_size=8")
    trainer = opened(config, tmp_path / "run")
    counted = Counter[str]()
    counting(trainer.policy.unet, counted)
    trainer._next_round(0)
    assert counted == {"other": 2 * 130}
    step = 0
    while step == 0 or trainer.position < len(trainer.batches):
        trainer.step(step)
        step += 1
    pairs = trainer.figures(step)["stepwise"]["pairs_kept"]
    assert pairs >= 8
    assert counted == {"other": 260 + 2 * pairs, "policy": 2 * pairs, "backward": 2 * pairs}
    work = trainer.work()
    assert (work.unet_forwards, work.unet_backwards) == (260 + 4 * pairs, 2 * pairs)
    assert work.text_forwards == 2 + 1
    assert (work.vae_decodes, work.scorer_forwards) == (2 * 64, 2 * 64)
    assert trainer.figures(step)["samples_seen"] == pairs


def test_a_scorer_of_noisy_candidates_needs_no_x0(recipe: Recipe, tmp_path: Path) -> None:
    trainer = opened(recipe("scorer=tiny_scorers:noisy", "rollout_prompts=2", "plain_steps=0"), tmp_path / "run")
    trainer._next_round(0)
    assert trainer.policy.forwards == 2 * 2 * 6 and trainer.work().vae_decodes == 0


@pytest.mark.parametrize(
    ("scheduler", "timesteps"),
    [
        (DDPMScheduler(), [664, 498, 332, 166, 0]),
        (DDIMScheduler(timestep_spacing="linspace"), [799, 599, 400, 200, 0]),
        (EulerDiscreteScheduler(timestep_spacing="trailing"), [832, 666, 499, 332, 166, 0]),
    ],
)
def test_a_round_is_trained_on_whatever_the_models_grid(
    recipe: Recipe, sdxl: Path, tmp_path: Path, scheduler: Any, timesteps: list[int]
) -> None:
    """Scores are asked for at t - 1 by default, at t with LPO's reference preset; the loss is finite on every step."""
    model = tmp_path / "model"
    shutil.copytree(sdxl, model, copy_function=lambda source, target: Path(target).hardlink_to(source))
    shutil.rmtree(model / "scheduler")
    scheduler.save_pretrained(model / "scheduler")
    asked = {}
    for preset in ("default", "reference"):
        settings = ["method=lpo", f"preset={preset}", "scorer=tiny_scorers:noisy", "plain_steps=0", "score_threshold=0"]
        config = recipe(f"model={model}", *settings, "steps=2", f"name={preset}")
        run_training(config)
        run = config.run_dir
        (line, *_) = [json.loads(text) for text in (run / "rollouts.jsonl").read_text().splitlines()]
        asked[preset] = line["timesteps"]
        losses = [json.loads(text)["loss"] for text in (run / "metrics.jsonl").read_text().splitlines()]
        assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert asked["default"] == timesteps
    assert asked["reference"][1:] == timesteps[:-1] and asked["reference"][0] > timesteps[0]


def test_micro_batches_do_not_change_the_training(recipe: Recipe, tmp_path: Path) -> None:
    def trained(*more: str) -> torch.Tensor:
        trainer = opened(recipe("precision=fp64", "inner_steps=1", *more), tmp_path / "-".join(["run", *more]))
        for step in range(4):
            trainer.step(step)
        return torch.cat([p.detach().flatten() for p in trainer.policy.trainable.values()])

    whole = trained()
    for micro in (3, 2, 1):
        torch.testing.assert_close(whole, trained(f"micro_batch_size={micro}"), rtol=0, atol=1e-9)


@pytest.mark.parametrize("extra", [["inner_steps=1"], ["fused_ops=true", "train=full"]])
def test_recomputation_does_not_change_the_training(recipe: Recipe, tmp_path: Path, extra: list[str]) -> None:
    """Win and lose apart or together, bit for bit: the same ops on the same numbers."""
    found = {}
    for mode in MODES:
        config = recipe(*extra, "sample_steps=4", f"gradient_checkpointing={mode}")
        trainer = perturbed(opened(config, tmp_path / mode), 0.01)
        trainer.step(0)
        assert trainer.policy.recomputed == (trainer.policy.backwards if mode == "full" else 0)
        found[mode] = torch.cat([p.detach().flatten() for p in trainer.policy.trainable.values()])
    assert torch.equal(found["selective"], found["none"]) and torch.equal(found["full"], found["none"])


def test_a_round_is_the_same_on_two_ranks(recipe: Recipe, tmp_path: Path) -> None:
    """Each rank rolls out its share; joined in rank order, their transitions are those of one process."""
    collector = opened(recipe("precision=fp64", "inner_steps=1"), tmp_path / "run").collector
    prompts, indices = ["red heart", "blue circle", "green tree"], torch.tensor([4, 2, 9])
    whole = collector.collect(prompts, indices, 3).transitions
    parts = [collector.collect(prompts[rows], indices[rows], 3).transitions for rows in (slice(0, 2), slice(2, 3))]
    for name, tensor in Transitions.concatenate(parts).tensors().items():
        torch.testing.assert_close(tensor, getattr(whole, name), rtol=1e-9, atol=1e-9)
    assert whole.prompt.unique().tolist() == [2, 4, 9] and whole.prompt[0] == 4


def test_batches_of_a_round_are_even_and_leave_nothing_out(recipe: Recipe, tmp_path: Path) -> None:
    trainer = opened(recipe("batch_size=8"), tmp_path / "run")
    trainer.round = 5
    for count in (1, 3, 8, 11, 12, 30):
        parts = trainer._split(count)
        sizes = [len(part) for part in parts]
        assert sorted(torch.cat(parts).tolist()) == list(range(count))
        assert max(sizes) - min(sizes) <= 1 and len(parts) == max(1, round(count / 8))
    assert trainer._split(30)[0].tolist() != sorted(trainer._split(30)[0].tolist())


def test_a_run_leaves_what_the_report_reads(recipe: Recipe) -> None:
    config = recipe("name=whole", "steps=5")
    run_training(config)
    run = config.run_dir
    rounds: dict[int, dict[str, Any]] = {}
    for line in (run / "rollouts.jsonl").read_text().splitlines():
        entry = json.loads(line)
        rounds[entry["round"]] = entry
    summary = json.loads((run / "summary.json").read_text())
    totals = summary["stepwise"]
    assert totals["rounds"] == len(rounds) and totals["pairs_kept"] == sum(r["pairs_kept"] for r in rounds.values())
    assert totals["pools"] == sum(r["pools"] for r in rounds.values()) == len(rounds) * 3 * 4
    assert totals["rollout_unet_forwards"] == sum(r["unet_forwards"] for r in rounds.values())
    assert summary["unet_forwards"] == totals["rollout_unet_forwards"] + 4 * summary["samples_seen"]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5]
    assert {line["pairs_kept"] for line in metrics} <= {r["pairs_kept"] for r in rounds.values()}
    pools = load_file(run / "pools" / "round-00000.safetensors")
    assert pools["latents"].shape == (4, 3, 4, 8, 8)
    assert pools["scores"].shape == (4, 3) and pools["chosen"].shape == pools["kept"].shape == (4,)


KILLER = """
import os, signal, sys
sys.argv = ["fastpref", "train", sys.argv[1]]
import fastpref.rollout.collect as collect, fastpref.rollout.queue as queue, fastpref.train.transitions as transitions
where, count = "{where}", {count}
place, name = {{"rollout": (collect.Collector, "_breathe"), "scoring": (queue.ScoringQueue, "_score"),
                "training": (transitions.TransitionObjective, "laid_out")}}[where]
plain = getattr(place, name)
def deadly(*args, **kwargs):
    global count
    count -= 1
    if count < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(*args, **kwargs)
setattr(place, name, deadly)
from fastpref.cli import main
main()
"""


@pytest.fixture(scope="module")
def uninterrupted(recipe_in: Callable[[Path], Recipe], tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = recipe_in(tmp_path_factory.mktemp("whole"))("name=whole", "steps=6")
    run_training(config)
    return config


@pytest.mark.parametrize(("where", "count"), [("rollout", 40), ("scoring", 7), ("training", 3)])
def test_a_killed_run_continues_bit_for_bit(
    recipe: Recipe, uninterrupted: Config, tmp_path: Path, where: str, count: int
) -> None:
    killed = recipe("name=killed", "steps=6")
    save_config(killed, tmp_path / "killed.yaml")
    done = forked.run(["-c", KILLER.format(where=where, count=count), str(tmp_path / "killed.yaml")])
    assert done.returncode == -signal.SIGKILL, done.stderr
    steps = sorted(path.name for path in (killed.run_dir / "checkpoints").glob("step-*"))
    assert steps and "step-000006" not in steps
    run_training(recipe("name=killed", "steps=6", "resume=auto"))
    name = "pytorch_lora_weights.safetensors"
    expected, found = load_file(uninterrupted.run_dir / name), load_file(killed.run_dir / name)
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    lines = [
        [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in path.read_text().splitlines()]
        for path in (uninterrupted.run_dir / "metrics.jsonl", killed.run_dir / "metrics.jsonl")
    ]
    assert lines[0] == lines[1]


def test_a_stop_in_the_rollout_changes_nothing(recipe: Recipe, tmp_path: Path) -> None:
    trainer = opened(recipe(), tmp_path / "run")
    trainer.step(0)
    trainer.position = len(trainer.batches)
    before, asked = (trainer.work(), trainer.round, dict(trainer.totals)), Counter[str]()

    def stopping() -> bool:
        asked["times"] += 1
        return asked["times"] > 3

    trainer.collector.watch = Watch(stopping=stopping)
    with pytest.raises(Interrupted):
        trainer.step(1)
    assert (trainer.work(), trainer.round, trainer.totals) == before


def test_pools_with_nan_are_dropped_and_counted(recipe: Recipe, tmp_path: Path) -> None:
    trainer = opened(
        recipe("scorer=tiny_scorers:bad", "rollout_batch_size=3", "decode_batch_size=64"), tmp_path / "run"
    )
    metrics = trainer.step(0)
    totals = trainer.figures(1)["stepwise"]
    assert totals["pools_dropped_nan"] == 4  # one prompt's four pools, in three rounds at most
    assert math.isfinite(metrics["loss"]) and trainer.skipped == 0
    assert trainer.transitions is not None
    first = trainer.order.batch(0).indices[0]
    assert int(first) not in trainer.transitions.prompt.tolist()


def test_no_clear_pair_is_a_message_with_the_gaps(recipe: Recipe) -> None:
    with pytest.raises(UserError, match=r"no pair of 3 rollouts .* quantiles are 0\.1: 0, 0\.5: 0.* needed > 0\.1"):
        run_training(recipe("scorer=tiny_scorers:same"))


def test_presets_and_defaults_of_a_method(recipe: Recipe) -> None:
    assert recipe().beta == 10.0 and recipe().max_grad_norm == 1.0
    official = load_config("", ["method=spo", "preset=reference"])
    assert official.max_grad_norm is None and (official.ratio_clip, official.beta, official.eta) == (0.1, 10.0, 1.0)
    assert (official.weight_decay, official.guidance_scale) == (1e-4, 5.0)
    assert load_config("", ["method=spo", "preset=reference", "max_grad_norm=2"]).max_grad_norm == 2.0
    latent = load_config("", ["method=lpo"])
    assert (latent.beta, latent.score_threshold, latent.plain_steps) == (500.0, (0.35, 0.5), 0)
    assert (latent.score_at, latent.preset, latent.max_grad_norm) == ("next", "default", 1.0)
    latent = load_config("", ["method=lpo", "preset=reference"])
    assert (latent.score_at, latent.beta, latent.max_grad_norm) == ("current", 500.0, None)
    assert (latent.score_threshold, latent.plain_steps, latent.candidates) == ((0.35, 0.5), 0, 4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["candidates=1"], "candidates is 1"),
        (["plain_steps=6"], "plain_steps is 6, must be below sample_steps 6"),
        (["inner_steps=2"], "3 must divide the 4 steps"),
        (["score_threshold=1.0"], "score_threshold is 1.0"),
        (["score_threshold=[0.5, 0.3]"], "low before high"),
        (["timestep_range=[900, 1000]"], "no segment of 1 steps lies in it"),
        (["safeguard=0.9"], "safeguard is set with method spo"),
        (["preset=reference", "method=rpo"], "there is one for spo and lpo only"),
        (["score_at=current"], "score_at is current with method spo"),
        (["scorer=tiny_scorers:nothing"], "the module has no nothing"),
        (["prompts=missing.txt"], "no such preference records"),
        (["rollout_prompts=999"], "999"),
    ],
)
def test_bad_input_is_one_line(recipe: Recipe, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        TrainJob.open(recipe(*overrides))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_small_decoder_says_how_far_it_agrees(recipe: Recipe, clip: Path, tmp_path: Path) -> None:
    """In every round, on one segment that the VAE decodes too."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    sizes: dict[str, Any] = {f"{side}_block_out_channels": (8, 8) for side in ("encoder", "decoder")}
    counts: dict[str, Any] = {f"num_{side}_blocks": (1, 1) for side in ("encoder", "decoder")}
    AutoencoderTiny(latent_channels=4, **sizes, **counts).save_pretrained(tmp_path / "small")
    overrides = [f"scorer={clip}", f"small_decoder={tmp_path / 'small'}", "score_threshold=0", "rollout_batch_size=3"]
    trainer = opened(recipe(*overrides), tmp_path / "run")
    trainer._next_round(0)
    line = json.loads((tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()[-1])
    assert line["decoder_pools"] == 3 and line["decoder_same_pair"] in {0.0, 1 / 3, 2 / 3, 1.0}
    assert -1 <= line["decoder_spearman"] < 1
    assert trainer.work().vae_decodes == 3 * 3 * 4 + 3 * 3  # all through the small one, a segment through the VAE
