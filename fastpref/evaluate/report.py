"""`fastpref report`: one HTML file that says what a run did, with the pictures in it."""

from __future__ import annotations

import base64
import io
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
from fastpref.evaluate.charts import Chart
from fastpref.evaluate.logs import read_metrics
from fastpref.evaluate.pools import MAX_ROWS, Round, draw_pools, read_rounds, totals
from fastpref.evaluate.run_charts import metric_charts, round_charts
from fastpref.evaluate.runner import paired_pictures
from fastpref.evaluate.sheets import MAX_TILE
from fastpref.evaluate.words import SCORERS, accuracy_rows, duration, headline, metric_rows, notes, subtitle

_SHOWN = 16  # prompts shown at once; the others unfold
_PIXEL_ART = 64  # pictures up to this size are enlarged with hard edges
_PACKAGES = ("fastpref", "fastpref-kernels", "torch", "diffusers", "transformers", "peft", "safetensors", "numpy")
_PAGE_WIDTH = 2048  # pixels of the pools' picture on the page: twice the width it is shown at
_WORK = {
    "unet_forwards": "UNet forwards",
    "rollout_unet_forwards": "of which in the rollouts",
    "unet_recomputed": "UNet forwards recomputed (gradient checkpointing)",
    "unet_backwards": "UNet backwards",
    "vae_encodes": "VAE encodes",
    "vae_decodes": "VAE decodes",
    "text_forwards": "Text encoder forwards",
    "scorer_forwards": "Scorer forwards",
}


def write_report(run_dir: Path) -> Path:
    """Write ``run_dir/report.html`` from config.yaml, summary.json, the logs and samples/, as far as there.

    Of spo and lpo the pools in ``pools/`` are drawn first where their pictures are missing or older.

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
    cards, rounds = _cards(run_dir / "samples"), read_rounds(run_dir)
    pools, undrawn = _pools(run_dir, config, rounds)
    stepwise = summary.get("stepwise") or (totals(rounds) if rounds else {})
    page = _template().render(
        config=config,
        headline=headline(config, before, after),
        subtitle=subtitle(config, summary),
        notes=notes(config, metrics, summary, before, after, rounds),
        shown=cards[:_SHOWN],
        folded=cards[_SHOWN:],
        rows=metric_rows(before, after),
        accuracies=accuracy_rows(before, after),
        left_out=_left_out(before) or _left_out(after),
        details=after.get("details") or before.get("details") or {},
        judge=SCORERS.get(str(config.get("method"))),
        rounds=rounds,
        pools=pools,
        undrawn=undrawn,
        stepwise=stepwise,
        round_charts=_drawn(round_charts(rounds)),
        charts=_drawn(metric_charts(config, metrics)),
        work=[
            (label, f"{(summary | stepwise)[key]:,}") for key, label in _WORK.items() if (summary | stepwise).get(key)
        ],
        cost=_cost(summary, stepwise),
        settings=_settings(config),
        versions=_versions(),
        finished=bool(summary),
        steps_logged=len(metrics.get("step", [])),
    )
    path = run_dir / "report.html"
    write_bytes(path, page.encode())
    return path


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


def _drawn(charts: list[Chart]) -> list[tuple[Chart, Markup]]:
    """Charts with what is drawn of them, whose labels are escaped already."""
    return [(chart, Markup(chart.svg)) for chart in charts]


def _pools(run_dir: Path, config: dict[str, Any], rounds: list[Round]) -> tuple[list[dict[str, Any]], str]:
    """The pools' pictures of the first and the newest round, and why there are none."""
    steps = {round_.number: round_.step for round_ in rounds}
    drawn, reason = draw_pools(run_dir, str(config.get("model")), str(config.get("prediction_type", "auto")))
    shown = drawn if len(drawn) < 3 else [drawn[0], drawn[-1]]
    entries = []
    for pool, picture in shown:
        image, width = _page_uri(picture)
        count = pool.scores.shape[1]
        candidates = f"the {count} candidates" if count <= MAX_ROWS else f"{MAX_ROWS} of the {count} candidates"
        entry = {"pool": pool, "image": image, "width": width, "candidates": candidates}
        entries.append(entry | {"step": steps.get(pool.number)})
    return entries, reason


def _page_uri(file: Path) -> tuple[str, int]:
    """A picture that fills the page's width as a data URI, a JPEG where that is smaller, and half its width."""
    try:
        with Image.open(file) as image:
            width, buffer = image.width, io.BytesIO()
            page = image.convert("RGB")
            page.thumbnail((_PAGE_WIDTH, _PAGE_WIDTH * 4), Image.Resampling.LANCZOS)
            page.save(buffer, "JPEG", quality=88)
    except OSError as error:
        raise UserError(
            "cannot read the picture", str(file), "delete it, and fastpref report draws it again"
        ) from error
    png = file.read_bytes()
    kind, data = ("png", png) if len(png) <= buffer.tell() else ("jpeg", buffer.getvalue())
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}", width // 2


def _cost(summary: dict[str, Any], stepwise: dict[str, Any]) -> list[tuple[str, str]]:
    cost = []
    seconds = {
        "seconds_total": "Total time",
        "seconds_train": "of which training" if not stepwise else "of which rollouts, scoring and training",
        "seconds_rollout": "rollouts",
        "seconds_scoring": "scoring",
        "seconds_training": "training on the pairs",
    }
    for key, label in seconds.items():
        if (found := (summary | stepwise).get(key)) is not None:
            cost.append((label, duration(found)))
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
