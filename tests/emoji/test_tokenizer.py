"""The tokenizer: a word of the captions is one token, anything else is spelled, nothing is unknown."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from fastpref.emoji import HELDOUT_PARQUET, TRAIN_PARQUET
from fastpref.emoji.records import read_records
from fastpref.emoji.tokenizer import MAX_LENGTH, save_tokenizer_files, train_tokenizer


@pytest.fixture(scope="module")
def captions() -> list[str]:
    return read_records(TRAIN_PARQUET).captions


@pytest.fixture(scope="module")
def tokenizer(captions: list[str]) -> CLIPTokenizer:
    return train_tokenizer(captions)


def test_round_trip_one_token_a_word(tokenizer: CLIPTokenizer, captions: list[str]) -> None:
    for caption in captions + read_records(HELDOUT_PARQUET).captions:
        ids = tokenizer(caption).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == caption.replace(" ", "")
        assert len(ids) <= MAX_LENGTH
        if not any(character.isdigit() for character in caption):  # digits are single tokens in CLIP
            assert len(ids) == len(caption.split()) + 2, caption


def test_other_text_is_spelled_not_unknown(tokenizer: CLIPTokenizer) -> None:
    ids = tokenizer("Xylophone, naïve 漢字!", truncation=False).input_ids
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.unk_token_id not in ids[1:-1]
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "xylophone,naïve漢字!"


def test_saved_files_open_again(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    save_tokenizer_files(tmp_path, ("",))
    again = CLIPTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    older = CLIPTokenizer.from_pretrained(tmp_path)
    for text in ("yellow heart", "unheard-of words"):
        ids = tokenizer(text, padding="max_length", truncation=True).input_ids
        assert ids == again(text, padding="max_length", truncation=True).input_ids
        assert ids == older(text, padding="max_length", truncation=True).input_ids
        assert len(ids) == MAX_LENGTH and ids[-1] == tokenizer.eos_token_id
