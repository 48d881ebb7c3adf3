"""What every benchmark writes the same way: CSV with machine, versions and commit; tables between README markers."""

from __future__ import annotations

import csv
import io
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastpref.atomic import write_bytes

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TABLES = ROOT / "benchmarks" / "README.md"


def provenance() -> dict[str, Any]:
    """Columns that say where and on what a row was measured; a commit is marked if code was changed."""
    head = _git("rev-parse", "--short", "HEAD").stdout.strip()
    changed = _git("diff", "--quiet", "HEAD", "--", ".", ":!benchmarks/results", ":!*.md").returncode == 1
    return {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "commit": f"{head}{'-dirty' * changed}" if head else "unknown",
    }


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:  # a copy of the tree on a machine without git
        return subprocess.CompletedProcess(arguments, 127, "", "")


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """All rows, atomically; the columns are those of the first row and whatever later rows add."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, text.getvalue().encode())


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows as text; none if there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def publish(
    out: Path, rows: Sequence[dict[str, Any]], title: str, text: str, plot: Callable[..., None], readme: Path | None
) -> None:
    """Rows as ``out``, its table ``text`` and its plot beside it, and the table between the markers of ``readme``."""
    write_csv(out, rows)
    write_bytes(out.with_suffix(".md"), f"# {title}\n\n{text}\n".encode())
    plot(rows, out.with_suffix(".png"))
    if readme is not None:
        fill(readme, f"table: {out.stem}", text)


def fill(document: Path, name: str, text: str) -> None:
    """Put ``text`` between ``<!-- NAME -->`` and ``<!-- end of NAME -->``.

    Raises:
        ValueError: the document does not hold the two markers once each, in this order.
    """
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    head, found, rest = document.read_text().partition(begin)
    old, closed, tail = rest.partition(end)
    if not found or not closed or begin in old + tail or end in tail:
        raise ValueError(f"{document.name} must hold '{begin}' and '{end}' once each")
    write_bytes(document, f"{head}{begin}\n{text}\n{end}{tail}".encode())
