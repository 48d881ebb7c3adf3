"""A UNet in one file, as diffusers names its weights: whatever wrote the file, and with or without other parts in it.

Read are diffusers' own names and those of the original code (``input_blocks.…``), behind any of the prefixes that
trainers and programs put in front: ``model.diffusion_model.``, ``unet.``, ``module.``, torch.compile's ``_orig_mod.``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from fastpref.errors import UserError
from fastpref.models.state_dict import core_shape, read_state_dict, refuse
from fastpref.models.weights import FLOATS, tensor_facts

if TYPE_CHECKING:
    from torch import Tensor

PREDICTIONS: dict[str, Literal["epsilon", "v_prediction"]] = {
    **{"epsilon": "epsilon", "eps": "epsilon"},
    **{"v": "v_prediction", "v_prediction": "v_prediction", "v-prediction": "v_prediction"},
}
ORIGINAL = "model.diffusion_model."
V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"
MARKERS = (V_PREDICTION, ZERO_SNR)  # tensors without meaning of their own, by which a file says what it predicts
_WRAPPERS = frozenset(["model", "module", "unet", "diffusion_model"])
_FIRST = {"conv_in.weight": False, "input_blocks.0.0.weight": True}  # the first layer: is the layout the original one
_COMPILED = "_orig_mod."


def find_unet(names: Collection[str]) -> list[tuple[str, bool]]:
    """(prefix, original layout) of the UNets among a file's names; EMA copies do not count."""
    found = []
    for name in names:
        plain = name.replace(_COMPILED, "")
        for first, original in _FIRST.items():
            prefix = plain.removesuffix(first)
            if plain.endswith(first) and set(prefix.split(".")[:-1]) <= _WRAPPERS and prefix[-1:] in ("", "."):
                found.append((prefix, original))
    return found


def is_unet_file(file: Path) -> bool:
    """Whether a safetensors file holds a UNet, and not a LoRA for one."""
    return file.suffix == ".safetensors" and bool(find_unet([name for name, _, _ in tensor_facts(file)]))


def read_unet(file: Path, config: Mapping[str, Any], expected: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The UNet in ``file`` by diffusers' names, in the dtypes of the file.

    Args:
        config: of the UNet, for the places of the original layout's blocks.
        expected: names and shapes it must have.

    Raises:
        UserError: no UNet, several, one of other shapes, or a quantised one.
    """
    state = {name.replace(_COMPILED, ""): tensor for name, tensor in read_state_dict(file, "state_dict").items()}
    found = find_unet(state)
    if not found:
        raise UserError("no UNet in the file", str(file), "give a UNet's weights, or a checkpoint with a UNet in it")
    if len(found) > 1:
        raise UserError(f"{len(found)} UNets in the file", str(file), "give a file with one")
    prefix, original = found[0]
    own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    own = {name: t for name, t in own.items() if not name.startswith("model_ema.") and name not in MARKERS}
    refuse_quantised({name: str(t.dtype).removeprefix("torch.") for name, t in own.items()}, file)
    return fitted(file, convert_unet(own, config, file) if original else own, expected)


def convert_unet(state: Mapping[str, Tensor], config: Mapping[str, Any], file: Path) -> dict[str, Tensor]:
    """The original layout's names, without prefix, to diffusers'."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    try:
        named = convert_ldm_unet_checkpoint({ORIGINAL + name: tensor for name, tensor in state.items()}, dict(config))
    except KeyError as error:
        raise UserError(f"the checkpoint lacks {error.args[0]}", str(file), "give the file as published") from None
    except TypeError:
        what = "the original layout does not fit a UNet whose blocks have different numbers of layers"
        raise UserError(what, str(file), "give the weights in diffusers' naming") from None
    used = {id(tensor) for tensor in named.values()}
    refuse(file, (), [name for name, tensor in state.items() if id(tensor) not in used])
    return dict(named)


def fitted(file: Path, state: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """``state`` with every shape as expected: a 1x1 convolution and a linear layer mean the same.

    Raises:
        UserError: a tensor is missing, unknown or of another shape.
    """
    alike = {name: tensor for name, tensor in state.items() if name in expected}
    mismatched = [name for name, tensor in alike.items() if core_shape(tensor.shape) != core_shape(expected[name])]
    refuse(file, expected.keys() - state.keys(), state.keys() - expected.keys(), mismatched)
    return {name: tensor.reshape(expected[name]) for name, tensor in alike.items()}


def refuse_quantised(dtypes: Mapping[str, str], file: Path) -> None:
    """Raise :class:`UserError` if a tensor is not of floating point of at least 16 bits."""
    floats = {*FLOATS, *(str(dtype).removeprefix("torch.") for dtype in FLOATS.values())}
    strange = sorted(name for name, dtype in dtypes.items() if dtype not in floats)
    if strange:
        what = f"the weights are quantised: {strange[0]} is {dtypes[strange[0]]}"
        raise UserError(what, str(file), "training starts from fp32, bf16 or fp16: give that file")


def stated_prediction(file: Path, names: Collection[str]) -> Literal["epsilon", "v_prediction"] | None:
    """What a file says it predicts: by its metadata (modelspec), or by a marker among its tensors; None: nothing.

    Raises:
        UserError: it says something else than epsilon or v.
    """
    stated = metadata_of(file).get("modelspec.prediction_type", "").strip().lower()
    if stated and stated not in PREDICTIONS:
        raise UserError(f"the file predicts '{stated}'", str(file), "epsilon and v_prediction are supported")
    if V_PREDICTION in names:
        return "v_prediction"
    return PREDICTIONS.get(stated)


def metadata_of(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    if file.suffix != ".safetensors":
        return {}
    from safetensors import safe_open

    with safe_open(str(file), framework="pt") as opened:
        return dict(opened.metadata() or {})
