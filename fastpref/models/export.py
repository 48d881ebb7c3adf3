"""`fastpref export`: what a run trained, as another program wants it: a LoRA in either naming, or a whole pipeline."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from fastpref.errors import UserError
from fastpref.models.loading import DTYPES, empty_unet, load_unet, model_family, resolve_model_dir, unet_source
from fastpref.models.lora_file import PEFT_WEIGHTS_NAME, WEIGHTS_NAME, load_adapter, read_lora, resolve_lora, save_lora
from fastpref.models.lora_form import Lora
from fastpref.models.lora_unet import fitted
from fastpref.models.state_dict import check_finite
from fastpref.models.unet_file import is_unet_file
from fastpref.models.weights import find_weights, stored_dtype, weight_files


def export_pipeline(
    model_dir: Path,
    out_dir: Path,
    *,
    lora: Path | None = None,
    unet: Path | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a pipeline folder with the trained UNet in it; any diffusers program opens it, no LoRA needed.

    The UNet is merged in fp32 and then rounded once. Of every other part the weights that were used are copied as they
    are, under names without a variant, so that a plain ``from_pretrained`` opens them.

    Args:
        model_dir: the base pipeline folder.
        out_dir: the new folder; appears only when it is whole.
        lora: LoRA to merge.
        unet: UNet folder or .safetensors file to put in place of the base's (the LoRA, if any, goes on top of it).
        dtype: ``fp32``, ``bf16`` or ``fp16`` of the UNet; default: as the weights that training started from.
        overwrite: replace an existing ``out_dir``.

    Raises:
        UserError: bad input, an ``out_dir`` that exists, or one that cannot be written.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype is '{dtype}'", "export", "use fp32, bf16 or fp16")
    if out_dir.exists() and not overwrite:
        raise UserError("the folder exists", str(out_dir), "give another one, or overwrite")
    merged: Any = load_unet(model_dir, torch.float32, None if unet is None else str(unet))
    check_finite(merged.named_parameters(), str(unet or model_dir / "unet"), "nothing is exported of a broken UNet")
    if lora is not None:
        load_adapter(merged, lora, "export")
        merged.fuse_lora(adapter_names=["export"])
        merged.unload_lora()
    # A LoRA's start is what was loaded and trained on; a UNet alone is a result, kept in fp32 whatever it began as.
    start = unet_source(model_dir, str(unet) if unet is not None and lora is not None else None)
    merged.to(DTYPES[dtype] if dtype else stored_dtype(start))
    check_finite(merged.named_parameters(), f"{lora or unet or model_dir} in {merged.dtype}", "give a wider dtype")
    draft = out_dir.with_name(f".{out_dir.name}.{os.getpid()}.tmp")
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        _copy_parts(model_dir, draft)
        merged.save_pretrained(draft / "unet", safe_serialization=True)
        if out_dir.exists():
            shutil.rmtree(out_dir)
        os.replace(draft, out_dir)
    except OSError as error:
        raise UserError("cannot write the pipeline folder", str(out_dir), str(error)) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return out_dir


def run_export(
    source: Path,
    out: Path,
    *,
    layout: Literal["pipeline", "diffusers", "kohya"] = "pipeline",
    model: str | None = None,
    prediction_type: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Path:
    """The body of ``fastpref export``.

    Args:
        source: a run directory, a LoRA file or folder, or a UNet folder or file.
        out: for ``pipeline`` a folder, else a .safetensors file.
        layout: ``pipeline``: the base with the trained weights merged; ``diffusers``, ``kohya``: a LoRA in that naming.
        model: base pipeline folder or file; default: what its run started from, by ``config.yaml``.
        prediction_type: what a ``model`` in one file predicts; default: the run's, else what the file says.
        dtype: of the written weights; default as stored.
        overwrite: replace an existing ``out``.

    Returns:
        What was written.

    Raises:
        UserError: nothing trained found, no model known, a full fine-tune asked for as LoRA, or
            numbers that are not finite.
    """
    lora, unet = trained_weights(source)
    base, start = _start(source, model, prediction_type)
    if layout == "pipeline":
        unet = start if unet is None else unet  # a LoRA belongs onto the UNet that it was trained on
        return export_pipeline(base, out, lora=lora, unet=unet, dtype=dtype, overwrite=overwrite)
    if lora is None:
        raise UserError("a fully trained UNet is no LoRA", str(source), "export it as pipeline")
    if out.exists() and not overwrite:
        raise UserError("the file exists", str(out), "give another name, or overwrite")
    folder = unet_source(base, None if start is None else str(start))
    skeleton = empty_unet(folder if folder.is_dir() else base / "unet")
    config = dict(skeleton.config)
    weights = fitted(read_lora(lora, unet_config=config), skeleton, str(lora))
    if dtype is not None:
        if dtype not in DTYPES:
            raise UserError(f"dtype is '{dtype}'", "export", "use fp32, bf16 or fp16")
        weights = Lora({key: tensor.to(DTYPES[dtype]) for key, tensor in weights.state.items()}, weights.alphas)
    return save_lora(weights, out, layout=layout, family=model_family(base), unet_config=config)


def trained_weights(source: Path) -> tuple[Path | None, Path | None]:
    """(LoRA file, UNet) of a run directory, a LoRA file or folder, or a UNet folder or file; one of the two is None."""
    if source.is_file() and is_unet_file(source):
        return None, source
    if not source.exists():
        raise UserError("no such file or folder", str(source), "give a run directory, a LoRA file or a UNet folder")
    if not any((source / name).is_file() for name in (WEIGHTS_NAME, PEFT_WEIGHTS_NAME)):
        for folder in (source / "unet", source):
            if (folder / "config.json").is_file():
                return None, folder
    if source.is_dir() and not any(source.glob("*.safetensors")):
        todo = f"expected {WEIGHTS_NAME} or unet/: did the training finish?"
        raise UserError("nothing trained in it", str(source), todo)
    return resolve_lora(source), None


def _copy_parts(model_dir: Path, draft: Path) -> None:
    """Copy a pipeline folder without its UNet, without weights that are not loaded, and without a checkpoint beside
    them, which would be the untrained model."""
    found = {folder: find_weights(folder) for folder in model_dir.iterdir() if (folder / "config.json").is_file()}

    def unused(name: str, _: list[str]) -> list[str]:
        folder = Path(name)
        weights = found.get(folder)
        if folder == model_dir:
            return ["unet", *(file.name for file in weight_files(folder))]
        if weights is None:
            return []
        return [file.name for file in weight_files(folder) - {*weights.on_disk}]

    shutil.copytree(model_dir, draft, ignore=unused)
    for folder, weights in found.items():
        if weights is not None and folder.name != "unet":
            for file in weights.on_disk:
                copy = draft / folder.name / file.name
                copy.rename(copy.with_name(weights.plain_name(file)))


def _start(source: Path, model: str | None, prediction_type: str | None) -> tuple[Path, Path | None]:
    """The pipeline folder that the weights are for: ``model``, else the one that their run trained on; with it the UNet
    that the run took in place of that folder's."""
    settings = _run_settings(source)
    said = str(settings.get("prediction_type", "auto")) if prediction_type is None else prediction_type
    if model is not None:
        of_run = prediction_type is None and Path(model).is_dir()  # a folder says it itself
        return resolve_model_dir(model, "auto" if of_run else said), None
    if "model" not in settings:
        what = "there is no run beside it that tells its model"
        raise UserError(what, str(source), "give --model FOLDER or FILE")
    unet = settings.get("unet")
    return resolve_model_dir(str(settings["model"]), said), None if unet is None else Path(unet)


def _run_settings(source: Path) -> dict[str, Any]:
    """The settings of the run that the weights are in; none where there is no run."""
    folder = source if source.is_dir() else source.parent
    try:
        settings = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return settings if isinstance(settings, dict) else {}
