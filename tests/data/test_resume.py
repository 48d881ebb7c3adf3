"""Killed at any time and run again, or run on two ranks: the same bytes. Real processes, real SIGKILL."""

from __future__ import annotations

import os
from pathlib import Path

import forked
import pytest

from fastpref.data import workspace
from fastpref.data.prepare import prepare
from fastpref.data.store import Store
from fastpref.data.workspace import Ranks, Workspace
from fastpref.errors import UserError

# Forks a child for every rank of every run, which prepares; with a death "function:call" it gets SIGKILL in that call.
DRIVER = """
import os, signal, sys
from fastpref.config import load_config
from fastpref.data import encode, prepare, scan, workspace

scan.SCAN_ROWS = 8
config_file, *runs = sys.argv[1:]

def child(store, rank, size, death):
    os.environ |= {"RANK": rank, "WORLD_SIZE": size}
    if death:
        name, call = death.split(":")
        owner, attribute = {
            "scan": (prepare, "scan_segment"), "text": (encode.Encoders, "text"), "images": (encode.Encoders, "images"),
            "shard": (prepare, "write_bytes"), "journal": (workspace.Workspace, "write_journal"),
            "index": (prepare, "finish"),
        }[name]
        original, calls = getattr(owner, attribute), [0]
        def dying(*arguments, **keywords):
            calls[0] += 1
            if calls[0] == int(call):
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **keywords)
        setattr(owner, attribute, dying)
    prepare.prepare(load_config(config_file, ["store=" + store]), progress=False)

for run in runs:
    store, group = run.split("=")
    pids = []
    for spec in group.split("+"):
        rank, size, death = spec.split("/")
        pid = os.fork()
        if not pid:
            child(store, rank, size, death)
            os._exit(0)
        pids.append((pid, death))
    for pid, death in pids:
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status) != bool(death) or (not death and status):
            sys.exit(f"child {pid} of {run}: status {status}")
"""
DEATHS = ["scan:3", "text:2", "shard:1", "journal:2", "images:3", "images:2", "shard:4", "index:1"]


def drive(config, tmp_path: Path, runs: list[str]) -> None:
    from fastpref.config import save_config

    save_config(config, tmp_path / "prepare.yaml")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = forked.run(["-c", DRIVER, str(tmp_path / "prepare.yaml"), *runs], environment)
    assert done.returncode == 0, done.stderr[-2000:]


def contents(path: Path) -> dict[str, bytes]:
    assert all(file.is_file() for file in path.iterdir())
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_killed_again_and_again_and_on_two_ranks_the_bytes_are_the_same(recipe, rows, parquet, tmp_path):
    made = rows(20)
    made[7]["jpg_0"], made[11]["jpg_1"] = made[1]["jpg_0"], made[12]["jpg_0"]  # shared over shards
    made[5]["label_0"], made[9]["caption"] = 0.5, ""
    runs = {
        "whole": ["0/1/"],
        "killed": [*(f"0/1/{death}" for death in DEATHS), "0/1/"],
        "ranks": ["0/2/+1/2/"],
        "both": ["0/2/text:2+1/2/images:2", "0/1/images:2", "0/3/+1/3/+2/3/"],
    }
    config = recipe(parquet(made), max_reject_share=0.1, posterior=True)
    drive(config, tmp_path, [f"{tmp_path / name}={run}" for name, group in runs.items() for run in group])
    stores = {name: contents(tmp_path / name) for name in runs}
    assert all(store == stores["whole"] for store in stores.values())
    assert len(Store.open(tmp_path / "both", verify=True)) == 18


def test_finished_shards_are_not_made_again(recipe, rows, parquet, monkeypatch):
    from fastpref.data import encode

    config, calls = recipe(parquet(rows(9))), []
    original = encode.Encoders.images

    def stopping(self, images):
        calls.append(len(images))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, images)

    monkeypatch.setattr(encode.Encoders, "images", stopping)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, progress=False)
    with pytest.raises(UserError, match=r"unfinished.*resumes"):
        Store.open(config.store)
    assert calls == [4, 2, 4, 2]  # shards of 6: the first is finished, the second is cut
    prepare(config, progress=False)
    assert calls[4:] == [4, 2, 4, 2]  # the second and the third


def test_an_unfinished_store_of_other_settings_needs_overwrite_once_it_holds_work(recipe, rows, parquet, monkeypatch):
    from fastpref.data import encode

    path = parquet(rows(4))

    def broken(self, images):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(encode.Encoders, "images", broken)
        with pytest.raises(KeyboardInterrupt):
            prepare(recipe(path), progress=False)
    with pytest.raises(UserError, match="unfinished store of other"):
        prepare(recipe(path, ties="half"), progress=False)
    assert prepare(recipe(path, ties="half"), progress=False, overwrite=True).pairs == 4


def test_a_rank_alone_gives_up_waiting(tmp_path, monkeypatch):
    monkeypatch.setattr(workspace, "STALL_SECONDS", 0.3)
    place = Workspace(tmp_path / "store", "abc", Ranks(0, 2))
    assert place.claim(False)
    with pytest.raises(UserError, match=r"1 parts of other ranks are missing, e\.g\. scan-00001"):
        place.wait_for([place.scan_file(1)])
    with pytest.raises(UserError, match="rank 0 did not start"):
        Workspace(tmp_path / "store", "other", Ranks(1, 2)).claim(False)


def test_ranks_come_from_the_launchers_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Ranks.from_env() == Ranks(0, 1, 0)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Ranks.from_env() == Ranks(3, 4, 1)
    assert Ranks(1, 3).share(list("abcdefg")) == [(1, "b"), (4, "e")]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="RANK is 3 of WORLD_SIZE 2"):
        Ranks.from_env()


@pytest.mark.parametrize(
    "name", ["work/scan-00000", "work/text-00000", "work/image-00001", "latents-00000.safetensors"]
)
def test_what_was_damaged_meanwhile_is_made_again(recipe, rows, parquet, monkeypatch, tmp_path, name):
    path = parquet(rows(9))
    prepare(recipe(path, store=str(tmp_path / "whole")), progress=False)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("fastpref.data.prepare.finish", killed)
        prepare(recipe(path), progress=False)
    file = tmp_path / "store" / name
    data = bytearray(file.read_bytes())
    data[-9] ^= 2
    file.write_bytes(data)
    prepare(recipe(path), progress=False)
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_a_damaged_store_is_not_up_to_date(recipe, rows, parquet, tmp_path):
    config = recipe(parquet(rows(4)))
    prepare(config, progress=False)
    assert prepare(config, progress=False).up_to_date
    file = tmp_path / "store" / "latents-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="is damaged"):
        prepare(config, progress=False)
    prepare(config, progress=False, overwrite=True)
    Store.open(tmp_path / "store", verify=True)
