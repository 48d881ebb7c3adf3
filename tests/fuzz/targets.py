"""What is fuzzed: a damaged input, the entry point that gets it, and what must hold if that takes it.

A target makes an :class:`Attempt` in an empty folder. Running it either raises ``UserError`` (refused), returns (taken,
and everything that can be checked about the result was right) or raises anything else, which is a fault.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from safetensors.torch import load_file

from fastpref.config import Config, load_config, save_config
from fastpref.data.images import ImageError, load_rgb, own_pixel_limit, probe, to_bucket
from fastpref.data.prepare import prepare
from fastpref.data.store import Store
from fastpref.errors import UserError
from fastpref.models.lora_file import WEIGHTS_NAME
from fastpref.runs import run_training
from fuzz.damage import TOKENS, damage_bytes, damage_folder, damage_text
from fuzz.world import METHODS, STEPS, World, make_rows, store_content

MAX_PIXELS = 1 << 20


class Wrong(Exception):
    """Damage was taken for good, or something was left that should not be there."""


class Attempt(NamedTuple):
    """One damaged input."""

    what: str  # the damage, in a few words
    run: Callable[[], None]
    command: tuple[str, ...]  # the same through the command line, run in the attempt's folder
    passive: bool = False  # the command must not change any file


Target = Callable[[World, random.Random, Path], Attempt]


def recipe(world: World, rng: random.Random, folder: Path) -> Attempt:
    """A recipe with a damaged value, to ``train --dry-run`` or ``prepare --dry-run``."""
    settings = world.settings(**world.run_settings(rng.choice(METHODS)), output_dir="runs", resume="never")
    for key in rng.sample(list(Config.model_fields), 6):
        settings.setdefault(key, Config.model_fields[key].default)
    text = yaml.safe_dump({k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}).encode()
    if rng.random() < 0.5:
        name, token = rng.choice(list(Config.model_fields)), rng.choice(TOKENS)
        text, what = text + f"{name}: {token}\n".encode(), f"{name}: {token[:40]}"
    else:
        text, what = damage_text(rng, text)
    (folder / "recipe.yaml").write_bytes(text)
    command = rng.choice(["train", "prepare"])

    def run() -> None:
        config = load_config("recipe.yaml")
        save_config(config, Path("saved.yaml"))
        if load_config("saved.yaml") != config:
            raise Wrong("the saved config is another")
        Path("saved.yaml").unlink()
        run_training(config, dry_run=True) if command == "train" else prepare(config, dry_run=True, progress=False)

    return Attempt(what, run, (command, "recipe.yaml", "--dry-run"), passive=True)


def parquet(world: World, rng: random.Random, folder: Path) -> Attempt:
    """Records as parquet or arrow: the file's bytes, or the values in it."""
    name = rng.choice(["records.parquet", "records.arrow"])
    data = (world.root / name).read_bytes()
    if rng.random() < 0.6:
        damaged, what = damage_bytes(rng, data)
    else:
        name = "records.parquet"
        table, what = _odd_table(world, rng)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        damaged = sink.getvalue().to_pybytes()
    (folder / name).write_bytes(damaged)
    return _records(world, folder, name, f"{name}: {what}")


def tar(world: World, rng: random.Random, folder: Path) -> Attempt:
    """Records as a tar."""
    data, what = damage_bytes(rng, (world.root / "records.tar").read_bytes())
    (folder / "records.tar").write_bytes(data)
    return _records(world, folder, "records.tar", what)


def lines(world: World, rng: random.Random, folder: Path) -> Attempt:
    """Records as JSONL, CSV or a folder: the text, or a picture or caption beside it."""
    shutil.copytree(world.root / "files", folder, dirs_exist_ok=True)
    name = rng.choice(["pairs.jsonl", "pairs.csv", "."])
    if name == "." or rng.random() < 0.3:
        files = [file for file in folder.rglob("*") if file.is_file() and file.suffix in (".png", ".txt")]
        what = damage_folder(rng, folder, sorted(str(file.relative_to(folder)) for file in files))
    else:
        data, what = damage_text(rng, (folder / name).read_bytes())
        (folder / name).write_bytes(data)
    return _records(world, folder, name, f"{name}: {what}")


def image(world: World, rng: random.Random, folder: Path) -> Attempt:
    """A picture's bytes, to what ``prepare`` does with a picture."""
    name = rng.choice(sorted(world.pictures))
    data, what = damage_bytes(rng, world.pictures[name])
    rows = make_rows()
    rows[0]["jpg_0"] = data
    pq.write_table(pa.Table.from_pylist(rows), folder / "records.parquet")

    def run() -> None:
        with own_pixel_limit():
            try:
                size = probe(data, MAX_PIXELS).size
                picture = load_rgb(data, MAX_PIXELS)
            except ImageError as error:
                raise UserError(error.reason, name, error.detail) from error
            if picture.size != size or picture.mode != "RGB":
                raise Wrong(f"{picture.mode} of {picture.size}, announced as {size}")
            to_bucket(picture, (16, 16))
            if name.startswith("PNG") and picture.tobytes() != load_rgb(world.pictures[name], MAX_PIXELS).tobytes():
                raise Wrong("a PNG has checksums, and these are other pixels")

    return Attempt(f"{name}: {what}", run, _records(world, folder, "records.parquet", "").command)


def store(world: World, rng: random.Random, folder: Path) -> Attempt:
    """A finished store, to ``train --dry-run``, to training's reads, and to ``prepare`` which finds it finished."""
    shutil.copytree(world.root / "store", folder / "store")
    what = damage_folder(rng, folder / "store", sorted(file.name for file in (folder / "store").iterdir()))
    config = world.config(store="store", output_dir="runs", method="dpo")
    save_config(config, folder / "recipe.yaml")
    entry = rng.choice(["train --dry-run", "training", "prepare"])

    def run() -> None:
        if entry == "train --dry-run":
            run_training(config, dry_run=True)
        elif entry == "prepare":
            prepare(config, progress=False)
        if not _same_content(world, Path("store")):
            raise Wrong("the store is taken and holds something else")

    command = ("prepare", "recipe.yaml") if entry == "prepare" else ("train", "recipe.yaml", "--dry-run")
    return Attempt(f"{what}; {entry}", run, command, passive=entry != "prepare")


def unfinished(world: World, rng: random.Random, folder: Path) -> Attempt:
    """A store that ``prepare`` was interrupted in, to ``prepare``: the result is the undamaged store, byte for byte."""
    shutil.copytree(world.root / rng.choice(["early", "late"]), folder / "store")
    files = [str(file.relative_to(folder / "store")) for file in (folder / "store").rglob("*") if file.is_file()]
    what = damage_folder(rng, folder / "store", sorted(files))
    config = world.config(store="store", shard_size=4, prepare_batch_size=4)
    save_config(config, folder / "recipe.yaml")

    def run() -> None:
        prepare(config, progress=False)
        found = {file.name: file.read_bytes() for file in Path("store").iterdir() if file.is_file()}
        if found != world.whole:
            differing = sorted(k for k in found.keys() | world.whole.keys() if found.get(k) != world.whole.get(k))
            raise Wrong(f"prepared, but other bytes in {', '.join(differing)}")

    return Attempt(what, run, ("prepare", "recipe.yaml"))


def run(world: World, rng: random.Random, folder: Path) -> Attempt:
    """An interrupted run, to ``train`` with resume=auto: the final weights are those of the uninterrupted run."""
    method = rng.choice(METHODS)
    shutil.copytree(world.root / "runs" / method, folder / "runs" / method)
    base = folder / "runs" / method
    files = sorted(str(file.relative_to(base)) for file in base.rglob("*") if file.is_file())
    wanted = [name for name in files if name.startswith("checkpoints")] if rng.random() < 0.7 else files
    what = damage_folder(rng, base, wanted)
    config = world.run_config(method, Path("runs"), STEPS)
    save_config(config, folder / "recipe.yaml")

    def run() -> None:
        run_training(config)
        weights = load_file(config.run_dir / WEIGHTS_NAME)
        if not _equal(weights, world.final[method]):
            raise Wrong("the final weights differ from the uninterrupted run's")
        if not (config.run_dir / "checkpoints" / f"step-{STEPS:06d}" / "manifest.json").is_file():
            raise Wrong("no checkpoint of the last step")
        json.loads((config.run_dir / "summary.json").read_text())

    return Attempt(f"{method} {what}", run, ("train", "recipe.yaml"))


TARGETS: dict[str, tuple[Target, int]] = {  # how many of a hundred cases
    "recipe": (recipe, 22),
    "parquet": (parquet, 13),
    "tar": (tar, 9),
    "lines": (lines, 9),
    "image": (image, 18),
    "store": (store, 14),
    "unfinished": (unfinished, 6),
    "run": (run, 9),
}


def leftovers(folder: Path) -> list[str]:
    """Files under a temporary name, which nobody may leave behind who is alive to clean up."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name.endswith(".tmp"))


def tree(folder: Path) -> dict[str, int]:
    """Every path with its modification time."""
    return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*")}


def _records(world: World, folder: Path, name: str, what: str) -> Attempt:
    """Damaged records, to ``prepare``: every record is accounted for, and pairs that are as before are stored so."""
    config = world.config(records=name, store="store", max_image_pixels=MAX_PIXELS)
    save_config(config, folder / "recipe.yaml")

    def run() -> None:
        try:
            summary = prepare(config, progress=False)
        except UserError:
            if Path("store/manifest.json").exists():
                raise Wrong("refused, and yet there is a store") from None
            raise
        counted = summary.pairs + summary.rejected + summary.ties_dropped + summary.unlabelled
        counted += summary.identical_dropped
        if counted != summary.records:
            raise Wrong(f"{summary.records} records, {counted} accounted for")
        Store.open("store", verify=True)
        if not _same_pairs(world, Path("store")):
            raise Wrong("a pair that was not damaged is stored otherwise")

    return Attempt(what, run, ("prepare", "recipe.yaml"))


def _same_pairs(world: World, path: Path) -> bool:
    """Batches of other sizes may change the last bits."""
    for pair, tensors in store_content(path).items():
        known = world.content.get(pair)
        if known is None:
            continue
        for name, tensor in tensors.items():
            if name != "label" and not torch.allclose(tensor.double(), known[name].double(), rtol=1e-4, atol=1e-5):
                return False
    return True


def _same_content(world: World, path: Path) -> bool:
    found = store_content(path)
    if Store.open(path).manifest != Store.open(world.root / "store").manifest:
        return False
    return list(found) == list(world.content) and all(_equal(found[pair], world.content[pair]) for pair in found)


def _equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def _odd_table(world: World, rng: random.Random) -> tuple[pa.Table, str]:
    """The records with a value, a row or a column that should not be there."""
    table = pa.Table.from_pylist(make_rows())
    column = rng.choice(table.column_names)
    kind = rng.choice(["value", "value", "value", "drop", "type", "null", "empty", "rename", "twice"])
    at = table.column_names.index(column)
    if kind == "drop":
        return table.drop_columns([column]), f"no column {column}"
    if kind == "rename":
        return table.rename_columns([column.upper() if n == column else n for n in table.column_names]), "renamed"
    if kind == "twice":
        return table.append_column(column, table.column(column)), f"{column} twice"
    if kind == "empty":
        return table.slice(0, rng.randrange(2)), "hardly a row"
    if kind == "null":
        return table.set_column(at, column, pa.nulls(len(table), table.schema.field(column).type)), f"{column} null"
    odd: list[Any] = [-1, 0.5, 2, float("nan"), float("inf"), None, "", "x", "\u0000", "é" * 5000, "true"]
    odd += [b"", b"\x89PNG"]
    odd += [[1], [], {"bytes": b"x", "path": None}, {"bytes": None, "path": "/etc/passwd"}, {"path": "a"}, 10**18, True]
    chosen = rng.choice(odd)
    if kind == "type":
        return table.set_column(at, column, pa.array([chosen] * len(table))), f"{column} all {chosen!r:.40}"
    values = table.column(column).to_pylist()
    values[rng.randrange(len(values))] = chosen
    try:
        return table.set_column(at, column, pa.array(values)), f"a {column} is {chosen!r:.40}"
    except (pa.ArrowException, TypeError, ValueError):
        return table.set_column(at, column, pa.array([str(v)[:99] for v in values])), f"{column} as text"


def enter(world: World, folder: Path) -> None:
    """Work in ``folder``, where the attempt's paths are relative to; scorers of the world can be imported."""
    os.chdir(folder)
    if str(world.root) not in sys.path:
        sys.path.insert(0, str(world.root))
