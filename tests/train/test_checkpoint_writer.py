"""Checkpoints beside the training: what is saved, when it counts, how a fault comes out, and what ranks wait for."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fastpref.config import Config, load_config
from fastpref.errors import UserError
from fastpref.train import checkpoint, checkpoint_writer
from fastpref.train.checkpoint import checkpoint_folders, load_checkpoint
from fastpref.train.checkpoint_writer import CheckpointWriter
from fastpref.train.engine import Piece
from fastpref.train.offline import OfflineTrainer
from fastpref.train.telemetry import MetricsLog
from fastpref.train.world import World

SECONDS = 60.0  # after which a test that waits has failed


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    held = Disk()
    monkeypatch.setattr(checkpoint, "write_tensors", held.write)
    yield held
    held.go.set()


class Disk:
    """A disk on which no write ends before ``go``, and then as ``fault`` says."""

    def __init__(self) -> None:
        self.go, self.fault, self.threads = threading.Event(), "", list[bool]()
        self._plain = checkpoint.write_tensors

    def write(self, path: Path, *arguments: Any) -> None:
        self.threads.append(threading.current_thread() is not threading.main_thread())
        assert self.go.wait(SECONDS)
        if self.fault:
            raise UserError("cannot write the file", str(path), self.fault)
        self._plain(path, *arguments)


def writer(folder: Path, *settings: str, world: World | None = None, before: Any = lambda: None) -> CheckpointWriter:
    config = load_config("", ["checkpoint_async=true", "keep_checkpoints=2", *settings])
    return CheckpointWriter(folder, config, world or World(), 0, before, Console(stderr=True))


def tensors(value: float) -> dict[str, torch.Tensor | Piece]:
    flat = torch.full((4,), value)
    return {"policy.a": torch.full((3, 5), value).T, "optimizer.0.exp_avg": Piece(flat, 0, (2, 2))}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_the_state_at_that_moment(tmp_path: Path, disk: Disk) -> None:
    state, values, saving = tensors(1.0), {"totals": {"pairs": 3}}, writer(tmp_path)
    expected = {name: checkpoint_writer._tensor(value).clone() for name, value in state.items()}
    saving.save(2, state, values)
    for value in state.values():
        checkpoint_writer._tensor(value).zero_()
    values["totals"]["pairs"] = 4
    saving.look()
    assert saving.saved == 0 and names(tmp_path) == [".step-000002.tmp"]
    disk.go.set()
    saving.settle()
    found = load_checkpoint(tmp_path / "step-000002")
    assert saving.saved == 2 and disk.threads == [True] and found.values["totals"] == {"pairs": 3}
    assert torch.equal(found.tensors["policy.a"], expected["policy.a"])
    assert torch.equal(found.tensors["optimizer.0.exp_avg"], expected["optimizer.0.exp_avg"].view(2, 2))


def test_one_is_under_way_at_most_and_the_last_is_waited_for(tmp_path: Path, disk: Disk) -> None:
    saving = writer(tmp_path)
    saving.save(2, tensors(2.0), {})
    threading.Timer(0.2, disk.go.set).start()
    saving.save(4, tensors(4.0), {})
    assert "step-000002" in names(tmp_path) and saving.saved == 2, "the one before is there first"
    saving.save(6, tensors(6.0), {}, wait=True)
    assert names(tmp_path) == ["step-000004", "step-000006"] and saving.saved == 6 and disk.threads[-1] is False
    saving.save(6, tensors(7.0), {}, wait=True)
    assert load_checkpoint(tmp_path / "step-000006").tensors["policy.a"][0, 0] == 6.0, "written once"


@pytest.mark.parametrize("where", ["look", "save", "settle", "error"])
def test_a_write_that_fails_is_one_line_at_the_next_look(
    tmp_path: Path, disk: Disk, where: str, capfd: pytest.CaptureFixture[str]
) -> None:
    saving = writer(tmp_path)
    disk.go.set()
    saving.save(2, tensors(2.0), {}, wait=True)
    disk.go.clear()
    disk.fault = "No space left on device"
    saving.save(4, tensors(4.0), {})
    saving.look()
    disk.go.set()
    if where == "error":  # of the training: it is the one that is raised, and the other is told
        with pytest.raises(ZeroDivisionError), saving:
            raise ZeroDivisionError
        assert "No space left" in capfd.readouterr().err
    else:
        act: Callable[[], Any] = saving.settle if where == "settle" else lambda: saving.save(6, tensors(6.0), {})
        if where == "look":
            act = lambda: wait_until(saving)  # noqa: E731
        with pytest.raises(UserError, match=r"cannot write the file .*step-000004.*No space left"):
            act()
    assert names(tmp_path) == ["step-000002"] and saving.saved == 2


def wait_until(saving: CheckpointWriter, step: int | None = None) -> None:
    """Look until the checkpoint of ``step`` is there."""
    until = time.monotonic() + SECONDS
    while saving.saved != step:
        assert time.monotonic() < until
        saving.look()
        time.sleep(0.005)


def test_an_error_of_the_training_waits_for_the_write(tmp_path: Path, disk: Disk) -> None:
    threading.Timer(0.2, disk.go.set).start()
    with pytest.raises(ZeroDivisionError), writer(tmp_path) as saving:
        saving.save(2, tensors(2.0), {})
        raise ZeroDivisionError
    assert load_checkpoint(tmp_path / "step-000002").step == 2


def test_what_comes_before_a_checkpoint_fails_it(tmp_path: Path) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    saving = writer(tmp_path, before=full)
    saving.save(2, tensors(2.0), {})
    with pytest.raises(OSError, match="No space left"):
        saving.settle()
    assert not checkpoint_folders(tmp_path)


@pytest.mark.parametrize(("setting", "free", "beside"), [("auto", 4, False), ("auto", 5, True), ("false", 5, False)])
def test_it_is_copied_where_memory_allows(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, setting: str, free: int, beside: bool
) -> None:
    held = (15 + 4) * 4
    monkeypatch.setattr(checkpoint_writer, "free_bytes", lambda device: held * free if device.type == "cpu" else 0)
    disk.go.set()
    saving = writer(tmp_path, f"checkpoint_async={setting}")
    saving.save(2, tensors(2.0), {})
    saving.settle()
    assert disk.threads == [beside] and names(tmp_path) == ["step-000002"]


@dataclass(frozen=True)
class Threads(World):
    """A rank that is a thread."""

    barrier: Any = None
    board: Any = None

    def objects(self, value: Any) -> list[Any]:
        self.board[self.rank] = value
        self.barrier.wait(SECONDS)
        found = list(self.board)
        self.barrier.wait(SECONDS)
        return found

    def most(self, value: int) -> int:
        return max(self.objects(value))


def on_two_ranks(work: Callable[[World], Any]) -> list[Future[Any]]:
    board, barrier = [None, None], threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        return [pool.submit(work, Threads(rank, 2, barrier=barrier, board=board)) for rank in range(2)]


@pytest.mark.parametrize("fault", ["", "No space left on device"])
def test_ranks_commit_when_the_last_has_written_and_fail_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    slow, plain = threading.Event(), checkpoint.write_tensors

    def write(path: Path, *arguments: Any) -> None:
        if "rank1" in path.name:
            assert slow.wait(SECONDS)
            if fault:
                raise UserError("cannot write the file", str(path), fault)
        plain(path, *arguments)

    monkeypatch.setattr(checkpoint, "write_tensors", write)

    def work(world: World) -> tuple[list[str], int]:
        saving = writer(tmp_path, world=world)
        saving.save(2, {f"policy.{world.rank}": torch.full((3,), 1.0 + world.rank)}, {})
        while not (tmp_path / ".step-000002.tmp" / "state.rank0.safetensors").exists():
            time.sleep(0.005)
        saving.look()  # one step later: rank 0 has written, rank 1 has not
        before = [path.name for path in checkpoint_folders(tmp_path)]
        world.objects(None)
        slow.set()
        wait_until(saving, 2)
        return before, saving.saved

    results = on_two_ranks(work)
    if fault:
        for result in results:
            with pytest.raises(UserError, match=r"rank 1: cannot write the file .*rank1.*No space left"):
                result.result()
        assert not names(tmp_path)
        return
    assert [result.result() for result in results] == [([], 2), ([], 2)]
    assert sorted(load_checkpoint(tmp_path / "step-000002").tensors) == ["policy.0", "policy.1"]


def test_training_goes_on_while_the_disk_is_slow(
    sd15_config: Callable[..., Config], disk: Disk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The write after step 2 is held up until the steps 3 and 4 are done; in one thread it would wait for ever."""
    plain, seen = MetricsLog.write, list[tuple[int, list[str]]]()
    config = sd15_config("name=slow", "method=dpo", "steps=6", "checkpoint_every=2", "checkpoint_async=true")

    def write(self: MetricsLog, metrics: dict[str, Any]) -> None:
        plain(self, metrics)
        seen.append((metrics["step"], names(config.run_dir / "checkpoints") if metrics["step"] > 2 else []))
        if metrics["step"] == 4:
            disk.go.set()

    monkeypatch.setattr(MetricsLog, "write", write)
    from fastpref.runs import run_training

    run_training(config)
    assert seen[2:4] == [(3, [".step-000002.tmp"]), (4, [".step-000002.tmp"])]
    assert disk.threads == [True, True, False] and names(config.run_dir / "checkpoints") == [
        "step-000004",
        "step-000006",
    ]


def test_a_run_that_fails_keeps_the_checkpoint_under_way(
    sd15_config: Callable[..., Config], disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, plain = sd15_config("name=failed", "method=dpo", "steps=4", "checkpoint_every=2"), OfflineTrainer.launch

    def failing(self: OfflineTrainer, step: int) -> Any:
        if step == 2:
            threading.Timer(0.2, disk.go.set).start()
            raise UserError("the third step fails")
        return plain(self, step)

    monkeypatch.setattr(OfflineTrainer, "launch", failing)
    from fastpref.runs import run_training

    with pytest.raises(UserError, match="the third step fails"):
        run_training(config)
    assert load_checkpoint(config.run_dir / "checkpoints" / "step-000002").step == 2
