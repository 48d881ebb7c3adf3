"""The reference ledger: the frozen reference's error of every (pair, draw), computed once, in files beside the store.

A draw is an epoch: (seed, epoch, pair) fixes noise, flip, posterior sample and caption dropout, (seed, epoch, group)
the timestep, so the reference's error is one number a picture and is looked up instead of computed. Rows are in the
order in which training visits them: ``ledgers/<name>/draw-DDDDD-PPPPP.safetensors`` holds ``errors`` (steps, 2, batch),
winners first, of the P-th stretch of steps of draw D; each file carries the sha256 of its numbers. ``<name>`` is the
digest of :class:`Facts`, which is everything that decides them: ledgers of several seeds lie side by side, and one made
for anything else is never read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from fastpref.atomic import make_directory, read_json, write_json, write_tensors
from fastpref.errors import UserError

FORMAT_VERSION = 1
FOLDER = "ledgers"
FACTS = "facts.json"
_YOUNGER = ("autocast", "ledger_precision")  # than ledgers in fp32 and fp64, which do without
OWN_SIZES = "own"  # SDXL was told each picture's own size, or SD1.5 none
_REMEDY = "run 'fastpref prepare --reference CONFIG'"
_PAIRS_PER_FILE = 4096


@dataclass(frozen=True)
class Facts:
    """What decides the numbers of a ledger; the names are those of the settings where there is one."""

    reference: str  # sha256 of its weights
    store: str  # fingerprint of records, models and settings that the store was prepared with
    schedule: str  # sha256 of the noise levels and the prediction type
    seed: int
    batch_size: int  # with the three below and the store: which pairs share a group, and in which order they come
    group_size: int
    sampling: str
    timestep_range: tuple[int, int] | None
    caption_dropout: float
    label_noise: float
    precision: str
    size_conditioning: str  # OWN_SIZES where it does not matter, as in ledgers older than the setting
    micro_batch_size: int | None = None  # these in half precision only: down to compile if rounded as in training
    attention: str | None = None
    fused_ops: bool | None = None
    compile: bool | str | None = None
    autocast: bool | None = None
    ledger_precision: str | None = None
    format_version: int = FORMAT_VERSION

    @property
    def name(self) -> str:
        """Digest of the facts, 16 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.stated(), sort_keys=True).encode()).hexdigest()[:16]

    def stated(self) -> dict[str, Any]:
        """What ``facts.json`` says: as ledgers did that are older than a setting, where that doesn't matter."""
        facts = asdict(self)
        if self.size_conditioning == OWN_SIZES:
            del facts["size_conditioning"]
        return {key: value for key, value in facts.items() if value is not None or key not in _YOUNGER}


class Part(NamedTuple):
    """Consecutive steps of one draw: the unit that is written, and resumed, as a whole."""

    draw: int
    number: int
    steps: range  # within the draw

    @property
    def file(self) -> str:
        return f"draw-{self.draw:05d}-{self.number:05d}.safetensors"


class Ledger:
    """The errors of one set of :class:`Facts`; ``steps_per_draw`` is the number of batches in an epoch."""

    def __init__(self, store: Path, facts: Facts, steps_per_draw: int) -> None:
        self.path, self.facts, self.steps_per_draw = store / FOLDER / facts.name, facts, steps_per_draw
        self.steps_per_part = max(1, _PAIRS_PER_FILE // facts.batch_size)
        self.dtype = torch.float64 if facts.precision == "fp64" else torch.float32
        self._parts: dict[str, torch.Tensor] = {}

    def parts(self, steps: int) -> Iterator[Part]:
        """The parts that hold the first ``steps`` optimizer steps of a run."""
        for draw in range(-(-steps // self.steps_per_draw)):
            visited = min(steps - draw * self.steps_per_draw, self.steps_per_draw)
            for number, start in enumerate(range(0, visited, self.steps_per_part)):
                yield Part(draw, number, range(start, min(start + self.steps_per_part, self.steps_per_draw)))

    def missing(self, steps: int) -> list[Part]:
        """Those of :meth:`parts` that have not been written."""
        return [part for part in self.parts(steps) if not (self.path / part.file).is_file()]

    def begin(self) -> None:
        """Make the directory, which says first what it is made for."""
        make_directory(self.path)
        write_json(self.path / FACTS, self.facts.stated())

    def write(self, part: Part, errors: torch.Tensor) -> None:
        """Put down the ``errors`` (steps, 2, batch) of a part, in one step."""
        errors = errors.to("cpu", self.dtype).contiguous()
        write_tensors(self.path / part.file, {"errors": errors}, {"sha256": _digest(errors)})

    def check(self, steps: int) -> None:
        """Read what a run of ``steps`` needs.

        Raises:
            UserError: there is no ledger, only one for something else, too few draws, or a damaged file.
        """
        if not read_json(self.path / FACTS):
            raise UserError(*self._absence(), f"{_REMEDY} with the settings of the training")
        missing = self.missing(steps)
        if missing:
            draws = -(-steps // self.steps_per_draw)
            what = f"the reference ledger is too short: {steps} steps need {draws} draws of a pair"
            todo = f"{_REMEDY} with steps={steps} (it adds what is missing), or set draws to train on fewer draws again"
            raise UserError(f"{what}, {len(missing)} parts are missing", str(self.path / missing[0].file), todo)
        for part in self.parts(steps):
            self._read(part)

    def errors(self, draw: int, step: int, rows: slice) -> torch.Tensor:
        """The reference's errors ``(2n,)``, winners first, of the pairs ``rows`` in the batch ``step`` of a draw."""
        number, at = divmod(step, self.steps_per_part)
        start = number * self.steps_per_part
        part = Part(draw, number, range(start, min(start + self.steps_per_part, self.steps_per_draw)))
        return self._read(part)[at, :, rows].reshape(-1)

    def _read(self, part: Part) -> torch.Tensor:
        if part.file not in self._parts:
            self._parts[part.file] = self._verified(part)
        return self._parts[part.file]

    def _verified(self, part: Part) -> torch.Tensor:
        file, todo = self.path / part.file, f"delete it and {_REMEDY}"
        try:
            with safe_open(file, framework="pt") as stream:
                errors, digest = stream.get_tensor("errors"), (stream.metadata() or {}).get("sha256")
        except (SafetensorError, OSError) as error:
            raise UserError("the ledger's file cannot be read", str(file), f"{error}: {todo}") from error
        whole = errors.shape == (len(part.steps), 2, self.facts.batch_size) and errors.dtype == self.dtype
        if not whole or _digest(errors) != digest:
            raise UserError("the ledger's file is damaged", str(file), f"its sha256 differs: {todo}")
        return errors

    def _absence(self) -> tuple[str, str]:
        """What is there instead, and where: the ledger that differs least."""
        wanted = json.loads(json.dumps(asdict(self.facts)))
        found = []
        for file in self.path.parent.glob(f"*/{FACTS}"):
            facts = {"size_conditioning": OWN_SIZES, **read_json(file)}
            found.append((sorted(key for key in wanted | facts if facts.get(key) != wanted.get(key)), file, facts))
        if not found:
            return "no reference ledger there", str(self.path.parent)
        differing, file, facts = min(found, key=lambda other: (len(other[0]), other[1]))
        said = ", ".join(_difference(key, facts.get(key), wanted.get(key)) for key in differing)
        return f"the reference ledger was made for something else: {said}", str(file.parent)


def _difference(key: str, there: object, here: object) -> str:
    if key in ("reference", "store", "schedule"):
        return f"another {key}"
    return f"{key} {json.dumps(there)}, here {json.dumps(here)}"


def _digest(errors: torch.Tensor) -> str:
    return hashlib.sha256(errors.numpy().tobytes()).hexdigest()
