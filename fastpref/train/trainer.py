"""What every method's training has in common: its share of the batch, the optimizer step, counts, and its result."""

from __future__ import annotations

import itertools
import math
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from fastpref.config import Config
from fastpref.errors import UserError
from fastpref.models.policy import Policy
from fastpref.models.state_dict import check_finite
from fastpref.models.work import Work
from fastpref.train.engine import Engine
from fastpref.train.graphs import Graphs, Inputs, capture_fault, plain_forward
from fastpref.watch import Watch


class Trainer(ABC):
    """One method's training: what a step is, what it costs and what is left in the end."""

    config: Config
    engine: Engine
    skipped: int  # steps without an update, because loss or gradient was not finite

    def begin(self, run_dir: Path, watch: Watch) -> None:  # noqa: B027 - most trainers need neither
        """Called once, after a checkpoint was put back and before the first step."""

    @property
    def unrecorded(self) -> str | None:
        """Why something is not recorded as a CUDA graph, in one line; None if nobody would expect it to be."""
        return None

    def close(self) -> None:
        """Called once, after the last step or an error: nothing is read ahead from then on."""
        if (loader := vars(self).get("_loader")) is not None:  # a cached_property: there once it was used
            loader.close()

    def verify(self) -> None:  # noqa: B027 - step-wise methods read no store
        """Compare all that is on disk for the training with its checksums; :class:`UserError` if it is damaged."""

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors and JSON values that a checkpoint has to keep beside the engine's."""
        return {}, {}

    def load_state(self, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:  # noqa: B027
        """Put back what :meth:`state` gave."""

    def figures(self, steps: int) -> dict[str, Any]:
        """What ``summary.json`` says of this method's data after ``steps`` optimizer steps."""
        return {"samples_seen": steps * self.config.batch_size}

    @abstractmethod
    def step(self, step: int) -> dict[str, Any]:
        """One optimizer step (0-based); returns its metrics over the global batch."""

    def launch(self, step: int) -> Callable[[], dict[str, Any]]:
        """Start a step; what is returned waits for its end and gives its metrics."""
        metrics = self.step(step)
        return lambda: metrics

    @abstractmethod
    def work(self) -> Work:
        """What was computed so far."""

    @abstractmethod
    def restore_work(self, work: Work) -> None:
        """Go on counting from what a checkpoint has counted."""

    @abstractmethod
    def export(self, run_dir: Path) -> None:
        """Write the trained weights below ``run_dir``; called in one rank, inside the engine's ``whole()``."""

    @abstractmethod
    def describe(self) -> str:
        """What it trains on, e.g. '652 pairs'."""

    def warnings(self) -> list[str]:
        """Lines about the data that the user should read before the training starts."""
        return []

    def micro_batches(self, pairs: int) -> list[slice]:
        """This rank's part of ``pairs``, cut into forwards; every rank gets as many.

        A forward is a collective under ZeRO-3 and a backward under ZeRO-2, so where there are more ranks than rows for
        the last forwards, some ranks get an empty slice and have to go through the motions.
        """
        world, size = self.engine.world, self.config.micro_batch
        share = world.share(pairs)
        count = math.ceil(math.ceil(pairs / world.size) / size)
        if len(range(share.start, share.stop, size)) != count:
            edges = [share.start + (share.stop - share.start) * n // count for n in range(count + 1)]
            return [slice(start, stop) for start, stop in itertools.pairwise(edges)]
        return [slice(s, min(s + size, share.stop)) for s in range(share.start, share.stop, size)]

    def checked(self, step: int, figures: dict[str, float]) -> dict[str, float | None]:
        """A step's ``figures``; without a finite ``loss`` and ``grad_norm`` it changed nothing, is booked, has no norm.

        Raises:
            UserError: more than ``max_skipped_steps`` steps came to nothing.
        """
        found: dict[str, float | None] = dict(figures)
        if not (math.isfinite(figures["loss"]) and math.isfinite(figures["grad_norm"])):
            self.count_skip(step, figures["loss"])
            found["grad_norm"] = None
        return found

    def count_skip(self, step: int, loss: float) -> None:
        """Book a step that changed nothing; raises :class:`UserError` as :meth:`checked` does."""
        self.skipped += 1
        if self.skipped > self.config.max_skipped_steps:
            error = UserError(
                f"{self.skipped} steps had a non-finite loss or gradient, the last with loss {loss}",
                f"step {step + 1}",
                "lower learning_rate or beta, or use precision=fp32; the newest checkpoint is intact",
            )
            error.shared = True
            raise error


def check_trained(trainable: Mapping[str, torch.Tensor], run_dir: Path) -> None:
    """Raise :class:`UserError` if trained weights are not finite: they are not exported."""
    check_finite(trainable.items(), str(run_dir), "nothing is exported; lower learning_rate, or use precision=fp32")


class PolicyTrainer(Trainer):
    """A trainer whose trained model is a diffusion policy; on a GPU, what every step repeats is recorded."""

    policy: Policy
    graphs: Graphs | None = None
    _unrecorded: str | None = None

    @property
    def unrecorded(self) -> str | None:
        return self._unrecorded

    def record_graphs(self, device: torch.device) -> None:
        """Record from now on what can be; called once, before the first step.

        Raises:
            UserError: ``cuda_graphs`` is true and nothing can be recorded.
        """
        fault, wanted = capture_fault(self.config, device), self.config.cuda_graphs
        if fault is not None:
            if wanted is True:
                raise UserError(f"cuda_graphs is true, but {fault}", "cuda_graphs", "use cuda_graphs=auto")
            self._unrecorded = f"no CUDA graphs: {fault}" if wanted == "auto" and device.type == "cuda" else None
            return
        self.graphs = graphs = Graphs(device, keeps=self.config.accumulation == "keep_graphs", strict=wanted is True)
        self.policy.repeat = graphs.run
        self._unrecorded = self.engine.record_graphs(graphs.run)

    def on_stream(self) -> AbstractContextManager[None]:
        """Around all that a step computes."""
        return nullcontext() if self.graphs is None else self.graphs.ahead()

    def repeated(self, name: str, function: Callable[..., Any], inputs: Inputs, key: Any = ()) -> Any:
        """``function(*inputs)`` without gradients; see :meth:`fastpref.train.graphs.Graphs.run`."""
        if self.graphs is None:
            with torch.no_grad():
                return function(*inputs)
        return self.graphs.run(name, function, inputs, key)

    def differentiable(
        self,
        name: str,
        function: Callable[..., tuple[torch.Tensor | None, ...]],
        backward: Callable[[torch.Tensor, torch.Tensor], None],
        inputs: Inputs,
        slot: int = 0,
        key: Any = (),
    ) -> tuple[tuple[torch.Tensor | None, ...], Callable[[torch.Tensor], None]]:
        """See :meth:`fastpref.train.graphs.Graphs.forward`."""
        if self.graphs is None or not self.engine.settled:
            return plain_forward(function, backward, inputs)
        return self.graphs.forward(name, function, backward, inputs, slot, key)

    def work(self) -> Work:
        policy = self.policy
        return Work(policy.forwards, policy.recomputed, policy.backwards)

    def restore_work(self, work: Work) -> None:
        policy = self.policy
        policy.forwards, policy.recomputed, policy.backwards = (
            work.unet_forwards,
            work.unet_recomputed,
            work.unet_backwards,
        )

    def export(self, run_dir: Path) -> None:
        """A LoRA file or a ``unet/`` folder, in diffusers' format."""
        from fastpref.models.lora_file import save_lora

        check_trained(self.policy.trainable, run_dir)
        if self.config.train == "lora":
            save_lora(self.policy.unet, run_dir)
            return
        draft, final = run_dir / ".unet.tmp", run_dir / "unet"
        shutil.rmtree(draft, ignore_errors=True)
        self.policy.unet.save_pretrained(draft)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(draft, final)
