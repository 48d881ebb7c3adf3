"""Training is a function of the recipe, not of the layout: two processes under every engine against one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
import ranks
import torch
from ranks import Task
from safetensors.torch import load_file

from fastpref.config import Config, load_config

STEPS = 4
EXACT = ["precision=fp64"]
CONFIGS = Path(__file__).parents[2] / "configs" / "deepspeed"
SCORER = """
def bright(images, prompts, t):
    return 1500 * images.mean(dim=(1, 2, 3)) + 800 * images.std(dim=(1, 2, 3))
"""
METHODS = {
    "dpo": ["method=dpo", "micro_batch_size=4"],
    "rpo": ["method=rpo", "group_size=4", "temperature=0.3", "micro_batch_size=2", "ema_decay=0.9"],
    "spo": [
        *("method=spo", "scorer=rank_scorers:bright", "resolution=16", "sample_steps=4", "plain_steps=2"),
        *("candidates=3", "guidance_scale=1.0", "rollout_prompts=4", "rollout_batch_size=2", "batch_size=5"),
        *("micro_batch_size=3", "score_threshold=0.05", "beta=10"),
    ],
}
SCORERS = {"spm": ["method=spm", "train=full"], "lrm": ["method=lrm", "train=full", "guidance_scale=2"]}
LAYOUTS = {
    "2x4": [],
    "ZeRO-1": ["engine=deepspeed", "zero_stage=1"],
    "ZeRO-2": ["engine=deepspeed", "zero_stage=2"],
    "ZeRO-3": ["engine=deepspeed", "zero_stage=3"],
}
SHARDED = [layout for layout in LAYOUTS if layout.startswith("ZeRO")]
SCALED = ["2x4", "ZeRO-2", "ZeRO-3"]
FIGURES = (
    *("loss", "grad_norm", "margin", "accuracy", "effective_contrasts", "pairs_kept", "reward_winner", "score_winner"),
)
COUNTS = ("samples_seen", "unet_forwards", "unet_backwards", "vae_decodes", "scorer_forwards")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the runs go, with a scorer on Python's path and one thread everywhere."""
    place, before = tmp_path_factory.mktemp("ranks"), torch.get_num_threads()
    (place / "rank_scorers.py").write_text(SCORER)
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(place)
        patch.setenv("PYTHONPATH", ":".join([str(place), *filter(None, sys.path)]))
        yield place
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def recipe(
    folder: Path, sdxl: Path, sdxl_store: Path, few_records: Path, clip: Path, one_level_unet: Path
) -> Callable[..., Config]:
    base = [
        *(f"model={sdxl}", f"store={sdxl_store}", f"records={few_records}", f"output_dir={folder}/runs"),
        *(f"clip={clip}", f"unet={one_level_unet}", "batch_size=8", "beta=200", "lora_rank=4", "learning_rate=0.001"),
        *("lora_targets=[to_v]", "evaluate=false", "tracker=none", "keep_best=loss"),
    ]
    steps = [f"steps={STEPS}", f"checkpoint_every={STEPS // 2}"]
    return lambda name, *more: load_config("", [*base, *steps, f"name={name}", *more])


def lines(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]


def weights(config: Config) -> dict[str, torch.Tensor]:
    (file,) = [*config.run_dir.glob("*.safetensors"), *config.run_dir.glob("*_model/*.safetensors")]
    return load_file(file)


def summary(config: Config) -> dict[str, Any]:
    return json.loads((config.run_dir / "summary.json").read_text())


def difference(a: Config, b: Config, *, rounded: bool = False) -> float:
    """The largest of all figures of all steps and of all weights.

    ``rounded`` leaves out the accuracy, a count of signs: here some margins are as small as fp32's rounding.
    """
    left, right = weights(a), weights(b)
    assert {name: x.shape for name, x in left.items()} == {name: x.shape for name, x in right.items()}
    found = [float((left[name] - right[name]).abs().max()) for name in left]
    for mine, other in zip(lines(a), lines(b), strict=True):
        for name in (name for name in FIGURES if not (rounded and name == "accuracy")):
            assert (mine.get(name) is None) == (other.get(name) is None), name
            if mine.get(name) is not None:
                found.append(abs(mine[name] - other[name]) / max(1.0, abs(mine[name])))
    return max(found)


def same(a: Config, b: Config) -> bool:
    left, right = weights(a), weights(b)
    return all(torch.equal(left[name], right[name]) for name in left)


def trained_by_two(tasks: list[Task], folder: Path) -> None:
    """One after another, in two processes."""
    results = ranks.finish(ranks.start([ranks.__file__, *ranks.recipe_files(tasks, folder)]), timeout=900)
    assert [code for code, _ in results] == [0, 0], results[0][1] + results[1][1]


def compiled(recipe: Callable[..., Config], whole: str) -> Config:
    engine = [*LAYOUTS["ZeRO-2"], f"compile={whole}", "gradient_checkpointing=full"]
    return recipe(f"compiled-{whole}", *EXACT, *METHODS["dpo"], *engine)


@pytest.fixture(scope="module")
def runs(folder: Path, recipe: Callable[..., Config]) -> dict[str, Config]:
    """Every method in every layout, in float64; DPO in fp32, offloaded and in fp16."""
    made = {}
    for layout, engine in LAYOUTS.items():
        for method, settings in METHODS.items():
            name = f"{method}-{layout}"
            made[name] = recipe(name, *EXACT, *settings, *engine)
    made["few-2x4"] = recipe("few-2x4", *METHODS["dpo"])
    for layout in SHARDED:
        for method, settings in SCORERS.items():
            made[f"{method}-{layout}"] = recipe(f"{method}-{layout}", *EXACT, *settings, *LAYOUTS[layout])
    for layout in ("ZeRO-2", "ZeRO-3"):
        offload = f"deepspeed={CONFIGS}/{layout.lower().replace('-', '')}_offload.json"
        selective = "gradient_checkpointing=selective"  # where weights are elsewhere in between
        made[f"few-{layout}"] = recipe(f"few-{layout}", *METHODS["dpo"], *LAYOUTS[layout], selective)
        made[f"offload-{layout}"] = recipe(f"offload-{layout}", *METHODS["dpo"], *LAYOUTS[layout], offload)
        made[f"fp16-{layout}"] = recipe(f"fp16-{layout}", *METHODS["dpo"], *LAYOUTS[layout], "precision=fp16")
    made["compiled-true"] = compiled(recipe, "true")
    made["nan"] = recipe("nan", *METHODS["dpo"], *LAYOUTS["ZeRO-2"])
    brief = ["steps=2", "checkpoint_every=1"]
    for layout in SCALED:
        made[f"steep-{layout}"] = recipe(f"steep-{layout}", *METHODS["dpo"], *LAYOUTS[layout], "precision=fp16", *brief)
    faults = {"nan": "nan", "fp16-ZeRO-2": "overflow", "fp16-ZeRO-3": "overflow"}
    faults |= {f"steep-{layout}": "steep" for layout in SCALED}
    trained_by_two([Task(config, fault=faults.get(name, "")) for name, config in made.items()], folder)
    return made


@pytest.fixture(scope="module")
def alone(recipe: Callable[..., Config]) -> dict[str, Config]:
    """The same in one process: the whole batch at once, and accumulated."""
    made = {}
    for method, settings in METHODS.items():
        both = [*EXACT, *settings]
        made[method] = recipe(f"{method}-alone", *both, "micro_batch_size=null")
        made[f"{method} accumulated"] = recipe(f"{method}-accumulated", *both)
    for method, settings in SCORERS.items():
        made[method] = recipe(f"{method}-alone", *EXACT, *settings)
    made["few"] = recipe("few-alone", *METHODS["dpo"])
    for config in made.values():
        ranks.train(config)
    return made


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", ["accumulated", *LAYOUTS])
def test_steps_are_those_of_one_process(
    runs: dict[str, Config], alone: dict[str, Config], method: str, layout: str
) -> None:
    """1×8, 1×4 accumulated, 2×4 and ZeRO 1, 2, 3: 1e-9 in float64, for every figure of every step and the weights."""
    other = alone[f"{method} accumulated"] if layout == "accumulated" else runs[f"{method}-{layout}"]
    assert next(iter(weights(other).values())).dtype == torch.float64
    assert difference(alone[method], other) < 1e-9
    assert len(lines(other)) == STEPS
    counted = {name: summary(alone[method])[name] for name in COUNTS}
    if layout == "accumulated":
        return
    assert summary(other)["world_size"] == 2
    mine, one = (summary(config)["best_checkpoint"] for config in (other, alone[method]))
    assert mine["step"] == one["step"] and abs(mine["value"] - one["value"]) < 1e-9
    if method != "rpo":  # which scores its batch twice where it is cut
        assert {name: summary(other)[name] for name in COUNTS} == counted


@pytest.mark.thorough
@pytest.mark.parametrize("method", METHODS)
def test_twenty_steps_are_those_of_one_process(folder: Path, recipe: Callable[..., Config], method: str) -> None:
    settings = [*EXACT, "steps=20", "checkpoint_every=10", *METHODS[method]]
    made = {layout: recipe(f"twenty-{method}-{layout}", *settings, *engine) for layout, engine in LAYOUTS.items()}
    trained_by_two([Task(config) for config in made.values()], folder)
    alone = recipe(f"twenty-{method}-alone", *settings, "micro_batch_size=null")
    ranks.train(alone)
    assert len(lines(alone)) == 20
    for layout, config in made.items():
        assert difference(alone, config) < 1e-9, layout


def test_compiling_changes_no_step(runs: dict[str, Config], alone: dict[str, Config]) -> None:
    """Block by block, with LoRA and checkpointing under DeepSpeed."""
    assert difference(alone["dpo"], runs["compiled-true"]) < 1e-9


@pytest.mark.thorough
def test_compiling_the_whole_changes_no_step(
    folder: Path, recipe: Callable[..., Config], alone: dict[str, Config]
) -> None:
    """The same as one graph, which ``test_compiled`` compares without DeepSpeed."""
    config = compiled(recipe, "unet")
    trained_by_two([Task(config)], folder)
    assert difference(alone["dpo"], config) < 1e-9


@pytest.mark.parametrize("method", SCORERS)
@pytest.mark.parametrize("layout", SHARDED)
def test_scorers_are_trained_as_in_one_process(
    runs: dict[str, Config], alone: dict[str, Config], method: str, layout: str
) -> None:
    """All their weights in float64, among them a scalar, which stays one in the folder they leave."""
    assert difference(alone[method], runs[f"{method}-{layout}"]) < 1e-9
    found = weights(runs[f"{method}-{layout}"])
    (scale,) = [value for name, value in found.items() if name.endswith("logit_scale")]
    assert scale.shape == () and scale.dtype == torch.float64 and abs(float(scale) - 2.6592) > 1e-4


@pytest.mark.parametrize("layout", ["ZeRO-2", "ZeRO-3"])
def test_offloading_changes_no_weight(runs: dict[str, Config], layout: str) -> None:
    """Optimizer states, and under ZeRO-3 the weights; only DeepSpeed's norm, which is fp32 there, is rounded."""
    assert same(runs[f"few-{layout}"], runs[f"offload-{layout}"])
    assert difference(runs[f"few-{layout}"], runs[f"offload-{layout}"]) < 1e-6


@pytest.mark.parametrize("layout", ["ZeRO-2", "ZeRO-3"])
def test_fp16_skips_a_step_that_overflows_and_halves_its_loss_scale(runs: dict[str, Config], layout: str) -> None:
    half, single = lines(runs[f"fp16-{layout}"]), lines(runs[f"few-{layout}"])
    assert [line["grad_norm"] is None for line in half] == [False, False, True, False]
    for mine, exact in zip(half[:2], single, strict=False):
        assert 0 < abs(mine["grad_norm"] / exact["grad_norm"] - 1) < 0.02
        assert abs(mine["loss"] - exact["loss"]) < 0.01
    before, after = loss_scales(runs[f"fp16-{layout}"])
    assert (after["scale"], after["_growth_tracker"]) == (before["scale"] / 2, 1)


def loss_scales(config: Config) -> list[dict[str, Any]]:
    """In the checkpoints of a run."""
    files = sorted((config.run_dir / "checkpoints").glob("*/state.json"))
    return [json.loads(file.read_text())["scaler"] for file in files]


@pytest.mark.parametrize("layout", SCALED)
def test_fp16_finds_its_loss_scale_before_the_first_update(runs: dict[str, Config], layout: str) -> None:
    """A gradient that is too steep for the first scale, in one of two ranks: no step is lost, and all go down."""
    steep = lines(runs[f"steep-{layout}"])
    assert None not in [line["grad_norm"] for line in steep] and summary(runs[f"steep-{layout}"])["skipped_steps"] == 0
    assert steep[0]["grad_norm"] > 100 * steep[1]["grad_norm"]
    first, _ = loss_scales(runs[f"steep-{layout}"])
    assert first["scale"] < 65536 / 2 and first["_growth_tracker"] == 1


def test_fp32_differences_between_layouts_are_printed_and_small(
    runs: dict[str, Config], alone: dict[str, Config], capsys: pytest.CaptureFixture[str]
) -> None:
    for layout in ("2x4", "ZeRO-2", "ZeRO-3"):
        off = difference(alone["few"], runs[f"few-{layout}"], rounded=True)
        with capsys.disabled():
            print(f"\nDPO in fp32, {STEPS} steps, one process against {layout}: {off:.1e}")
        assert off < 1e-4


def test_a_gradient_that_is_not_finite_in_one_rank_is_skipped_by_all(
    runs: dict[str, Config], recipe: Callable[..., Config]
) -> None:
    single = recipe("nan-alone", *METHODS["dpo"])
    ranks.train(single, fault="nan")
    for config, step in ((runs["nan"], 3), (single, 2)):  # the third of one backward a step, and of two
        norms = [line["grad_norm"] for line in lines(config)]
        assert [place for place, norm in enumerate(norms, 1) if norm is None] == [step]
        assert all(torch.isfinite(value).all() for value in weights(config).values())
        assert summary(config)["skipped_steps"] == 1


RESUMED = {
    "2 ranks again": ("2x4", "2x4", True),
    "ZeRO-1 again": ("ZeRO-1", "ZeRO-1", True),
    "ZeRO-2 again": ("ZeRO-2", "ZeRO-2", True),
    "ZeRO-3 again": ("ZeRO-3", "ZeRO-3", True),
    "ZeRO-2 to ZeRO-3": ("ZeRO-2", "ZeRO-3", False),
    "ZeRO-3 to ZeRO-1": ("ZeRO-3", "ZeRO-1", False),
    "2 ranks to ZeRO-2": ("2x4", "ZeRO-2", False),
}


@pytest.fixture(scope="module")
def resumed(
    folder: Path, recipe: Callable[..., Config], runs: dict[str, Config], alone: dict[str, Config]
) -> dict[str, Config]:
    """Half of each run again, in new processes; and a run whose second checkpoint has no room."""
    made = {
        name: recipe(name.replace(" ", "-"), *EXACT, *METHODS["rpo"], *LAYOUTS[to], "resume=auto")
        for name, (_, to, _) in RESUMED.items()
    }
    tasks = [Task(config, runs[f"rpo-{RESUMED[name][0]}"].run_dir) for name, config in made.items()]
    for method in SCORERS:
        made[method] = recipe(f"{method}-resumed", *EXACT, *SCORERS[method], *LAYOUTS["ZeRO-3"], "resume=auto")
        tasks.append(Task(made[method], alone[method].run_dir))
    made["no space"] = recipe("no-space", *METHODS["dpo"], *LAYOUTS["ZeRO-1"])
    tasks.append(Task(made["no space"], fault="no space"))
    trained_by_two(tasks, folder)
    return made


@pytest.mark.parametrize("name", RESUMED)
def test_resuming_is_exact_on_the_same_layout_and_close_on_another(
    resumed: dict[str, Config], runs: dict[str, Config], name: str
) -> None:
    _, to, exact = RESUMED[name]
    whole = runs[f"rpo-{to}"]
    off = difference(resumed[name], whole)
    assert (off == 0 and same(resumed[name], whole)) if exact else off < 1e-9
    assert summary(resumed[name])["unet_forwards"] == summary(whole)["unet_forwards"]
    mine, other = (summary(config)["best_checkpoint"] for config in (resumed[name], whole))
    assert mine == other if exact else mine["step"] == other["step"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_best_checkpoint_is_exported_from_any_layout(
    runs: dict[str, Config], alone: dict[str, Config], layout: str
) -> None:
    """With its averages; after the loss of RPO's first half or of its last."""
    mine, other = (config.run_dir / "best" for config in (runs[f"rpo-{layout}"], alone["rpo"]))
    left, right = (load_file(place / "pytorch_lora_weights.safetensors") for place in (mine, other))
    assert left.keys() == right.keys() and all(torch.allclose(left[n], right[n], rtol=0, atol=1e-9) for n in right)


@pytest.mark.parametrize("layout", ["2x4", "ZeRO-3"])
def test_two_ranks_go_on_as_one(
    runs: dict[str, Config],
    alone: dict[str, Config],
    recipe: Callable[..., Config],
    layout: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config = recipe(f"{layout}-to-one", *EXACT, *METHODS["rpo"], "resume=auto")
    ranks.train(config, runs[f"rpo-{layout}"].run_dir)
    assert difference(config, alone["rpo"]) < 1e-9
    assert "going on as 1 rank: equal to rounding" in " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize("method", SCORERS)
def test_a_scorer_goes_on_on_another_layout(
    resumed: dict[str, Config],
    runs: dict[str, Config],
    alone: dict[str, Config],
    recipe: Callable[..., Config],
    method: str,
) -> None:
    """From one process to two under ZeRO-3 and back; a scalar's optimizer states are scalars, and moved as such."""
    back = recipe(f"{method}-back", *EXACT, *SCORERS[method], "resume=auto")
    ranks.train(back, runs[f"{method}-ZeRO-3"].run_dir)
    for config in (resumed[method], back):
        assert difference(config, alone[method]) < 1e-9
        assert len(lines(config)) == STEPS


def test_a_disk_that_fills_in_one_rank_leaves_the_checkpoint_before(resumed: dict[str, Config], folder: Path) -> None:
    config = resumed["no space"]
    for rank in (0, 1):
        said = (folder / f"no-space.rank{rank}.error").read_text()
        assert said.startswith("rank 1: cannot write the file") and "No space left" in said and "\n" not in said
    (kept,) = (config.run_dir / "checkpoints").iterdir()
    assert kept.name == "step-000002"


def test_the_launchers_start_it(folder: Path, recipe: Callable[..., Config], runs: dict[str, Config]) -> None:
    """``deepspeed --module fastpref.cli`` trains as the processes above; the JSON decides what the recipe does not."""
    (folder / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto"}}))
    config = recipe("launched", *EXACT, *METHODS["dpo"], "steps=2", "engine=deepspeed")
    (file,) = ranks.recipe_files([Task(config)], folder)
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(ranks.free_port())]
    result = forked.run([*launcher, "--module", "fastpref.cli", "train", file, f"deepspeed={folder}/zero.json"])
    assert result.returncode == 0, result.stderr[-3000:]
    expected = [line["loss"] for line in lines(runs["dpo-ZeRO-2"])[:2]]
    # The launcher gives its processes another number of threads, which add up in another order.
    assert [line["loss"] for line in lines(config)] == pytest.approx(expected, rel=1e-9)
    assert result.stdout.count("2 steps of dpo") == 1
