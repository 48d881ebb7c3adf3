"""Starts the processes of a run, several runs one after another, because importing DeepSpeed takes ten seconds.

As a script it is one such process: ``ranks.py RECIPE…`` trains the recipes in turn.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from fastpref.config import Config, save_config


def start(recipes: list[Config], folder: Path, ranks: int = 2, **environment: str) -> list[subprocess.Popen[str]]:
    """One process a rank, each training ``recipes`` in turn."""
    files = []
    for config in recipes:
        files.append(folder / f"{config.name}.yaml")
        save_config(config, files[-1])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *map(str, files)]
    return [
        subprocess.Popen(
            command,
            env={**os.environ, **common, **environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


def finish(processes: list[subprocess.Popen[str]], timeout: float = 300) -> list[tuple[int, str]]:
    """(exit code, stderr) of every rank."""
    found = [process.communicate(timeout=timeout)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, found, strict=True)]


def main() -> None:
    from fastpref.config import load_config
    from fastpref.models.loading import resolve_device
    from fastpref.runs import _run
    from fastpref.train.world import open_world

    for path in sys.argv[1:]:
        config = load_config(path)
        world = open_world(config, resolve_device(config.device))
        _run(config, world, dry_run=False)


if __name__ == "__main__":
    main()
