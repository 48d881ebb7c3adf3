"""What the arms of gpu_bench.py share: one UNet's weights on the device, a small prepared store, and the clock."""

from __future__ import annotations

import copy
import gc
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import literal_spo
import sdxl_full_size as full_size
import torch
from worlds import ENCODERS, config_of, make_full_encoders, open_world

import fastpref.models.policy
from fastpref.config import Config, load_config
from fastpref.data.prepare import prepare
from fastpref.models.loading import empty_unet, load_unet, model_dir_of
from fastpref.train.offline import OfflineTrainer, open_trainer
from fastpref.train.reference import prepare_reference
from fastpref.train.world import World as Ranks

MODELS = {
    "sdxl": "SDXL's UNet of 2,567 M parameters, random bf16 weights drawn on the device, 1024 px",
    "emoji": "the bundled SDXL, a UNet of 9.6 M parameters, 32 px: a rehearsal",
    "random": "a random SDXL: a rehearsal in a few seconds",
}
# beta as published; a learning rate at which random weights stay where they are
SDXL = ("precision=bf16", "resolution=1024", "beta=5000", "learning_rate=1e-6", "lora_rank=8", "group_size=1")
PAIRS = 8  # of the store: two batches of four, so that a ledger is made of few forwards


class OverLimit(Exception):
    """A part of the benchmark has used up its time."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Inside, :class:`OverLimit` is raised once ``seconds`` are over, between two lines of Python."""

    def over(*_: object) -> None:
        raise OverLimit(f"its {seconds:.0f} s are over")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class DeviceWeights:
    """A UNet's weights on a device. UNets that :meth:`load_unet` opens are built anew and share them.

    Args:
        empty: the UNet on the meta device.
        make: draws or reads the weights, by name, on the device.
    """

    def __init__(self, empty: Any, make: Callable[[], dict[str, torch.Tensor]]) -> None:
        self.empty, self._make = empty, make
        self._weights: dict[str, torch.Tensor] = {}
        self.lent = True  # False: whoever opens a UNet trains these weights themselves, the next one gets new ones

    def load_unet(self, _: Path, dtype: torch.dtype, unet: str | None = None) -> Any:
        """In place of :func:`fastpref.models.loading.load_unet`."""
        assert unet is None
        weights = self._weights or self._make()
        self._weights = weights if self.lent else {}
        found = copy.deepcopy(self.empty)
        found.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()}, assign=True)
        return found.eval()


@dataclass
class World:
    """What is trained, and where.

    Attributes:
        done: says of a part and an arm that an interrupted run has measured it.
        deadline: of the part that runs, by :func:`time.perf_counter`.
        repo, python: the checkout of the public script, if there is one, and the interpreter that runs it.
    """

    model: str
    device: torch.device
    folder: Path
    settings: list[str]
    weights: DeviceWeights
    repeats: int = 3
    done: Callable[[str, str], bool] = lambda part, arm: False
    deadline: float = math.inf
    repo: Path | None = None
    python: str = ""

    def config(self, *overrides: str) -> Config:
        """A recipe of an arm."""
        return config_of(self.settings, *overrides)

    def trainer(self, *overrides: str, ranks: Ranks | None = None) -> OfflineTrainer:
        """The trainer of an arm, all that earlier arms held being freed; a ledger is made first."""
        self.free()
        config = self.config(*overrides)
        if config.reference == "ledger":
            prepare_reference(config, progress=False)
        self.weights.lent = config.train == "lora"
        return open_trainer(config, model_dir_of(config), self.device, ranks)

    def free(self) -> None:
        """Give back what nobody refers to any more."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def with_parts(self, *parts: str) -> Path:
        """A pipeline folder whose VAE and text encoders (of :data:`worlds.ENCODERS`) have SDXL's size."""
        plain = model_dir_of(self.config())
        if self.model != "sdxl":
            return plain
        folder = self.folder / "-".join(("with", *parts))
        if not folder.is_dir():
            shutil.copytree(plain, folder, copy_function=os.link)
            make_full_encoders(folder, self.device, parts)
        return folder

    def whole(self) -> Path:
        """A pipeline folder that public code can open: 7 GB of SDXL."""
        folder = self.with_parts(*ENCODERS)
        if self.model == "sdxl" and not list((folder / "unet").glob("*.safetensors")):
            full_size.write_weights(self.weights.empty, folder / "unet", self.device)
        return folder


@contextmanager
def open_gpu_world(model: str, device: torch.device, folder: Path) -> Iterator[World]:
    """Make the inputs in ``folder``; inside, every UNet that fastpref opens has the weights on the device."""
    chosen = f"device={device.type}"
    if model == "sdxl":
        settings = [*_sdxl_settings(folder), chosen]
        empty = empty_unet(folder / "model" / "unet")
        weights = DeviceWeights(empty, lambda: draw_weights(empty, device))
    else:
        settings = [*open_world(model, folder, [chosen], PAIRS), "precision=bf16", "group_size=1"]
        path = model_dir_of(config_of(settings))
        empty = empty_unet(path / "unet")
        plain = load_unet  # the name is another function inside
        weights = DeviceWeights(empty, lambda: dict(plain(path, torch.bfloat16).to(device).state_dict()))
    with ExitStack() as stack:
        for module in (fastpref.models.policy, literal_spo):
            stack.enter_context(mock.patch.object(module, "load_unet", weights.load_unet))
        yield World(model, device, folder, settings, weights)


def draw_weights(empty: torch.nn.Module, device: torch.device) -> dict[str, torch.Tensor]:
    """Random bf16 weights of torch's default scale, drawn on the device."""
    shards = enumerate(full_size.shards_of(empty), 1)
    return {
        name: tensor
        for number, names in shards
        for name, tensor in full_size.drawn_shard(empty, names, number, device).items()
    }


def _sdxl_settings(folder: Path) -> Sequence[str]:
    """A pipeline folder without the UNet's weights, and a store of the bundled pairs at 1024 px."""
    from fastpref.emoji.random_models import make_random_clip

    full_size.make_pipeline(folder / "model")
    make_random_clip(folder / "clip")
    (folder / "records").mkdir()
    records = full_size.few_records(folder / "records")  # alone in its folder, as public scripts want it
    where = [f"model={folder / 'model'}", f"clip={folder / 'clip'}", f"records={records}", f"store={folder / 'store'}"]
    settings = [*where, *SDXL, "max_enlargement=null", "evaluate=false", "tracker=none"]
    prepare(load_config("", settings), progress=False)
    return settings
