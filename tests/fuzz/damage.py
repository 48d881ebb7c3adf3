"""What happens to bytes, to text and to folders: a function of a random generator, described in a few words."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

Damaged = tuple[bytes, str]
TOKENS = (
    *("-1", "0", "1", "2", "7", "1e-9", "1e999", "-1e999", ".nan", "NaN", "null", "~", "true", "[]", "{}", "''"),
    *("9223372036854775807", "9223372036854775808", "99999999999999999999999", "2147483648", "[1, 2]", "[[[]]]"),
    *("'../../x'", "/dev/null", "/dev/zero", "'a\\0b'", '"\\u0000"', '"\\ud800"', "é", "x" * 3000, "{a: b}", "&a [*a]"),
    *("!!python/name:os.system", "<<: *b", "- - -", "0x10", "1_000", "2001-01-01", "[" * 300, "*", "'**'", "."),
)
_WORD = re.compile(rb"[\w.+-]+")


def damage_bytes(rng: random.Random, data: bytes) -> Damaged:
    """One kind of damage at a random place; the result differs from ``data`` (unless that is empty)."""
    if not data:
        return bytes([rng.randrange(256)]), "a byte in an empty file"
    for _ in range(20):
        kind = rng.choice(_KINDS)
        out = kind(rng, bytearray(data))
        if out != data:
            return bytes(out), f"{kind.__name__.strip('_').replace('_', ' ')}, {len(data)} -> {len(out)} bytes"
    return data[:-1], "last byte cut"


def damage_text(rng: random.Random, data: bytes) -> Damaged:
    """A word replaced by something that a parser or a bound may not expect; sometimes :func:`damage_bytes`."""
    words = list(_WORD.finditer(data))
    if not words or rng.random() < 0.25:
        return damage_bytes(rng, data)
    word, token = rng.choice(words), rng.choice(TOKENS)
    shown = token if len(token) < 40 else f"{token[:8]}… ({len(token)})"
    out = data[: word.start()] + token.encode() + data[word.end() :]
    return out, f"{word.group()[:40].decode(errors='replace')} -> {shown}"


def damage_folder(rng: random.Random, folder: Path, names: list[str]) -> str:
    """One of the files ``names`` below ``folder`` damaged, deleted, exchanged with another or turned into a folder."""
    name = rng.choice(names)
    file, kind = folder / name, rng.random()
    if kind < 0.10:
        file.unlink()
        return f"{name}: deleted"
    if kind < 0.15:
        file.unlink()
        file.mkdir()
        return f"{name}: a folder in its place"
    if kind < 0.25:
        other = rng.choice(names)
        ours, theirs = file.read_bytes(), (folder / other).read_bytes()
        file.write_bytes(theirs)
        (folder / other).write_bytes(ours)
        return f"{name}: exchanged with {other}"
    if kind < 0.28:
        shutil.rmtree(file.parent) if file.parent != folder else file.write_bytes(b"")
        return f"{name}: its folder deleted" if file.parent != folder else f"{name}: emptied"
    textual = file.suffix in (".json", ".jsonl", ".yaml")
    data, how = (damage_text if textual else damage_bytes)(rng, file.read_bytes())
    file.write_bytes(data)
    return f"{name}: {how}"


def _place(rng: random.Random, data: bytearray) -> int:
    """Headers and ends are where formats keep what matters: half of the places are there."""
    edge = min(len(data), 64)
    return rng.choice([rng.randrange(edge), len(data) - 1 - rng.randrange(edge), rng.randrange(len(data))])


def _one_bit(rng: random.Random, data: bytearray) -> bytes:
    data[_place(rng, data)] ^= 1 << rng.randrange(8)
    return bytes(data)


def _some_bits(rng: random.Random, data: bytearray) -> bytes:
    for _ in range(rng.randrange(2, 20)):
        data[_place(rng, data)] ^= 1 << rng.randrange(8)
    return bytes(data)


def _cut_short(rng: random.Random, data: bytearray) -> bytes:
    return bytes(data[: rng.randrange(len(data))])


def _span(rng: random.Random, data: bytearray) -> slice:
    start = _place(rng, data)
    return slice(start, min(len(data), start + rng.choice([1, 4, 8, 64, 512])))


def _zeroed(rng: random.Random, data: bytearray) -> bytes:
    span = _span(rng, data)
    data[span] = bytes(span.stop - span.start)
    return bytes(data)


def _all_ones(rng: random.Random, data: bytearray) -> bytes:
    span = _span(rng, data)
    data[span] = b"\xff" * (span.stop - span.start)
    return bytes(data)


def _noise(rng: random.Random, data: bytearray) -> bytes:
    span = _span(rng, data)
    data[span] = rng.randbytes(span.stop - span.start)
    return bytes(data)


def _left_out(rng: random.Random, data: bytearray) -> bytes:
    del data[_span(rng, data)]
    return bytes(data)


def _doubled(rng: random.Random, data: bytearray) -> bytes:
    span = _span(rng, data)
    data[span.start : span.start] = data[span]
    return bytes(data)


def _appended(rng: random.Random, data: bytearray) -> bytes:
    return bytes(data) + rng.randbytes(rng.choice([1, 8, 512]))


_KINDS: tuple[Callable[[random.Random, bytearray], bytes], ...] = (
    *(_one_bit, _one_bit, _one_bit, _some_bits, _cut_short, _zeroed, _all_ones, _noise, _left_out, _doubled),
    _appended,
)
