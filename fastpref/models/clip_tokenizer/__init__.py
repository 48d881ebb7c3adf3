"""CLIP's byte pair encoding (OpenAI; from OpenCLIP's distribution, LICENSE.txt): 48,894 merges, 49,408 tokens.

SD1.5 and SDXL were trained with it, and a checkpoint in one file holds no tokenizer.
"""

from __future__ import annotations

import json
from pathlib import Path

MERGES = Path(__file__).parent / "merges.txt"
START, END = "<|startoftext|>", "<|endoftext|>"


def vocabulary() -> dict[str, int]:
    """Token to id: the bytes as printable characters, the same at a word's end, what each merge makes, two specials."""
    merges = MERGES.read_text(encoding="utf-8").splitlines()[1:]
    letters = _printable_bytes()
    pieces = [*letters, *(letter + "</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    return {piece: number for number, piece in enumerate([*pieces, START, END])}


def write_tokenizer(folder: Path, pad_token: str) -> None:
    """Write a CLIPTokenizer's files as they are published, for prompts of 77 tokens."""
    folder.mkdir()
    (folder / "merges.txt").write_bytes(MERGES.read_bytes())
    (folder / "vocab.json").write_text(json.dumps(vocabulary(), ensure_ascii=False), encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": pad_token,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _printable_bytes() -> list[str]:
    """All bytes as characters, in the order of GPT-2's byte-level encoding: printable ones first and as themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(len(others))]
