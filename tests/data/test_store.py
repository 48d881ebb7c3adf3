"""A store gives back exact bits, in any order, and names what is damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastpref.data.prepare import prepare
from fastpref.data.store import Store
from fastpref.errors import UserError


@pytest.fixture(scope="module")
def made(tmp_path_factory, sdxl, clip, few_records):
    """A store of 40 pairs in several shards."""
    from fastpref.config import Config

    path = tmp_path_factory.mktemp("store") / "s"
    config = Config(records=str(few_records), model=str(sdxl), clip=str(clip), store=str(path), shard_size=16)
    prepare(config, progress=False)
    return path


@pytest.fixture
def copy(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "copy"))


def test_batches_are_the_exact_bits_of_the_shards_in_any_order(made):
    store = Store.open(made)
    latents = torch.cat([load_file(made / f"latents-{n:05d}.safetensors")["latents.0"] for n in range(5)])
    text = torch.cat([load_file(made / f"text-{n:05d}.safetensors")["prompt_embeds"] for n in range(3)])
    assert len(latents) == store.manifest.images
    assert len(store) == 40
    order = np.random.default_rng(0).permutation(40)
    for indices in (order, order[:1], np.asarray([7, 7, 0]), np.arange(40)[::-1]):
        batch = store.batch(indices)
        image_w = store._image_w[indices]
        assert torch.equal(batch.latents_w, latents[torch.from_numpy(image_w.astype(np.int64))])
        assert torch.equal(batch.prompt_embeds, text[torch.from_numpy(store._caption[indices].astype(np.int64))])
        clip = store.clip_batch(indices)
        assert torch.equal(clip.text, batch.clip_text)
        assert torch.equal(clip.image_w, batch.clip_image_w)
        assert torch.equal(clip.image_l, batch.clip_image_l)
        for i, index in enumerate(indices):
            alone = store.batch([index])
            assert torch.equal(alone.latents_l[0], batch.latents_l[i])
            assert torch.equal(alone.clip_image_w[0], batch.clip_image_w[i])


def test_fewer_open_shards_than_shards_change_nothing(made, monkeypatch):
    wanted = Store.open(made).batch(range(40))
    monkeypatch.setattr("fastpref.data.store._OPEN_SHARDS", 1)
    store = Store.open(made)
    assert torch.equal(store.batch(range(40)).latents_w, wanted.latents_w)
    assert len(store._shards) == 1


def test_writing_into_a_batch_leaves_the_store_alone(made):
    store = Store.open(made)
    before = store.batch([3]).latents_w.clone()
    store.batch([3]).latents_w.fill_(7)
    assert torch.equal(store.batch([3]).latents_w, before)
    Store.open(made, verify=True)


def test_impossible_indices_are_refused(made):
    store = Store.open(made)
    for indices in ([], [40], [-1]):
        with pytest.raises(ValueError, match=r"indices must be in \[0, 40\)"):
            store.batch(indices)
    with pytest.raises(ValueError, match="flips=true"):
        store.batch([0], flip=[True])
    with pytest.raises(ValueError, match="flip has 1"):
        store.batch([0, 1], flip=[False])


@pytest.mark.parametrize("name", ["latents-00001.safetensors", "text-00000.safetensors", "pairs.parquet"])
def test_a_truncated_or_missing_file_is_named_on_opening(copy, name):
    file = copy / name
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{name} is damaged"):
        Store.open(copy)
    file.unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        Store.open(copy)


def test_a_flipped_bit_is_found_by_verify(copy):
    file = copy / "clip-image-00002.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)
    Store.open(copy)
    with pytest.raises(UserError, match=r"clip-image-00002\.safetensors is damaged"):
        Store.open(copy, verify=True)


ROWS = {
    "latents": ("latents.0", "image"),
    "clip-image": ("clip_image.0", "image"),
    "text": ("prompt_embeds", "caption"),
    "clip-text": ("clip_text", "caption"),
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_flipped_bit_is_found_by_those_who_read_its_row(copy, kind):
    (name, unit), store = ROWS[kind], Store.open(copy)
    used = {"image": (store._image_w, store._image_l), "caption": (store._caption,)}[unit]
    item = int(used[0][5])
    file = copy / f"{kind}-{int(getattr(store, f'_{unit}_shard')[item]):05d}.safetensors"
    row = load_file(file)[name][int(getattr(store, f"_{unit}_row")[item])].contiguous()
    data = bytearray(file.read_bytes())
    data[data.index(row.view(torch.uint8).numpy().tobytes()) + 5] ^= 16
    file.write_bytes(data)
    store, found = Store.open(copy), []
    for index in range(40):
        try:
            store.batch([index])
        except UserError as error:
            assert f"{file.name} is damaged" in str(error) and "checksum" in str(error)
            found.append(index)
    assert found == [index for index in range(40) if item in [column[index] for column in used]]
    if kind == "clip-text":
        with pytest.raises(UserError, match="does not match its checksum"):
            store.clip_text_all()


def test_exchanged_shards_are_found(copy):
    first, second = (copy / f"latents-{n:05d}.safetensors" for n in (0, 1))
    ours, theirs = first.read_bytes(), second.read_bytes()
    assert len(ours) == len(theirs)
    first.write_bytes(theirs)
    second.write_bytes(ours)
    with pytest.raises(UserError, match=r"latents-00000\.safetensors is damaged"):
        Store.open(copy).batch([0])


@pytest.mark.parametrize("name", ["pairs.parquet", "images.parquet", "captions.parquet"])
def test_a_flipped_bit_in_the_index_is_found_on_opening(copy, name):
    file = copy / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        Store.open(copy)


@pytest.mark.parametrize("change", [{"scaling_factor": 0.5}, {"buckets": [[16, 32]]}, {"pairs": 41}, {"sha256": ""}])
def test_a_changed_value_of_the_manifest_is_damage(copy, change):
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(UserError, match="the manifest is damaged"):
        Store.open(copy)


def test_a_shard_with_a_broken_header_is_named_when_used(copy):
    file = copy / "latents-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[:8] = b"\xff" * 8
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"latents-00000\.safetensors cannot be read"):
        Store.open(copy).batch([0])


def test_what_is_not_a_store_is_refused(copy, tmp_path):
    with pytest.raises(UserError, match="no such store"):
        Store.open(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not a store"):
        Store.open(tmp_path / "empty")
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(UserError, match="format version 99"):
        Store.open(copy)
    (copy / "manifest.json").write_text('{"name": "other"}')
    with pytest.raises(UserError, match="damaged or not a store's"):
        Store.open(copy)


def test_a_store_for_another_model_is_refused(made, sdxl, sd15):
    from fastpref.models.loading import model_fingerprint

    store = Store.open(made)
    store.check_model(model_fingerprint(sdxl), "sdxl")
    with pytest.raises(UserError, match="made for another model"):
        store.check_model("0" * 64, "sdxl")
    with pytest.raises(UserError, match="made for sdxl, the model is sd15"):
        store.check_model(model_fingerprint(sd15), "sd15")
