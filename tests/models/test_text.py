"""Captions in blocks of 75 tokens: against a literal loop and diffusers, and what is cut off is counted."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from fastpref.emoji.random_models import WORDS, text_config
from fastpref.emoji.tokenizer import train_tokenizer
from fastpref.errors import UserError
from fastpref.models import caption_length
from fastpref.models.caption_length import BLOCKS, CutCaptions, count_cut, cut_captions
from fastpref.models.pipeline import load_pipeline
from fastpref.models.text import BlockTokenizer, TextStack, load_text_stack

CPU = torch.device("cpu")
LENGTHS = (0, 1, 75, 76, 150, 151, 225, 300)
VOCABULARY = " ".join(WORDS).split()


def words(count: int, seed: int = 0) -> str:
    """So many words, of one token each."""
    return " ".join(random.Random(seed).choices(VOCABULARY, k=count))


@pytest.fixture(scope="module")
def stacks() -> dict[str, TextStack]:
    """Random text encoders of 77 positions in fp64; SDXL's second tokenizer pads with '!', as the published one."""
    torch.manual_seed(0)
    tokenizers = [train_tokenizer(list(WORDS)) for _ in range(2)]
    for tokenizer in tokenizers:
        tokenizer.model_max_length = 77
    tokenizers[1].pad_token = "!"
    assert tokenizers[1].pad_token_id not in (tokenizers[1].eos_token_id, None)
    first = CLIPTextModel(text_config(tokenizers[0], 32, 2, 32)).double().eval()
    second = CLIPTextModelWithProjection(text_config(tokenizers[1], 16, 3, 24)).double().eval()
    return {
        "sd15": TextStack("sd15", tokenizers[:1], [first], CPU),
        "sdxl": TextStack("sdxl", tokenizers, [first, second], CPU),
    }


def literal(stack: TextStack, caption: str, blocks: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One caption, one block and one encoder at a time."""
    sides, pooled = [], None
    for tokenizer, encoder in zip(stack.tokenizers, stack.encoders, strict=True):
        tokens = tokenizer(caption, add_special_tokens=False).input_ids
        rows, pools = [], []
        for number in range(blocks):
            ids = [tokenizer.bos_token_id, *tokens[75 * number : 75 * number + 75], tokenizer.eos_token_id]
            while len(ids) < 77:
                ids.append(tokenizer.pad_token_id)
            with torch.no_grad():
                output = encoder(torch.tensor([ids]), output_hidden_states=True)
            if stack.family == "sdxl":
                rows.append(output.hidden_states[-2][0])
                pools.append(output[0][0])
            else:
                rows.append(output.last_hidden_state[0])
        sides.append(torch.cat(rows))
        pooled = pools[0] if pools else None  # of the last encoder, first block
    return torch.cat(sides, dim=1), pooled


@pytest.mark.parametrize("key", [77, 150, 225])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_blocks_are_those_of_a_literal_loop(stacks: dict[str, TextStack], family: str, key: int) -> None:
    """fp64: a batch and single rows differ by rounding, some 1e-15 of values of order one."""
    known = stacks[family]
    stack = TextStack(known.family, known.tokenizers, known.encoders, CPU, key)
    captions = [words(count) for count in LENGTHS]
    assert [len(stack.tokenizers[0](c, add_special_tokens=False).input_ids) for c in captions] == list(LENGTHS)
    embeds, pooled = stack.encode(captions)
    assert embeds.shape == (len(LENGTHS), 77 * BLOCKS[key], 32 if family == "sd15" else 48)
    assert stack.rows == len(LENGTHS) * BLOCKS[key] and (pooled is None) == (family == "sd15")
    for row, caption in enumerate(captions):
        expected, expected_pooled = literal(stack, caption, BLOCKS[key])
        torch.testing.assert_close(embeds[row], expected, rtol=0, atol=1e-12)
        if pooled is not None:
            torch.testing.assert_close(pooled[row], expected_pooled, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_one_block_is_bit_for_bit_what_diffusers_encodes(family: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(family)
    captions = ["", "a red cat", words(13), words(14), words(15), words(40), "naïve 漢字 👩‍🚀!", "x" * 200, " \n "]
    found, pooled = load_text_stack(folder, torch.float32, CPU).encode(captions)
    pipeline = load_pipeline(folder, torch.float32, CPU)
    settings = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    with torch.no_grad():
        expected = pipeline.encode_prompt(captions, device=CPU, **settings)  # type: ignore[attr-defined]
    assert torch.equal(found, expected[0])
    if family == "sdxl":
        assert pooled is not None and torch.equal(pooled, expected[2])
    own, own_pooled = TextStack.of_pipeline(pipeline, 77).encode(captions)
    assert torch.equal(own, found) and (pooled is None or torch.equal(own_pooled, pooled))


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_difference_at_token_100_is_seen_with_two_blocks(stacks: dict[str, TextStack], family: str) -> None:
    known, start = stacks[family], words(99)
    pair = [f"{start} red {words(20)}", f"{start} blue {words(20)}"]
    one, two = (TextStack(known.family, known.tokenizers, known.encoders, CPU, key) for key in (77, 150))
    # Each by itself: rows of one matrix product may be summed in different orders.
    cut, whole = ([stack.encode([caption])[0][0] for caption in pair] for stack in (one, two))
    assert torch.equal(*cut)
    a, b = whole
    assert torch.equal(a[:77], b[:77])
    same = (a[77:] == b[77:]).all(dim=1)
    assert same[:25].all() and not same[25:].any()  # 24 tokens and the start token before it; the mask is causal


def test_the_empty_prompt_is_the_empty_block_over_and_over(stacks: dict[str, TextStack]) -> None:
    known = stacks["sdxl"]
    three = TextStack("sdxl", known.tokenizers, known.encoders, CPU, 225).encode(["", words(80)])[0]
    # float64's rounding: a matrix product may sum its rows in different orders
    for block in (three[0, 77:154], three[0, 154:], three[1, 154:]):
        torch.testing.assert_close(block, three[0, :77], rtol=0, atol=1e-12)


@pytest.mark.parametrize("key", [77, 150])
def test_cut_captions_are_counted_as_by_hand(
    stacks: dict[str, TextStack], key: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few different words, so that many captions share their first tokens, some differing behind the cut only."""
    stack, room = stacks["sdxl"], 75 * BLOCKS[key]
    rng = random.Random(key)
    captions = ["", "red", words(room), *(words(room + extra) for extra in (0, 1, 1, 3))]
    for _ in range(300):
        end = rng.choices(["red", "cat"], k=rng.randrange(6))
        captions.append(" ".join([words(room - 2, rng.randrange(3)), *end]))
    captions += [words(room + 5, seed) for seed in range(10, 14)]
    captions = list(dict.fromkeys(captions))
    tokens = [tuple(stack.tokenizers[0](c, add_special_tokens=False).input_ids) for c in captions]
    cut = [t for t in tokens if len(t) > room]
    alike = [t for t in cut if any(o[:room] == t[:room] and o != t for o in tokens)]
    tokenizers = [BlockTokenizer(t, 77, BLOCKS[key]) for t in stack.tokenizers]
    monkeypatch.setattr(caption_length, "_CHARACTERS", 3000)
    advanced: list[int] = []
    found = cut_captions(tokenizers, captions, advanced.append)
    assert sum(advanced) == len(captions) and len(advanced) > 5
    assert found is not None and 0 < len(alike) < len(cut) < len(captions)
    seen = (found.captions, found.cut, found.alike, found.longest, found.room)
    assert seen == (len(captions), len(cut), len(alike), max(map(len, tokens)), room)
    assert cut_captions(tokenizers, [words(room), "", "é" * (room // 2)]) is None


@pytest.mark.parametrize(
    ("key", "count", "hint"),
    [
        (77, 15, "max_caption_tokens=150 takes them whole"),
        (77, 28, "max_caption_tokens=150 takes them whole"),
        (77, 29, "max_caption_tokens=225 takes them whole"),
        (77, 60, "max_caption_tokens=225 takes the first 42"),
        (150, 30, "max_caption_tokens=225 takes them whole"),
        (225, 60, "shorten them"),
    ],
)
def test_one_line_names_the_key_that_takes_them(sd15: Path, key: int, count: int, hint: str) -> None:
    """The tiny tokenizer's blocks have 14 tokens."""
    found = count_cut(sd15, key, ["red", "red", words(count)])
    room = 14 * BLOCKS[key]
    assert f"{found}" == f"1 of 2 captions is cut after {room} tokens (the longest has {count}): {hint}"


def test_the_line_says_which_became_equal() -> None:
    found = CutCaptions(captions=50, cut=3, alike=2, longest=103, room=75, key=150, takes=150)
    assert f"{found}" == (
        "3 of 50 captions are cut after 75 tokens, 2 of them to the same text as another caption (the longest has "
        "103): max_caption_tokens=150 takes them whole"
    )


@pytest.mark.parametrize(
    "text", ["x" * 100_000, "漢" * 50_000, "red cat " * 12_500, "👩‍🚀" * 9_000, "<|endoftext|>" * 500]
)
def test_captions_of_any_length_and_kind_are_encoded(sdxl: Path, text: str) -> None:
    stack = load_text_stack(sdxl, torch.float32, CPU, 225)
    embeds, pooled = stack.encode([text, "red"])
    assert embeds.shape == (2, 3 * 16, 64) and embeds.isfinite().all() and pooled is not None
    tokens = stack.tokenizers[0](text, add_special_tokens=False).input_ids
    found = count_cut(sdxl, 225, [text])
    assert found is not None and (found.cut, found.longest) == (1, len(tokens))


def test_a_tokenizer_without_a_length_takes_the_encoder_s(sd15: Path, tmp_path: Path) -> None:
    folder = _copy_without(sd15, tmp_path, "model_max_length")
    captions = ["red", words(20)]
    for key in (77, 150):
        own, other = (load_text_stack(path, torch.float32, CPU, key).encode(captions)[0] for path in (sd15, folder))
        assert torch.equal(own, other)
    assert f"{count_cut(folder, 77, captions)}" == f"{count_cut(sd15, 77, captions)}"
    assert load_text_stack(folder, torch.float32, CPU).tokenizers[0].model_max_length == 16


def test_a_tokenizer_that_cannot_pad_is_refused(sd15: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no start, end or padding token"):
        load_text_stack(_copy_without(sd15, tmp_path, "pad_token"), torch.float32, CPU)


def _copy_without(model: Path, tmp_path: Path, setting: str) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("unet", "vae"))
    file = folder / "tokenizer" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings[setting]
    file.write_text(json.dumps(settings | ({"pad_token": None} if setting == "pad_token" else {})))
    return folder
