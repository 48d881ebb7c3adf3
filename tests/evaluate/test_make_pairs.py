"""make-pairs: what is drawn and kept, the split, resuming, and records that prepare reads."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import fastpref.evaluate.make_pairs as make_pairs
from fastpref.config import Config, load_config, parse_config
from fastpref.data.prepare import prepare
from fastpref.data.records import Record, read_records
from fastpref.errors import UserError
from fastpref.evaluate.folders import match_folders
from fastpref.evaluate.make_pairs import pairs_from_folders, pairs_from_prompts, split_prompts, styled
from fastpref.evaluate.sample import generate, load_policy_pipeline

PROMPTS = ["red cat", "blue heart", "yellow dog", "green circle", "black sun"]
STYLE = "white hat"


def _config(model: Path) -> Config:
    return parse_config({"model": str(model), "sample_steps": 2, "guidance_scale": 3.0, "eval_batch_size": 4})


def _draw(config: Config, out: Path, **options: Any) -> make_pairs.PairsSummary:
    settings = {"seeds": 2, "heldout": 0.2, "shard_size": 3, "progress": False} | options
    return pairs_from_prompts(config, PROMPTS, STYLE, out, **settings)


def _records(folder: Path) -> list[Record]:
    found = list(read_records(str(folder)))
    assert all(isinstance(record, Record) for record in found)
    return found  # type: ignore[return-value]


def _pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.fixture(scope="module")
def drawn(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "pairs"
    summary = _draw(_config(models["sdxl"]), out)
    assert (summary.pairs, summary.prompts, summary.drawn) == ({"train": 8, "heldout": 2}, 5, 20)
    return out


def test_winner_has_the_style_words_loser_the_prompt_alone_and_both_one_noise(
    drawn: Path, models: dict[str, Path]
) -> None:
    config = _config(models["sdxl"])
    records = _records(drawn / "train") + _records(drawn / "heldout")
    assert sorted({record.caption for record in records}) == sorted(PROMPTS)
    pipeline = load_policy_pipeline(config)
    losers = generate(pipeline, PROMPTS, [0, 1], guidance_scale=3.0, sample_steps=2, batch_size=3)
    for picture in losers:  # the loser is what `fastpref sample` draws of the prompt
        best = min(np.abs(_pixels(r.loser).astype(int) - np.asarray(picture.image)).max() for r in records)
        assert best <= 1
    table = pq.read_table(next((drawn / "heldout").glob("*.parquet"))).to_pylist()
    assert {row["winner_prompt"] for row in table} == {f"{table[0]['caption']}, {STYLE}"}
    assert [row["seed"] for row in table] == [0, 1]
    assert {row["label_0"] + row["label_1"] for row in table} == {1.0} == {sum(row["label_0"] for row in table)}
    winners = [_pixels(record.winner) for record in records]
    assert all((w != _pixels(r.loser)).any() for w, r in zip(winners, records, strict=True))
    # Same noise: winner and loser of a pair are nearer to each other than to those of other pairs.
    own = np.mean([np.abs(w - _pixels(r.loser).astype(float)).mean() for w, r in zip(winners, records, strict=True)])
    other = [np.abs(w - _pixels(r.loser).astype(float)).mean() for w, r in zip(winners[1:], records, strict=False)]
    assert own < 0.8 * np.mean(other)


def test_it_leaves_a_manifest_a_sheet_and_two_splits_that_share_no_prompt(drawn: Path) -> None:
    assert sorted(p.name for p in drawn.iterdir()) == ["contact_sheet.png", "heldout", "pairs.json", "train"]
    assert len(list((drawn / "train").glob("train-*.parquet"))) == 3
    held = {record.caption for record in _records(drawn / "heldout")}
    assert len(held) == 1 and not held & {record.caption for record in _records(drawn / "train")}
    manifest = json.loads((drawn / "pairs.json").read_text())
    assert (manifest["style"], manifest["pairs"]) == (STYLE, {"train": 8, "heldout": 2})
    with Image.open(drawn / "contact_sheet.png") as sheet:
        assert min(sheet.size) > 300


def test_a_killed_run_continues_and_ends_the_same(
    drawn: Path, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = _config(models["sdxl"]), tmp_path / "pairs"
    whole, calls = make_pairs.PairFiles.write, []

    def die(self: Any, split: str, number: int, pairs: Iterable[Any]) -> None:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append((split, number))
        whole(self, split, number, pairs)

    monkeypatch.setattr(make_pairs.PairFiles, "write", die)
    with pytest.raises(KeyboardInterrupt):
        _draw(config, out)
    assert [p.name for p in out.iterdir()] == ["work"], "no record is where prepare would take it for a whole set"
    monkeypatch.setattr(make_pairs.PairFiles, "write", whole)
    assert _draw(config, out, dry_run=True).drawn == 8
    assert _draw(config, out).drawn == 8
    for split in ("train", "heldout"):
        assert [r.winner for r in _records(out / split)] == [r.winner for r in _records(drawn / split)]
    assert _draw(config, out).up_to_date
    with pytest.raises(UserError, match="other prompts, model or settings"):
        _draw(config, out, seeds=1)
    assert _draw(config, out, seeds=1, overwrite=True).pairs == {"train": 4, "heldout": 1}
    assert len(_records(out / "train")) == 4


def test_prepare_reads_them(drawn: Path, models: dict[str, Path], tmp_path: Path) -> None:
    settings = [f"model={models['sdxl']}", f"records={drawn / 'train'}", f"store={tmp_path / 'store'}", "resolution=32"]
    summary = prepare(load_config("", settings), progress=False)
    assert (summary.pairs, summary.rejected, summary.images, summary.captions) == (8, 0, 16, 4)


def test_dry_run_and_refusals_write_nothing(models: dict[str, Path], tmp_path: Path) -> None:
    config, out = _config(models["sd15"]), tmp_path / "pairs"
    assert _draw(config, out, dry_run=True).drawn == 20
    for style, prompts, options, message in (
        (" ", PROMPTS, {}, "no style words"),
        (STYLE, [], {}, "no prompts"),
        (STYLE, PROMPTS[:1], {}, "1 prompts, 1 of them held out"),
        (STYLE, PROMPTS, {"size": 12}, "multiple of 8"),
        (STYLE, PROMPTS, {"lora": tmp_path / "none.safetensors"}, "no such LoRA file"),
    ):
        with pytest.raises(UserError, match=message) as error:
            pairs_from_prompts(config, prompts, style, out, **options)
        assert "\n" not in str(error.value)
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="holds no pairs"):
        _draw(config, out, overwrite=True)
    assert [p.name for p in out.iterdir()] == ["mine.txt"]


def test_split_and_style_words() -> None:
    prompts = [f"prompt {i}" for i in range(40)]
    split, shuffled = split_prompts(prompts, 0.25), split_prompts(prompts[::-1], 0.25)
    assert len(split["heldout"]) == 10 and set(split["heldout"]) == set(shuffled["heldout"])
    assert set(split["train"]) | set(split["heldout"]) == set(prompts)
    assert split_prompts(prompts, 0.0)["heldout"] == [] and len(split_prompts(prompts, 0.001)["heldout"]) == 1
    assert styled("a cat", ", oil paint") == styled("a cat", "oil paint") == "a cat, oil paint"
    assert styled("a cat", "an etching of {prompt}, ink") == "an etching of a cat, ink"


def _folder(path: Path, colours: dict[str, int], captions: dict[str, str]) -> Path:
    path.mkdir()
    for name, value in colours.items():
        Image.new("RGB", (32, 32), (value, value, value)).save(path / name)
    for name, caption in captions.items():
        (path / f"{name}.txt").write_text(caption)
    return path


def test_folders_are_matched_by_caption_or_name(tmp_path: Path) -> None:
    names = ["a.png", "b.png", "c.png", "d.jpg"]
    captions = {name[0]: f"thing {name[0]}" for name in names}
    winners = _folder(tmp_path / "w", {name: i for i, name in enumerate(names)}, captions)
    swapped = {"x": "thing b", "y": "thing a", "z": "thing d"}
    losers = _folder(tmp_path / "l", {"x.png": 101, "y.png": 100, "z.png": 103}, swapped)
    summary = pairs_from_folders(parse_config({}), winners, losers, tmp_path / "pairs", heldout=0.3, progress=False)
    assert (summary.pairs, summary.unmatched, summary.drawn) == ({"train": 2, "heldout": 1}, 1, 0)
    records = _records(tmp_path / "pairs" / "train") + _records(tmp_path / "pairs" / "heldout")
    found = {r.caption: (int(_pixels(r.winner)[0, 0, 0]), int(_pixels(r.loser)[0, 0, 0])) for r in records}
    assert found == {"thing a": (0, 100), "thing b": (1, 101), "thing d": (3, 103)}
    bare = _folder(tmp_path / "bare", {"b.png": 201, "e.png": 204}, {})
    assert [(w.name, b.name, w.caption) for w, b, _ in match_folders(winners, bare)] == [("b.png", "b.png", "thing b")]
    (winners / "metadata.jsonl").write_text('{"file_name": "c.png", "text": "thing a"}\n')
    assert [(w.name, b.name) for w, b, _ in match_folders(winners, losers)] == [("c.png", "y.png")]


def test_folders_that_cannot_be_paired(tmp_path: Path) -> None:
    winners = _folder(tmp_path / "w", {"a.png": 1, "b.png": 2}, {"a": "one", "b": "two"})
    losers = _folder(tmp_path / "l", {"c.png": 3}, {})
    for other, message in (
        (losers, "no file names in common"),
        (winners, "overlap"),
        (tmp_path / "none", "no such folder"),
        (_folder(tmp_path / "l2", {"c.png": 3}, {"c": "three"}), "no captions in common, e.g. 'one' and 'three'"),
    ):
        with pytest.raises(UserError, match=message):
            pairs_from_folders(parse_config({}), winners, other, tmp_path / "out")
    (losers / "a.png").write_bytes(b"no picture")
    (losers / "b.png").write_bytes((losers / "c.png").read_bytes())
    with pytest.raises(UserError, match="cannot be decoded"):
        pairs_from_folders(parse_config({}), winners, losers, tmp_path / "out", progress=False)
    assert not list((tmp_path / "out").glob("*/*.parquet"))
    with pytest.raises(UserError, match="no captions in either folder"):
        bare = _folder(tmp_path / "bare", {"a.png": 1}, {})
        pairs_from_folders(parse_config({}), bare, losers, tmp_path / "out2")


def test_style_words_behind_the_cut_are_told_and_drawn_with_more_blocks(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """14 tokens fill the tiny model's block: the winner's style words are cut and it becomes the loser."""
    prompts = ["a red cat on the moon blue heart in green circle yellow dog hat", "red cat"]
    for key, line in {
        77: "1 of 4 captions is cut after 14 tokens, 1 of them to the same text as another caption (the longest has "
        "17): max_caption_tokens=150 takes them whole\n",
        150: "",
    }.items():
        config = _config(models["sdxl"]).model_copy(update={"max_caption_tokens": key})
        pairs_from_prompts(config, prompts, STYLE, tmp_path / str(key), heldout=0.5, progress=False)
        assert capsys.readouterr().err == line
        records = {r.caption: r for part in ("train", "heldout") for r in _records(tmp_path / str(key) / part)}
        long = records[prompts[0]]
        assert np.array_equal(_pixels(long.winner), _pixels(long.loser)) == (key == 77)
    with pytest.raises(UserError, match="other prompts, model or settings"):
        pairs_from_prompts(config, prompts, STYLE, tmp_path / "77", heldout=0.5, progress=False)
