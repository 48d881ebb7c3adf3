"""The normal form of a UNet's LoRA, and how any state dict is brought into it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastpref.errors import UserError
from fastpref.models.lora_naming import KOHYA_PREFIX, PUBLIC, Numbering, lora_key
from fastpref.models.state_dict import check_finite


@dataclass(frozen=True)
class Lora:
    """A UNet's LoRA in normal form.

    Attributes:
        state: ``<module>.lora_A.weight`` ``(r, in[, k, k])`` and ``<module>.lora_B.weight`` ``(out, r[, 1, 1])``;
            module paths are diffusers'.
        alphas: alpha of every module.
    """

    state: dict[str, torch.Tensor]
    alphas: dict[str, float]

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of every module."""
        return {module: self.state[f"{module}.lora_A.weight"].shape[0] for module in self.alphas}

    def peft_config(self) -> dict[str, Any]:
        """Arguments of ``peft.LoraConfig`` under which these weights mean what they say."""
        rank = Counter(self.ranks.values()).most_common(1)[0][0]
        alpha = Counter(self.alphas.values()).most_common(1)[0][0]
        return {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {module: r for module, r in self.ranks.items() if r != rank},
            "alpha_pattern": {module: a for module, a in self.alphas.items() if a != alpha},
            "target_modules": sorted(self.alphas),
            "use_dora": False,
            "lora_bias": False,
        }


def make_lora(
    state: Mapping[str, torch.Tensor],
    alpha: float | Mapping[str, float] | None = None,
    where: str = "",
    numbering: Numbering = PUBLIC,
) -> Lora:
    """Any UNet LoRA state dict in normal form.

    Args:
        state: keys in any naming (see :mod:`fastpref.models.lora_naming`); tensors ``….alpha`` are taken as alphas.
        alpha: alpha of all or of each module; a tensor that says another one is an error. By default what the tensors
            say, else the module's rank.
        numbering: of the UNet's layers, by which Stability's names are read; default: the public models'.

    Raises:
        UserError: keys that are no LoRA's, half a pair, ranks that do not match, numbers that are not finite.
    """
    check_finite(state.items(), where, "a LoRA with such numbers is broken: save it again")
    weights, stored = _sorted_in(state, numbering, where)
    modules = sorted({key.rsplit(".lora_", 1)[0] for key in weights})
    if not modules:
        raise UserError("no LoRA weights in it", where, f"expected keys like unet.….lora_A.weight or {KOHYA_PREFIX}…")
    if lost := sorted(stored.keys() - set(modules)):
        raise UserError(f"an alpha of {lost[0]}, which has no LoRA weights", where, "the file is damaged")
    alphas = {}
    for module in modules:
        down, up = weights.get(f"{module}.lora_A.weight"), weights.get(f"{module}.lora_B.weight")
        if down is None or up is None or down.ndim < 2 or up.ndim < 2 or down.shape[0] != up.shape[1]:
            raise UserError(
                f"the two LoRA factors of {module} are not both there or differ in rank", where, "the file is damaged"
            )
        if not down.shape[0]:
            raise UserError(f"the LoRA of {module} has rank 0", where, "save it without the modules that have none")
        given = alpha.get(module) if isinstance(alpha, Mapping) else alpha
        alphas[module] = _agreed(module, down.shape[0], given, stored.get(module), where)
    return Lora(weights, alphas)


def _sorted_in(
    state: Mapping[str, torch.Tensor], numbering: Numbering, where: str
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(weights by ``<module>.lora_A.weight``, alpha tensors by module)."""
    weights: dict[str, torch.Tensor] = {}
    alphas: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():
        try:
            module, part = lora_key(key, numbering=numbering)
        except ValueError as error:
            raise UserError(str(error), where, "LoRA files in diffusers', peft's or kohya's naming are read") from None
        target, name = (alphas, module) if part == "alpha" else (weights, f"{module}.lora_{part}.weight")
        if name in target:
            raise UserError(f"'{key}' is there a second time under another name", where, "the file is damaged")
        if not tensor.is_floating_point() and part != "alpha":
            raise UserError(f"'{key}' holds {tensor.dtype}, not real numbers", where, "save the LoRA unquantised")
        target[name] = tensor
    return weights, alphas


def _agreed(module: str, rank: int, given: float | None, stored: torch.Tensor | None, where: str) -> float:
    """The alpha of a module: what a configuration gives and what a tensor stores must be one number."""
    if stored is not None and stored.numel() != 1:
        raise UserError(f"the alpha of {module} has {stored.numel()} numbers", where, "the file is damaged")
    rounded = None if given is None or stored is None else float(torch.tensor(given).to(torch.result_type(stored, 1.0)))
    if stored is not None and rounded not in (None, float(stored)):
        what = f"two alphas for {module}: {given:g} by the configuration, {float(stored):g} by its tensor"
        raise UserError(what, where, "save the LoRA again with one of them")
    said = given if given is not None else stored
    alpha = float(rank if said is None else said)
    if alpha == 0.0 or not math.isfinite(alpha):
        # programs disagree on 0: kohya's reads it as the rank
        raise UserError(f"the alpha of {module} is {alpha:g}", where, "save the LoRA again with another one")
    return alpha
