"""What ``prepare`` tells the person who started it: bars with the time left, and a summary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from fastpref.data.manifest import StoreManifest
    from fastpref.data.plan import Plan
    from fastpref.models.caption_length import CutCaptions


class Bars:
    """Progress bars on a console, or nothing."""

    def __init__(self, shown: bool, console: Console | None) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), "eta")
        self._progress = Progress(
            *columns, TimeRemainingColumn(), console=console or Console(stderr=True), disable=not shown
        )

    def __enter__(self) -> Bars:
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, trace)

    def add(self, description: str, total: int, beat: Callable[[], None] | None = None) -> Callable[[int], None]:
        """A new bar (none for a total of 0); returns what advances it, calling ``beat`` each time."""
        task = self._progress.add_task(description, total=total) if total else None

        def advance(count: int) -> None:
            if task is not None:
                self._progress.advance(task, count)
            if beat is not None:
                beat()

        return advance


@dataclass(frozen=True)
class PrepareSummary:
    """Counts of a prepared (or, for a dry run, planned) store."""

    store: Path
    pairs: int
    images: int  # distinct pictures, encoded once each
    captions: int  # distinct captions
    records: int
    rejected: int
    ties_dropped: int
    identical_dropped: int  # pairs of two equal pictures
    unlabelled: int
    bytes: int  # of the store; estimated in a dry run
    seconds: float  # this call took
    reasons: dict[str, int] = field(default_factory=dict)
    cut: CutCaptions | None = None
    buckets: dict[str, int] = field(default_factory=dict)  # dry run: pictures by bucket
    hours: float | None = None  # dry run: estimated for the whole job on one rank
    up_to_date: bool = False
    dry_run: bool = False
    finished: bool = True  # False on a rank that does not write the index

    @classmethod
    def of_manifest(
        cls, manifest: StoreManifest, store: Path, seconds: float, up_to_date: bool = False
    ) -> PrepareSummary:
        """The summary of a finished store."""
        return cls(
            store=store,
            pairs=manifest.pairs,
            images=manifest.images,
            captions=manifest.captions,
            records=manifest.source_records,
            rejected=manifest.rejected,
            ties_dropped=manifest.ties_dropped,
            identical_dropped=manifest.identical_dropped,
            unlabelled=manifest.unlabelled,
            bytes=manifest.total_bytes,
            seconds=seconds,
            reasons=manifest.reasons,
            cut=manifest.cut,
            up_to_date=up_to_date,
        )

    @classmethod
    def of_plan(cls, plan: Plan, store: Path, seconds: float) -> PrepareSummary:
        """The summary of a rank that has done its share."""
        from fastpref.data.plan import reasons

        return cls(
            store=store,
            pairs=len(plan.record),
            images=len(plan.image_key),
            captions=len(plan.captions) - 1,
            records=plan.records,
            rejected=len(plan.rejected),
            ties_dropped=plan.ties_dropped,
            identical_dropped=plan.identical_dropped,
            unlabelled=plan.unlabelled,
            bytes=0,
            seconds=seconds,
            reasons=dict(sorted(reasons(plan.rejected).items())),
            finished=False,
        )

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """The summary for a terminal."""
        left_out = [f"{self.rejected} rejected", f"{self.ties_dropped} ties dropped", f"{self.unlabelled} unlabelled"]
        left_out += [f"{self.identical_dropped} with identical pictures dropped"] * bool(self.identical_dropped)
        head = "up to date" if self.up_to_date else "dry run, nothing written" if self.dry_run else "prepared"
        lines = [
            f"{self.store}: {head if self.finished else 'this rank is done'}",
            f"  {self.pairs} pairs of {self.records} records ({', '.join(left_out)})",
            f"  {self.images} distinct pictures, {self.captions} distinct captions",
        ]
        if self.cut is not None:
            lines.append(f"  {self.cut}")
        lines += [f"  rejected: {reason} ({count})" for reason, count in self.reasons.items()]
        if len(self.buckets) > 1:
            lines.append("  pictures by bucket: " + ", ".join(f"{name} {n}" for name, n in self.buckets.items()))
        if self.dry_run:
            lines.append(f"  estimated: {_size(self.bytes)}, {self.hours:.2f} hours on one rank")
        elif self.finished:
            lines.append(f"  {_size(self.bytes)} in {self.seconds:.1f} s")
        return lines


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"
