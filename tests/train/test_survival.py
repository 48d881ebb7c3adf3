"""Whatever happens to a run, what was acknowledged stays, a line says what happened, and the run goes on from there."""

from __future__ import annotations

import errno
import math
import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastpref.config import Config, save_config
from fastpref.data.prepare import prepare
from fastpref.data.store import Store
from fastpref.errors import UserError
from fastpref.runs import run_training
from fastpref.train.batch import BatchBuilder
from fastpref.train.checkpoint import Checkpoint, load_checkpoint, newest_intact
from fastpref.train.job import Stopped
from fastpref.train.offline import OfflineTrainer
from fastpref.train.telemetry import MetricsLog, StopRequest

Recipe = Callable[..., Config]


COMMON = ["method=dpo", "steps=4", "checkpoint_every=2", "micro_batch_size=4", "ema_decay=0.9", "resume=auto"]


@pytest.fixture
def recipe(sd15_config: Recipe) -> Recipe:
    """A DPO run of four steps with a checkpoint after each two; ``recipe("NAME", …)``."""
    return lambda name, *more: sd15_config(f"name={name}", *COMMON, *more)


@pytest.fixture(scope="module")
def whole(
    sd15_config_in: Callable[[Path], Recipe], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    """The weights of the uninterrupted run."""
    config = sd15_config_in(tmp_path_factory.mktemp("whole"))(*COMMON)
    run_training(config)
    return weights(config)


def weights(config: Config) -> dict[str, torch.Tensor]:
    return load_file(config.run_dir / "pytorch_lora_weights.safetensors")


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def checkpoint(config: Config) -> Checkpoint:
    found = next(iter(newest_intact(config.run_dir / "checkpoints")))
    assert isinstance(found, Checkpoint)
    return found


@contextmanager
def largest_file(limit: int) -> Iterator[None]:
    """The system refuses to let any file grow beyond ``limit`` bytes, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def command(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of ``fastpref train``, in this process."""
    from fastpref.cli import main

    save_config(config, tmp_path / "recipe.yaml")
    monkeypatch.setattr(sys, "argv", ["fastpref", "train", str(tmp_path / "recipe.yaml")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.mark.parametrize("beside", ["true", "false"])
def test_a_full_disk_leaves_the_checkpoint_before_it(
    recipe: Recipe,
    whole: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Any,
    beside: str,
) -> None:
    config = recipe("full", f"checkpoint_async={beside}")
    run_training(recipe("full", "steps=2"))
    before = checkpoint(config)
    size = (before.path / "state.safetensors").stat().st_size
    with largest_file(size // 2):
        assert command(config, tmp_path, monkeypatch) == 2
    error = capfd.readouterr().err
    assert "cannot write the" in error and "step-000004" in error and "File too large" in error
    assert "Traceback" not in error and sum(line.startswith("error: ") for line in error.splitlines()) == 1
    assert [path.name for path in (config.run_dir / "checkpoints").iterdir()] == ["step-000002"]
    assert load_checkpoint(before.path).step == 2
    run_training(config)
    assert same(weights(config), whole)


def test_a_full_disk_anywhere_else_is_one_line_too(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    def full(self: MetricsLog, metrics: dict[str, Any]) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(MetricsLog, "write", full)
    assert command(recipe("full"), tmp_path, monkeypatch) == 2
    error = capfd.readouterr().err
    assert "No space left on device" in error and "Traceback" not in error and error.count("error: ") == 1


@pytest.mark.parametrize("fails", [False, True])
def test_nobody_reads_the_store_after_the_run(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """Neither after its end nor after an error: the files may be replaced then, and a mapped one that shrinks kills."""
    reads, plain = [0], BatchBuilder.read

    def slow(batches: BatchBuilder, *rest: Any) -> Any:
        reads[0] += 1
        number = reads[0]
        time.sleep(0.1)
        if fails and number == 3:
            raise UserError("the store is damaged", "test", "none")
        return plain(batches, *rest)

    monkeypatch.setattr(BatchBuilder, "read", slow)
    with pytest.raises(UserError, match="the store is damaged") if fails else nullcontext():
        run_training(recipe("alone"))
    found = reads[0]
    time.sleep(0.5)
    assert reads[0] == found >= 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_a_closed_trainer_reads_again_when_it_is_asked_to(sd15_config: Recipe) -> None:
    from fastpref.models.loading import resolve_model_dir
    from fastpref.train.offline import open_trainer

    config = sd15_config("method=dpo", "micro_batch_size=4")
    losses = []
    for closes in (False, True):
        trainer = open_trainer(config, resolve_model_dir(config.model), torch.device("cpu"))
        trainer.step(0)
        if closes:
            trainer.close()
        losses.append(trainer.step(1)["loss"])
        trainer.close()
    assert losses[0] == losses[1] != math.log(2)


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_a_damaged_shard_ends_the_training_and_nothing_else(
    recipe: Recipe, whole: dict[str, torch.Tensor], sd15_store: Path, tmp_path: Path, damage: str
) -> None:
    store = shutil.copytree(sd15_store, tmp_path / "store")
    config = recipe("damaged", f"store={store}")
    run_training(recipe("damaged", f"store={store}", "steps=2"))
    intact = {}
    for file in store.glob("latents-*.safetensors"):
        intact[file] = data = file.read_bytes()
        half = len(data) // 2
        flipped = bytes(byte ^ 1 for byte in data[half:])  # so many that every batch has some
        file.write_bytes(data[:half] + flipped if damage == "flipped" else data[:half])
        if damage == "missing":
            file.unlink()
    says = {"flipped": "does not match its checksum", "cut": "is damaged", "missing": "is missing"}[damage]
    with pytest.raises(UserError, match=f"latents-.*{says}"):
        run_training(config)
    assert checkpoint(config).step == 2
    for file, data in intact.items():
        file.write_bytes(data)
    run_training(config)
    assert same(weights(config), whole)


@pytest.mark.parametrize("method", ["sft", "dpo", "rpo"])
def test_nan_in_one_micro_batch_skips_that_step_only(
    sd15_config: Recipe, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The second micro-batch of the second step: every weight, moment and average is as after the first step."""
    config = sd15_config(f"method={method}", "micro_batch_size=4", "steps=3", "ema_decay=0.9")
    from fastpref.models.loading import resolve_model_dir
    from fastpref.train.offline import open_trainer

    trainer = open_trainer(config, resolve_model_dir(config.model), torch.device("cpu"))
    plain, calls = trainer.policy.forward_pass, [0]
    trainer.step(0)
    before = {name: tensor.clone() for name, tensor in trainer.engine.state()[0].items()}

    def spoiled(noisy: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        calls[0] += 1
        found = plain(noisy, *rest, **more)
        return found * torch.tensor([math.nan] + [1.0] * (len(found) - 1)).view(-1, 1, 1, 1) if calls[0] == 2 else found

    monkeypatch.setattr(trainer.policy, "forward_pass", spoiled)
    metrics = trainer.step(1)
    assert metrics["grad_norm"] is None and not math.isfinite(metrics["loss"]) and trainer.skipped == 1
    assert same(trainer.engine.state()[0], before)
    assert all(parameter.grad is None for parameter in trainer.policy.trainable.values())
    metrics = trainer.step(2)
    assert math.isfinite(metrics["loss"]) and not same(trainer.engine.state()[0], before) and trainer.skipped == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_and_its_exit_code(
    recipe: Recipe,
    whole: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    config, plain = recipe("stopped", "checkpoint_every=1000"), OfflineTrainer.launch

    def signalled(self: OfflineTrainer, step: int) -> Any:
        if step == 2:
            os.kill(os.getpid(), number)
        return plain(self, step)

    with monkeypatch.context() as patched:
        patched.setattr(OfflineTrainer, "launch", signalled)
        assert command(config, tmp_path, patched) == 128 + number
    assert checkpoint(config).step == 3, "the step is finished first"
    run_training(recipe("stopped", "checkpoint_every=1000"))
    assert same(weights(config), whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_does_what_it_did_before(number: signal.Signals) -> None:
    seen: list[int] = []
    before = signal.signal(number, lambda *_: seen.append(number))
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), number)
            assert stop.signal == number and not seen
            os.kill(os.getpid(), number)
            assert seen == [number]
    finally:
        signal.signal(number, before)
    assert Stopped(number).exit_code == 128 + number


def test_a_dead_decoding_thread_ends_prepare_and_is_made_up_for(
    sd15: Path, few_records: Path, sd15_store: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastpref.data import encode

    settings: dict[str, Any] = {"resolution": 32, "shard_size": 10, "clip": str(clip), "records": str(few_records)}
    config = Config(model=str(sd15), store=str(tmp_path / "store"), **settings)
    calls = [0]

    def dying(*_: Any) -> Any:
        calls[0] += 1
        raise MemoryError("in the thread")

    with monkeypatch.context() as patched, pytest.raises(MemoryError, match="in the thread"):
        patched.setattr(encode, "_prepare_image", dying)
        prepare(config, progress=False)
    with pytest.raises(UserError, match="unfinished"):
        Store.open(tmp_path / "store")
    prepare(config, progress=False)
    ours, theirs = (
        {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}
        for folder in (tmp_path / "store", sd15_store)
    )
    assert calls[0] and ours == theirs


def test_a_dead_loader_thread_ends_the_run_and_nothing_else(
    recipe: Recipe, whole: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, read, calls = recipe("starved"), Store.batch, [0]

    def dying(self: Store, *arguments: Any, **keywords: Any) -> Any:
        calls[0] += 1
        if calls[0] > 6 and threading.current_thread() is not threading.main_thread():
            raise MemoryError("in the thread")
        return read(self, *arguments, **keywords)

    with monkeypatch.context() as patched, pytest.raises(MemoryError, match="in the thread"):
        patched.setattr(Store, "batch", dying)
        run_training(config)
    assert checkpoint(config).step == 2
    run_training(config)
    assert same(weights(config), whole)
