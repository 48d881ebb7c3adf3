"""The plan against what is measured: optimizer states, a run's peak memory, DeepSpeed's arithmetic by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from fastpref.config import Config, load_config, save_config
from fastpref.errors import UserError
from fastpref.models import public
from fastpref.models.recompute import MODES
from fastpref.plan import report
from fastpref.plan.cost import Batch, traffic_bytes
from fastpref.plan.count import Shapes, StepCount, count_step
from fastpref.plan.memory import memory_of, optimizer_bytes
from fastpref.plan.report import make_plan
from fastpref.train.job import TrainJob
from fastpref.train.optim import build_optimizer, optimizer_state

MakeConfig = Callable[..., Config]
SHAPES = [torch.Size(s) for s in [(64, 100), (7,), (3, 5, 3, 3), (4096,), (128, 128)]]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "lion8bit", "adafactor"])
def test_optimizer_bytes_are_those_of_the_real_state(optimizer: str) -> None:
    if "8bit" in optimizer:
        pytest.importorskip("bitsandbytes")
    config = load_config("", [f"optimizer={optimizer}"])
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    built = build_optimizer(config, parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    built.step()
    state = [(k, v) for _, k, v in optimizer_state(built) if isinstance(v, torch.Tensor) and not k.startswith("qmap")]
    assert optimizer_bytes(config, SHAPES) == sum(value.nbytes for _, value in state)


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_the_public_unets_have_their_published_size(family: str) -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**public.UNETS[family])
    assert sum(p.numel() for p in unet.parameters()) == public.PARAMETERS[family]


def counted(config: Config, pairs: int, side: int = 8, *, several: bool = False) -> StepCount:
    unet = json.loads((Path(config.unet or f"{config.model}/unet") / "config.json").read_text())
    return count_step(config, Shapes(unet, (4, side, side), 77), pairs, several=several)


def test_weights_and_trained_values_are_those_of_the_loaded_policy(one_level_config: MakeConfig) -> None:
    for extra in (["train=lora", "precision=bf16"], ["train=full", "precision=bf16"]):
        config = one_level_config("method=dpo", *extra)
        policy = TrainJob.open(config).trainer.policy
        count = counted(config, 1)
        everything = sum(tensor.nbytes for tensor in policy.tensors())
        assert count.trained_values == sum(p.numel() for p in policy.trainable.values())
        assert count.trained == sum(p.nbytes for p in policy.trainable.values())
        assert count.frozen + count.trained == everything


@pytest.mark.parametrize("extra", [[], ["train=full"], ["fused_ops=true"]])
def test_checkpointing_saves_activations_and_full_costs_work(sdxl_config: MakeConfig, extra: list[str]) -> None:
    modes = (f"gradient_checkpointing={mode}" for mode in MODES)
    none, selective, full = (counted(sdxl_config("method=dpo", *extra, mode), 2, 16) for mode in modes)
    # of a fused UNet there is a norm's result before attention left to save
    assert selective.activations < (0.95 if "fused_ops=true" in extra else 0.75) * none.activations
    assert full.activations < 0.7 * none.activations
    assert selective.flops == none.flops and full.flops > 1.1 * none.flops


def test_a_fused_lora_does_the_same_work(one_level_config: MakeConfig) -> None:
    for full in (False, True):
        mode = f"gradient_checkpointing={str(full).lower()}"
        plain, fused = (counted(one_level_config("method=dpo", mode, *fused), 2) for fused in ([], ["fused_ops=true"]))
        assert plain.flops == fused.flops and plain.forward_flops == fused.forward_flops


def test_the_whole_batch_is_linear_in_it(one_level_config: MakeConfig) -> None:
    plain = counted(one_level_config("method=dpo"), 2, 16)
    double = counted(one_level_config("method=dpo"), 4, 16)
    assert 1.8 < double.activations / plain.activations < 2.1 and 1.9 < double.flops / plain.flops <= 2.0


def test_a_ledger_needs_no_reference(one_level_config: MakeConfig) -> None:
    full = ["method=dpo", "train=full", "batch_size=2"]
    copied, ledger = counted(one_level_config(*full), 2), counted(one_level_config(*full, "reference=ledger"), 2)
    assert copied.frozen == ledger.trained and ledger.frozen == 0
    assert 0.70 < ledger.flops / copied.flops < 0.80  # three passes of four, a backward being two


def test_the_step_inside_the_backward_saves_the_gradients(sdxl_config: MakeConfig) -> None:
    full = ["method=dpo", "train=full", "batch_size=2", "gradient_checkpointing=full"]
    plain = counted(sdxl_config(*full), 2)
    inside = counted(sdxl_config(*full, "step_in_backward=true"), 2)
    assert plain.peak - inside.peak > 0.5 * plain.gradients


def test_zero_divides_what_it_says(tmp_path: Path) -> None:
    """By hand, 1000 fp32 values over 4 ranks, of which everything is trained."""
    config = load_config("", ["method=dpo", "train=full"])
    count = StepCount(4000, 4000, 1000, [torch.Size([1000])], 4000, 700, 4500, 1, 0)
    by_stage = {stage: memory_of(config, count, stage, 4, 10) for stage in (0, 1, 2, 3)}
    assert [by_stage[s].weights for s in (0, 1, 2, 3)] == [8000, 8000, 8000, 2000]
    assert [by_stage[s].gradients for s in (0, 1, 2, 3)] == [4000, 4000, 1000, 1000]
    assert [by_stage[s].optimizer for s in (0, 1, 2, 3)] == [8004, 3001, 3001, 3001]
    assert by_stage[0].activations == 500 and by_stage[2].activations == 700
    batch = Batch.of(load_config("", ["batch_size=24", "micro_batch_size=2"]), 4)
    assert (batch.share, batch.micro, batch.rounds) == (6, 2, 3)
    sent = [traffic_bytes(config, count, batch, stage, 4) for stage in (0, 1, 2, 3)]
    assert sent == [6000, 6000 + 3000, 3 * 6000 + 3000, 3 * (3000 + 2 * 3000 + 3000)]
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"use_multi_rank_bucket_allreduce": false}}')
    apart = load_config("", ["method=dpo", "train=full", "engine=deepspeed", f"deepspeed={tmp_path}/zero.json"])
    assert [traffic_bytes(apart, count, batch, stage, 4) for stage in (1, 2)] == [6000, 3 * 3000 + 3000]
    adapter, ledger = (load_config("", ["method=rpo", f"reference={kind}"]) for kind in ("adapter", "ledger"))
    lora = StepCount(40000, 400, 100, [torch.Size([100])], 400, 700, 1100, 1, 0)
    three_passes = 3 * (300 + 3 * (30000 + 300))  # the rewards come first
    assert traffic_bytes(ledger, lora, batch, 3, 4) == three_passes
    assert traffic_bytes(adapter, lora, batch, 3, 4) == three_passes + 3 * 30000


@pytest.mark.parametrize("share", [0.5, 0.3])
def test_what_does_not_fit_gets_the_nearest_that_does(
    one_level_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """The suggestion, taken, fits; and the device is one that the recipe does not fit on."""
    recipe = ["method=dpo", "train=full", "batch_size=32", "gradient_checkpointing=none"]
    need = make_plan(one_level_config(*recipe), 1, "h100").best.total
    monkeypatch.setattr(report, "device_bytes", lambda _: int(share * need / 0.9))
    plan = make_plan(one_level_config(*recipe), 1, "h100")
    changes, _, gpus = plan.nearest.partition("on ")
    assert "gradient_checkpointing=" in changes
    assert make_plan(one_level_config(*recipe, *changes.split()), int(gpus.split()[0]), "h100").nearest == ""


def test_rpo_in_micro_batches_goes_forward_twice(one_level_config: MakeConfig) -> None:
    """Reference, forward, and a backward that costs one more, for frozen weights get no gradient."""
    whole = make_plan(one_level_config("method=rpo", "batch_size=4"), 1, "h100")
    parts = make_plan(one_level_config("method=rpo", "batch_size=4", "micro_batch_size=2"), 1, "h100")
    assert parts.flops / whole.flops == pytest.approx(4 / 3, abs=0.02)


def test_gradients_wait_beside_the_activations_of_later_micro_batches(one_level_config: MakeConfig) -> None:
    config = one_level_config("method=dpo", "train=full")
    one, many = (counted(config, 2, several=several) for several in (False, True))
    assert many.activations == one.activations and many.flops == one.flops
    assert many.peak == many.activations + many.gradients > one.peak


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["method=spm", "train=full"], "method spm is not planned"),
        (["batch_size=1"], "2 GPUs but 1 pairs"),
        (["method=dpo", "train=full", "step_in_backward=true"], "step_in_backward is for one process"),
    ],
)
def test_what_cannot_be_planned_is_one_line(sdxl_config: MakeConfig, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_plan(sdxl_config(*arguments), 2, "h100")
    with pytest.raises(UserError, match="unknown device 'h1000'"):
        make_plan(sdxl_config(), 1, "h1000")
    with pytest.raises(UserError, match="no such model folder"):
        make_plan(load_config("", ["model=nowhere"]), 1, "h100")


def test_predictions_on_emoji_are_within_a_tenth_of_the_measured_peaks(
    tmp_path: Path, few_records: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bundled model in a process of its own, which gives freed memory back at once (see plan/memory.py), with every
    mode of gradient_checkpointing: what needs more comes later, for a peak doesn't sink."""
    from fastpref.data.prepare import prepare

    settings = [f"records={few_records}", f"store={tmp_path}/store", f"output_dir={tmp_path}/runs", "clip=emoji"]
    settings += ["method=dpo", "beta=100", "steps=1", "batch_size=24", "threads=1", "evaluate=false", "tracker=none"]
    config = load_config("", settings)
    prepare(config, progress=False)
    save_config(config, tmp_path / "recipe.yaml")
    command = [sys.executable, "-c", PREDICT_AND_MEASURE, str(tmp_path / "recipe.yaml"), *reversed(MODES)]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, text=True, capture_output=True, env=env)
    numbers = list(map(int, done.stdout.split()[-2 * len(MODES) :]))
    halves = {"predicted": numbers[: len(MODES)], "measured": numbers[len(MODES) :]}
    found = {name: dict(zip(reversed(MODES), half, strict=True)) for name, half in halves.items()}
    with capsys.disabled():
        for mode in MODES:
            megabytes = (f"{name} {bytes_[mode] / 1e6:.0f} MB" for name, bytes_ in found.items())
            print(f"\nemoji DPO, gradient_checkpointing={mode}: {', '.join(megabytes)}")
    for mode in MODES:
        assert abs(found["predicted"][mode] / found["measured"][mode] - 1) < 0.1, mode


# A UNet whose layers' forwards are overridden refers to itself: the one before goes with a collection.
PREDICT_AND_MEASURE = """
import gc, json, sys
from fastpref.config import load_config
from fastpref.plan.report import make_plan
from fastpref.runs import run_training
recipes = [load_config(sys.argv[1], [f"gradient_checkpointing={mode}", f"name={mode}"]) for mode in sys.argv[2:]]
predicted = [make_plan(recipe, 1, "cpu").best.total for recipe in recipes]
measured = []
for recipe in recipes:
    gc.collect()
    run_training(recipe)
    measured.append(json.loads((recipe.run_dir / "summary.json").read_text())["peak_rss_bytes"])
print(*predicted, *measured)
"""


def test_the_unet_of_the_recipe_is_counted_and_has_to_be_one(
    sdxl_config: MakeConfig, one_level_unet: Path, tmp_path: Path
) -> None:
    config = sdxl_config("method=dpo", "train=full", f"unet={one_level_unet}")
    unet = UNet2DConditionModel.from_config(json.loads((one_level_unet / "config.json").read_text()))
    assert make_plan(config, 1, "h100").count.trained_values == sum(p.numel() for p in unet.parameters())
    save_file({"lora_unet_conv_in.lora_down.weight": torch.zeros(1, 4)}, tmp_path / "lora.safetensors")
    for name, message in (("lora.safetensors", "no UNet in the file"), ("missing", "no UNet there")):
        with pytest.raises(UserError, match=message):
            make_plan(sdxl_config(f"unet={tmp_path / name}"), 1, "h100")
