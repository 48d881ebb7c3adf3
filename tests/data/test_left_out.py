"""What is left out before anything is encoded: identical pairs, pictures far too small, what file managers leave."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from fastpref.data.manifest import read_manifest
from fastpref.data.prepare import prepare
from fastpref.data.records import open_records, read_records
from fastpref.errors import UserError
from fastpref.evaluate.folders import match_folders, read_folder


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def turned(data: bytes) -> bytes:
    """The same picture, stored on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(opened(data).transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)


def test_pairs_of_one_picture_are_counted_and_dropped(rows, parquet, recipe, picture):
    made = rows(6)
    first = made[0]["jpg_0"]
    made[1]["jpg_1"] = made[1]["jpg_0"]  # equal bytes
    made[2] |= {"jpg_0": first, "jpg_1": encoded(opened(first), "WEBP", lossless=True)}  # another format
    made[3] |= {"jpg_0": first, "jpg_1": turned(first)}
    photo = picture(40, (301, 277), "JPEG")  # a JPEG is tried at an eighth, its decoded twin as a whole
    made[4] |= {"jpg_0": photo, "jpg_1": encoded(opened(photo), "PNG")}
    nearly = opened(photo)
    nearly.putpixel((5, 5), (0, 0, 0))
    made[5] |= {"jpg_0": photo, "jpg_1": encoded(nearly, "PNG")}  # one pixel differs: a pair
    config = recipe(parquet(made))
    dry = prepare(config, dry_run=True, progress=False)
    summary = prepare(config, progress=False)
    for found in (dry, summary, prepare(config, progress=False)):
        assert (found.pairs, found.identical_dropped, found.rejected) == (2, 4, 0)
        assert "4 with identical pictures dropped" in str(found)
    kept = prepare(recipe(parquet(made), identical="keep", store=config.store + "-kept"), progress=False)
    assert (kept.pairs, kept.identical_dropped) == (6, 0)
    with pytest.raises(UserError, match="two identical pictures"):
        prepare(recipe(parquet(made[1:2]), store=config.store + "-none"), progress=False)


def test_a_manifest_from_before_a_field_was_added_is_read(rows, parquet, recipe):
    from fastpref.data.manifest import _digest

    config = recipe(parquet(rows(2)))
    prepare(config, progress=False)
    file = Path(config.store) / "manifest.json"
    content = json.loads(file.read_text())
    del content["identical_dropped"], content["sha256"]
    file.write_text(json.dumps(content | {"sha256": _digest(content)}))
    assert read_manifest(file.parent).identical_dropped == 0
    file.write_text(json.dumps(content | {"pairs": 9, "sha256": _digest(content)}))
    with pytest.raises(UserError, match="damaged"):
        read_manifest(file.parent)


@pytest.mark.parametrize(
    ("buckets", "size", "refused"),
    [
        (False, (8, 8), False),  # 4 times: the limit itself
        (False, (7, 64), True),  # the shorter side decides
        (False, (1, 1), True),
        (True, (16, 4), False),  # its bucket is 64x16
        (True, (15, 4), True),
    ],
)
def test_a_picture_far_below_the_resolution_is_refused(buckets, size, refused, rows, parquet, recipe, picture):
    made = rows(3)
    made[1] |= {"jpg_0": picture(9, size), "jpg_1": picture(10, size)}
    settings = {"resolution": 32, "max_reject_share": 0.5, "buckets": buckets}
    summary = prepare(recipe(parquet(made), **settings), progress=False)
    assert (summary.pairs, summary.reasons) == ((2, {"image is too small": 1}) if refused else (3, {}))
    if refused:
        (entry,) = map(json.loads, (Path(summary.store) / "rejected.jsonl").read_text().splitlines())
        assert (
            entry["record"] == 1
            and entry["where"] == "records.parquet row 1"
            and f"winner: {size[0]}x{size[1]} to be enlarged" in entry["detail"]
        )
        other = recipe(parquet(made), **settings, max_enlargement=None, store=f"{summary.store}-all")
        assert prepare(other, progress=False).pairs == 3


def test_a_store_of_another_decoder_is_not_taken_for_finished(rows, parquet, recipe, monkeypatch):
    config = recipe(parquet(rows(2)))
    prepare(config, progress=False)
    assert prepare(config, progress=False).up_to_date
    monkeypatch.setattr("fastpref.data.job.DECODING", 1)
    with pytest.raises(UserError, match=r"another fastpref.*overwrite"):
        prepare(config, progress=False)


def _tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


JUNK = ["._k", "__MACOSX/._k", "__MACOSX/k", ".DS_Store", "Thumbs.db", "desktop.ini", "./a/._k", ".cache/k"]


def test_what_file_managers_leave_is_no_record(tmp_path, picture, rows):
    own = [(f"./a/k.{name}", b"1") for name in ("winner.jpg", "loser.jpg", "txt")]
    junk = [
        (f"{name}.{ending}", b"\0\5\x16\7")
        for name in JUNK
        if name.endswith("k")
        for ending in ("winner.jpg", "loser.jpg", "txt")
    ]
    junk += [(name, b"x") for name in JUNK]
    (record,) = read_records(str(_tar(tmp_path / "a.tar", [*junk[:9], *own, *junk[9:]])))
    assert record.caption == "1" and record.where == "a.tar sample ./a/k"
    folder = tmp_path / "folder"
    for side in ("winner", "loser"):
        (folder / side).mkdir(parents=True)
        (folder / side / "k.png").write_bytes(picture(0))
        for name in ("._k.png", ".k.jpg", "Thumbs.db", "._k.txt"):
            (folder / side / name).write_bytes(b"\0\5\x16\7")
        (folder / side / "dir.png").mkdir()
    (folder / "k.txt").write_text("one")
    before = open_records(str(folder)).fingerprint()
    assert [record.caption for record in read_records(str(folder))] == ["one"]
    (folder / "._k.txt").write_bytes(b"\0")
    assert open_records(str(folder)).fingerprint() == before
    (folder / "winner/k.txt").write_text("one")
    assert [file.name for file in read_folder(folder / "winner")] == ["k.png"]
    import pyarrow as pa

    pq.write_table(pa.Table.from_pylist(rows(2)), tmp_path / "train-0.parquet")
    (tmp_path / "._train-0.parquet").write_bytes(b"\0\5\x16\7")
    (tmp_path / "a.tar").unlink()
    assert len(open_records(str(tmp_path))) == len(open_records(str(tmp_path / "*.parquet"))) == 2


@pytest.mark.parametrize("side", ["winner", "loser"])
def test_two_files_of_one_name_are_an_error(side, tmp_path, picture):
    for name in ("winner", "loser"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "n0.png").write_bytes(picture(0))
    (tmp_path / side / "n0.jpg").write_bytes(picture(1))
    (tmp_path / side / "n0.txt").write_text("one")
    with pytest.raises(UserError, match=r"two pictures are called n0 .*n0.jpg, n0.png: keep one") as caught:
        open_records(str(tmp_path))
    assert "\n" not in str(caught.value)
    for read in (lambda: read_folder(tmp_path / side), lambda: match_folders(tmp_path / "winner", tmp_path / "loser")):
        with pytest.raises(UserError, match="two pictures are called n0"):
            read()
    entries = [{"file_name": name, "text": name} for name in ("n0.png", "n0.jpg")]
    (tmp_path / side / "metadata.jsonl").write_text("\n".join(map(json.dumps, entries)))
    assert [file.caption for file in read_folder(tmp_path / side)] == ["n0.png", "n0.jpg"]  # named, so not ambiguous


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (
            ("winner.jpg", "winner.png", "loser.jpg"),
            "sample k has two pictures in one place: winner.jpg and winner.png",
        ),
        (("winner.jpg", "loser.avif", "loser.jpg"), "sample k has two pictures in one place: loser.avif and loser.jpg"),
        (("jpg_0", "0.jpg", "1.jpg"), "sample k has two pictures in one place: jpg_0 and 0.jpg"),
        (("winner.jpg", "winner.jpg"), "sample k has winner.jpg twice"),
        (("txt", "TXT"), "sample k has txt twice"),
    ],
)
def test_a_tar_sample_with_two_pictures_for_one_place_is_an_error(names, says, tmp_path):
    with pytest.raises(UserError, match=says):
        open_records(str(_tar(tmp_path / "a.tar", [(f"k.{name}", b"1") for name in names])))
