"""Losses, gradients, candidates and verdicts of public code beside ours, on the same tensors, and both beside float64.

Give it checkouts of the public repositories (see docs/compared-with-peers.md for the commits); each is recognised by
its files, and the statements that compute its loss run as they stand there:

    python benchmarks/peers.py --repos ~/src/diffusers ~/src/DiffusionDPO ~/src/Diffusion-SDPO ~/src/SPO ~/src/LPO
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, ROOT, fill, markdown, provenance, read_csv, write_csv
from peer_code import Checkout
from peer_losses import Case, Outcome, cases, dpo_side, exact, ours
from peer_steps import (
    CANDIDATES,
    OfficialSteps,
    StepCase,
    noise_of,
    our_candidates,
    our_loss,
    our_verdict,
    published_sampler,
    step_cases,
)
from rich.console import Console
from rich.progress import track
from torch import Tensor

from fastpref.atomic import write_bytes
from fastpref.errors import UserError
from fastpref_kernels import derive_keys

OUT = RESULTS / "peers.csv"
DOCUMENT = ROOT / "docs" / "compared-with-peers.md"
CASES = 480
POOLS = 192  # at each of the 20 steps
DPO = "examples/research_projects/diffusion_dpo/train_diffusion_dpo"
SPO = "spo_training_and_inference"
Row = dict[str, Any]


@dataclass(frozen=True)
class Peer:
    """A public code and how it is compared."""

    name: str
    marks: tuple[str, ...]  # files by which its checkout is recognised
    compare: Callable[[Checkout], Iterator[Row]]


def offline(path: str, what: str, **options: Any) -> Callable[[Checkout], Iterator[Row]]:
    """The DPO loss of a training script, in fp32 and as it is in half precision.

    With the safeguard every case is one pair, since the script's λ belongs to the micro-batch and ours to the pair.
    """
    guarded = bool(options.get("safeguard"))

    def compare(checkout: Checkout) -> Iterator[Row]:
        theirs, found = dpo_side(checkout, path, **options), dict[str, list[float]]()
        for case in _tracked(list(cases(CASES, 1 if guarded else None)), what):
            for dtype, suffix in ((torch.float32, ""), (torch.float16, ", fp16"), (torch.bfloat16, ", bf16")):
                given = case.to(dtype)
                sides = theirs(given), ours(given, guarded), exact(given, guarded)
                _note(found, f"loss{suffix}", *(side.loss for side in sides))
                if not suffix:  # else rounded to half precision, which is all that would show
                    _note(found, "gradient", *(side.gradient for side in sides))
        for quantity, (between, own, other) in found.items():
            yield _row(path, f"{what}: {quantity}", CASES, between, own, other)
        yield from () if guarded else _ties(path, theirs, what)

    return compare


def _ties(path: str, theirs: Callable[[Case], Outcome], what: str) -> Iterator[Row]:
    """The accuracy where winner and loser are equally good: before the first update."""
    case = next(cases(1, 4))
    same = case._replace(pred=case.ref)
    found = theirs(same).accuracy, ours(same).accuracy
    assert found[0] is not None and found[1] is not None
    yield _row(path, f"{what}: accuracy of ties", 1, abs(float(found[0]) - float(found[1])))


def stepwise(package: str, trainer: str, theta: float | tuple[float, float]) -> Callable[[Checkout], Iterator[Row]]:
    """Candidates, verdicts on pools, and the loss of kept transitions over the published 20 steps."""

    def compare(checkout: Checkout) -> Iterator[Row]:
        official, found = OfficialSteps(checkout, package, trainer), dict[str, list[float]]()
        for number, case in enumerate(_tracked(list(step_cases(CASES)), "steps")):
            theirs, own, oracle = official.loss(case), our_loss(case), our_loss(_double(case))
            _note(found, "loss", theirs.loss, own.loss, oracle.loss)
            _note(found, "ratios", theirs.ratios, own.ratios, oracle.ratios)
            if oracle.gradient.any():  # zero where both ratios are clipped
                _note(found, "gradient", theirs.gradient, own.gradient, oracle.gradient)
            drawn = torch.arange(CANDIDATES * len(case.x_t))
            keys = derive_keys(number, 0, drawn, 0, "candidate").view(-1, CANDIDATES)
            pools = official.candidates(case, noise_of(keys, case)), our_candidates(case, keys)
            _note(found, "candidates", *pools, our_candidates(_double(case), keys))
        for quantity, (between, own_error, their_error) in found.items():
            yield _row(trainer, f"transitions: {quantity}", CASES, between, own_error, their_error)
        yield _row(trainer, "verdicts that differ", POOLS * len(published_sampler().steps), _verdicts(official, theta))

    return compare


def _verdicts(official: OfficialSteps, theta: float | tuple[float, float]) -> float:
    """Pools in which the two sides choose otherwise or disagree on keeping the pair."""
    random, different = torch.Generator().manual_seed(0), 0
    for index, step in enumerate(published_sampler().steps):
        scores = torch.randn(POOLS, CANDIDATES, generator=random).double()
        (chosen, kept), own = official.verdict(scores, step.t, theta), our_verdict(scores, index, theta)
        apart = (kept != own.kept) | (chosen[0] != own.winner) | (chosen[1] != own.loser)
        different += int(apart.sum())
    return float(different)


PEERS = (
    Peer("huggingface/diffusers, SDXL", (f"{DPO}_sdxl.py",), offline(f"{DPO}_sdxl.py", "DPO")),
    Peer("huggingface/diffusers, SD1.5", (f"{DPO}.py",), offline(f"{DPO}.py", "DPO", halved=False)),
    Peer("SalesforceAIResearch/DiffusionDPO", ("train.py", "launchers/turbo.sh"), offline("train.py", "DPO")),
    Peer(
        "AIDC-AI/Diffusion-SDPO",
        ("train.py", "scripts/train/sd15_dmpo.sh"),
        offline("train.py", "DPO with safeguard", safeguard=True),
    ),
    Peer("RockeyCoss/SPO", (f"{SPO}/spo",), stepwise(f"{SPO}/spo", f"{SPO}/train_scripts/train_spo.py", 0.3)),
    Peer("Kwai-Kolors/LPO", ("lpo/lpo",), stepwise("lpo/lpo", "lpo/train_scripts/train_lpo.py", (0.35, 0.5))),
)


def compare(folders: Sequence[Path]) -> list[Row]:
    """A row a quantity of every peer found in ``folders``.

    Raises:
        UserError: a folder that holds none of them, or another version of one.
    """
    rows: list[Row] = []
    for folder in folders:
        checkout = Checkout(folder)
        here = [peer for peer in PEERS if all((folder / mark).exists() for mark in peer.marks)]
        if not here:
            names = ", ".join(dict.fromkeys(peer.name.partition(",")[0] for peer in PEERS))
            raise UserError("not a checkout of a public code that is compared", str(folder), f"give one of: {names}")
        for peer in here:
            about = {"peer": peer.name, "their_commit": checkout.commit}
            rows += [about | row | provenance() for row in peer.compare(checkout)]
    return rows


def table(rows: Sequence[Row]) -> str:
    """Largest relative differences, a line a quantity."""
    head = ("public code", "commit", "what", "cases", "ours − theirs", "ours − float64", "theirs − float64")
    lines = [
        (
            *(str(row[name]) for name in ("peer", "their_commit", "what", "cases")),
            *(_shown(row[name]) for name in ("between", "ours", "theirs")),
        )
        for row in rows
    ]
    return markdown(head, lines)


def _shown(value: Any) -> str:
    return "" if value in ("", None) else f"{float(value):.1e}" if float(value) % 1 else f"{float(value):.0f}"


def _note(found: dict[str, list[float]], quantity: str, theirs: Tensor, own: Tensor, oracle: Tensor) -> None:
    """Keep the largest differences, relative to the largest element."""
    pairs = ((own, theirs), (own, oracle), (theirs, oracle))
    now = [float((a.double() - b.double()).abs().max() / b.double().abs().max()) for a, b in pairs]
    found[quantity] = [max(pair) for pair in zip(now, found.get(quantity, [0.0] * 3), strict=True)]


def _row(path: str, what: str, count: int, between: float, own: float | str = "", theirs: float | str = "") -> Row:
    return {"file": path, "what": what, "cases": count, "between": between, "ours": own, "theirs": theirs}


def _double(case: StepCase) -> StepCase:
    states = {name: getattr(case, name).double() for name in ("x_t", "x_w", "x_l")}
    both = {name: tuple(x.double() for x in getattr(case, name)) for name in ("policy", "reference")}
    return case._replace(**states, **both)


def _tracked(found: Sequence[Any], what: str) -> Iterator[Any]:
    yield from track(found, what, console=Console(stderr=True), transient=True)


def main() -> None:
    """Compare, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repos", nargs="*", type=Path, default=[], help="checkouts of public repositories")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--docs", action="store_true", help="also put the table into docs/compared-with-peers.md")
    options = parser.parse_args()
    try:
        found = compare(options.repos)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    again = {row["peer"] for row in found}
    rows = [*(row for row in read_csv(options.out) if row["peer"] not in again), *found]
    if not rows:
        print(UserError("no rows to report", str(options.out), "give checkouts with --repos"), file=sys.stderr)
        sys.exit(2)
    order = [peer.name for peer in PEERS]
    rows.sort(key=lambda row: order.index(row["peer"]))
    text = table(rows)
    print(text)
    if found:
        write_csv(options.out, rows)
        write_bytes(options.out.with_suffix(".md"), f"# Ours beside public code\n\n{text}\n".encode())
    if options.docs:
        fill(DOCUMENT, "table: peers", text)


if __name__ == "__main__":
    main()
