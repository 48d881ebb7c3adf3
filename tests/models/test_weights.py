"""Which files of a folder are its weights: everything that opens, copies or counts them means the same ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from fastpref.errors import UserError
from fastpref.models.export import export_pipeline
from fastpref.models.loading import load_unet, load_vae, model_fingerprint
from fastpref.models.pipeline import load_pipeline
from fastpref.models.text import load_text_stack
from fastpref.models.weights import find_weights, stored_dtype, stored_values, weights_of

CPU = torch.device("cpu")
PARTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
PARTS["text_encoder_2"] = PARTS["text_encoder"]


def rewrite(folder: Path, name: str, *, half: bool = False, shift: float = 0.0, keep: bool = False) -> None:
    """Write the folder's weights again under another name, in half precision or moved by ``shift``."""
    (old,) = folder.glob("*.safetensors")
    state = {key: value + shift for key, value in load_file(old).items()}
    state = {key: value.half() if half else value for key, value in state.items()}
    if not keep:
        old.unlink()
    if name.endswith(".bin"):
        torch.save(state, folder / name)
    else:
        save_file(state, folder / name, metadata={"format": "pt"})


def shard(folder: Path, stem: str, variant: str | None) -> None:
    """The folder's weights in two shards with an index, as the libraries write them."""
    (old,) = folder.glob("*.safetensors")
    state, middle = load_file(old), "" if variant is None else f".{variant}"
    old.unlink()
    names, where = sorted(state), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"{stem}{middle}-0000{number}-of-00002.safetensors"
        values = {name: state[name].half() if variant else state[name] for name in part}
        save_file(values, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / f"{stem}.safetensors.index{middle}.json").write_text(json.dumps(index))


@pytest.fixture
def model(sdxl: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sdxl, tmp_path / "model"))


def weights(folder: Path) -> list[dict[str, torch.Tensor]]:
    """Of every part, as each loader opens it."""
    text = load_text_stack(folder, torch.float32, CPU)
    parts = [load_unet(folder, torch.float32), load_vae(folder, "fp32", CPU), *text.encoders]
    return [part.state_dict() for part in parts]


def same(one: list[dict[str, torch.Tensor]], other: list[dict[str, torch.Tensor]]) -> bool:
    return all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("form", ["fp16", "sharded", "sharded fp16", "bin", "fp16 bin", "mixed"])
def test_every_form_opens_in_every_part_and_leaves_export_plain(model: Path, tmp_path: Path, form: str) -> None:
    variant = "fp16" if "fp16" in form else None
    for part, stem in PARTS.items():
        if form == "mixed" and part in ("vae", "text_encoder_2"):
            continue
        if "sharded" in form:
            shard(model / part, stem, variant)
        else:
            middle, half = ("", False) if form == "bin" else (".fp16", True)
            plain = "pytorch_model" if "bin" in form and stem == "model" else stem
            rewrite(model / part, f"{plain}{middle}.{'bin' if 'bin' in form else 'safetensors'}", half=half)
    opened = weights(model)
    assert stored_dtype(model / "unet") == (torch.float16 if variant or form == "mixed" else torch.float32)
    assert stored_values(model / "unet") == sum(value.numel() for value in opened[0].values())
    pipe = load_pipeline(model, torch.float32, CPU)
    drawn = [part.state_dict() for part in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)]
    assert same(drawn, opened)
    out = export_pipeline(model, tmp_path / "out")
    plain_pipe = DiffusionPipeline.from_pretrained(out)
    parts = (plain_pipe.unet, plain_pipe.vae, plain_pipe.text_encoder, plain_pipe.text_encoder_2)
    assert same([part.float().state_dict() for part in parts], opened)


def test_export_keeps_the_dtype_of_the_weights_that_are_loaded(model: Path, tmp_path: Path) -> None:
    """fp32 beside .fp16 of other values, in every part: fp32 is what is loaded, and what is written."""
    for part, stem in PARTS.items():
        rewrite(model / part, f"{stem}.fp16.safetensors", half=True, shift=1.0, keep=True)
        (model / part / "model.onnx").write_bytes(b"")
    (model / "sd_xl_base_1.0.safetensors").write_bytes(b"the base, untrained")
    opened = weights(model)
    out = export_pipeline(model, tmp_path / "out")
    assert stored_dtype(out / "unet") == torch.float32
    assert same(weights(out), opened)
    written = sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.suffix in (".safetensors", ".onnx"))
    assert written == sorted(f"{part}/{stem}.safetensors" for part, stem in PARTS.items())
    export_pipeline(model, tmp_path / "half", dtype="fp16")
    assert stored_dtype(tmp_path / "half" / "unet") == torch.float16


def test_ordinary_fingerprints_stay(sdxl: Path, tmp_path: Path) -> None:
    """Every file counts, so that stores made before variants were told apart are still the model's."""
    copy = Path(shutil.copytree(sdxl, tmp_path / "model"))
    assert model_fingerprint(copy) == model_fingerprint(sdxl)
    rewrite(copy / "vae", "diffusion_pytorch_model.fp16.safetensors", half=True, keep=True)
    assert model_fingerprint(copy) != model_fingerprint(sdxl)


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin"], "diffusion_pytorch_model.bin"),
        (["model.fp16.safetensors", "model.bf16.safetensors"], "model.fp16.safetensors"),
        (["model.non_ema.safetensors", "model.fp16.safetensors"], "model.fp16.safetensors"),
        (["pytorch_model.fp16.bin", "model.bf16.safetensors"], "model.bf16.safetensors"),
        (["diffusion_pytorch_model.non_ema.safetensors", "openvino_model.bin", "flax_model.msgpack"], None),
    ],
)
def test_the_choice_among_several(tmp_path: Path, files: list[str], chosen: str | None) -> None:
    for file in files:
        (tmp_path / file).touch()
    found = find_weights(tmp_path)
    assert (None if found is None else [file.name for file in found.files]) == (chosen and [chosen])


def _no_weights(unet: Path) -> None:
    rewrite(unet, "diffusion_pytorch_model.non_ema.safetensors")


def _lost_shard(unet: Path) -> None:
    shard(unet, "diffusion_pytorch_model", None)
    next(unet.glob("*-00002-of-*")).unlink()


def _damaged_index(unet: Path) -> None:
    shard(unet, "diffusion_pytorch_model", None)
    next(unet.glob("*.index.json")).write_text("[]")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_weights, "only diffusion_pytorch_model.non_ema.safetensors"),
        (_lost_shard, "00002-of-00002.safetensors is not there"),
        (_damaged_index, "cannot read the index"),
    ],
)
def test_nothing_that_can_be_loaded_is_one_line(model: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(model / "unet")
    for call in (lambda: load_unet(model, torch.float32), lambda: weights_of(model / "unet")):
        with pytest.raises(UserError, match=message):
            call()
