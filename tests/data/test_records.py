"""Every kind of source gives the same records; every defect gives its reason."""

from __future__ import annotations

import csv
import io
import json
import math
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastpref.config import Config
from fastpref.data.prepare import prepare
from fastpref.data.records import Record, Unusable, check_row, open_records, read_captions, read_records
from fastpref.data.sources import Row
from fastpref.errors import UserError


def _tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def _as_kind(kind: str, rows, folder: Path) -> Path:
    """The same records as another kind of source; returns what to pass as ``records``."""
    table = pa.Table.from_pylist(rows)
    if kind == "parquet folder":
        pq.write_table(table.slice(0, 3), folder / "train-0.parquet")
        pq.write_table(table.slice(3), folder / "train-1.parquet", row_group_size=2)
    elif kind == "saved dataset":
        image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        for name in ("jpg_0", "jpg_1"):
            values = [{"bytes": value, "path": None} for value in table.column(name).to_pylist()]
            table = table.set_column(table.schema.get_field_index(name), name, pa.array(values, image))
        for number, part in enumerate((table.slice(0, 4), table.slice(4))):
            with pa.ipc.new_stream(folder / f"data-{number}.arrow", table.schema) as stream:
                stream.write_table(part, max_chunksize=3)
        files = [{"filename": f"data-{number}.arrow"} for number in range(2)]
        (folder / "state.json").write_text(json.dumps({"_data_files": files}))
    elif kind == "tars":
        for number, part in enumerate((rows[:4], rows[4:])):
            members = []
            for i, row in enumerate(part):
                about = json.dumps({"caption": row["caption"], "label_0": row["label_0"]}).encode()
                pictures = [("jpg_0", "jpg_1"), ("0.png", "1.png")][number]
                members += [
                    (f"{i:03d}.{name}", row[column]) for name, column in zip(pictures, ("jpg_0", "jpg_1"), strict=True)
                ]
                members.append((f"{i:03d}.json", about))
            _tar(folder / f"shard-{number}.tar", members)
    elif kind in ("jsonl", "csv"):
        named = []
        for i, row in enumerate(rows):
            for side in (0, 1):
                (folder / f"{i}-{side}.png").write_bytes(row[f"jpg_{side}"])
            rest = {"label_0": row["label_0"], "caption": row["caption"]}
            named.append({"image_0": f"{i}-0.png", "image_1": f"{i}-1.png", **rest})
        path = folder / f"pairs.{kind}"
        if kind == "jsonl":
            path.write_text("\n\n".join(json.dumps(value) for value in named))
        else:
            with path.open("w", newline="") as stream:
                writer = csv.DictWriter(stream, list(named[0]))
                writer.writeheader()
                writer.writerows(named)
        return path
    else:
        for name in ("winner", "loser"):
            (folder / name).mkdir()
        for i, row in enumerate(rows):
            first = row["label_0"] == 1.0
            (folder / f"winner/{i}.png").write_bytes(row["jpg_0" if first else "jpg_1"])
            (folder / f"loser/{i}.png").write_bytes(row["jpg_1" if first else "jpg_0"])
            (folder / f"{i}.txt").write_text(row["caption"] + "\n")
    return folder


KINDS = ["parquet folder", "saved dataset", "tars", "jsonl", "csv", "folder"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_gives_the_records_of_the_parquet_file(kind, rows, parquet, tmp_path):
    made = rows(7)
    made[2]["caption"] = 'said "a, b"\nand c' if kind in ("csv", "jsonl") else "plain"
    wanted = list(read_records(str(parquet(made))))
    folder = tmp_path / "other"
    folder.mkdir()
    found = list(read_records(str(_as_kind(kind, made, folder))))
    assert [(r.winner, r.loser, r.caption, r.label) for r in found] == [
        (r.winner, r.loser, r.caption, r.label) for r in wanted
    ]
    assert [r.index for r in found] == list(range(7))
    assert found[1].winner == made[1]["jpg_1"]


@pytest.mark.parametrize("kind", KINDS)
def test_any_rows_can_be_read_again(kind, rows, tmp_path):
    source = open_records(str(_as_kind(kind, rows(7), tmp_path)))
    everything = list(source.rows(range(7)))
    for chosen in ([0, 3, 6], [2], [3, 4, 5], []):
        assert list(source.rows(np.asarray(chosen, dtype=np.int64))) == [everything[i] for i in chosen]


def test_a_glob_chooses_files_and_mixed_splits_are_refused(rows, tmp_path):
    made = rows(4)
    pq.write_table(pa.Table.from_pylist(made[:3]), tmp_path / "train-0.parquet")
    pq.write_table(pa.Table.from_pylist(made[3:]), tmp_path / "validation-0.parquet")
    with pytest.raises(UserError, match="several splits"):
        open_records(str(tmp_path))
    assert len(open_records(str(tmp_path / "train-*.parquet"))) == 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"label_0": None}, "label is missing"),
        ({"label_0": math.nan}, "label is NaN"),
        ({"label_0": "best"}, "label is NaN"),
        ({"label_0": 0.7}, "label is not 0, 0.5 or 1"),
        ({"label_0": 1.0, "label_1": 1.0}, "label_0 and label_1 do not add up to 1"),
        ({"caption": None}, "caption is missing"),
        ({"caption": 7}, "caption is missing"),
        ({"caption": " \n"}, "caption is empty"),
        ({"caption": "\udcff"}, "caption is not UTF-8"),
        ({"image_1": None}, "image is missing"),
        ({"image_0": b""}, "image is missing"),
        ({"error": "image file is missing"}, "image file is missing"),
    ],
)
def test_a_broken_row_is_rejected_with_its_reason(change, reason):
    row = {"image_0": b"0", "image_1": b"1", "caption": "a cat", "label_0": 1.0} | change
    assert check_row(Row(3, "here", **row)) == Unusable(
        3, "here", "rejected", reason, "label_0 = 0.7" if "0.5" in reason else "1.0 + 1.0" if "add up" in reason else ""
    )


def test_labels_order_the_pair_and_ties_are_marked():
    def check(label, **rest):
        return check_row(Row(0, "", b"0", b"1", "a cat", label, **rest))

    assert check(1) == Record(0, "", b"0", b"1", "a cat", 1.0)
    assert check("0.0", label_1=1) == Record(0, "", b"1", b"0", "a cat", 1.0)
    assert check(0.5) == Record(0, "", b"0", b"1", "a cat", 0.5)
    assert check(math.nan, has_label=False).kind == "unlabelled"


def test_paths_never_leave_the_directory(tmp_path, picture):
    folder = tmp_path / "inside"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(picture(0))
    (folder / "a.png").write_bytes(picture(1))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    bad = ["../secret.png", str(tmp_path / "secret.png"), "link.png", "none.png", "nul\0.png", "", "."]
    lines = [{"winner": name, "loser": "a.png", "caption": "c"} for name in [*bad, "./a.png"]]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\nnot json\n[1]\n")
    found = list(read_records(str(folder / "pairs.jsonl")))
    outside = "image path leaves the directory of the records"
    assert [r.reason if isinstance(r, Unusable) else r.winner for r in found] == [
        outside,
        outside,
        outside,
        "image file is missing",
        "image file cannot be read",
        "no image path",
        outside,
        picture(1),
        "line is not JSON",
        "line is not a JSON object",
    ]
    assert found[0].where == "pairs.jsonl record 0"
    assert found[0].detail == "winner: ../secret.png"


def test_tars_named_winner_and_loser_need_no_label_and_others_do(tmp_path):
    members = [("a/1.winner.jpg", b"w"), ("a/1.loser.png", b"l"), ("a/1.txt", b" red cat\n")]
    members += [("b/1.jpg_0", b"0"), ("b/1.jpg_1", b"1"), ("b/1.caption", b"blue"), ("b/1.label_0", b"0")]
    members += [("c/1.0.jpg", b"0"), ("c/1.1.jpg", b"1"), ("c/1.txt", b"no label")]
    first, second, third = read_records(str(_tar(tmp_path / "x.tar", members)))
    assert (first.winner, first.loser, first.caption) == (b"w", b"l", "red cat")
    assert (second.winner, second.loser, second.caption) == (b"1", b"0", "blue")
    assert third.reason == "label is missing"
    assert third.where == "x.tar sample c/1"


def test_a_csv_record_of_another_length_is_rejected(tmp_path):
    (tmp_path / "p.csv").write_text("winner,loser,caption\n\na.png,b.png\n\n")
    (found,) = read_records(str(tmp_path / "p.csv"))
    assert found.reason == "record and header differ in length"


def _fail_cases(tmp_path: Path) -> dict[str, str]:
    pq.write_table(pa.table({"jpg_0": [b""], "jpg_1": [b""], "caption": ["a"]}), tmp_path / "no_label.parquet")
    pq.write_table(
        pa.table({"jpg_0": ["x"], "jpg_1": ["y"], "caption": ["a"], "label_0": [1.0]}), tmp_path / "text.parquet"
    )
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "text.parquet").read_bytes()[:100])
    (tmp_path / "cut.tar").write_bytes(b"x" * 700)
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "empty").mkdir()
    indexed = {"_data_files": [], "_indices_data_files": [{"filename": "i.arrow"}]}
    for name, state in (("mapped", indexed), ("gone", {"_data_files": [{"filename": "data.arrow"}]})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text(json.dumps(state))
    return {
        "none.parquet": "no such preference records",
        "no_label.parquet": "no column label_0",
        "text.parquet": "column jpg_0 is string",
        "cut.parquet": "cannot read the parquet file",
        "cut.tar": "cannot read the tar file",
        "bad.csv": "CSV header is a, b",
        "empty.jsonl": "no records",
        "empty": "no preference records in the folder",
        "mapped": "indices mapping",
        "gone": "data file of the dataset is missing",
    }


def test_sources_that_cannot_be_read_say_why_in_one_line(tmp_path):
    for name, message in _fail_cases(tmp_path).items():
        with pytest.raises(UserError, match=message) as caught:
            open_records(str(tmp_path / name))
        assert "\n" not in str(caught.value)
        assert name in str(caught.value)


def test_captions_are_distinct_ordered_and_limited(tmp_path, rows, parquet):
    made = rows(3)
    made[2]["caption"] = made[0]["caption"]
    assert read_captions(str(parquet(made))) == [made[0]["caption"], made[1]["caption"]]
    (tmp_path / "p.txt").write_text("b\n\na\nb\n")
    (tmp_path / "p.json").write_text(json.dumps([{"caption": "b"}, "a", {"other": 1}]))
    (tmp_path / "p.jsonl").write_text('"b"\n{"prompt": "a"}\n')
    for name in ("p.txt", "p.json", "p.jsonl"):
        assert read_captions(str(tmp_path / name)) == ["b", "a"]
        assert read_captions(str(tmp_path / name), 1) == ["b"]
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "q.parquet")
    for name in ("q.parquet", "none.txt"):
        with pytest.raises(UserError):
            read_captions(str(tmp_path / name))


def test_offsets_of_a_damaged_arrow_file_are_not_followed(rows, tmp_path):
    table = pa.Table.from_pylist(rows(3))
    with pa.OSFile(str(tmp_path / "r.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    data, images = bytearray((tmp_path / "r.arrow").read_bytes()), [len(row["jpg_0"]) for row in rows(3)]
    ends = np.cumsum(images).astype("<i4").tobytes()
    at = data.index(ends)
    data[at : at + 4] = np.int32(1 << 30).tobytes()
    (tmp_path / "r.arrow").write_bytes(data)
    with pytest.raises(UserError, match="arrow file is damaged"):
        list(read_records(str(tmp_path / "r.arrow")))


def test_a_column_that_is_there_twice_is_named(rows, tmp_path):
    table = pa.Table.from_pylist(rows(2))
    pq.write_table(table.append_column("jpg_1", table.column("jpg_1")), tmp_path / "twice.parquet")
    with pytest.raises(UserError, match="column jpg_1 is there twice"):
        open_records(str(tmp_path / "twice.parquet"))


def test_a_flipped_bit_of_a_parquet_file_with_checksums_is_found(rows, tmp_path):
    pq.write_table(pa.Table.from_pylist(rows(3)), tmp_path / "r.parquet", compression="none", write_page_checksum=True)
    data = (tmp_path / "r.parquet").read_bytes()
    (tmp_path / "r.parquet").write_bytes(data.replace(b"a picture of number 1", b"a picture of number 9"))
    with pytest.raises(UserError, match="damaged"):
        list(read_records(str(tmp_path / "r.parquet")))


def test_a_name_that_is_no_text_is_listed_all_the_same(rows, tmp_path):
    (tmp_path / "r.csv").write_bytes(b"winner,loser,caption\na\xc0.png,b.png,x\n")
    with pytest.raises(UserError, match="cannot be used, most often 'image file is missing'"):
        prepare(Config(records=str(tmp_path / "r.csv"), store=str(tmp_path / "s")), progress=False)
    assert "a?.png" in (tmp_path / "s" / "rejected.jsonl").read_text()
