"""The GPU benchmark: a rehearsal of its parts on the CPU, and what its rows are taken to say."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.autograd import DeviceType

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

import gpu_bench  # noqa: E402
import gpu_bench_measure as measuring  # noqa: E402
import gpu_bench_parts as parts  # noqa: E402
import gpu_bench_report as reporting  # noqa: E402
import gpu_bench_steps as steps  # noqa: E402
import gpu_bench_world as worlds_of  # noqa: E402
from common import read_csv  # noqa: E402
from gpu_bench_world import OverLimit, World  # noqa: E402
from stand_in_gpu import StandInGpu, on_gpu  # noqa: E402
from stand_in_graphs import Graph  # noqa: E402

from fastpref.emoji import random_models  # noqa: E402
from fastpref.models import public  # noqa: E402

Row = dict[str, Any]
CPU = torch.device("cpu")
FEW = {"dpo-4-ledger", "dpo-4", "rpo-4x1-kept-ledger", "sft-4"}
# A step's rows through the UNet, forward and backward: two a pair (SFT one), and as many for a reference.
PASSES = {"dpo-4-ledger": (8, 8), "dpo-4": (16, 8), "rpo-4x1-kept-ledger": (8, 8), "sft-4": (4, 4)}


@pytest.fixture(scope="module", autouse=True)
def small(one_level_unet: Path) -> Iterator[None]:
    """Random SDXLs are made with that UNet."""
    make = random_models.make_random_sdxl

    def made(folder: Path, **settings: Any) -> Path:
        shutil.copytree(one_level_unet, make(folder, **settings) / "unet", dirs_exist_ok=True)
        return folder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random_models, "make_random_sdxl", made)
        yield


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CSV of a rehearsal with a few arms of every part, but for compiled ones, of a step each."""
    out, every = tmp_path_factory.mktemp("gpu_bench") / "gpu_bench.csv", steps.step_arms()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_bench, "BEGAN", time.perf_counter())  # not when this process did
        patch.setattr(steps, "WARM", 0)
        patch.setattr(steps, "WINDOW", 1)
        patch.setattr(parts, "CALLS", 1)
        patch.setattr(steps, "step_arms", lambda: [arm for arm in every if arm.name in FEW])
        patch.setattr(steps, "FULL_ARMS", {"rpo-full": ()})
        patch.setattr(steps, "BARE_ARMS", {"dpo-4": ()})
        patch.setattr(steps, "CHOICES", {"fused_ops": ("fused_ops=true",)})
        patch.setattr(steps, "TRAINED", {"lora": ()})
        patch.setattr(steps, "ENGINES", {"zero2": steps.ENGINES["zero2"]})
        patch.setattr(parts, "SPO", (*parts.SPO, "sample_steps=3", "plain_steps=1", "candidates=2"))
        assert gpu_bench.main(["--device=cpu", "--model=random", "--repeats=1", f"--out={out}"]) == 0
    return out


def test_a_rehearsal_runs_every_part(rehearsal: Path) -> None:
    rows = read_csv(rehearsal)
    assert list(dict.fromkeys(row["part"] for row in rows)) == list(gpu_bench.PARTS)
    assert not [row["note"] for row in rows if row["note"].startswith(("failed", "refused"))]
    assert {row["device"] for row in rows} == {"cpu"} and len({row["run"] for row in rows}) == 1
    assert not any(row["peak_device_bytes"] or row["busy_ms"] for row in rows if "busy_ms" in row)
    text = rehearsal.with_suffix(".md").read_text()
    assert "a rehearsal |" in text and "| yes |" not in text and rehearsal.with_suffix(".png").is_file()


def test_a_step_s_limit_is_its_rows_at_the_measured_rate(rehearsal: Path) -> None:
    found = reporting.Found(read_csv(rehearsal))
    forward, backward = (found.quantity(f"{side} of a row, lora") for side in ("forward", "backward"))
    rate = found.median("rates", "bf16 matrix product", "tflop_s")
    assert forward and backward and rate and 0.5 < backward / forward < 2
    for arm, (forwards, backwards) in PASSES.items():
        measured = found.median("steps", arm, "forward_rows"), found.median("steps", arm, "backward_rows")
        assert measured == (forwards, backwards), arm
        expected = 1e3 * (forwards * forward + backwards * backward) / (rate * 1e12)
        assert found.limit_ms("steps", arm) == pytest.approx(expected)
    # all weights: the backward also multiplies for every weight, about as much as the forward again
    whole = found.quantity("backward of a row, all weights")
    assert whole and found.quantity("forward of a row, all weights") == pytest.approx(forward, rel=0.1)
    assert 1.3 < whole / backward < 2.1


def test_an_interrupted_run_goes_on_with_the_arms_that_are_not_whole(
    rehearsal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_bench, "BEGAN", time.perf_counter())
    rows = [row for row in read_csv(rehearsal) if row["part"] == "rates"]
    for row in rows:
        row["last"] = "" if row["arm"] == "copy" else row["last"]
    out = tmp_path / "gpu_bench.csv"
    gpu_bench.write_csv(out, rows)
    same = ["--device=cpu", "--model=random", "--repeats=1", "--parts=rates", f"--out={out}"]
    assert gpu_bench.main([*same, "--resume"]) == 0
    after = read_csv(out)
    assert [row["arm"] for row in after] == ["bf16 matrix product", "operations", "operations", "copy"]
    assert len({row["run"] for row in after}) == 1 and after[0] == rows[0]
    with mock.patch.object(gpu_bench.time, "strftime", lambda _: "9999"):
        gpu_bench.main(same)
    assert {row["run"] for row in read_csv(out)} == {rows[0]["run"], "9999"}


def test_a_part_over_its_limit_leaves_its_rows_and_the_other_parts(tmp_path: Path) -> None:
    def slow(world: World) -> Iterator[Row]:
        yield {"arm": "whole", "ms": 1.0}
        yield {"arm": "cut off", "ms": 2.0}
        time.sleep(30)

    def wrapped(world: World) -> Iterator[Row]:
        def measure() -> Iterator[Row]:
            try:
                time.sleep(30)
            except OverLimit:
                raise RuntimeError("a compiler that says what it met") from None
            yield {"ms": 1.0}

        yield from measuring.guarded(world, "wrapped", "arm", measure)

    def quick(world: World) -> Iterator[Row]:
        yield {"arm": "quick", "ms": 3.0}

    chosen = {name: gpu_bench.Part(part, 1.1) for name, part in (("slow", slow), ("wrapped", wrapped))}
    chosen["quick"] = gpu_bench.Part(quick, 5)
    world = World("random", CPU, tmp_path, [], mock.Mock())
    book, began = gpu_bench.Book(tmp_path / "rows.csv", {"device": "cpu"}, resume=False), time.perf_counter()
    with mock.patch.object(gpu_bench, "PARTS", chosen):
        gpu_bench.measure(world, book, list(chosen), began + 60)
        gpu_bench.measure(world, book, ["quick"], began)  # no time is left for it
    assert time.perf_counter() - began < 10
    found = [(row["part"], row["arm"], row["ms"], row["last"]) for row in read_csv(tmp_path / "rows.csv")]
    assert found == [("slow", "whole", "1.0", "yes"), ("slow", "cut off", "2.0", ""), ("quick", "quick", "3.0", "yes")]


def step(arm: str, ms: float, part: str = "steps", **more: Any) -> Row:
    return {"run": "2", "device": "NVIDIA H200", "model": "sdxl", "part": part, "arm": arm, "ms": ms, **more}


PUBLIC = step("as it is", 1500.0, "public")


@pytest.mark.parametrize(
    ("rows", "what", "expected"),
    [
        ([step("dpo-4", 560.0)], "DPO, 4 pairs, adapter off", ("560 ms", "yes")),
        ([step("dpo-4", 561.0)], "DPO, 4 pairs, adapter off", ("561 ms", "no")),
        ([step("dpo-4", 561.0) | {"device": "A100"}], "DPO, 4 pairs, adapter off", ("561 ms", "an H200's bar")),
        ([step("dpo-4", 500.0), PUBLIC], "DPO, 4 pairs, adapter off, of the public script", ("3 ×", "yes")),
        (
            [step("dpo-4", 500.0), PUBLIC | {"run": "1"}],
            "DPO, 4 pairs, adapter off, of the public script",
            ("", "not measured"),
        ),
        (
            [step("dpo-4-ledger", 300.0, note="refused: noise")],
            "DPO, 4 pairs, ledger",
            ("300 ms", "no: refused: noise"),
        ),
        ([step("dpo-4-ledger", "", note="failed: memory")], "DPO, 4 pairs, ledger", ("", "failed: memory")),
        (
            [step("dpo-4", 400.0), step("dpo-4", 600.0), step("dpo-4", 100.0), step("rpo-4", 440.0)],
            "RPO over DPO, adapter off",
            ("1.1 ×", "no"),  # over the median of the repeats
        ),
        (
            [step("dpo-4-recompute", 700.0, peak_device_bytes=11 << 30)],
            "DPO, 4 pairs, full recomputation: memory",
            ("11 GiB", "yes"),
        ),
        (
            [step("dpo-1-ledger", 100.0), step("dpo-1-ledger", "", busy_ms=94.0)],
            "time the GPU idles: DPO, one pair, ledger",
            ("6 %", "no"),
        ),
        (
            [
                step("round", 1.0, "spo", side="ours", training_ms=100.0),
                step("round", 1.0, "spo", side="literal", training_ms=200.0),
            ],
            "SPO, training, of the literal order of work",
            ("2 ×", "yes"),
        ),
        (
            [
                step("bf16 matrix product", "", "rates", tflop_s=100.0),
                step("rpo-full", "", "full", quantity="forward of a row, all weights", flops=1e12),
                step("rpo-full", "", "full", quantity="backward of a row, all weights", flops=2e12),
                step("rpo-full", 160.0, "full", forward_rows=4, backward_rows=2),
            ],
            "full fine-tuning over its arithmetic limit",
            ("2 ×", "yes"),  # 4 + 2·2 TFLOP at 100 a second are 80 ms
        ),
    ],
)
def test_bars(rows: list[Row], what: str, expected: tuple[str, str]) -> None:
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in reporting.bars_table(rows).splitlines()]
    assert [(line[2], line[3]) for line in table if line and line[0] == what] == [expected]


def test_without_a_gpu_s_rows_no_bar_is_measured() -> None:
    lines = reporting.bars_table([]).splitlines()[4:]
    assert len(lines) == len(reporting.BARS)
    assert all(line.endswith("|  | not measured |") for line in lines)


def test_busy_time_counts_what_overlaps_once() -> None:
    assert measuring.union([(0, 4), (2, 3), (3, 6), (10, 11)]) == 7


@dataclass
class Event:
    """As kineto reports what ran on a device."""

    label: str
    begin: int
    length: int
    marks: bool = False

    def name(self) -> str:
        return self.label

    def device_type(self) -> DeviceType:
        return DeviceType.CUDA

    def is_user_annotation(self) -> bool:
        return self.marks

    def start_ns(self) -> int:
        return self.begin

    def duration_ns(self) -> int:
        return self.length


def test_steps_on_the_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An arm, its busy time, the bare passes from a graph, and rates: what a GPU runs and a CPU does not."""
    monkeypatch.setattr(steps, "WARM", 0)
    monkeypatch.setattr(steps, "WINDOW", 1)
    kernels = [
        Event("gemm", 0, 2_000_000),
        Event("copy", 1_000_000, 3_000_000),
        Event("fastpref: backward", 0, 9_000_000),
    ]
    profiler = mock.Mock()
    profiler.profiler.kineto_results.events.return_value = [*kernels, Event("step", 0, 9_000_000, marks=True)]
    profile = mock.Mock(return_value=nullcontext(profiler))
    with StandInGpu(), ExitStack() as stack:
        for name, value in (
            *(("synchronize", lambda *_: None), ("reset_peak_memory_stats", lambda *_: None)),
            *(("max_memory_allocated", lambda *_: 5 << 30), ("max_memory_reserved", lambda *_: 6 << 30)),
        ):
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch.profiler, "profile", profile))
        world = stack.enter_context(worlds_of.open_gpu_world("random", torch.device("cuda"), tmp_path))
        world.repeats = 1
        assert all(on_gpu(weight) for weight in world.weights.load_unet(tmp_path, torch.bfloat16).parameters())
        own = next(arm for arm in steps.step_arms() if arm.name == "dpo-4")
        rows = list(steps._each(world, "steps", own))
        assert [row.get("note") for row in rows] == [""] * 2
        assert [row.get("peak_device_bytes") for row in rows] == [5 << 30, None]
        assert rows[-1]["busy_ms"] == 2.0  # of two steps in which 0 to 4 ms are covered
        assert rows[0]["forward_rows"] == 16
        before = Graph.replays
        (replayed,) = steps._bare(world, own, captured=True)
        assert "note" not in replayed and Graph.replays > before


def test_the_fastest_attention_is_that_of_all_layers() -> None:
    def row(backend: str, shape: str, layers: int, ms: float | str) -> Row:
        return step(f"{backend}: {shape}", 0, "attention", backend=backend, shape=shape, layers=layers, rows=8) | {
            "ms": ms
        }

    rows = [row("a", "long", 1, 5.0), row("a", "short", 10, 1.0), row("b", "long", 1, 1.0), row("b", "short", 10, 1.3)]
    rows += [row("c", "long", 1, 0.1), row("c", "short", 10, "")]  # does not do all of them
    shares = reporting.Found(rows).attention()
    assert shares == pytest.approx({("8", "a"): 15.0, ("8", "b"): 14.0})
    assert "Fastest: b." in reporting.attention_lines(shares)


def test_the_shapes_of_sdxl_s_attention() -> None:
    """70 transformer blocks, each with self- and cross-attention: 10 at 64x64 with 10 heads, 60 at 32x32 with 20."""
    with torch.device("meta"):
        from diffusers import UNet2DConditionModel

        unet = UNet2DConditionModel(**public.UNETS["sdxl"])
    found = parts.attention_shapes(unet, 8, 128)
    large, small = (8, 10, 4096, 64), (8, 20, 1024, 64)
    assert found == {
        (large, large): 10,
        (large, (8, 10, 77, 64)): 10,
        (small, small): 60,
        (small, (8, 20, 77, 64)): 60,
    }


# Few channels, as in tests/gpu/test_stand_in.py.
SMALL_UNET = public.UNETS["sdxl"] | {
    **{"block_out_channels": (32, 32, 64), "transformer_layers_per_block": (1, 1, 1), "layers_per_block": 1},
    "attention_head_dim": (1, 1, 2),
}


def test_sdxl_s_inputs_and_weights_that_all_arms_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a UNet of few channels, what the GPU gets at full size."""
    with torch.device("meta"):
        from diffusers import UNet2DConditionModel

        count = sum(p.numel() for p in UNet2DConditionModel(**SMALL_UNET).parameters())
    monkeypatch.setitem(public.UNETS, "sdxl", SMALL_UNET)
    monkeypatch.setitem(public.PARAMETERS, "sdxl", count)
    small = {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}
    monkeypatch.setitem(public.VAES, "sdxl", public.VAES["sdxl"] | small)
    monkeypatch.setattr(worlds_of, "SDXL", (*worlds_of.SDXL, "resolution=64"))
    text_config = random_models.text_config

    def narrow(*arguments: Any) -> Any:  # inside; what the encoders put out stays
        found = text_config(*arguments)
        found.intermediate_size = 32
        return found

    monkeypatch.setattr(random_models, "text_config", narrow)
    with worlds_of.open_gpu_world("sdxl", CPU, tmp_path) as world:
        assert not list((tmp_path / "model" / "unet").glob("*.safetensors"))
        trainer = world.trainer("method=dpo", "reference=ledger", "batch_size=4")
        assert measuring.begin(trainer) == ""
        weights = dict(trainer.policy.unet.named_parameters())
        name = "mid_block.resnets.0.conv1.weight"  # the UNet's ends are in fp32, each policy's own
        shared = world.weights._weights[name]
        assert weights[name].data_ptr() == shared.data_ptr()
        again = world.trainer("method=sft", "batch_size=4")
        assert again.policy.unet.get_parameter(name).data_ptr() == shared.data_ptr()
        world.trainer("method=sft", "batch_size=4", *steps.FULL)
        assert not world.weights._weights  # its own, to train
        other = world.trainer("method=sft", "batch_size=4").policy.unet.get_parameter(name)
        assert other.data_ptr() != shared.data_ptr() and torch.equal(other, shared)
        folder = world.with_parts("vae")
        assert (folder / "vae" / "diffusion_pytorch_model.safetensors").stat().st_size > 100_000
        worlds_of.full_size.write_weights(world.weights.empty, folder / "unet")
        assert list((folder / "unet").glob("*.safetensors"))
    assert "load_unet" in worlds_of.fastpref.models.policy.load_unet.__qualname__


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--parts=steps,nothing"], "there is no part 'nothing'"),
        ([], "SDXL's step on a CPU takes minutes"),
        (["--model=random", "--reference-repo=nowhere"], "no public script there"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_bench.main(["--device=cpu", *arguments]) == 2
    said = capsys.readouterr().err.strip()
    assert says in said and "\n" not in said
