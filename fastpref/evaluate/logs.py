"""Logs of a run: one JSON object a line, as a run that was killed and resumed leaves them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from fastpref.errors import UserError


def read_rows(path: Path, key: str) -> list[dict[str, Any]]:
    """The objects of a log, ascending in the integer ``key``; a later line for the same number wins. No file: none.

    A last line cut short by a kill is passed over; any other damage is a UserError.
    """
    if not path.is_file():
        return []
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    rows: dict[int, dict[str, Any]] = {}
    for index, line in enumerate(lines):
        try:
            row = json.loads(line)
            rows[int(row[key])] = row
        except (ValueError, KeyError, TypeError):
            if index < len(lines) - 1:
                raise UserError(f"line {index + 1} is damaged", str(path), "remove the line") from None
    return [rows[number] for number in sorted(rows)]


def read_metrics(path: Path) -> dict[str, list[float]]:
    """``metrics.jsonl`` by column, ascending in step, read as :func:`read_rows` does; gaps are NaN."""
    rows = read_rows(path, "step")
    columns = dict.fromkeys(key for row in rows for key in row)
    return {key: [number_or_nan(row.get(key)) for row in rows] for key in columns}


def number_or_nan(value: Any) -> float:
    """A number as a float; null, which stands for what is not finite, and anything else as NaN."""
    return float(value) if isinstance(value, int | float) else math.nan
