"""Starts the processes of a run, several runs one after another.

As a script it is one such process: ``ranks.py RECIPE…`` trains the recipes in turn. A recipe ``NAME.yaml`` goes on from
the first checkpoint of the run named in ``NAME.from``, and gets the fault named in ``NAME.fault``.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from forked import Process

from fastpref.config import Config, load_config, save_config
from fastpref.errors import UserError


@dataclass
class Task:
    """A recipe, the run it continues, and what goes wrong in rank 1."""

    config: Config
    source: Path | None = None
    fault: str = ""


def recipe_files(tasks: list[Task], folder: Path) -> list[str]:
    """What the script takes."""
    files = []
    for task in tasks:
        files.append(folder / f"{task.config.name}.yaml")
        save_config(task.config, files[-1])
        files[-1].with_suffix(".from").write_text(str(task.source or ""))
        files[-1].with_suffix(".fault").write_text(task.fault)
    return [str(file) for file in files]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(arguments: list[str], ranks: int = 2) -> list[Process]:
    """A process a rank running ``python ARGUMENTS``, with the environment that a launcher gives it."""
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = {**os.environ, **common, "OMP_NUM_THREADS": "1"}
    return [Process(arguments, {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(ranks)]


def finish(processes: list[Process], timeout: float = 300) -> list[tuple[int, str]]:
    """(exit code, stderr) of every rank."""
    try:
        said = [process.communicate(timeout)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.wait(), text) for process, text in zip(processes, said, strict=True)]


def train(config: Config, source: Path | None = None, fault: str = "") -> None:
    """Train one recipe in this process, alone or with the others of the launcher; a fault strikes in the last rank."""
    from fastpref.models import compiled
    from fastpref.models.loading import resolve_device
    from fastpref.runs import _run
    from fastpref.train.world import open_world

    device = resolve_device(config.device)
    world = open_world(config, device)
    with world.together():
        if source is not None and world.is_main:
            _cut(source, config.run_dir)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(compiled.OPTIONS, "backend", "aot_eager")  # traced and split as always, but in seconds
        if fault and world.rank == world.size - 1:
            FAULTS[fault](patch)
        with world.watching():
            _run(config, world, device, dry_run=False)


def _cut(source: Path, run_dir: Path) -> None:
    """What a kill leaves of a run that has come far beyond its first checkpoint."""
    first = min((source / "checkpoints").iterdir())
    shutil.copytree(first, run_dir / "checkpoints" / first.name)
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copyfile(source / name, run_dir / name)


def _spoil(factor: float, number: int = 2) -> Callable[[pytest.MonkeyPatch], None]:
    """The third back-propagation, or another, of something else."""

    def fault(patch: pytest.MonkeyPatch) -> None:
        from fastpref.train.deepspeed_engine import ShardedEngine
        from fastpref.train.engine import LocalEngine

        count = iter(range(1000))
        for engine in (LocalEngine, ShardedEngine):
            backward = engine.backward
            patch.setattr(
                engine,
                "backward",
                lambda self, x, go=backward: go(self, x * (factor if next(count) == number else 1.0)),
            )

    return fault


def _no_space(patch: pytest.MonkeyPatch) -> None:
    """From the second checkpoint on."""
    import safetensors.torch

    save, count = safetensors.torch.save_file, iter(range(1000))

    def full(*arguments: Any, **named: Any) -> None:
        if next(count):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(*arguments, **named)

    patch.setattr(safetensors.torch, "save_file", full)


def _slow_disk(patch: pytest.MonkeyPatch) -> None:
    """Of the second checkpoint a part is written, and no more comes."""
    import safetensors.torch

    save, count = safetensors.torch.save_file, iter(range(1000))

    def slow(tensors: Any, path: Any, *more: Any, **named: Any) -> None:
        if next(count) == 1:
            Path(path).write_bytes(b"half")
            time.sleep(3600)
        save(tensors, path, *more, **named)

    patch.setattr(safetensors.torch, "save_file", slow)


def _stop(patch: pytest.MonkeyPatch) -> None:
    """Stand still before the fourth back-propagation, in whose collectives the others are."""
    from fastpref.train.deepspeed_engine import ShardedEngine
    from fastpref.train.engine import LocalEngine

    count = iter(range(1000))

    def stand_still(self: Any, objective: Any, go: Any) -> None:
        if next(count) == 3:
            os.kill(os.getpid(), signal.SIGSTOP)
        go(self, objective)

    for engine in (LocalEngine, ShardedEngine):
        backward = engine.backward
        patch.setattr(engine, "backward", lambda self, x, go=backward: stand_still(self, x, go))


FAULTS = {
    "nan": _spoil(float("nan")),
    "overflow": _spoil(1e9),
    "steep": _spoil(2.0**12, 0),
    "no space": _no_space,
    "slow disk": _slow_disk,
    "stop": _stop,
}


def main() -> None:
    for argument in sys.argv[1:]:
        if argument.startswith("--local_rank"):
            continue
        path = Path(argument)
        source, fault = (path.with_suffix(f".{end}").read_text() for end in ("from", "fault"))
        config = load_config(path)
        try:
            train(config, Path(source) if source else None, fault)
        except UserError as error:
            (path.parent / f"{config.name}.rank{os.environ['RANK']}.error").write_text(str(error))


if __name__ == "__main__":
    main()
