"""Text that people wrote: which encoding its bytes are in, and what of it is the caption."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from typing import Any

BOM = "\ufeff"
# UTF-32's little-endian mark starts with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def encoding_of(start: bytes) -> tuple[str, int]:
    """The encoding that a byte order mark at the ``start`` names (without one UTF-8), and the length of the mark."""
    return next(((name, len(mark)) for mark, name in _MARKS if start.startswith(mark)), ("utf-8", 0))


def decode(data: bytes) -> str:
    """A whole text in UTF-8, or in UTF-16 or UTF-32 with a byte order mark; the mark is taken off.

    Raises:
        UnicodeDecodeError: bytes that are not text in that encoding.
    """
    name, mark = encoding_of(data)
    return data[mark:].decode(name)


def decode_row(data: bytes) -> str:
    """As :func:`decode`; of bytes that are not text it makes lone surrogates, which :func:`caption_problem` finds."""
    try:
        return decode(data)
    except UnicodeDecodeError:
        return data.decode("utf-8", "surrogateescape")


def lines(text: str) -> Iterator[str]:
    """The lines of a text without their ends. Only LF, CRLF and CR end one: JSON may hold other line separators."""
    return (line.rstrip("\n") for line in io.StringIO(text, newline=None))


def caption_of(value: Any) -> Any:
    """A caption without the white space and byte order marks around it; anything but text as it is."""
    return value.strip().strip(BOM).strip() if isinstance(value, str) else value


def caption_problem(caption: Any) -> str:
    """Why this is not a caption, in a few fixed words; '' if it is one."""
    if not isinstance(caption, str):
        return "caption is missing"
    if not caption_of(caption):
        return "caption is empty"
    try:
        caption.encode("utf-8")
    except UnicodeEncodeError:
        return "caption is not UTF-8"
    if "\0" in caption:
        return "caption holds NUL characters: is it UTF-16 without a mark?"
    return ""
