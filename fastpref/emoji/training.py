"""The one training loop of the bundled models: seeded, resumable, with a progress line and a JSONL log.

The randomness of step k is a function of (seed, stage, k) only, so a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import json
import math
import os
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastpref.errors import UserError

THREADS = 2
LossFunction = Callable[[int, torch.Generator], dict[str, Tensor]]  # must hold the key "loss"


@dataclass(frozen=True)
class Workspace:
    """Where the stages keep checkpoints and logs, the seed of the build, and whether to continue an earlier one."""

    path: Path
    seed: int
    resume: bool

    def file(self, name: str) -> Path:
        self.path.mkdir(parents=True, exist_ok=True)
        return self.path / name


@dataclass(frozen=True)
class FitSettings:
    """Length and optimizer of one stage. ``ema_decay`` 0 means the last weights are kept."""

    stage: str
    steps: int
    learning_rate: float
    warmup: int = 100
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    ema_decay: float = 0.0
    clip_norm: float = 1.0
    log_every: int = 50
    checkpoint_seconds: float = 120.0


@dataclass
class FitResult:
    """What the model card states: steps, seconds over all resumes, and the mean of each metric over the last tenth."""

    steps: int
    seconds: float
    metrics: dict[str, float]


def stage_generator(seed: int, stage: str, step: int) -> torch.Generator:
    """The random generator of one step of one stage."""
    return torch.Generator().manual_seed((seed << 40) ^ (zlib.crc32(stage.encode()) << 20) ^ step)


def learning_rate_at(step: int, settings: FitSettings) -> float:
    """Linear warm-up, then half a cosine to a hundredth of the peak."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.learning_rate * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * progress)))


def save_atomic(state: dict[str, Any], path: Path) -> None:
    """torch.save to a temporary name, then os.replace."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


class Fit:
    """AdamW on one module with warm-up and cosine decay, weight averaging, checkpoints and a log."""

    def __init__(self, model: nn.Module, settings: FitSettings, work: Workspace):
        self.model, self.settings, self.work = model, settings, work
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        decayed = [p for p in self.parameters if p.ndim > 1]
        plain = [p for p in self.parameters if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, fused=True)
        self.average = [p.detach().clone() for p in self.parameters] if settings.ema_decay else []
        self.step, self.seconds = 0, 0.0
        self.history: list[dict[str, float]] = []
        self.checkpoint = work.file(f"{settings.stage}.pt")
        self.log = work.file(f"{settings.stage}.jsonl")
        if work.resume and self.checkpoint.is_file():
            self._load()
        else:
            self.log.write_text("")

    def _load(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average = state["average"]
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
        rows = self.log.read_text().splitlines() if self.log.is_file() else []
        self.log.write_text("".join(row + "\n" for row in rows if json.loads(row)["step"] <= self.step))

    def save(self) -> None:
        """Write the whole state of the run, atomically."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "average": self.average}
        save_atomic(state | {"step": self.step, "seconds": self.seconds, "history": self.history}, self.checkpoint)

    def run(self, loss_function: LossFunction, provisional: Callable[[], None] | None = None) -> FitResult:
        """Train to the end; ``provisional`` is called once, with the averaged weights in place, at a third of it."""
        settings, started, saved = self.settings, time.monotonic() - self.seconds, time.monotonic()
        self.model.train()
        pending: list[dict[str, float]] = []
        while self.step < settings.steps:
            pending.append(self._one_step(loss_function))
            self.seconds = time.monotonic() - started
            if self.step % settings.log_every == 0 or self.step == settings.steps:
                self._report(pending)
                pending = []
            if provisional and self.step == settings.steps // 3:
                self._swap()
                provisional()
                self._swap()
            if time.monotonic() - saved > settings.checkpoint_seconds or self.step == settings.steps:
                self.save()
                saved = time.monotonic()
        self._swap()
        self.model.eval()
        tail = self.history[-max(1, len(self.history) // 10) :]
        return FitResult(self.step, self.seconds, {k: sum(row[k] for row in tail) / len(tail) for k in tail[0]})

    def _one_step(self, loss_function: LossFunction) -> dict[str, float]:
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(self.step, settings)
        metrics = loss_function(self.step, stage_generator(self.work.seed, settings.stage, self.step))
        self.optimizer.zero_grad(set_to_none=True)
        metrics["loss"].backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, settings.clip_norm)
        if torch.isfinite(norm):
            self.optimizer.step()
        self.step += 1
        if self.average:
            # A short memory at first, so that the average forgets the random start.
            decay = min(settings.ema_decay, self.step / (self.step + 10))
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1.0 - decay)
        return {name: float(value.detach()) for name, value in metrics.items()} | {"grad_norm": float(norm)}

    def _swap(self) -> None:
        """Exchange the weights with their running average."""
        for parameter, average in zip(self.parameters, self.average, strict=bool(self.average)):
            live = parameter.detach().clone()
            parameter.data.copy_(average)
            average.copy_(live)

    def _report(self, pending: list[dict[str, float]]) -> None:
        row = {name: sum(p[name] for p in pending) / len(pending) for name in pending[0]}
        self.history.append(row)
        with self.log.open("a") as log:
            log.write(json.dumps({"step": self.step, "seconds": round(self.seconds, 1)} | row) + "\n")
        left = self.seconds / self.step * (self.settings.steps - self.step)
        values = " ".join(f"{name} {value:.4f}" for name, value in row.items())
        print(
            f"{self.settings.stage} {self.step}/{self.settings.steps} {values} · {left / 60:.1f} min left", flush=True
        )


def load_finished(model: nn.Module, settings: FitSettings, work: Workspace) -> None:
    """Load the weights, averaged if they were averaged, that a finished stage left in the workspace.

    Raises:
        UserError: the stage has not run to its end.
    """
    checkpoint = work.file(f"{settings.stage}.pt")
    state: dict[str, Any] = torch.load(checkpoint, weights_only=True) if checkpoint.is_file() else {"step": 0}
    if state["step"] < settings.steps:
        todo = f"run python -m fastpref.emoji.build {settings.stage} --resume first"
        raise UserError(f"stage {settings.stage} is at step {state['step']} of {settings.steps}", str(checkpoint), todo)
    model.load_state_dict(state["model"])
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter, average in zip(trained, state["average"], strict=bool(state["average"])):
        parameter.data.copy_(average)


def declare_float32(config_file: Path) -> None:
    """Let transformers load fp16 weights as fp32: it takes the dtype from config.json, diffusers defaults to fp32."""
    config = json.loads(config_file.read_text())
    config["dtype"] = "float32"
    config_file.write_text(json.dumps(config, indent=2) + "\n")


def random_shift(images: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Shift each picture of (N, C, H, W) by up to ``pixels`` in both directions, repeating the edge."""
    n, _, height, width = images.shape
    padded = nn.functional.pad(images, (pixels,) * 4, mode="replicate")
    offsets = torch.randint(0, 2 * pixels + 1, (n, 2), generator=generator)
    rows = offsets[:, :1] + torch.arange(height)
    columns = offsets[:, 1:] + torch.arange(width)
    index = torch.arange(n)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def degrade(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blur a third of the pictures (N, C, H, W) in [0, 1] and add noise (std up to 0.15) to half of them."""
    n = len(images)
    sigma = 0.4 + 0.8 * torch.rand(n, generator=generator)
    images = torch.where((torch.rand(n, generator=generator) < 1 / 3).view(n, 1, 1, 1), blur(images, sigma), images)
    std = 0.15 * torch.rand(n, generator=generator) * (torch.rand(n, generator=generator) < 0.5)
    noise = torch.randn(images.shape, generator=generator) * std.view(n, 1, 1, 1)
    return (images + noise).clamp(0.0, 1.0)


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with a 5-tap kernel, one sigma (pixels) a picture: (N, C, H, W) and (N,)."""
    n, channels, height, width = images.shape
    taps = torch.exp(-0.5 * (torch.arange(-2.0, 3.0)[None] / sigma[:, None]) ** 2)
    kernel = (taps / taps.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    flat = nn.functional.pad(images, (2,) * 4, mode="replicate").reshape(1, n * channels, height + 4, width + 4)
    flat = nn.functional.conv2d(flat, kernel[:, None, :, None], groups=n * channels)
    return nn.functional.conv2d(flat, kernel[:, None, None, :], groups=n * channels).view_as(images)


def to_tensor(images: Any) -> Tensor:
    """(N, H, W, 3) uint8 array to (N, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255.0).contiguous()
