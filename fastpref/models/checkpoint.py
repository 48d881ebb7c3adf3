"""A whole SDXL or SD1.5 in one file in the original layout: what is in it, and its parts by diffusers' names.

The renaming is diffusers' own; here is what it does not do: to know what the file is, to refuse by name what is not
supported, and to check that every tensor is there and has the public models' shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from fastpref.errors import UserError
from fastpref.models import public
from fastpref.models.unet_file import (
    ORIGINAL,
    ZERO_SNR,
    convert_unet,
    find_unet,
    fitted,
    metadata_of,
    refuse_quantised,
    stated_prediction,
)
from fastpref.models.weights import tensor_facts

if TYPE_CHECKING:
    from torch import Tensor

Family = Literal["sdxl", "sd15"]
NAMES = {"sdxl": "SDXL", "sd15": "SD1.5"}
_VAE = "first_stage_model."
_TEXT: dict[Family, dict[str, str]] = {
    "sdxl": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    "sd15": {"text_encoder": "cond_stage_model.transformer."},
}
# Parts of names by which other models are known.
_OTHERS = {
    "double_blocks.": "a Flux model",
    "joint_blocks.": "an SD3 model",
    "control_model.": "a ControlNet",
    "controlnet_": "a ControlNet",
    "lora_": "a LoRA",
    "clip_mapper": "a Stable Cascade model",
    "cap_embedder.": "a Lumina model",
    "y_embedder.": "a PixArt model",
    "motion_modules.": "an AnimateDiff module",
    "decoder.up_blocks.": "a VAE",
    "decoder.up.": "a VAE",
    "emb_params": "a textual inversion",
}
_EDM = {"edm_mean": "Playground v2.5", "edm_vpred.sigma_max": "CosXL"}  # another noise schedule
_WITHOUT_USE = ("position_ids", "logit_scale", "attn_mask")  # buffers, and what only CLIP's loss needs


@dataclass(frozen=True)
class Checkpoint:
    """What a file says about itself; of safetensors only the header is read for it."""

    file: Path
    family: Family
    prediction_type: Literal["epsilon", "v_prediction"] | None  # None: the file does not say
    zero_snr: bool  # its noise schedule ends in pure noise (marker ztsnr)
    resolution: int | None  # pixels, where the metadata has a square one
    values: dict[str, int]  # of the UNet, the VAE and the text encoders


def read_facts(file: Path) -> Checkpoint:
    """What a checkpoint is.

    Raises:
        UserError: it is not a whole SDXL or SD1.5 (the line says what it is instead), or it is quantised.
    """
    facts = {name: (dtype, shape) for name, dtype, shape in tensor_facts(file)}
    shapes = {name: shape for name, (_, shape) in facts.items()}
    family = _family(file, shapes)
    prefixes = {"unet": ORIGINAL, "vae": _VAE, **_TEXT[family]}
    absent = [part for part, prefix in prefixes.items() if not any(name.startswith(prefix) for name in shapes)]
    if absent:
        todo = (
            "give a whole checkpoint as model; a UNet alone goes into the key unet, beside a pipeline folder as model"
        )
        raise UserError(f"the checkpoint holds no {', no '.join(absent)}", str(file), todo)
    values = dict.fromkeys(prefixes, 0)
    for part, prefix in prefixes.items():
        own = [name for name in shapes if name.startswith(prefix) and not name.endswith(_WITHOUT_USE)]
        refuse_quantised({name: facts[name][0] for name in own}, file)
        values[part] = sum(shapes[name].numel() for name in own)
    stated = stated_prediction(file, shapes)
    return Checkpoint(file, family, stated, ZERO_SNR in shapes, _resolution(file), values)


def convert(
    state: Mapping[str, Tensor], checkpoint: Checkpoint, expected: Mapping[str, Mapping[str, torch.Size]]
) -> dict[str, dict[str, Tensor]]:
    """The parts of a checkpoint by the names of diffusers and transformers, in the file's dtypes.

    Args:
        expected: of every part, names and shapes; see :func:`expected_shapes`.

    Raises:
        UserError: a tensor is missing, unknown or of another shape.
    """
    file, family = checkpoint.file, checkpoint.family
    parts = {"unet": convert_unet(_under(state, ORIGINAL), public.UNETS[family], file)}
    parts["vae"] = _vae(state, public.VAES[family])
    for part, prefix in _TEXT[family].items():
        parts[part] = _open_clip(state, prefix) if part == "text_encoder_2" else _clip(state, prefix)
    return {part: fitted(file, own, expected[part]) for part, own in parts.items()}


def expected_shapes(family: Family) -> dict[str, dict[str, torch.Size]]:
    """Names and shapes of every part of the public model; text encoders as in published files, with ``text_model.``"""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        models: dict[str, Any] = {
            "unet": UNet2DConditionModel(**public.UNETS[family]),
            "vae": AutoencoderKL(**public.VAES[family]),
        }
        for part, config in public.TEXT_ENCODERS[family].items():
            kind = CLIPTextModelWithProjection if part == "text_encoder_2" else CLIPTextModel
            models[part] = kind(CLIPTextConfig(**config))
    shapes = {part: {name: t.shape for name, t in model.state_dict().items()} for part, model in models.items()}
    for part in _TEXT[family]:
        shapes[part] = {_in_text_model(n): s for n, s in shapes[part].items() if not n.endswith(_WITHOUT_USE)}
    return shapes


def _family(file: Path, shapes: Mapping[str, torch.Size]) -> Family:
    first = shapes.get(f"{ORIGINAL}input_blocks.0.0.weight")
    if first is None:
        if find_unet(shapes):
            todo = "give it as the key unet, beside a pipeline folder as model"
            raise UserError("the file is a UNet alone, not a whole model", str(file), todo)
        kinds = [what for part, what in _OTHERS.items() if any(part in name for name in shapes)]
        what = f"the file is {kinds[0]}" if kinds else "the file is not a Stable Diffusion checkpoint"
        raise UserError(what, str(file), "fastpref aligns SDXL and SD1.5; give a checkpoint in the original layout")
    context = next((shape[-1] for name, shape in shapes.items() if "attn2.to_k.weight" in name), 0)
    what = ""
    if first[1] != 4:
        what = {9: "an inpainting model", 8: "a model that edits pictures"}.get(first[1], f"for {first[1]} channels")
    elif kind := next((kind for marker, kind in _EDM.items() if marker in shapes), None):
        what = f"{kind}, trained on the EDM noise schedule"
    elif context == 1024 or any(name.startswith("cond_stage_model.model.") for name in shapes):
        what = "an SD2 model"
    elif f"{ORIGINAL}label_emb.0.0.weight" in shapes:
        refiner = any(name.startswith("conditioner.embedders.0.model.") for name in shapes)
        if context != 1280 and not refiner:
            return "sdxl"
        what = "the SDXL refiner"
    else:
        return "sd15"
    raise UserError(f"the checkpoint is {what}", str(file), "fastpref aligns SDXL base models and SD1.5")


def _resolution(file: Path) -> int | None:
    sides = metadata_of(file).get("modelspec.resolution", "").lower().split("x")
    if len(sides) != 2 or sides[0] != sides[1] or not sides[0].isdecimal():
        return None
    side = int(sides[0])
    return side if 64 <= side <= 8192 and side % 8 == 0 else None


def _vae(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    own = {_VAE + name: tensor for name, tensor in _under(state, _VAE).items() if not name.startswith("loss.")}
    return dict(convert_ldm_vae_checkpoint(own, dict(config)))


def _clip(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    own = {name: t for name, t in _under(state, prefix).items() if not name.endswith(_WITHOUT_USE)}
    own.pop("text_projection.weight", None)  # some programs write it, and neither pipeline's first encoder has it
    return {_in_text_model(name): tensor for name, tensor in own.items()}


def _open_clip(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    own = {prefix + name: t for name, t in _under(state, prefix).items() if not name.endswith(_WITHOUT_USE)}
    # It takes the width from the projection, and asks the model only where there is none.
    return dict(convert_open_clip_checkpoint(None, own, prefix)) if f"{prefix}text_projection" in own else {}


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _in_text_model(name: str) -> str:
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"
