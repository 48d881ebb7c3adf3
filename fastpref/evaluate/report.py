"""`fastpref report`: one HTML file that says what a run did, with the pictures in it."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from PIL import Image

from fastpref.atomic import read_json, write_bytes
from fastpref.config import Config
from fastpref.errors import UserError
from fastpref.evaluate.charts import Chart, Series, draw
from fastpref.evaluate.runner import paired_pictures
from fastpref.evaluate.sheets import MAX_TILE
from fastpref.evaluate.words import accuracy_rows, duration, headline, metric_rows, notes, subtitle

_SHOWN = 16  # prompts shown at once; the others unfold
_PIXEL_ART = 64  # pictures up to this size are enlarged with hard edges
_PACKAGES = ("fastpref", "fastpref-kernels", "torch", "diffusers", "transformers", "peft", "safetensors", "numpy")
_WORK = {
    "unet_forwards": "UNet forwards",
    "unet_recomputed": "UNet forwards recomputed (gradient checkpointing)",
    "unet_backwards": "UNet backwards",
    "vae_encodes": "VAE encodes",
    "vae_decodes": "VAE decodes",
    "text_forwards": "Text encoder forwards",
    "scorer_forwards": "Scorer forwards",
}


def write_report(run_dir: Path) -> Path:
    """Write ``run_dir/report.html`` from config.yaml, metrics.jsonl, summary.json and samples/, as far as there.

    Raises:
        UserError: no run directory, a damaged file in it, or a directory that cannot be written.
    """
    run_dir = Path(run_dir)
    config = _read_config(run_dir / "config.yaml")
    summary = read_json(run_dir / "summary.json")
    evaluation = summary.get("evaluation") or read_json(run_dir / "evaluation.json")
    if not isinstance(evaluation, dict) or not isinstance(summary.get("seconds_total") or 0.0, int | float):
        raise UserError("not what fastpref wrote", str(run_dir / "summary.json"), "restore it, or fastpref evaluate")
    metrics = read_metrics(run_dir / "metrics.jsonl")
    before, after = evaluation.get("before") or {}, evaluation.get("after") or {}
    cards = _cards(run_dir / "samples")
    page = _template().render(
        config=config,
        headline=headline(config, before, after),
        subtitle=subtitle(config, summary),
        notes=notes(config, metrics, summary, before, after),
        shown=cards[:_SHOWN],
        folded=cards[_SHOWN:],
        rows=metric_rows(before, after),
        accuracies=accuracy_rows(before, after),
        left_out=_left_out(before) or _left_out(after),
        details=after.get("details") or before.get("details") or {},
        charts=[(chart, Markup(chart.svg)) for chart in _charts(config, metrics)],  # drawn here, labels escaped there
        work=[(label, f"{summary[key]:,}") for key, label in _WORK.items() if summary.get(key)],
        cost=_cost(summary),
        settings=_settings(config),
        versions=_versions(),
        finished=bool(summary),
        steps_logged=len(metrics.get("step", [])),
    )
    path = run_dir / "report.html"
    write_bytes(path, page.encode())
    return path


def read_metrics(path: Path) -> dict[str, list[float]]:
    """``metrics.jsonl`` by column, ascending in step; a resumed run's later line for a step wins; gaps are NaN.

    A last line cut short by a kill is passed over; any other damage is a UserError.
    """
    if not path.is_file():
        return {}
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    rows: dict[int, dict[str, Any]] = {}
    for index, line in enumerate(lines):
        try:
            row = json.loads(line)
            rows[int(row["step"])] = row
        except (ValueError, KeyError, TypeError):
            if index < len(lines) - 1:
                raise UserError(f"line {index + 1} is damaged", str(path), "remove the line") from None
    columns = dict.fromkeys(key for row in rows.values() for key in row)
    ordered = [rows[step] for step in sorted(rows)]
    return {key: [_value(row.get(key)) for row in ordered] for key in columns}


def _charts(config: dict[str, Any], metrics: dict[str, list[float]]) -> list[Chart]:
    steps = metrics.get("step", [])
    if not steps:
        return []

    def pair(stem: str) -> list[Series]:
        return [Series("winner", metrics[f"{stem}_winner"], "a"), Series("loser", metrics[f"{stem}_loser"], "b")]

    charts = []
    if "loss" in metrics:
        charts.append(draw("Loss", "", steps, [Series("loss", metrics["loss"], "c")]))
    for title, stem, note, line in (
        ("Implicit rewards", "reward", "reference's error − policy's error; above zero the policy is better", 0.0),
        ("Denoising errors", "err", "mean squared error of the policy", None),
    ):
        if f"{stem}_winner" in metrics and f"{stem}_loser" in metrics:
            charts.append(draw(title, note, steps, pair(stem), line=line))
    clip = config.get("max_grad_norm")
    clipping = f"before clipping at {clip:g}" if isinstance(clip, int | float) else "not clipped"
    for title, key, note, line in (
        ("Pairwise accuracy", "accuracy", "share of pairs whose winner has the higher reward", 0.5),
        ("Effective contrasts", "effective_contrasts", "losers that each winner is really compared with", None),
        ("Gradient norm", "grad_norm", clipping, float(clip) if isinstance(clip, int | float) else None),
        ("Learning rate", "lr", "", None),
    ):
        if any(math.isfinite(value) for value in metrics.get(key, [])):
            charts.append(
                draw(title, note, steps, [Series(key.replace("_", " "), metrics[key], "c")], line=line, raw=key == "lr")
            )
    return charts


def _cards(samples: Path) -> list[dict[str, Any]]:
    """For each prompt its caption and the (before, after) pictures of its seeds as data URIs."""
    cards = []
    for prompt, files in paired_pictures(samples).items():
        pairs = [(data_uri(before), data_uri(after)) for before, after in files]
        with Image.open(files[0][0]) as image:
            pixel_art = max(image.size) <= _PIXEL_ART
        cards.append({"prompt": prompt, "pairs": pairs, "pixel_art": pixel_art})
    return cards


def data_uri(file: Path) -> str:
    """A picture for the page: small PNGs as they are, larger ones reduced to JPEGs of at most 256 pixels."""
    try:
        with Image.open(file) as image:
            if max(image.size) <= MAX_TILE:
                return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
            image.thumbnail((MAX_TILE, MAX_TILE), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "JPEG", quality=90)
    except OSError as error:
        raise UserError("cannot read the picture", str(file), "sample it again with fastpref evaluate") from error
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _cost(summary: dict[str, Any]) -> list[tuple[str, str]]:
    cost = []
    for key, label in (("seconds_total", "Total time"), ("seconds_train", "of which training")):
        if summary.get(key) is not None:
            cost.append((label, duration(summary[key])))
    if summary.get("samples_seen") is not None:
        cost.append(("Samples seen", f"{summary['samples_seen']:,}"))
    if summary.get("samples_per_second"):
        cost.append(("Samples per second", f"{summary['samples_per_second']:.3g}"))
    for key, label in (("peak_rss_bytes", "Peak memory"), ("peak_device_bytes", "Peak device memory")):
        if summary.get(key):
            cost.append((label, f"{summary[key] / 2**30:.2f} GiB"))
    if summary.get("world_size"):
        cost.append(("Processes", str(summary["world_size"])))
    return cost


def _settings(config: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """(key, value, differs from the default)."""
    rows = []
    for key, value in config.items():
        field = Config.model_fields.get(key)
        text = "–" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        rows.append((key, text, field is not None and value != _plain(field.default)))
    return rows


def _left_out(result: dict[str, Any]) -> dict[str, str]:
    return (result.get("details") or {}).get("left_out") or {}


def _value(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _versions() -> list[tuple[str, str]]:
    rows = [("Python", platform.python_version())]
    for name in _PACKAGES:
        try:
            rows.append((name, version(name)))
        except PackageNotFoundError:
            continue
    return [*rows, ("system", f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs")]


def _template() -> Any:
    environment = Environment(loader=PackageLoader("fastpref.evaluate", "."), autoescape=True, trim_blocks=True)
    environment.lstrip_blocks = True
    return environment.get_template("report.html.jinja")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError("not a run directory", str(path.parent), "give a folder that fastpref train wrote") from None
    except (OSError, yaml.YAMLError) as error:
        raise UserError("cannot read the config", str(path), " ".join(str(error).split())) from None
    if not isinstance(settings, dict):
        raise UserError("the config is no mapping", str(path), "restore the file that fastpref train wrote")
    return settings
