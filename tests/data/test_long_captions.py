"""Captions beyond one block in a store: what is cut is told, what is kept is encoded, and a run has to agree."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file

from fastpref.data.job import make_job
from fastpref.data.manifest import read_manifest
from fastpref.data.prepare import prepare
from fastpref.data.records import open_records
from fastpref.data.store import Store
from fastpref.errors import UserError
from fastpref.models.text import load_text_stack
from fastpref.train.inputs import open_store

CPU = torch.device("cpu")
START = "a red cat on the moon blue heart in green circle yellow dog"  # 13 tokens; a block of the tiny model has 14
CAPTIONS = [f"{START} with {end}" for end in ("hat", "white hat", "sun", "")] + [f"{START} {'hat ' * 40}", "blue sun"]
LINE = "4 of 6 captions are cut after 14 tokens, 3 of them to the same text as another caption (the longest has 53): "


@pytest.fixture
def records(rows, parquet):
    made = rows(len(CAPTIONS) + 1)
    for row, caption in zip(made, [*CAPTIONS, CAPTIONS[0]], strict=True):
        row["caption"] = caption
    return parquet(made)


def run(config, **options):
    return prepare(config, progress=False, **options)


def test_prepare_says_what_is_cut_dry_finished_and_again(recipe, records):
    config = recipe(records)
    dry, made, again = run(config, dry_run=True), run(config), run(config)
    assert again.up_to_date and made.captions == 6
    for summary in (dry, made, again):
        assert f"  {LINE}max_caption_tokens=225 takes the first 42" in str(summary).splitlines()
    longer = run(recipe(records, max_caption_tokens=150, store=str(made.store) + "-150"))
    assert "  1 of 6 captions is cut after 28 tokens (the longest has 53): max_caption_tokens=225 takes" in str(longer)


def test_nothing_is_said_where_all_captions_fit(recipe, rows, parquet):
    config = recipe(parquet(rows(2)), max_caption_tokens=150)
    assert "cut" not in str(run(config, dry_run=True)) + str(run(config))
    assert read_manifest(run(config).store).cut is None


@pytest.mark.parametrize(("key", "blocks"), [(77, 1), (150, 2), (225, 3)])
@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_the_store_holds_every_block(recipe, records, request, family, key, blocks):
    model = request.getfixturevalue(family)
    config = recipe(records, max_caption_tokens=key, model=str(model))
    store = Store.open(run(config).store, verify=True)
    assert store.manifest.max_caption_tokens == key
    rows = [store.record.tolist().index(number) for number in range(6)]
    batch, (empty, _) = store.batch(rows), store.empty_prompt()
    assert batch.prompt_embeds.shape[1] == empty.shape[1] == 16 * blocks
    stack = load_text_stack(model, torch.float32, CPU, key)
    for row, caption in enumerate(CAPTIONS):
        embeds, pooled = stack.encode([caption])
        torch.testing.assert_close(batch.prompt_embeds[row], embeds[0], rtol=1e-4, atol=1e-5)
        if pooled is not None:
            torch.testing.assert_close(batch.pooled_prompt_embeds[row], pooled[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(empty, stack.encode([""])[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(batch.prompt_embeds[0], batch.prompt_embeds[1]) == (key == 77)  # they differ at token 15


def test_the_estimate_is_the_size(recipe, records):
    config = recipe(records, max_caption_tokens=225)
    run(config)
    files = Store.open(config.store).path.glob("text-*.safetensors")
    names = ("prompt_embeds", "pooled_prompt_embeds")
    text = sum(load_file(file)[name].nbytes for file in files for name in names)
    assert text == (6 + 1) * (3 * 16 * 64 + 32) * 4
    dry = {key: run(recipe(records, max_caption_tokens=key), dry_run=True).bytes for key in (77, 150, 225)}
    assert dry[225] - dry[150] == dry[150] - dry[77] == (6 + 1) * 16 * 64 * 4


@pytest.mark.parametrize(("held", "wanted"), [(77, 150), (150, 77), (225, 150)])
def test_a_run_of_another_length_is_refused(recipe, records, sdxl, held, wanted):
    config = recipe(records, max_caption_tokens=held)
    run(config)
    assert open_store(config, sdxl).manifest.max_caption_tokens == held
    other = config.model_copy(update={"max_caption_tokens": wanted})
    with pytest.raises(UserError) as refused:
        open_store(other, sdxl)
    assert str(refused.value) == (
        f"the store was prepared with max_caption_tokens={held}, not {wanted} ({config.store}): "
        f"set max_caption_tokens={held}, or prepare a store with {wanted}"
    )
    with pytest.raises(UserError, match="other"):
        run(other)


def test_a_store_from_before_the_key_opens_with_77_and_is_up_to_date(recipe, records, sdxl):
    """Its manifest lacks the fields, also in its sha256; the fingerprint of its settings is the one of today."""
    config = recipe(records)
    store = run(config).store
    file = store / "manifest.json"
    content = json.loads(file.read_text())
    for name in ("max_caption_tokens", "cut", "sha256"):
        del content[name]
    content["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps(content))
    assert open_store(config, sdxl).manifest.max_caption_tokens == 77
    assert run(config).up_to_date
    content["pairs"] += 1
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="manifest is damaged"):
        read_manifest(store)


def test_a_store_of_another_length_is_another_store(recipe, records):
    source = open_records(str(records))
    found = {tokens: make_job(recipe(records, max_caption_tokens=tokens), source).fingerprint for tokens in (77, 150)}
    assert found[77] != found[150] and make_job(recipe(records), source).fingerprint == found[77]
