"""Hostile data, models and run folders: nothing outside is read or written, no code is run, nothing is inflated."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastpref
import fastpref_kernels
from fastpref.config import Config, load_config
from fastpref.data.files import MAX_CAPTION_BYTES
from fastpref.data.images import ImageError, load_rgb, probe
from fastpref.data.manifest import read_manifest
from fastpref.data.prepare import prepare
from fastpref.data.records import Record, Unusable, open_records, read_records
from fastpref.errors import UserError
from fastpref.models.loading import load_unet, load_vae
from fastpref.models.pipeline import load_pipeline
from fastpref.models.state_dict import read_state_dict

Recipe = Callable[..., Config]
SECRET = b"the contents of a file that is nobody's business"


class Exploit:
    """A pickle of it creates a file where it is loaded."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self.proof),)


def png(width: int = 8, height: int = 8) -> bytes:
    """A grey PNG of any size: zeros compress a thousandfold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer, rows = zlib.compressobj(9), []
    for _ in range(height):
        rows.append(packer.compress(bytes(1 + width)))
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = b"".join(rows) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tree(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """``data/`` with two pictures, beside a secret one and a secret text."""
    (tmp_path / "data").mkdir()
    for name in ("data/a.png", "data/b.png", "secret.png"):
        (tmp_path / name).write_bytes(png())
    (tmp_path / "secret.txt").write_bytes(SECRET)
    return tmp_path / "data"


@pytest.mark.parametrize("kind", ["absolute", "parent", "detour", "symlink", "folder symlink", "device"])
def test_a_path_in_jsonl_never_leaves_the_folder_of_the_records(data: Path, kind: str) -> None:
    (data / "link.png").symlink_to(data.parent / "secret.png")
    (data / "up").symlink_to(data.parent)
    path = {
        "absolute": str(data.parent / "secret.png"),
        "parent": "../secret.png",
        "detour": "up/../../secret.png",
        "symlink": "link.png",
        "folder symlink": "up/secret.png",
        "device": "/dev/zero",
    }[kind]
    lines = [{"winner": path, "loser": "b.png", "caption": "x"}, {"winner": "a.png", "loser": "b.png", "caption": "y"}]
    (data / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    bad, good = read_records(str(data / "pairs.jsonl"))
    assert isinstance(bad, Unusable) and bad.reason == "image path leaves the directory of the records"
    assert isinstance(good, Record)


@pytest.mark.parametrize("kind", ["link", "too large"])
def test_a_caption_file_is_no_way_out_either(data: Path, kind: str) -> None:
    for side in ("winner", "loser"):
        (data / side).mkdir()
        (data / side / "a.png").write_bytes(png())
    caption = data / "a.txt"
    if kind == "link":
        caption.symlink_to(data.parent / "secret.txt")
    else:
        caption.write_bytes(b"x" * (MAX_CAPTION_BYTES + 1))
    (found,) = read_records(str(data))
    assert isinstance(found, Unusable)
    says = "caption path leaves the directory of the records" if kind == "link" else "caption file is too large"
    assert found.reason == says and SECRET.decode() not in str(found)
    caption.unlink()
    caption.write_text("a cat")
    (found,) = read_records(str(data))
    assert isinstance(found, Record) and found.caption == "a cat"


@pytest.mark.parametrize("name", ["../x", "/tmp/fastpref-escaped", "a/../../x"])
def test_names_in_a_tar_are_names_and_no_paths(
    tmp_path: Path, name: str, sdxl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "inner" / "data"
    inner.mkdir(parents=True)
    with tarfile.open(inner / "pairs.tar", "w") as tar:
        for key in (name, "ok"):
            members = [("jpg_0", png(32, 32)), ("jpg_1", png(33, 33)), ("json", b'{"caption": "c", "label_0": 1}')]
            for extension, content in members:
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        for kind, target in ((tarfile.SYMTYPE, "/etc/passwd"), (tarfile.LNKTYPE, "../../secret")):
            link = tarfile.TarInfo("link.jpg_0")
            link.type, link.linkname = kind, target
            tar.addfile(link)
    before = tree(tmp_path)
    records = list(read_records(str(inner / "pairs.tar")))
    assert tree(tmp_path) == before, "reading a tar extracts nothing"
    assert sum(isinstance(record, Record) for record in records) == len(records), "links are no samples"
    store = tmp_path / "inner" / "store"
    monkeypatch.chdir(inner)
    settings = [f"model={sdxl}", f"records={inner / 'pairs.tar'}", f"store={store}", "resolution=32"]
    prepare(load_config("", settings), progress=False)
    outside = {path for path in tree(tmp_path) - before if not path.startswith("inner/store")}
    assert not outside and not Path("/tmp/fastpref-escaped.jpg_0").exists()


def test_a_split_of_a_dataset_stays_in_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "secret.arrow"}]}')
    (folder / "dataset_dict.json").write_text('{"splits": [".."]}')
    with pytest.raises(UserError, match="leaves the dataset's folder"):
        open_records(str(folder))
    (folder / "dataset_dict.json").unlink()
    (folder / "state.json").write_text('{"_data_files": [{"filename": "../state.json"}]}')
    with pytest.raises(UserError, match="is missing"):
        open_records(str(folder))


def test_a_manifest_lists_no_file_outside_its_store(sdxl_store: Path, tmp_path: Path) -> None:
    manifest = json.loads((sdxl_store / "manifest.json").read_text())
    for name in ("../secret.txt", "/etc/passwd", "a/b"):
        wrong = {**manifest, "files": {name: {"bytes": 1, "sha256": ""}}}
        (tmp_path / "manifest.json").write_text(json.dumps(wrong))
        with pytest.raises(UserError, match="outside the store"):
            read_manifest(tmp_path)


def test_a_bomb_is_refused_by_its_header_before_it_is_inflated(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import ImageFile

    bomb = png(20_000, 4_000)
    assert len(bomb) < 200_000
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    for read in (probe, load_rgb):
        with pytest.raises(ImageError, match="too many pixels"):
            read(bomb, 64_000_000)


def test_a_bomb_in_the_text_of_a_png_is_refused() -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    plain, text = png(), b"Comment\0\0" + zlib.compress(bytes(80 << 20), 9)
    bomb = plain[:33] + chunk(b"zTXt", text) + plain[33:]
    with pytest.raises(ImageError):
        probe(bomb, 64_000_000)


def test_compressed_tars_are_not_inflated(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "pairs.tar", "w:gz") as tar:
        info = tarfile.TarInfo("a.jpg_0")
        info.size = 1 << 20
        tar.addfile(info, io.BytesIO(bytes(1 << 20)))
    with pytest.raises(UserError, match="compressed tars are not read"):
        open_records(str(tmp_path / "pairs.tar"))


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_pickle_in_the_place_of_weights_runs_no_code(sd15: Path, tmp_path: Path, part: str) -> None:
    model, proof = tmp_path / "model", tmp_path / "proof"
    shutil.copytree(sd15, model)
    for file in (model / part).glob("*.safetensors"):
        file.unlink()
    torch.save(Exploit(proof), model / part / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="cannot load the model"):
        if part == "unet":
            load_unet(model, torch.float32)
        else:
            load_vae(model, "fp32", torch.device("cpu"))
    assert not proof.exists()


@pytest.mark.parametrize("new_format", [True, False])
def test_a_pickle_in_a_published_checkpoint_runs_no_code(tmp_path: Path, new_format: bool) -> None:
    proof, file = tmp_path / "proof", tmp_path / "scorer.bin"
    torch.save({"w": torch.ones(1), "x": Exploit(proof)}, file, _use_new_zipfile_serialization=new_format)
    with pytest.raises(UserError, match="holds more than tensors"):
        read_state_dict(file)
    file.write_bytes(pickle.dumps(Exploit(proof)))
    with pytest.raises(UserError):
        read_state_dict(file)
    assert not proof.exists()


def test_a_model_folder_brings_no_code(sd15: Path, tmp_path: Path) -> None:
    model, proof = tmp_path / "model", tmp_path / "proof"
    shutil.copytree(sd15, model)
    (model / "unet" / "evil.py").write_text(f"import os\nos.mkdir({str(proof)!r})\nclass Evil: ...\n")
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "unet": ["evil", "Evil"]}))
    with pytest.raises(Exception, match=r"evil|Evil|trust_remote_code|load"):
        load_pipeline(model, torch.float32, torch.device("cpu"))
    assert not proof.exists()


def test_a_recipe_constructs_no_objects(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"name: !!python/object/apply:os.mkdir ['{proof}']\n")
    with pytest.raises(UserError, match="no YAML"):
        load_config(recipe)
    with pytest.raises(UserError, match="no YAML"):
        load_config("", [f"name=!!python/object/apply:os.mkdir ['{proof}']"])
    assert not proof.exists()


def test_aliases_in_a_recipe_are_not_written_out(tmp_path: Path) -> None:
    """Nine lines of YAML that stand for a thousand million words, as any setting."""
    lines = ["- &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"- &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    for key in ("method", "preset", "name", "beta", "lora_targets", "score_threshold"):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"{key}:\n" + "\n".join(f"  {line}" for line in lines) + "\n")
        with pytest.raises(UserError) as caught:
            load_config(recipe)
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", "a/b", "..", ".", ""])
def test_a_run_is_named_by_a_name(name: str) -> None:
    with pytest.raises(UserError, match="name is"):
        load_config("", [f"name={json.dumps(name)}"])


def test_no_secret_of_the_environment_reaches_a_run(
    sd15_config: Recipe, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from fastpref.runs import run_training

    secrets = {name: f"s3cr3t-{name}" for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY")}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    config = sd15_config("name=quiet", "method=dpo", "steps=1", "tracker=tensorboard")
    run_training(config)
    files = [p for p in config.run_dir.rglob("*") if p.is_file()]
    assert {"config.yaml", "metrics.jsonl", "summary.json"} <= {p.name for p in files}
    written = b"".join(p.read_bytes() for p in files) + "".join(capfd.readouterr()).encode()
    assert not [value for value in secrets.values() if value.encode() in written]


def test_the_source_uses_no_loader_that_runs_code() -> None:
    """Every call in the package is looked at: torch.load needs weights_only=True, YAML the safe loader."""
    forbidden = {
        "eval",
        "exec",
        "compile",
        "__import__",
        "yaml.load",
        "yaml.full_load",
        "yaml.unsafe_load",
        "os.system",
    }
    forbidden |= {
        f"{module}.{name}" for module in ("pickle", "marshal", "dill", "joblib") for name in ("load", "loads")
    }
    forbidden |= {"shelve.open", "pickle.Unpickler", "pd.read_pickle", "torch.jit.load", "torch.hub.load"}
    faults = []
    packages = (Path(fastpref.__file__).parent, Path(fastpref_kernels.__file__).parent)
    for file in sorted(path for package in packages for path in package.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            unsafe = name in forbidden or name.endswith((".extractall", ".extract"))
            unsafe |= name == "torch.load" and options.get("weights_only") != "True"
            unsafe |= options.get("shell") == "True" or options.get("allow_pickle") == "True"
            unsafe |= options.get("trust_remote_code", "False") != "False"
            if unsafe:
                faults.append(f"{file.name}:{node.lineno} {name}")
    assert not faults
