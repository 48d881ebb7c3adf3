"""The report says what the files say, stands alone, and copes with a run that is not complete."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastpref.config import parse_config, save_config
from fastpref.errors import UserError
from fastpref.evaluate.charts import Series, draw, number, smooth, ticks
from fastpref.evaluate.logs import read_metrics
from fastpref.evaluate.report import data_uri, write_report
from fastpref.evaluate.words import duration, headline, metric_rows, notes, subtitle

PROMPTS = ["red <b>cat</b> & dog", "blue heart"]

CHARTS = ["Loss", "Implicit rewards", "Denoising errors", "Pairwise accuracy"]
CHARTS += ["Effective contrasts", "Gradient norm", "Learning rate"]


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(file.read_text())
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def of(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def _result(share: float, distance: float, top5: float) -> dict[str, Any]:
    details = {"pictures": 4, "prompts": 2, "pool": 74, "floor": 3.25, "real_style_accuracy": 0.993}
    details |= {"ceiling": {"top1": 1.0, "top5": 1.0}, "chance": {"top1": 0.0135, "top5": 0.0676}}
    details |= {"base_distance": 43.25, "distance_left": (distance - 3.25) / 40}
    retrieval = {"top1": 0.25, "top5": top5}
    return {"style_share": share, "style_distance": distance, "prompt_retrieval": retrieval, "details": details}


def _row(step: int, **extra: float) -> dict[str, float]:
    row = {"step": step, "loss": 0.69 - step / 1000, "reward_winner": 1e-4 * step, "reward_loser": -2e-4 * step}
    row |= {"err_winner": 0.05, "err_loser": 0.06, "accuracy": 0.5, "grad_norm": 2.0, "lr": 1e-3, "seconds": 0.1}
    return row | extra


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished RPO run with two prompts of two seeds."""
    save_config(parse_config({"name": "demo", "beta": 1234.0, "steps": 40}), tmp_path / "config.yaml")
    rows = [json.dumps(_row(step, effective_contrasts=7.5)) for step in range(1, 41)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    evaluation = {"before": _result(0.0, 41.5, 0.5), "after": _result(1.0, 12.25, 0.5)}
    summary = {"seconds_total": 252.0, "seconds_train": 61.0, "samples_seen": 1280, "peak_rss_bytes": 3 << 30}
    summary |= {"unet_forwards": 12345, "vae_decodes": 8, "scorer_forwards": 0, "evaluation": evaluation}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    for tag, colour in (("before", "red"), ("after", "black")):
        folder = tmp_path / "samples" / tag
        folder.mkdir(parents=True)
        entries = []
        for i, prompt in enumerate(PROMPTS):
            for seed in (0, 1):
                Image.new("RGB", (32, 32), colour).save(folder / f"{i}-{seed}.png")
                entries.append({"file": f"{i}-{seed}.png", "prompt": prompt, "seed": seed})
        (folder / "index.json").write_text(json.dumps({"pictures": entries}))
    return tmp_path


def test_a_complete_run(run: Path) -> None:
    file = write_report(run)
    assert file == run / "report.html"
    page = Page(file)
    assert "RPO raised the share of pictures in the preferred style from 0% to 100%" in page.text
    assert re.search(
        r"Style distance .* 41.5 12.2 −29.2 real preferred pictures 3.25, real dispreferred 43.2", page.text
    )
    assert "; 22% of that way is left" in page.text
    assert re.search(r"top 5 .* 50% 50% \+0 points real pictures 100%, chance 7%", page.text)
    assert "UNet forwards 12,345" in page.text and "Scorer" not in page.text
    assert "Total time 4 min 12 s" in page.text and "Peak memory 3.00 GiB" in page.text
    assert "beta 1234.0" in page.text
    assert [str(svg["aria-label"]).split(":")[0] for svg in page.of("svg")] == CHARTS


def test_it_stands_alone_and_pairs_the_pictures(run: Path) -> None:
    page = Page(write_report(run))
    images = page.of("img")
    assert len(images) == 8
    assert all(str(image["src"]).startswith("data:image/png;base64,") for image in images)
    before, after = (data_uri(run / "samples" / tag / "0-0.png") for tag in ("before", "after"))
    assert [image["src"] for image in images] == [before, after] * 4
    assert not page.of("script") and not page.of("link")
    html = (run / "report.html").read_text()
    assert "http" not in html and "<b>cat" not in html
    assert 'red &lt;b&gt;cat&lt;/b&gt; &amp; dog' in html  # fmt: skip
    assert {attributes.get("class") for attributes in page.of("figure")} == {"pixels"}
    assert not list(run.glob(".*"))


def test_without_evaluation_it_says_so(run: Path) -> None:
    save_config(parse_config({"name": "demo", "evaluate": False, "method": "sft"}), run / "config.yaml")
    summary = json.loads((run / "summary.json").read_text()) | {"evaluation": None}
    (run / "summary.json").write_text(json.dumps(summary))
    for tag in ("before", "after"):
        (run / "samples" / tag / "index.json").unlink()
    page = Page(write_report(run))
    assert "was not evaluated" in page.text and "SFT on emoji" in page.text
    assert not page.of("img") and "Style share" not in page.text


def test_a_run_under_way(run: Path) -> None:
    (run / "summary.json").unlink()
    (run / "metrics.jsonl").unlink()
    (run / "evaluation.json").write_text(json.dumps({"before": _result(0.5, 9.0, 0.5)}))
    page = Page(write_report(run))
    assert "no summary yet" in page.text and "No step has been logged" in page.text
    assert re.search(r"Style share .* 50% – –", page.text)


def test_left_out_metrics_are_named(run: Path) -> None:
    nothing = {"style_share": None, "style_distance": None, "prompt_retrieval": None}
    result = {**nothing, "details": {"left_out": dict.fromkeys(nothing, "no style encoder given")}}
    (run / "summary.json").write_text(json.dumps({"evaluation": {"before": result, "after": result}}))
    page = Page(write_report(run))
    assert "3 metrics were left out: no style encoder given." in page.text
    assert "RPO on emoji" in page.text


def test_metrics_of_a_killed_and_resumed_run(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    rows = [_row(1), _row(2), _row(3), _row(2, loss=0.25), _row(4, loss=math.nan)]
    file.write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 5, "lo')
    metrics = read_metrics(file)
    assert metrics["step"] == [1, 2, 3, 4]
    assert metrics["loss"][:3] == pytest.approx([0.689, 0.25, 0.687]) and math.isnan(metrics["loss"][3])
    file.write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2 is damaged"):
        read_metrics(file)
    assert read_metrics(tmp_path / "none") == {}


def test_not_a_run_directory_and_damaged_files(run: Path) -> None:
    with pytest.raises(UserError, match="not a run directory"):
        write_report(run / "samples")
    (run / "samples" / "after" / "0-0.png").write_bytes(b"no png")
    with pytest.raises(UserError, match="cannot read the picture"):
        write_report(run)
    (run / "summary.json").write_text("{")
    with pytest.raises(UserError, match="cannot read the file"):
        write_report(run)
    assert not (run / "report.html").exists()


def test_large_pictures_are_reduced(tmp_path: Path) -> None:
    Image.effect_noise((1024, 512), 90).convert("RGB").save(tmp_path / "large.png")
    uri = data_uri(tmp_path / "large.png")
    assert uri.startswith("data:image/jpeg") and len(uri) < 80_000


def test_words() -> None:
    rpo = {"method": "rpo", "model": "models/sdxl"}
    assert headline(rpo, {"style_share": 0.5}, {"style_share": 0.5}).endswith(
        "left the share of pictures in the preferred style at 50%"
    )
    assert "lowered" in headline(rpo, {"style_share": 0.5}, {"style_share": 0.1})
    assert headline(rpo, {}, {}) == "RPO on sdxl"
    assert [duration(s) for s in (7.4, 61, 7300)] == ["7 s", "1 min 1 s", "2 h 1 min"]
    displaced = {"reward_winner": [0.1] * 90 + [-0.02] * 10, "reward_loser": [-0.1] * 100}
    assert (
        "likelihood displacement" in notes(rpo, displaced, {}, {}, {})[0]
        and "-0.02" in notes(rpo, displaced, {}, {}, {})[0]
    )
    assert notes(rpo, {"reward_winner": [-0.1] * 90 + [0.1] * 10}, {}, {}, {}) == []
    assert notes(rpo, {"reward_winner": [-0.11, 0.1] * 50}, {}, {}, {}) == []
    lost = notes(rpo, {}, {"skipped_steps": 2}, _result(0, 1, 0.5), _result(0, 1, 0.3))
    assert len(lost) == 2 and "prompt retrieval" in lost[0] and lost[1].startswith("2 steps")


def test_words_of_a_preference_model() -> None:
    before, after = ({"pair_accuracy": {"0": a, "951": b}} for a, b in ((0.9, 0.5), (1.0, 0.8)))
    line = "tells the preferred picture in 90% of held-out pairs, before training in 70%"
    assert headline({"method": "spm"}, before, after) == f"The step-aware preference model {line}"
    assert headline({"method": "lrm"}, before, after) == f"The latent reward model {line}"
    assert headline({"method": "lrm", "model": "emoji"}, {}, {}) == "LRM on emoji"


@pytest.mark.parametrize("method", ["spm", "lrm"])
def test_a_preference_model_has_accuracies_and_no_pictures(run: Path, method: str) -> None:
    save_config(parse_config({"method": method, "train": "full"}), run / "config.yaml")
    details = {"pairs": 1000, "prompts": 64}
    results = [{"pair_accuracy": {"501": share}, "details": details} for share in (0.5, 0.75)]
    (run / "summary.json").write_text(json.dumps({"evaluation": dict(zip(("before", "after"), results, strict=True))}))
    page = Page(write_report(run))
    assert "t = 501 50% 75% +25 points" in page.text and "on 1000 pairs of 64 prompts" in page.text
    assert ("one-step prediction" in page.text) == (method == "spm")
    assert "Before and after" not in page.text and "share of pairs whose winner has the higher score" in page.text


def test_words_of_the_stepwise_methods() -> None:
    lpo = parse_config({"method": "lpo", "scorer": "runs/x"}).model_dump(mode="json")
    said = subtitle(lpo, {})
    assert {"K 4, threshold 0.35 to 0.5", "scored by runs/x", "β 500"} <= set(said)
    fine = {"ratio_winner": [1.01, 1.02] * 10, "ratio_clipped": [0.1] * 20}
    assert notes(lpo, fine, {}, {}, {}) == []
    said = notes(lpo, {"ratio_winner": [0.97, 0.98] * 10, "ratio_clipped": [0.6] * 20}, {}, {}, {})
    assert "ends below one (0.975)" in said[0] and said[1].startswith("60% of the likelihood ratios")


def test_a_change_within_sampling_error_is_not_coloured() -> None:
    def verdicts(pictures: int) -> list[str]:
        results = [_result(0.5, 9.0, 0.5), _result(0.7, 9.5, 0.4)]
        for result in results:
            result["details"]["pictures"] = pictures
        return [row["verdict"] for row in metric_rows(*results)]

    assert verdicts(10) == ["", "bad", "", ""]
    assert verdicts(1000) == ["good", "bad", "", "bad"]


def test_charts_by_hand() -> None:
    assert ticks(0, 1) == [0.0, 0.2, 0.4, pytest.approx(0.6), 0.8, 1.0]
    assert ticks(-0.0045, 0.001) == [-0.004, -0.002, 0]
    assert [number(v) for v in (0.0, 0.05, -0.004, 1234.4, 2.5e-5, 3e7, math.nan)] == [
        "0",
        "0.05",
        "-0.004",
        "1234",
        "2.5e-5",
        "3e7",
        "–",
    ]
    assert smooth([3.0] * 30) == pytest.approx([3.0] * 30)
    curve = smooth([0.0, 1.0] * 50)
    assert curve[0] == 0.0 and abs(curve[-1] - 0.5) < 0.15
    assert math.isnan(smooth([1.0] * 10 + [math.nan] + [1.0] * 20)[10])
    chart = draw("T", "", [0, 10], [Series("x", [0.0, 1.0])])
    path = re.search(r'<path class="curve a" d="([^"]+)"', chart.svg)
    assert path is not None and path[1].startswith("M56.0 202.0") and path[1].endswith("L430.0 19.1")
    assert chart.last == [("a", "x", "1")]
    gap = draw("T", "", [0, 1, 2], [Series("x", [1.0, math.nan, 2.0])]).svg
    assert gap.split('d="')[1].count("M") == 2
    assert draw("T", "", [0, 1], [Series("x", [math.nan] * 2)]).svg == ""
    marked = draw("T", "", range(3), [Series("x", [1.0, 2.0, 3.0], earlier=True)], axis="t", marks=["951", "501", "0"])
    assert (
        all(f">{label}<" in marked.svg for label in ("t", "951", "501", "0"))
        and 'class="curve a earlier"' in marked.svg
    )
    assert marked.last == []
    share = draw("T", "", [0, 1, 2], [Series("x", [0.001, 0.1, 0.2])], line=0.0).svg
    assert ">0.1<" in share and ">0.01<" not in share, "no logarithm where zero is marked"
    wide = draw("T", "", [0, 1, 2], [Series("x", [0.01, 1.0, 100.0])]).svg
    assert all(f">{label}<" in wide for label in ("0.01", "1", "100"))
