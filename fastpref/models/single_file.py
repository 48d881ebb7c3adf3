"""A checkpoint in one file becomes a pipeline folder, once, in a cache; everything else opens that folder.

The cache is ``$FASTPREF_CACHE``, else ``$XDG_CACHE_HOME/fastpref``, else ``~/.cache/fastpref``. A folder's name is the
sha256 of the file's content, so that a moved file is known again and a replaced one is not mistaken. Its files are the
same bytes on every machine, so stores and ledgers that were made from it stay valid.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from fastpref.atomic import make_directory, write_bytes, write_json, write_tensors
from fastpref.errors import UserError
from fastpref.models import public
from fastpref.models.checkpoint import NAMES, Checkpoint, convert, expected_shapes, read_facts
from fastpref.models.clip_tokenizer import write_tokenizer
from fastpref.models.state_dict import read_state_dict

_LAYOUT = "v1"  # of what is written; another number makes the folders anew
_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_PIPELINES = {"sdxl": "StableDiffusionXLPipeline", "sd15": "StableDiffusionPipeline"}


def cache_folder() -> Path:
    """Where converted checkpoints are kept; any folder in it may be deleted when nothing runs."""
    given = os.environ.get("FASTPREF_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastpref"


def resolve_single_file(file: Path, prediction_type: str = "auto") -> Path:
    """The pipeline folder of a checkpoint file; made if it is not there.

    Of several processes that ask at once the first makes it and the others wait.

    Args:
        prediction_type: auto (what the file says, else epsilon), epsilon, v_prediction or v_prediction_zero_snr.

    Raises:
        UserError: the file is not an SDXL or SD1.5 checkpoint, a part or a tensor is missing, or the disk is full.
    """
    if file.suffix not in _SUFFIXES:
        raise UserError(f"a {file.suffix} file is not a model", str(file), "give a folder or a .safetensors file")
    models = cache_folder() / "models"
    make_directory(models)
    with _progress() as progress:
        folder = models / f"{_LAYOUT}-{prediction_type}-{_content_hash(file, progress)}"
        if folder.is_dir():
            return folder
        with _locked(folder.with_suffix(".lock")):
            if not folder.is_dir():
                for draft in models.glob(f".{folder.name}.*"):  # of a process that was killed
                    shutil.rmtree(draft, ignore_errors=True)
                _make(file, prediction_type, folder, progress)
    return folder


def _make(file: Path, prediction_type: str, folder: Path, progress: Progress) -> None:
    checkpoint = read_facts(file)
    scheduler, why = _scheduler(checkpoint, prediction_type)
    size, free = file.stat().st_size, shutil.disk_usage(folder.parent).free
    if size > free:
        what = f"{file.name} needs {size / 1e9:.1f} GB as a folder, {free / 1e9:.1f} GB are free"
        raise UserError(what, str(folder.parent), "make room, or set FASTPREF_CACHE to another disk")
    line = f"{file}: {NAMES[checkpoint.family]}, {why}; writing {size / 1e9:.2f} GB to {folder}, once"
    progress.console.print(line, soft_wrap=True, markup=False, highlight=False)
    draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        _write(checkpoint, scheduler, draft, progress)
        if not folder.is_dir():
            os.replace(draft, folder)
    except OSError as error:
        raise UserError("cannot write the converted checkpoint", str(folder), error.strerror or str(error)) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write(checkpoint: Checkpoint, scheduler: dict[str, Any], draft: Path, progress: Progress) -> None:
    family = checkpoint.family
    state = read_state_dict(checkpoint.file, "state_dict")
    parts = convert(state, checkpoint, expected_shapes(family))
    del state
    task = progress.add_task("writing", total=sum(t.nbytes for part in parts.values() for t in part.values()))
    draft.mkdir()
    for name, part in parts.items():
        text = name.startswith("text_encoder")
        weights = draft / name / ("model.safetensors" if text else "diffusion_pytorch_model.safetensors")
        write_tensors(weights, part, {"format": "pt"})
        write_json(draft / name / "config.json", _config(checkpoint, name))
        progress.advance(task, sum(tensor.nbytes for tensor in part.values()))
        part.clear()
        if text:
            tokenizer = name.replace("text_encoder", "tokenizer")
            write_tokenizer(draft / tokenizer, public.PAD_TOKENS[tokenizer])
    (draft / "scheduler").mkdir()
    write_json(draft / "scheduler" / "scheduler_config.json", scheduler)
    write_json(draft / "model_index.json", _index(family, scheduler["_class_name"]))


def _config(checkpoint: Checkpoint, part: str) -> dict[str, Any]:
    family = checkpoint.family
    if part.startswith("text_encoder"):
        kind = "CLIPTextModelWithProjection" if part == "text_encoder_2" else "CLIPTextModel"
        return {"architectures": [kind], "model_type": "clip_text_model", **public.TEXT_ENCODERS[family][part]}
    if part == "vae":
        return {"_class_name": "AutoencoderKL", **public.VAES[family]}
    config = {"_class_name": "UNet2DConditionModel", **public.UNETS[family]}
    return config if checkpoint.resolution is None else config | {"sample_size": checkpoint.resolution // 8}


def _scheduler(checkpoint: Checkpoint, prediction_type: str) -> tuple[dict[str, Any], str]:
    """The scheduler's configuration, and what it is and who says so, in words."""
    stated = checkpoint.prediction_type
    zero_snr = checkpoint.zero_snr if prediction_type == "auto" else prediction_type.endswith("zero_snr")
    if prediction_type != "auto":
        kind, source = prediction_type.removesuffix("_zero_snr"), "by the key prediction_type"
    elif stated is not None:
        kind, source = stated, "as the file says"
    else:
        kind, source = "epsilon", "the file does not say; if it is another, set prediction_type"
    if zero_snr and kind == "epsilon":
        what = "the file's noise schedule ends in pure noise, of which epsilon prediction learns nothing"
        raise UserError(what, str(checkpoint.file), "set prediction_type=v_prediction_zero_snr or =epsilon")
    config = public.SCHEDULERS[checkpoint.family] | {"prediction_type": kind}
    if zero_snr:  # PNDM does not know it; sampling has to start at the last step (Lin et al., arXiv 2305.08891)
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        if config["_class_name"] == "PNDMScheduler":
            config["_class_name"] = "DDIMScheduler"
    return config, f"{kind} {'with zero terminal SNR ' if zero_snr else ''}({source})"


def _index(family: str, scheduler: str) -> dict[str, Any]:
    index: dict[str, Any] = {
        "_class_name": _PIPELINES[family],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    if family == "sd15":
        return index | {"safety_checker": [None, None], "feature_extractor": [None, None]}
    second = {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
    return index | second | {"tokenizer_2": ["transformers", "CLIPTokenizer"], "force_zeros_for_empty_prompt": True}


def _content_hash(file: Path, progress: Progress) -> str:
    """sha256 of the file; remembered for as long as the file is the same by path, size, times and inode."""
    try:
        stat = file.stat()
        identity = f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"
        memo = cache_folder() / "hashes" / hashlib.sha256(identity.encode()).hexdigest()
        make_directory(memo.parent)
        if not memo.is_file():
            with _locked(memo.with_suffix(".lock")):
                if not memo.is_file():
                    write_bytes(memo, _hash(file, progress).encode())
        return memo.read_text()
    except OSError as error:
        raise UserError("cannot read the checkpoint", str(file), error.strerror or str(error)) from error


def _hash(file: Path, progress: Progress) -> str:
    digest, task = hashlib.sha256(), progress.add_task("hashing", total=file.stat().st_size)
    with file.open("rb") as stream:
        while block := stream.read(8 << 20):
            digest.update(block)
            progress.advance(task, len(block))
    return digest.hexdigest()


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold a lock among the processes of this machine (and of others, where the file system knows locks)."""
    try:
        stream = file.open("w")
    except OSError as error:
        raise UserError("the cache cannot be written", str(file.parent), "set FASTPREF_CACHE to a folder") from error
    with stream:
        with suppress(OSError):  # a file system without locks: several may work, and the first to be done counts
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
