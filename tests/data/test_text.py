"""A byte order mark is no part of a caption, whichever file it comes from, and other encodings are read or refused."""

from __future__ import annotations

import codecs
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastpref.data.records import Record, Unusable, read_captions, read_records
from fastpref.data.text import caption_of, decode
from fastpref.errors import UserError
from fastpref.evaluate.folders import read_folder

WANTED = "a red café\u200d"  # a zero-width joiner inside is the writer's business
MESSY = f"\r\n {WANTED} \r\n"
ENCODINGS = {
    "utf-8": b"",
    "utf-8-sig": b"",
    "utf-16": b"",
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
}


def written(text: str, encoding: str) -> bytes:
    return ENCODINGS[encoding] + text.encode(encoding)


def _record_of(path: Path) -> Record | Unusable:
    (found,) = read_records(str(path))
    return found


def _folder(root: Path, encoding: str, picture: bytes) -> str:
    for side in ("winner", "loser"):
        (root / side).mkdir()
        (root / side / "n0.png").write_bytes(picture)
    (root / "n0.txt").write_bytes(written(MESSY, encoding))
    return _record_of(root).caption


def _tar(root: Path, name: str, data: bytes, picture: bytes) -> str:
    with tarfile.open(root / "a.tar", "w") as tar:
        members = {"k.jpg_0": picture, "k.jpg_1": picture + b"x", name: data, "k.label_0": codecs.BOM_UTF8 + b"1\r\n"}
        for member, content in members.items():
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return _record_of(root / "a.tar").caption


def _jsonl(root: Path, encoding: str, picture: bytes) -> str:
    for name in ("a.png", "b.png"):
        (root / name).write_bytes(picture)
    line = json.dumps({"winner": "a.png", "loser": "b.png", "caption": MESSY}, ensure_ascii=False)
    (root / "p.jsonl").write_bytes(written("\r\n" + line + "\r\n", encoding))
    return _record_of(root / "p.jsonl").caption


def _csv(root: Path, encoding: str, picture: bytes) -> str:
    for name in ("a.png", "b.png"):
        (root / name).write_bytes(picture)
    (root / "p.csv").write_bytes(written(f'"winner","loser","caption"\r\na.png,b.png,"{MESSY}"\r\n', encoding))
    return _record_of(root / "p.csv").caption


def _prompts(suffix: str) -> Callable[[Path, str, bytes], str]:
    texts = {
        ".txt": MESSY,
        ".json": json.dumps([MESSY], ensure_ascii=False),
        ".jsonl": json.dumps({"prompt": MESSY}, ensure_ascii=False) + "\r\n",
    }

    def read(root: Path, encoding: str, picture: bytes) -> str:
        (root / f"p{suffix}").write_bytes(written(texts[suffix], encoding))
        (caption,) = read_captions(str(root / f"p{suffix}"))
        return caption

    return read


def _beside(root: Path, encoding: str, picture: bytes) -> str:
    (root / "n0.png").write_bytes(picture)
    (root / "n0.txt").write_bytes(written(MESSY, encoding))
    return read_folder(root)[0].caption


def _metadata(root: Path, encoding: str, picture: bytes) -> str:
    (root / "n0.png").write_bytes(picture)
    text = json.dumps({"file_name": "n0.png", "text": MESSY}, ensure_ascii=False)
    (root / "metadata.jsonl").write_bytes(written(text + "\r\n", encoding))
    return read_folder(root)[0].caption


READERS: dict[str, Callable[[Path, str, bytes], str]] = {
    "folder": _folder,
    "tar txt": lambda root, code, picture: _tar(root, "k.txt", written(MESSY, code), picture),
    "tar json": lambda root, code, picture: _tar(
        root, "k.json", written(json.dumps({"caption": MESSY}, ensure_ascii=False), code), picture
    ),
    "jsonl": _jsonl,
    "csv": _csv,
    "prompts txt": _prompts(".txt"),
    "prompts json": _prompts(".json"),
    "prompts jsonl": _prompts(".jsonl"),
    "beside a picture": _beside,
    "metadata.jsonl": _metadata,
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("reader", READERS)
def test_a_caption_is_its_text_in_every_layout_and_encoding(reader, encoding, tmp_path, picture):
    read = READERS[reader]
    if reader in ("jsonl", "csv") and encoding not in ("utf-8", "utf-8-sig"):
        with pytest.raises(UserError, match=r"the file is in UTF-(16|32)-[LB]E .*save it as UTF-8"):
            read(tmp_path, encoding, picture(0))
    else:
        assert read(tmp_path, encoding, picture(0)) == WANTED


def test_a_mark_that_another_program_left_in_a_table_goes_too(tmp_path, rows, parquet):
    made = rows(2)
    made[0]["caption"] = made[1]["caption"] = "red"
    made[1]["caption"] = "\ufeffred\n"
    path = parquet(made)
    assert [record.caption for record in read_records(str(path))] == ["red", "red"]
    assert read_captions(str(path)) == ["red"]
    made[1]["caption"] = "\ufeff \n"
    assert [getattr(record, "reason", "") for record in read_records(str(parquet(made)))] == ["", "caption is empty"]


def test_text_in_no_known_encoding_is_named_and_never_guessed(tmp_path, picture):
    for name, data, reason in (
        ("latin", "café".encode("latin-1"), "caption is not UTF-8"),
        ("cut", codecs.BOM_UTF16_LE + b"r\0e", "caption is not UTF-8"),
        ("bare", "red".encode("utf-16-le"), "caption holds NUL characters"),
    ):
        root = tmp_path / name
        for side in ("winner", "loser"):
            (root / side).mkdir(parents=True)
            (root / side / "n.png").write_bytes(picture(0))
        (root / "n.txt").write_bytes(data)
        assert _record_of(root).reason.startswith(reason)
        (root / "winner/n.txt").write_bytes(data)
        with pytest.raises(UserError, match=r"cannot read the caption|NUL"):
            read_folder(root / "winner")
    folder = tmp_path / "latin/winner"
    (folder / "metadata.jsonl").write_bytes('{"file_name": "n.png", "text": "café"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"cannot read the captions .*metadata.jsonl"):
        read_folder(folder)
    (tmp_path / "p.json").write_text('{"prompts": ["a"]}')
    with pytest.raises(UserError, match="not a list of prompts"):
        read_captions(str(tmp_path / "p.json"))


def test_other_line_separators_end_no_line(tmp_path, picture):
    caption = "a\u2028b\x85c\x0bd"
    (tmp_path / "n0.png").write_bytes(picture(0))
    (tmp_path / "metadata.jsonl").write_text(
        json.dumps({"file_name": "n0.png", "text": "a\u2028b\x85c"}, ensure_ascii=False), encoding="utf-8"
    )
    assert read_folder(tmp_path)[0].caption == "a\u2028b\x85c"
    (tmp_path / "p.txt").write_text(f"{caption}\nnext\rlast", encoding="utf-8", newline="")
    assert read_captions(str(tmp_path / "p.txt")) == [caption, "next", "last"]


def test_a_mark_does_not_reach_the_encoder(tmp_path, picture, recipe):
    """The store has one caption, not two whose embeddings differ."""
    from fastpref.data.prepare import prepare

    for side, number in (("winner", 0), ("loser", 2)):
        (tmp_path / "r" / side).mkdir(parents=True)
        for i in range(2):
            (tmp_path / "r" / side / f"{i}.png").write_bytes(picture(number + i))
    (tmp_path / "r/0.txt").write_bytes(codecs.BOM_UTF8 + b"a red cat\r\n")
    (tmp_path / "r/1.txt").write_bytes(b"a red cat")
    assert prepare(recipe(tmp_path / "r"), progress=False).captions == 1
    captions = pq.read_table(tmp_path / "store/captions.parquet").column("caption")
    assert captions.to_pylist() == ["", "a red cat"] and pa.types.is_string(captions.type)


def test_marks_are_taken_off_and_nothing_else():
    assert decode(codecs.BOM_UTF8 + b"x\r\n") == "x\r\n"
    assert caption_of("\ufeff\ufeff a\ufeffb \ufeff") == "a\ufeffb"
    assert caption_of(7) == 7
