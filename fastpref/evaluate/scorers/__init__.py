"""Scorers of (picture, prompt), one a file, opened from local checkpoints in the layouts their authors published."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastpref.errors import UserError

if TYPE_CHECKING:
    from fastpref.evaluate.scores import Scorer

_OPTIONS: dict[str, tuple[str, ...]] = {
    "pickscore": ("processor",),
    "hpsv2": ("tokenizer",),
    "imagereward": ("config", "tokenizer"),
    "aesthetic": ("clip",),
    "clip": ("processor",),
}
NAMES = tuple(_OPTIONS)


def load_scorer(spec: str, device: str = "cpu") -> Scorer:
    """Open the scorer that ``NAME=PATH[,OPTION=PATH]...`` describes.

    ``pickscore=FOLDER[,processor=FOLDER]`` · ``hpsv2=FILE[,tokenizer=FOLDER]`` ·
    ``imagereward=FILE[,config=FILE][,tokenizer=FOLDER]`` · ``aesthetic=FILE,clip=FOLDER`` ·
    ``clip=FOLDER[,processor=FOLDER]``; ``clip=emoji`` is the bundled CLIP.

    Raises:
        UserError: an unknown name or option, or a checkpoint that cannot be used.
    """
    name, paths = _parse(spec)
    path = paths.pop("")
    if name == "aesthetic":
        from fastpref.evaluate.scorers.aesthetic import AestheticScore

        if "clip" not in paths:
            raise UserError("no CLIP given", spec, "add ,clip=FOLDER of openai/clip-vit-large-patch14")
        return AestheticScore(path, clip=paths["clip"], device=device)
    return _class(name)(path, **paths, device=device)


def _class(name: str) -> Any:
    if name == "hpsv2":
        from fastpref.evaluate.scorers.hpsv2 import HpsV2

        return HpsV2
    if name == "imagereward":
        from fastpref.evaluate.scorers.image_reward import ImageReward

        return ImageReward
    from fastpref.evaluate.scorers.clip import ClipScore, PickScore

    return PickScore if name == "pickscore" else ClipScore


def _parse(spec: str) -> tuple[str, dict[str, Path]]:
    """Name, and paths by option; the checkpoint's under the empty string."""
    name, _, rest = spec.partition("=")
    first, *others = rest.split(",")
    if name not in _OPTIONS or not first:
        raise UserError("no such scorer", spec, f"give NAME=PATH with a name of {', '.join(NAMES)}")
    if (name, first) == ("clip", "emoji"):
        from fastpref.emoji import CLIP_DIR

        first = str(CLIP_DIR)
    paths = {"": Path(first)}
    for other in others:
        key, _, value = other.partition("=")
        if key not in _OPTIONS[name] or not value:
            raise UserError(f"{name} has no option {other}", spec, f"it takes {', '.join(_OPTIONS[name])}")
        paths[key] = Path(value)
    return name, paths
