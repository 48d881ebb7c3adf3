"""SDXL's time ids: one condition a pair, the training resolution's or the winner's, whatever the files' sizes."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from fastpref.config import Config, load_config
from fastpref.data import ledger as ledgers
from fastpref.data.prepare import prepare
from fastpref.data.store import Store, StoreBatch
from fastpref.errors import UserError
from fastpref.evaluate.pair_accuracy import evaluate_pair_accuracy
from fastpref.evaluate.sample import generate, load_policy_pipeline
from fastpref.models.policy import Conditioning, Predict
from fastpref.models.prompt_book import PromptBook
from fastpref.models.text import load_text_stack
from fastpref.models.time_ids import target_time_ids
from fastpref.models.work import Work
from fastpref.train.job import TrainJob
from fastpref.train.reference import prepare_reference
from fastpref.train.run_dir import check_run_dir

MakeConfig = Callable[..., Config]
WINNER, LOSER, TARGET = ([size, size, 0, crop, 32, 32] for size, crop in ((64, 5), (36, 0), (32, 0)))
OFFLINE = {
    "sft": ["method=sft"],
    "dpo": ["method=dpo"],
    "dpo safeguard": ["method=dpo", "safeguard=0.9", "sft_weight=1"],
    "rpo": ["method=rpo"],
    "rpo groups": ["method=rpo", "group_size=4", "weight=inside"],
}


@pytest.fixture
def unlike_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every store that is opened says of its winners that they were 64 pixels high, of its losers that they were 36."""
    plain = Store.__init__

    def opened(store: Store, *rest: Any) -> None:
        plain(store, *rest)
        losers = np.isin(np.arange(len(store._image_bucket)), store._image_l)
        sizes = np.array([WINNER, LOSER], np.int32)[losers.astype(int)]
        store._sizes_and_crops = list(sizes[:, :4].T)

    monkeypatch.setattr(Store, "__init__", opened)


@pytest.fixture
def identical_pictures(unlike_sizes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Winner and loser have the same latents, and differ in nothing but those sizes."""
    plain = Store.batch

    def batch(store: Store, *rest: Any, **more: Any) -> StoreBatch:
        found = plain(store, *rest, **more)
        same = {"latents_l": found.latents_w, "posterior_std_w": None, "posterior_std_l": None}
        return replace(found, **same, clip_image_l=found.clip_image_w)

    monkeypatch.setattr(Store, "batch", batch)


def time_ids(config: Config) -> torch.Tensor:
    """Of the first batch, winners first."""
    trainer: Any = TrainJob.open(config).trainer
    conditioning = trainer.batches.build(trainer.sampler.batch(0), slice(0, config.batch_size)).conditioning
    assert len(conditioning.prompt_embeds) == len(conditioning.time_ids)
    for rows in (conditioning.prompt_embeds, conditioning.pooled_prompt_embeds, conditioning.time_ids):
        halves = rows.chunk(2)
        assert config.method == "sft" or torch.equal(*halves), "the winners' rows are not the losers'"
    return conditioning.time_ids


@pytest.mark.usefixtures("unlike_sizes")
@pytest.mark.parametrize("noise", [0.0, 0.4])
@pytest.mark.parametrize("method", OFFLINE)
def test_both_pictures_of_a_pair_have_one_condition(one_level_config: MakeConfig, method: str, noise: float) -> None:
    """Exchanged pairs have the size of the picture that passes for the winner."""
    common = [*OFFLINE[method], f"label_noise={noise}"]
    ids = time_ids(one_level_config(*common))
    assert ids.tolist() == [TARGET] * len(ids)
    own = time_ids(one_level_config(*common, "size_conditioning=winner")).tolist()
    exchanged = own.count(LOSER)
    assert own.count(WINNER) + exchanged == len(ids) and (exchanged > 0) == (noise > 0)


@pytest.mark.usefixtures("identical_pictures")
@pytest.mark.parametrize("sizes", ["target", "winner"])
@pytest.mark.parametrize("method", [["method=dpo"], ["method=rpo"]])
def test_nothing_is_learnt_from_the_sizes_of_pairs_alike(
    one_level_config: MakeConfig, sizes: str, method: list[str]
) -> None:
    """Pairs of one picture each are undecided after any training: equal rewards, an accuracy of one half.

    DPO's loss stays log 2. RPO contrasts a winner with other pairs' losers too, whose rewards may well differ.
    """
    common = ["learning_rate=1e-2", "precision=fp64", f"size_conditioning={sizes}"]
    trainer: Any = TrainJob.open(one_level_config(*common, *method)).trainer
    predict_sides_apart(trainer.policy)
    for step in range(5):
        found = trainer.step(step)
        assert (found["margin"], found["accuracy"]) == (0.0, 0.5)
        if method == ["method=dpo"]:
            assert found["loss"] == pytest.approx(math.log(2), rel=1e-14)
    assert method == ["method=dpo"] or abs(found["reward_winner"]) > 0


def predict_sides_apart(policy: Any) -> None:
    """Winners and losers in forwards of one shape: a matrix product may round first and last rows differently."""

    def apart(plain: Predict, noisy: torch.Tensor, timesteps: torch.Tensor, told: Conditioning) -> torch.Tensor:
        n, sides = len(noisy) // 2, []
        for side in (slice(0, n), slice(n, None)):
            x, t, *given = (torch.cat([rows[side]] * 2) for rows in (noisy, timesteps, *vars(told).values()))
            sides.append(plain(x, t, Conditioning(*given))[:n])
        return torch.cat(sides)

    policy.forward_pass = partial(apart, policy.forward_pass)
    policy.reference_pass = partial(apart, policy.reference_pass)


@pytest.mark.parametrize("method", ["spm", "lrm"])
@pytest.mark.usefixtures("unlike_sizes")
def test_a_preference_model_is_trained_and_evaluated_on_the_ids_of_the_rollout(
    one_level_config: MakeConfig, clip: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its UNet is told, the frozen one of SPM and the trained one of LRM."""
    more = [f"clip={clip}"] if method == "spm" else []
    config = one_level_config(f"method={method}", "train=full", *more, "batch_size=2", "eval_prompts=2")
    job, told = TrainJob.open(config), noted(monkeypatch)
    job.trainer.step(0)
    trained = len(told)
    evaluate_pair_accuracy(config.model_copy(update={"eval_timesteps": [501]}))
    assert 0 < trained < len(told)
    device = torch.device("cpu")
    texts = load_text_stack(job.model_dir, torch.float32, device)
    rollout = PromptBook(texts, job.model_dir, (32, 32), device, Work()).conditioning(["a house"]).time_ids
    assert rollout is not None and told == rollout.tolist() * len(told)


@pytest.mark.usefixtures("unlike_sizes")
@pytest.mark.parametrize("size", [32, 48])
def test_training_is_told_what_sampling_is_told(
    one_level_config: MakeConfig, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers' pipeline at the resolution of training, with and without guidance, beside the batch's conditioning."""
    if size != 32:
        monkeypatch.setattr(Store, "size", lambda store, index: (size, size))
    expected = time_ids(one_level_config("method=dpo"))[0]
    pipeline, told = load_policy_pipeline(one_level_config("method=dpo")), []

    def note(_: Any, inputs: Any, arguments: dict[str, Any]) -> None:
        told.extend(arguments["added_cond_kwargs"]["time_ids"])

    pipeline.unet.register_forward_pre_hook(note, with_kwargs=True)
    for guidance in (1.0, 5.0):
        settings = {"guidance_scale": guidance, "sample_steps": 1, "batch_size": 2, "size": size}
        generate(pipeline, ["a house", "a cat"], [0], **settings)
    assert len(told) == 2 + 4 and all(torch.equal(row, expected) for row in told)
    assert expected.tolist() == [size, size, 0, 0, size, size]


def test_target_ids_are_height_before_width() -> None:
    assert target_time_ids((20, 48), 2).tolist() == [[20, 48, 0, 0, 20, 48]] * 2


def test_every_bucket_has_its_own_target(recipe_of_wide_pictures: Config) -> None:
    """Pictures of 48 by 20 and 20 by 48 pixels: each batch has the shape of its latents."""
    trainer: Any = TrainJob.open(recipe_of_wide_pictures).trainer
    shapes = set()
    for step in range(4):
        batch = trainer.batches.build(trainer.sampler.batch(step), slice(0, 2))
        height, width = (2 * side for side in batch.noisy.shape[2:])
        assert batch.conditioning.time_ids.tolist() == [[height, width, 0, 0, height, width]] * 4
        shapes.add((height, width))
    assert len(shapes) == 2


@pytest.fixture
def recipe_of_wide_pictures(sdxl: Path, tmp_path: Path) -> Config:
    folder = tmp_path / "pairs"
    folder.mkdir()
    for number in range(8):
        size = (90, 40) if number % 2 else (40, 90)
        for side in "wl":
            colour = (30 * number, 100 if side == "w" else 200, 50)
            Image.new("RGB", size, colour).save(folder / f"{number}{side}.png")
    lines = [{"winner": f"{n}w.png", "loser": f"{n}l.png", "caption": f"colour {n}"} for n in range(8)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    base = [f"model={sdxl}", f"records={folder / 'pairs.jsonl'}", f"store={tmp_path / 'store'}", "evaluate=false"]
    config = load_config("", [*base, "resolution=32", "buckets=true", "method=dpo", "batch_size=2"])
    prepare(config, progress=False)
    return config


def noted(monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
    """The time ids that UNets are told from now on, row by row."""
    told: list[list[float]] = []
    plain = Conditioning.kwargs

    def spied(conditioning: Conditioning, *dtypes: torch.dtype) -> dict[str, Any]:
        assert conditioning.time_ids is not None
        told.extend(conditioning.time_ids.tolist())
        return plain(conditioning, *dtypes)

    monkeypatch.setattr(Conditioning, "kwargs", spied)
    return told


@pytest.fixture
def own_ledgers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledgers, "FOLDER", str(tmp_path / "ledgers"))


def written_before_the_key(config: Config) -> None:
    """The config's ledger, named and described as before ``size_conditioning`` was a setting."""
    path = prepare_reference(config, progress=False).path
    facts = json.loads((path / ledgers.FACTS).read_text())
    facts.pop("size_conditioning", None)
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    (path / ledgers.FACTS).write_text(json.dumps(facts))
    path.rename(path.with_name(name))


@pytest.mark.usefixtures("unlike_sizes", "own_ledgers")
def test_a_ledger_of_other_sizes_is_refused_whenever_it_was_written(one_level_config: MakeConfig) -> None:
    common = ["method=dpo", "reference=ledger", "steps=1"]
    target, winner = (one_level_config(*common, f"size_conditioning={sizes}") for sizes in ("target", "winner"))
    told = 'size_conditioning "target", here "winner"'
    prepare_reference(target, progress=False)
    TrainJob.open(target)
    with pytest.raises(UserError, match=f"the reference ledger was made for something else: {told}"):
        TrainJob.open(winner)
    written_before_the_key(winner)
    for config in (target, winner):
        shutil.rmtree(prepare_reference(config, dry_run=True).path, ignore_errors=True)
    for config in (target, winner):
        with pytest.raises(UserError, match=f'size_conditioning "own", here "{config.size_conditioning}"'):
            TrainJob.open(config)


@pytest.mark.usefixtures("own_ledgers")
@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_a_ledger_from_before_the_key_serves_where_no_size_differs(
    one_level_config: MakeConfig, sd15_config: MakeConfig, family: str
) -> None:
    """SD1.5 is not told sizes; the emoji pictures are all of the size they are trained at, not cropped."""
    config = (one_level_config if family == "sdxl" else sd15_config)("method=dpo", "reference=ledger", "steps=1")
    written_before_the_key(config)
    found: Any = TrainJob.open(config).trainer.step(0)
    assert found["margin"] == pytest.approx(0, abs=1e-6)
    if family == "sdxl":
        TrainJob.open(config.model_copy(update={"size_conditioning": "winner"}))


@pytest.mark.usefixtures("unlike_sizes", "own_ledgers")
@pytest.mark.parametrize("sizes", ["target", "winner"])
def test_the_ledger_is_written_under_the_same_condition(one_level_config: MakeConfig, sizes: str) -> None:
    """Before the first update policy and reference are one, so the rewards by the ledger are 0 but for rounding."""
    config = one_level_config(
        "method=dpo", "reference=ledger", "steps=1", "precision=fp64", f"size_conditioning={sizes}"
    )
    prepare_reference(config, progress=False)
    found: Any = TrainJob.open(config).trainer.step(0)
    assert abs(found["reward_winner"]) < 1e-12 and abs(found["reward_loser"]) < 1e-12


@pytest.mark.parametrize("method", ["dpo", "spm"])
@pytest.mark.parametrize("stored", ["unlike", "alike"])
def test_a_run_goes_on_only_under_its_own_conditioning(
    one_level_config: MakeConfig, clip: Path, stored: str, method: str, request: pytest.FixtureRequest
) -> None:
    """A run from before the key was told each picture's own size: it goes on where that makes no difference."""
    if stored == "unlike":
        request.getfixturevalue("unlike_sizes")
    more = ["train=full", f"clip={clip}"] if method == "spm" else []
    config = one_level_config(f"method={method}", *more, "resume=auto")
    config.run_dir.mkdir(parents=True)
    settings = config.model_dump(mode="json")
    file = config.run_dir / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    assert check_run_dir(config)
    if method == "dpo":
        with pytest.raises(UserError, match="size_conditioning is 'winner' but the run was started with 'target'"):
            check_run_dir(config.model_copy(update={"size_conditioning": "winner"}))
    del settings["size_conditioning"]
    file.write_text(yaml.safe_dump(settings))
    if stored == "alike":
        assert check_run_dir(config)
        return
    with pytest.raises(UserError, match="the run was started with each picture's own size"):
        check_run_dir(config)


def test_the_setting_is_refused_where_it_would_do_nothing(
    one_level_config: MakeConfig, sd15_config: MakeConfig
) -> None:
    for method in ("spm", "lrm", "spo", "lpo"):
        with pytest.raises(UserError, match=f"size_conditioning is winner with method {method}"):
            one_level_config(f"method={method}", "train=full", "size_conditioning=winner")
    with pytest.raises(UserError, match=r"size_conditioning is winner, but SD1\.5 is not told sizes"):
        TrainJob.open(sd15_config("method=dpo", "size_conditioning=winner"))
