"""Steps that are recorded once and replayed: equal to plain ones bit for bit, on the GPU of ``stand_in_gpu``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from recorded import METHODS, STEPS, WAITING, trained
from stand_in_gpu import CUDA, StandInGpu
from stand_in_graphs import CaptureError, Graph

from fastpref.config import Config
from fastpref.errors import UserError
from fastpref.train.graphs import MOST_SHAPES, Graphs
from fastpref.train.trainer import PolicyTrainer

Recipe = Callable[..., Config]


@pytest.fixture
def recipe(sdxl_config: Recipe, clip: Path, few_records: Path, one_level_unet: Path) -> Recipe:
    files = [f"clip={clip}", f"records={few_records}", f"unet={one_level_unet}"]
    fixed = ["vae_precision=fp32", "batch_size=2", "resolution=32", "device=cuda", f"steps={STEPS}"]
    return lambda *more: sdxl_config(*files, *fixed, *more)


@contextmanager
def waiting_for_nothing(gpu: StandInGpu) -> Iterator[None]:
    gpu.waits.clear()
    yield
    assert not [wait for wait in gpu.waits if not any(own in wait for own in WAITING)]


@pytest.mark.parametrize("name", METHODS)
def test_recorded_steps_are_the_plain_ones(recipe: Recipe, tmp_path: Path, name: str) -> None:
    with StandInGpu() as gpu:
        watched = partial(waiting_for_nothing, gpu)
        plain, expected, trainer = trained(recipe(*METHODS[name], "cuda_graphs=false"), tmp_path / "plain", watched)
        work, before = trainer.work(), Graph.replays
        metrics, found, trainer = trained(recipe(*METHODS[name], "cuda_graphs=true"), tmp_path / "recorded", watched)
        assert Graph.replays - before >= 2 * (STEPS - 1)
        assert trainer.work() == work
    assert metrics == plain
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_cannot_be_recorded_raises(tmp_path: Path) -> None:
    with StandInGpu():
        graphs, given = Graphs(CUDA), torch.ones(2, device=CUDA)
        for number, read_back in enumerate((lambda x: x * x.sum().item(), lambda x: x + torch.ones(2).to(CUDA))):
            graphs.run(f"{number}", read_back, [given])
            with pytest.raises(CaptureError):
                graphs.run(f"{number}", read_back, [given])
            lenient = Graphs(CUDA, strict=False)
            lenient.run("work", read_back, [given])
            with pytest.warns(UserWarning, match="no CUDA graph of work, which runs as plain code"):
                lenient.run("work", read_back, [given])
            assert torch.equal(lenient.run("work", read_back, [given]).cpu(), torch.full((2,), 2.0))


def test_a_bounded_number_of_shapes_is_recorded_and_none_twice() -> None:
    """More shapes than are kept, each met again and again; forwards that wait don't count against each other."""
    with StandInGpu():
        graphs, shapes = Graphs(CUDA, keeps=True), range(1, MOST_SHAPES + 4)
        recorded: list[int] = []

        def doubled(x: torch.Tensor) -> tuple[torch.Tensor]:
            recorded.extend([len(x)] * torch.cuda.is_current_stream_capturing())
            return (2 * x,)

        with pytest.warns(UserWarning, match="no CUDA graph of doubled in further shapes") as warned:
            for _ in range(4):
                for rows in shapes:
                    (found,) = graphs.run("doubled", doubled, [torch.ones(rows, device=CUDA)])
                    assert torch.equal(found.cpu(), torch.full((rows,), 2.0))
        assert len(warned) == 1
        assert recorded == [*shapes][:MOST_SHAPES]
        recorded.clear()
        for _ in range(3):
            for slot in range(MOST_SHAPES + 4):
                graphs.forward("waiting", doubled, lambda *_: None, [torch.ones(3, device=CUDA)], slot)
        assert len(recorded) == MOST_SHAPES + 4


@pytest.mark.parametrize(
    ("settings", "why"),
    [(["device=cpu"], "they need a GPU"), (["engine=deepspeed"], "DeepSpeed runs Python in every pass")],
)
def test_graphs_that_cannot_be_are_one_line(recipe: Recipe, settings: list[str], why: str) -> None:
    config = recipe("method=dpo", *settings, "cuda_graphs=true")
    device = torch.device("cpu") if "device=cpu" in settings else CUDA
    with pytest.raises(UserError) as refused:
        PolicyTrainer.record_graphs(SimpleNamespace(config=config), device)
    assert str(refused.value) == f"cuda_graphs is true, but {why} (cuda_graphs): use cuda_graphs=auto"


def test_a_forward_that_waits_for_its_backward_is_not_written_over() -> None:
    """With one pool the second forward takes the memory of what the first keeps; ``keeps`` gives each its own."""
    weight = torch.tensor([2.0])
    with StandInGpu():
        for keeps in (True, False):
            there = torch.nn.Parameter(weight.to(CUDA))
            there.grad = torch.zeros_like(there)
            graphs = Graphs(CUDA, keeps=keeps)

            def forward(x: torch.Tensor, there: torch.Tensor = there) -> tuple[torch.Tensor]:
                return ((there * x).exp(),)

            def backward(result: torch.Tensor, factor: torch.Tensor) -> None:
                (result * factor).sum().backward()

            one = torch.ones(1, device=CUDA)
            for _ in range(3):
                there.grad.zero_()
                waiting = [graphs.forward("f", forward, backward, [one * n], slot=n)[1] for n in (1, 2)]
                for later in waiting:
                    later(one)
            exact = (2 * weight).exp() * 2 + weight.exp()
            assert torch.equal(there.grad.cpu(), exact) == keeps
