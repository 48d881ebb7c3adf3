"""What a rank sends is counted by hand and as the plan says; the noise of a ledger, and the tables."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
from torch import distributed as dist

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import ledger_noise  # noqa: E402
import numerics  # noqa: E402
import precision_arms  # noqa: E402
import scaling  # noqa: E402
import scaling_ranks as ranks  # noqa: E402
import worlds  # noqa: E402


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_ring_of_four_sends_what_is_counted(group: None) -> None:
    values = torch.ones(1000)  # 4000 bytes
    with ranks.Traffic(4) as traffic:
        dist.all_reduce(values)
        dist.broadcast(values, 0)
        dist.all_gather([torch.empty_like(values)], values)
        dist.reduce_scatter_tensor(torch.empty_like(values), values)
        dist.barrier()
    expected = {"allreduce_": 6000, "broadcast_": 3000, "allgather_": 3000, "_reduce_scatter_base_": 3000}
    assert {name: sent for name, sent in traffic.sent.items() if sent} == expected
    with pytest.raises(ValueError, match="no rule for what gather_ sends"), ranks.Traffic(4):
        dist.gather(values, [torch.empty_like(values)], 0)


def forks(command: list[str], env: dict[str, str], **_: object) -> subprocess.CompletedProcess[str]:
    """What torchrun does with the command, with forked processes in place of new interpreters; rank 0's answer."""
    *launcher, count, script, job = command
    assert launcher == [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        common = env | {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    numbers = map(str, range(int(count)))
    started = [forked.Process([script, job], common | {"RANK": rank, "LOCAL_RANK": rank}) for rank in numbers]
    try:
        said = [process.communicate(300) for process in started]
    finally:
        for process in started:
            process.kill()
    return subprocess.CompletedProcess(command, max(process.wait() for process in started), *said[0])


def test_two_ranks_under_zero_2_send_what_the_plan_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "subprocess", SimpleNamespace(run=forks))
    settings = worlds.open_world("random", tmp_path, pairs=16)
    row = ranks.launch(settings, "full ZeRO-2", 2, 1)
    assert row["formula_bytes"] < row["sent_bytes"] < 1.01 * row["formula_bytes"]
    assert row["sent_allreduce"] > 1.9 * row["sent_allgather_base"] > 0
    line = scaling.table([row | {"kind": "ranks", "value": "2"}]).splitlines()[-1]
    assert line.startswith("| ranks | 2 |") and "all weights, ZeRO-2: a rank sends" in line and "of the formula" in line


def test_arms_and_the_bars_of_the_store() -> None:
    assert ranks.arms(1) == ["lora local", "full local"] and len(ranks.arms(2)) == 2 * len(ranks.ENGINES)
    assert ranks.arms(2, short=True) == list(ranks.SHORT)
    row = {"kind": "records", "value": "1000000", "seconds": "0.5", "grown_bytes": "1e8", "peak_rss_bytes": "3e8"}
    assert "at most 1 s and 200 MB: met" in scaling.table([row])
    assert "at most 1 s and 200 MB: missed" in scaling.table([row | {"grown_bytes": "3e8"}])
    fed = {"kind": "loader", "value": "8", "seconds": "0.1", "pairs_fed": "90", "pairs_trained": "10"}
    assert "feeds 9 times what is trained (at least 10: missed)" in scaling.table([fed])


def test_logit_and_gradient_by_hand(tmp_path: Path) -> None:
    """An offset that winner and loser share cancels, errors apart by 0.01 move the logit by β/2 times that; DPO's slope
    at a logit of 0 is β/4 over the pairs."""
    errors, reference = torch.zeros(2, 3, dtype=torch.float64), torch.full((2, 3), 0.7, dtype=torch.float64)
    assert precision_arms.logit(errors, reference, 500).tolist() == [0, 0, 0]
    reference[0] += 0.01
    assert precision_arms.logit(errors, reference, 500).tolist() == pytest.approx([2.5] * 3)
    weight = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    trainer = SimpleNamespace(policy=SimpleNamespace(masters=SimpleNamespace(copies={"w": weight})))
    slope = precision_arms.gradient(trainer, weight * torch.tensor([[2.0], [1.0]]), torch.tensor([[2.0], [1.0]]), 500)
    assert slope.tolist() == [125.0]
    rows = [
        {"model": "emoji", "steps": steps, "reference": name}
        | {f"{figure}_{beta}": "0.25" for figure in ("logit", "noise", "angle") for beta in ledger_noise.BETAS}
        for steps in ledger_noise.STEPS
        for name in (ledger_noise.OFF, *ledger_noise.LEDGERS)
    ]
    assert "| emoji | 10 | 0.25 | ledger, fp32 | 0.25 | 0.25 | 0.25 |" in ledger_noise.table(rows)
    ledger_noise.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_every_way_of_half_precision_is_another(tmp_path: Path) -> None:
    """On a small model: fp32 is nearest to fp64, then come rounded weights, bf16 with the fp32 parts, bf16 without."""
    rows = numerics.measure(worlds.open_world("random", tmp_path, ["device=cpu"], pairs=16), draws=2, steps=2)
    found = {row["arm"]: float(row["prediction"]) for row in rows}
    assert len({*found.values()}) >= len(numerics.ARMS) - 1  # on a CPU autocast is the pass without fp32 parts
    assert found["fp32"] < found[precision_arms.ROUNDED] < found[precision_arms.ONE_DTYPE] < found["no fp32 islands"]
    (about,) = [row | {"model": "random"} for row in rows if row["arm"] == "conv_in"]
    assert "| random | bf16, in fp32 only: conv_in | " in numerics.table([about])
    numerics.plot([about], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
