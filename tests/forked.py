"""Processes that start at once: forked from one that has imported what a run imports.

A new interpreter spends ten seconds of processor time on importing torch, diffusers, transformers and DeepSpeed; the
fork server of :mod:`multiprocessing` spends them once. What distinguishes a new interpreter (what gets imported,
variables that libraries read while they are imported) is for tests that start one with :mod:`subprocess`.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

IMPORTED = [
    *("torch", "fastpref.runs", "fastpref.data.prepare", "fastpref.train.job", "fastpref.train.offline"),
    *("fastpref.train.stepwise", "fastpref.models.lora_unet", "fastpref.models.similarity", "safetensors.torch"),
    *("diffusers.models.unets.unet_2d_condition", "diffusers.models.autoencoders.autoencoder_kl"),
    *("diffusers.schedulers.scheduling_ddim", "transformers.models.clip.modeling_clip"),
    *("transformers.models.clip.tokenization_clip", "transformers.models.clip.image_processing_pil_clip"),
    *("peft", "pytest"),
]


class Process:
    """``python ARGUMENTS`` with an environment, with the methods of :class:`subprocess.Popen` that tests use.

    Args:
        arguments: a script, ``-m MODULE`` or ``-c CODE``, and what it takes.
    """

    def __init__(self, arguments: list[str], environment: dict[str, str] | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="forked-")
        place = Path(self._folder.name)
        self._said = [place / "stdout", place / "stderr"]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_preloaded())
        with mock.patch.dict(os.environ, DS_ACCELERATOR="cpu"):
            forkserver.ensure_running()
        given = (arguments, dict(os.environ if environment is None else environment), [str(p) for p in self._said])
        self._process = context.Process(target=_interpret, args=given, daemon=True)
        self._process.start()
        assert self._process.pid
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs, -SIGNAL of one that was killed."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("forked", timeout or 0.0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """(stdout, stderr) when it has ended."""
        self.wait(timeout)
        out, err = (path.read_text() if path.exists() else "" for path in self._said)
        return out, err

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(arguments: list[str], environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """``subprocess.run`` of ``python ARGUMENTS`` with its output captured."""
    process = Process(arguments, environment)
    try:
        out, err = process.communicate(300)
    finally:
        process.kill()
    assert process.returncode is not None
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def _preloaded() -> list[str]:
    import torch

    gpu = torch.cuda.is_available()  # DeepSpeed decides what it runs on while it is imported
    return IMPORTED if gpu else [*IMPORTED, "deepspeed"]


def _interpret(arguments: list[str], environment: dict[str, str], said: list[str]) -> None:
    """In the fork: what the interpreter does with its arguments."""
    import torch

    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(said, 1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    if threads := environment.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    sys.argv = list(arguments)
    place: dict[str, Any] = {"run_name": "__main__"}
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.modules.pop(arguments[1], None)  # otherwise runpy warns
        runpy.run_module(arguments[1], alter_sys=True, **place)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(arguments[1], {"__name__": "__main__"})
    else:
        runpy.run_path(arguments[0], **place)
