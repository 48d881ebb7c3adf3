"""Step-aware preference models on disk: a CLIP folder to start from, a folder that training wrote, a published file.

The published files (``*_step-aware_preference_model.bin``) are raw state dicts: the CLIPModel's names under ``model.``,
beside them ``model.t_embedder.mlp.{0,2}``, ``model.vision_model.encoder.layers.{i}.adaLN_modulation.1`` and
``model.vision_model.adaLN_modulation.1``. Training writes the same names, as safetensors.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastpref.atomic import write_tensors
from fastpref.errors import UserError
from fastpref.models.loading import open_part
from fastpref.models.similarity import resolve_clip_dir
from fastpref.models.state_dict import read_state_dict, refuse
from fastpref.models.step_preference import ClipScorer, Preprocess, StepPreferenceModel
from fastpref.models.weights import weights_of

FOLDER_NAME = "step_preference_model"
WEIGHTS_NAME = "step_preference_model.safetensors"
_PREFIX = "model."
_COPIED = (
    "config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)


@dataclass(frozen=True)
class PreferenceFiles:
    """Where a preference model comes from."""

    clip_dir: Path  # config, tokenizer and image processor
    weights: Path | None  # state dict in the published layout; None: the CLIP of clip_dir, untrained as to timesteps


def resolve_step_preference(scorer: str | None, clip: str | None) -> PreferenceFiles:
    """The files of a config's ``scorer`` and ``clip``.

    ``scorer`` is a CLIP folder ('emoji' is the bundled one), a folder that ``method: spm`` wrote, or a published state
    dict, which takes architecture, tokenizer and image processor from ``clip``. Without it the start is ``clip``.

    Raises:
        UserError: neither is given, or something is not there.
    """
    if scorer is None and clip is None:
        raise UserError("no preference model is given", "scorer", "set clip=FOLDER of a CLIP, or scorer=PATH")
    if scorer is None or scorer == "emoji":
        return PreferenceFiles(resolve_clip_dir(scorer or clip or ""), None)
    path = Path(scorer)
    if not path.exists():
        raise UserError("no such preference model", scorer, "give a CLIP folder, a trained one or a published .bin")
    if path.is_file():
        if clip is None:
            todo = "set clip=FOLDER of the CLIP it was trained from"
            raise UserError("a state dict needs the CLIP folder it belongs to", scorer, todo)
        return PreferenceFiles(resolve_clip_dir(clip), path)
    weights = path / WEIGHTS_NAME
    return PreferenceFiles(resolve_clip_dir(scorer), weights if weights.is_file() else None)


def load_step_preference(
    files: PreferenceFiles, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> StepPreferenceModel:
    """The model, in eval mode; ``seed`` draws the timestep MLP of an untrained one.

    Raises:
        UserError: a file is missing or damaged, a weight is missing, unknown or of another shape, or the image
            processor makes pictures of another size than the CLIP takes.
    """
    tokenizer, preprocess = _tokenizer(files.clip_dir), _preprocess(files.clip_dir)
    if files.weights is None:
        clip = _clip(files.clip_dir, None, files.clip_dir, dtype)
        return StepPreferenceModel(clip, tokenizer, preprocess, seed).to(device).eval()
    state = read_state_dict(files.weights)
    own, adaln = _split(state, files.weights)
    _check_image_size(own, preprocess, files)
    model = StepPreferenceModel(_clip(files.clip_dir, own, files.weights, dtype), tokenizer, preprocess)
    expected = {name: value.shape for name, value in model.state_dict().items() if not name.startswith("clip.")}
    refuse(
        files.weights,
        {_published(name) for name in expected.keys() - adaln.keys()},
        {_published(name) for name in adaln.keys() - expected.keys()},
        {_published(name) for name in expected.keys() & adaln.keys() if adaln[name].shape != expected[name]},
    )
    model.load_state_dict(adaln, strict=False)
    return model.to(device).eval()


def load_clip_scorer(
    files: PreferenceFiles, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> ClipScorer:
    """The plain CLIP (or PickScore) of ``files.clip_dir``, in eval mode, whatever the timestep."""
    clip = _clip(files.clip_dir, None, files.clip_dir, dtype)
    return ClipScorer(clip, _tokenizer(files.clip_dir), _preprocess(files.clip_dir)).to(device).eval()


def save_step_preference(model: StepPreferenceModel, files: PreferenceFiles, folder: Path) -> None:
    """Write ``folder`` whole or not at all: weights in the published layout, and the files of ``files.clip_dir``."""
    draft = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    write_tensors(draft / WEIGHTS_NAME, {_published(name): value for name, value in model.state_dict().items()})
    for name in _COPIED:
        if (files.clip_dir / name).is_file():
            shutil.copyfile(files.clip_dir / name, draft / name)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(draft, folder)


def _published(name: str) -> str:
    """Our parameter name in the published layout."""
    part, _, rest = name.partition(".")
    if part == "clip":
        return _PREFIX + rest
    if part == "time_mlp":
        return f"{_PREFIX}t_embedder.mlp.{rest}"
    if part == "final_modulation":
        return f"{_PREFIX}vision_model.adaLN_modulation.1.{rest}"
    index, _, kind = rest.partition(".")
    return f"{_PREFIX}vision_model.encoder.layers.{index}.adaLN_modulation.1.{kind}"


def _own(name: str) -> str:
    """The opposite of :func:`_published`, without the prefix; a CLIP's own name stays as it is."""
    if name.startswith("t_embedder.mlp."):
        return "time_mlp." + name.removeprefix("t_embedder.mlp.")
    before, found, kind = name.partition("adaLN_modulation.1.")
    if not found:
        return name
    index = before.removeprefix("vision_model.encoder.layers.").rstrip(".")
    return f"final_modulation.{kind}" if before == "vision_model." else f"modulations.{index}.{kind}"


def _split(state: dict[str, torch.Tensor], path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The CLIP's weights under CLIPModel's names, and those of the adaLN under ours."""
    clip: dict[str, torch.Tensor] = {}
    adaln: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        if not name.startswith(_PREFIX):
            refuse(path, [], [name])
        inner = name.removeprefix(_PREFIX)
        if inner.endswith(".embeddings.position_ids"):  # a constant that older transformers saved as a weight
            if not torch.equal(value.flatten(), torch.arange(value.numel())):
                raise UserError(f"{name} is not 0, 1, 2 …", str(path), "give the file as published")
            continue
        own = _own(inner)
        (clip if own == inner else adaln)[own] = value
    return clip, adaln


def _clip(folder: Path, state: dict[str, torch.Tensor] | None, where: Path, dtype: torch.dtype) -> Any:
    """The CLIPModel of ``folder`` with its own weights or exactly those of ``state``."""
    from transformers import CLIPConfig, CLIPModel

    options = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    if state is None:
        load = partial(CLIPModel.from_pretrained, folder, **options, **weights_of(folder).options)
    else:
        config = open_part(partial(CLIPConfig.from_pretrained, folder), folder)
        load = partial(CLIPModel.from_pretrained, None, config=config, state_dict=state, **options)
    model, info = open_part(load, where)
    mismatched = [entry[0] for entry in info["mismatched_keys"]]
    refuse(where, info["missing_keys"], info["unexpected_keys"] if state is not None else (), mismatched)
    return model


def _tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    if not (folder / "vocab.json").is_file() and not (folder / "tokenizer.json").is_file():
        raise UserError("the CLIP folder has no tokenizer", str(folder), "copy the tokenizer of its base CLIP there")
    return open_part(partial(CLIPTokenizer.from_pretrained, folder), folder)


def _preprocess(folder: Path) -> Preprocess:
    """From ``preprocessor_config.json`` and the vision tower's image size, which have to agree."""
    try:
        settings = json.loads((folder / "preprocessor_config.json").read_text())
        config = json.loads((folder / "config.json").read_text())
        crop = settings.get("crop_size", settings["size"])
        if isinstance(crop, dict):
            crop = crop["height"] if "height" in crop else crop["shortest_edge"]
        size = config.get("vision_config", {}).get("image_size", 224)
        preprocess = Preprocess(int(crop), tuple(settings["image_mean"]), tuple(settings["image_std"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = "cannot read the CLIP folder's preprocessor_config.json and config.json"
        raise UserError(what, str(folder), f"{error}; copy them from its base CLIP") from None
    if preprocess.size != size:
        what = f"the image processor makes pictures of {preprocess.size} pixels, the CLIP takes {size}"
        raise UserError(what, str(folder), "use the preprocessor_config.json that belongs to this CLIP")
    return preprocess


def _check_image_size(state: dict[str, torch.Tensor], preprocess: Preprocess, files: PreferenceFiles) -> None:
    positions = state.get("vision_model.embeddings.position_embedding.weight")
    patch = state.get("vision_model.embeddings.patch_embedding.weight")
    if positions is None or patch is None or positions.ndim != 2 or patch.ndim != 4:
        return
    size = round((len(positions) - 1) ** 0.5) * patch.shape[-1]
    if size != preprocess.size:
        what = f"the preference model takes pictures of {size} pixels, the CLIP folder says {preprocess.size}"
        raise UserError(what, str(files.weights), f"set clip to the CLIP it was trained from, not {files.clip_dir}")
