"""Open diffusers folders: which family they are, what they are made of, and each part on its own.

Nothing is ever fetched: a model is a folder on disk. Heavy imports happen inside the functions, so that the offline
training loop never pays for transformers pipelines it does not use.
"""

from __future__ import annotations

import hashlib
import json
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from fastpref.config import Config
from fastpref.errors import UserError
from fastpref.models.noise_schedule import NoiseSchedule, ddim_settings, noise_schedule
from fastpref.models.unet_file import ZERO_SNR, find_unet, read_unet, stated_prediction
from fastpref.models.vae import survives_fp16
from fastpref.models.weights import tensor_facts, weights_of

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel

Family = Literal["sdxl", "sd15"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
_FAMILIES: dict[str, Family] = {"StableDiffusionXLPipeline": "sdxl", "StableDiffusionPipeline": "sd15"}
_PARTS: dict[Family, tuple[str, ...]] = {
    "sd15": ("unet", "vae", "scheduler", "text_encoder", "tokenizer"),
    "sdxl": ("unet", "vae", "scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
}
_FINGERPRINTED = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
for _name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
    os.environ.setdefault(_name, "error")


def resolve_model_dir(model: str, prediction_type: str = "auto") -> Path:
    """The pipeline folder of a config's ``model``; 'emoji' is the bundled one, and of a checkpoint in one file it is
    made in a cache the first time.

    Args:
        prediction_type: the config's, for a file that does not say what its UNet predicts.

    Raises:
        UserError: no such folder, no pipeline folder, a family other than SDXL and SD1.5, or a noise schedule that
            fastpref does not know.
    """
    if prediction_type != "auto" and not Path(model).is_file():
        todo = "it is for a model in one file; a folder says it in scheduler/scheduler_config.json"
        raise UserError(f"prediction_type is {prediction_type}", model, todo)
    if model == "emoji":
        from fastpref.emoji import MODEL_DIR

        return MODEL_DIR
    path = Path(model)
    if not path.exists():
        todo = "models are not downloaded: give a diffusers folder or a .safetensors file on disk"
        raise UserError("no such model folder or file", model, todo)
    if path.is_file():
        from fastpref.models.single_file import resolve_single_file

        return resolve_single_file(path, prediction_type)
    family = model_family(path)
    for part in _PARTS[family]:
        if not (path / part).is_dir():
            raise UserError(f"the model folder has no {part}/", model, "give a whole pipeline folder")
    load_noise_schedule(path)
    return path


def model_dir_of(config: Config) -> Path:
    """The pipeline folder that a recipe means; see :func:`resolve_model_dir`."""
    return resolve_model_dir(config.model, config.prediction_type)


def model_family(path: Path) -> Family:
    """'sdxl' or 'sd15', from ``model_index.json``."""
    index = path / "model_index.json"
    if not index.is_file():
        raise UserError(
            "no model_index.json: not a diffusers pipeline folder", str(path), "give the pipeline's top folder"
        )
    name = read_part_json(index).get("_class_name")
    if name not in _FAMILIES:
        raise UserError(f"a {name} is not supported", str(path), "fastpref aligns SDXL and SD1.5 pipelines")
    return _FAMILIES[name]


def model_fingerprint(path: Path) -> str:
    """sha256 over the files of the VAE, text encoders and tokenizers: what a prepared store depends on.

    Over all of them, also variants that :func:`~fastpref.models.weights.find_weights` does not choose, so that a store
    stays valid as long as nobody touches the folder.
    """
    digest = hashlib.sha256()
    for part in _FINGERPRINTED:
        for file in sorted(p for p in (path / part).rglob("*") if p.is_file()):
            digest.update(file.relative_to(path).as_posix().encode())
            _hash_file(file, digest)
    return digest.hexdigest()


def folder_fingerprint(path: Path) -> str:
    """sha256 over all files of a folder, or of one file."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        digest.update(file.name.encode())
        _hash_file(file, digest)
    return digest.hexdigest()


def unet_fingerprint(path: Path, unet: str | None, lora: str | None) -> str:
    """sha256 over the files of the UNet that :func:`load_unet` opens, and of a LoRA beside it."""
    source = unet_source(path, unet)
    parts = [source] if source.is_dir() else [source, path / "unet" / "config.json"]
    if lora is not None:
        from fastpref.models.lora_file import lora_sources

        parts += lora_sources(Path(lora))
    return hashlib.sha256("".join(folder_fingerprint(part) for part in parts).encode()).hexdigest()


def resolve_device(device: str) -> torch.device:
    """'auto' is cuda where there is one."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda but torch sees none", "device", "use device=cpu or a CUDA build of torch")
    return torch.device("cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu"))


def load_vae(path: Path, precision: str, device: torch.device, *, judged_in: str = "fp32") -> AutoencoderKL:
    """The VAE in a precision it survives; for 'auto' and ``judged_in`` see :func:`vae_dtype`."""
    vae = open_vae(path, vae_dtype(precision, device.type, judged_in=judged_in)).to(device)
    return survives_fp16(vae, partial(load_vae, path, "fp32", device))


def vae_dtype(precision: str, device: str, *, judged_in: str = "fp32") -> torch.dtype:
    """What :func:`load_vae` opens a VAE in on 'cpu' or 'cuda'.

    'auto' is fp32, but bf16 on a GPU for pictures that are judged in bf16 themselves. Latents are stored and trained
    on, and bf16 costs them 30 times what their rounding to fp16 does; a bf16 picture moves a score by a quarter to a
    half of what the scorer's own bf16 moves it (``benchmarks/vae_precision.py``), which is more than fp16 would.

    Args:
        judged_in: the precision of what looks at the pictures; 'fp32' too for a VAE that encodes.
    """
    if precision == "auto":
        precision = "bf16" if device == "cuda" and judged_in == "bf16" else "fp32"
    return DTYPES[precision]


def open_vae(path: Path, dtype: torch.dtype) -> AutoencoderKL:
    """The VAE of a pipeline folder, on the CPU; nothing of it is trained."""
    from diffusers import AutoencoderKL

    options = weights_of(path / "vae").options
    vae = open_part(partial(AutoencoderKL.from_pretrained, path / "vae", dtype=dtype, **options), path)
    return vae.eval().requires_grad_(False)


def vae_scale_factor(path: Path) -> int:
    """Pixels per latent along one side, as the diffusers pipelines count them."""
    blocks = read_part_json(path / "vae" / "config.json").get("block_out_channels", [1])
    return 2 ** (len(blocks) - 1)


def unet_source(path: Path, unet: str | None) -> Path:
    """The folder or file that :func:`load_unet` opens."""
    source = path / "unet" if unet is None else Path(unet)
    return source / "unet" if (source / "unet" / "config.json").is_file() else source


def load_unet(path: Path, dtype: torch.dtype, unet: str | None = None) -> UNet2DConditionModel:
    """The UNet of a pipeline folder, or the one in ``unet``: a folder (or its ``unet/``) or a file
    that :mod:`fastpref.models.unet_file` reads."""
    source = unet_source(path, unet)
    if source.is_file():
        _check_prediction(path, source)
        model = empty_unet(path / "unet")
        expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
        state = read_unet(source, model.config, expected)
        # Copied even where the dtype is right: the file may be replaced while the model is in use.
        model.load_state_dict({name: state.pop(name).to(dtype, copy=True) for name in list(state)}, assign=True)
        return model.eval()
    unet_config(path, unet)
    return _open_unet(source, dtype)


def empty_unet(folder: Path) -> UNet2DConditionModel:
    """The UNet that a folder's ``config.json`` describes, on the meta device: no weights are read."""
    from diffusers import UNet2DConditionModel

    config = read_part_json(folder / "config.json")
    with torch.device("meta"):
        return open_part(partial(UNet2DConditionModel.from_config, config), folder)


def unet_config(path: Path, unet: str | None) -> dict[str, Any]:
    """The config of the UNet that :func:`load_unet` opens; of a file no more than its tensors' names is looked at.

    Raises:
        UserError: no UNet there.
    """
    source = unet_source(path, unet)
    if source.is_file():
        if not find_unet([name for name, _, _ in tensor_facts(source)]):
            raise UserError(
                "no UNet in the file", str(source), "give a UNet's weights, or a checkpoint with a UNet in it"
            )
        source = path / "unet"
    elif unet is not None and not (source / "config.json").is_file():
        raise UserError("no UNet there", unet, "give a folder with config.json and weights, or a .safetensors file")
    return read_part_json(source / "config.json")


def _check_prediction(path: Path, unet: Path) -> None:
    """Raise :class:`UserError` if a UNet file says that it is for another scheduler than the pipeline's."""
    names = [name for name, _, _ in tensor_facts(unet)]
    stated, schedule = stated_prediction(unet, names), load_noise_schedule(path)
    used = schedule.prediction_type
    if stated is not None and stated != used:
        what = f"the UNet says that it is for {stated}, the model's scheduler is for {used}"
        raise UserError(what, str(unet), f"use a model whose scheduler/ has prediction_type {stated}")
    if ZERO_SNR in names and schedule.alphas_cumprod[-1] > 0:
        what = "the UNet says that its noise schedule ends in pure noise, the model's scheduler does not"
        raise UserError(what, str(unet), "use a model whose scheduler/ has rescale_betas_zero_snr")


def _open_unet(folder: Path, dtype: torch.dtype) -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    read_part_json(folder / "config.json")
    options = weights_of(folder).options
    return open_part(lambda: UNet2DConditionModel.from_pretrained(folder, dtype=dtype, **options), folder)


def scheduler_settings(path: Path) -> dict[str, Any]:
    """The folder's scheduler config as :func:`fastpref.models.noise_schedule.ddim_settings` reads it."""
    named = read_part_json(path / "model_index.json").get("scheduler")
    library, name = named if isinstance(named, list) and len(named) == 2 else (None, None)
    if library != "diffusers" or not isinstance(name, str):
        what = f"model_index.json says that the scheduler is {named}"
        raise UserError(what, str(path), 'it has to be of the form ["diffusers", "DDIMScheduler"]')
    file = path / "scheduler" / "scheduler_config.json"
    return ddim_settings(read_part_json(file), str(file), name)


def load_noise_schedule(path: Path) -> NoiseSchedule:
    """ᾱ_t and the prediction type, from the folder's scheduler config.

    Raises:
        UserError: not a schedule that fastpref knows (:mod:`fastpref.models.noise_schedule`).
    """
    return noise_schedule(scheduler_settings(path), f"{path}/scheduler")


def open_part(load: Any, where: Path) -> Any:
    """What ``load()`` gives, without progress bars; what it raises becomes a :class:`UserError` in one line."""
    from diffusers.utils import logging as diffusers_logging
    from safetensors import SafetensorError
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        return load()
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError("cannot load the model", str(where), " ".join(str(error).split())[:300]) from error


def read_part_json(path: Path) -> dict[str, Any]:
    """A JSON object in a model's folder; :class:`UserError` if it is missing or damaged."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError("cannot read the file", str(path), str(error)) from None
    if not isinstance(value, dict):
        raise UserError("the file is not a JSON object", str(path), "copy the model again")
    return value


def _hash_file(file: Path, digest: hashlib._Hash) -> None:
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
