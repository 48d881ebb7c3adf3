"""Captions that are longer than what the text encoders are given, counted by the tokenizers alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from fastpref.models.text import BlockTokenizer

BLOCKS = {77: 1, 150: 2, 225: 3}  # of a caption, by max_caption_tokens; see fastpref.models.text
_CAPTIONS, _CHARACTERS = 1024, 1 << 20  # a call of a tokenizer takes at most, but one caption at least


class CutCaptions(BaseModel):
    """What ``max_caption_tokens`` cuts off the distinct captions of a data set; lengths without start and end."""

    model_config = ConfigDict(frozen=True)

    captions: int  # all that were looked at
    cut: int  # those that are too long
    alike: int  # of these, those that are the same as another caption once they are cut
    longest: int  # tokens
    room: int  # tokens that fit
    key: int | None = None  # the least max_caption_tokens above the present one that cuts fewer; None: there is none
    takes: int = 0  # tokens that fit then

    def __str__(self) -> str:
        """One line: how many, what it does, and the key that changes it."""
        verb = "is" if self.cut == 1 else "are"
        same = f", {self.alike} of them to the same text as another caption" if self.alike else ""
        hint = "shorten them"
        if self.key is not None:
            taken = "them whole" if self.takes >= self.longest else f"the first {self.takes}"
            hint = f"max_caption_tokens={self.key} takes {taken}"
        return (
            f"{self.cut} of {self.captions} captions {verb} cut after {self.room} tokens{same} (the longest has "
            f"{self.longest}): {hint}"
        )


def cut_captions(
    tokenizers: Sequence[BlockTokenizer], captions: Sequence[str], advance: Callable[[int], None] | None = None
) -> CutCaptions | None:
    """Count the captions that do not fit, for a model's one or two tokenizers; None if all fit.

    Args:
        captions: distinct ones. A caption is tokenised only if it is long enough not to fit: a token covers at least
            one character of ASCII.
        advance: called after every few captions with their number.
    """
    room = min(tokenizer.room for tokenizer in tokenizers)
    doubtful = [caption for caption in captions if len(caption) >= room or not caption.isascii()]
    lengths = np.zeros((len(tokenizers), len(doubtful)), np.int64)
    whole, kept = (np.zeros((len(tokenizers), len(doubtful)), np.int64) for _ in range(2))  # hashes of tokens
    advance = advance or (lambda _: None)
    advance(len(captions) - len(doubtful))
    for start, part in _parts(doubtful):
        for row, tokenizer in enumerate(tokenizers):
            found = tokenizer.tokenizer(
                part, add_special_tokens=False, return_attention_mask=False, verbose=False
            ).input_ids
            for at, ids in enumerate(found, start):
                lengths[row, at] = len(ids)
                whole[row, at], kept[row, at] = hash(tuple(ids)), hash(tuple(ids[: tokenizer.room]))
        advance(len(part))
    too_long = (lengths > np.asarray([[tokenizer.room] for tokenizer in tokenizers])).any(axis=0)
    if not too_long.any():
        return None
    longest = int(lengths.max())
    key, takes = _longer(tokenizers[0], longest)
    return CutCaptions(
        captions=len(captions),
        cut=int(too_long.sum()),
        alike=int((_joined(whole, kept) & too_long).sum()),
        longest=longest,
        room=room,
        key=key,
        takes=takes,
    )


def count_cut(
    model_dir: Path,
    max_caption_tokens: int,
    captions: Iterable[str],
    advance: Callable[[int], None] | None = None,
) -> CutCaptions | None:
    """:func:`cut_captions` of the distinct ones among ``captions``, by the tokenizers of a pipeline folder."""
    from fastpref.models.text import load_block_tokenizers

    return cut_captions(load_block_tokenizers(model_dir, max_caption_tokens), list(dict.fromkeys(captions)), advance)


def warn_of_cut(model_dir: Path, max_caption_tokens: int, captions: Iterable[str]) -> None:
    """Say in one line, on standard error, how many of the captions are too long; nothing if all fit."""
    from rich.console import Console

    if found := count_cut(model_dir, max_caption_tokens, captions):
        Console(stderr=True).print(f"{found}", style="yellow", markup=False, soft_wrap=True)


def _parts(captions: list[str]) -> Iterator[tuple[int, list[str]]]:
    """Consecutive captions and the number of the first: a caption may be a book."""
    start, characters = 0, 0
    for at, caption in enumerate(captions):
        if at > start and (at - start == _CAPTIONS or characters + len(caption) > _CHARACTERS):
            yield start, captions[start:at]
            start, characters = at, 0
        characters += len(caption)
    if captions:
        yield start, captions[start:]


def _joined(whole: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """(n,) whether a caption's ``kept`` tokens (T, n) are also those of a caption whose ``whole`` tokens differ."""
    _, groups = np.unique(kept, axis=1, return_inverse=True)
    _, texts = np.unique(whole, axis=1, return_inverse=True)
    groups, texts = groups.reshape(-1), texts.reshape(-1)
    pairs = np.unique(np.stack([groups, texts]), axis=1)
    return np.bincount(pairs[0])[groups] > 1


def _longer(tokenizer: BlockTokenizer, longest: int) -> tuple[int | None, int]:
    """The least key that takes ``longest`` tokens, or else the largest, if it is above the tokenizer's own."""
    size = tokenizer.length - 2
    above = {key: blocks * size for key, blocks in BLOCKS.items() if blocks > tokenizer.blocks}
    enough = [key for key, room in above.items() if room >= longest]
    key = min(enough) if enough else max(above, default=None)
    return key, 0 if key is None else above[key]
