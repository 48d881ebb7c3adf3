"""What judges the pictures: a style encoder, given, bundled or fitted to the real images, and a CLIP."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastpref.config import Config
from fastpref.errors import UserError
from fastpref.evaluate.reals import FolderReals, Reals
from fastpref.evaluate.sheets import to_batch
from fastpref.models.prompt_book import prompt_id

FIT = "fit"
FIT_SIZE, FIT_STEPS, FIT_BATCH = 64, 300, 32  # pixels, steps and pictures a step of a fitted style encoder
MIN_FIT_CAPTIONS = 8  # to fit on, and as many again to measure


@dataclass(frozen=True)
class Judges:
    """Folders of both encoders, or why there are none."""

    style_dir: Path | None = None
    clip_dir: Path | None = None
    reason: str = ""
    size: tuple[int, int] | None = None  # the only size of pictures they judge
    fitted_on: frozenset[int] = frozenset()  # prompt ids of the captions the style encoder has seen
    accuracy: dict[str, float] | None = None  # of the style encoder, on captions it was not trained on

    def refusal(self, size: tuple[int, int]) -> str:
        """Why they do not judge pictures of this size; empty if they do."""
        if self.size not in (None, size):
            wanted = "{} x {}".format(*self.size or ())
            return f"the bundled style encoder sees {wanted} pixels, the model draws {size[0]} x {size[1]}"
        return self.reason

    def unseen(self, captions: list[str]) -> list[str]:
        """The captions that the style encoder was not fitted on."""
        return [caption for caption in captions if prompt_id(caption) not in self.fitted_on]


def find_judges(
    config: Config, reals: Reals, out_dir: Path, *, style_dir: Path | None = None, clip_dir: Path | None = None
) -> Judges:
    """The encoders of a config, checked before anything is sampled; fits a style encoder where one is asked for.

    A style encoder fitted to these real images goes to ``out_dir/style_encoder`` and is used again from there.

    Args:
        style_dir, clip_dir: in place of the config's ``eval_style`` and ``eval_clip``.

    Raises:
        UserError: a folder without an encoder, real images in two folders and no CLIP, too few captions to fit.
    """
    from fastpref.emoji.style import load_style_encoder

    asked = isinstance(reals, FolderReals)
    style = str(style_dir) if style_dir is not None else config.eval_style or (FIT if asked else None)
    if style is None and config.eval_records == "emoji":
        from fastpref.emoji import CLIP_DIR, IMAGE_SIZE, STYLE_DIR

        clip = clip_dir or (CLIP_DIR if config.eval_clip is None else _clip(config, None))
        return Judges(STYLE_DIR, clip, size=(IMAGE_SIZE, IMAGE_SIZE), accuracy=_accuracy(STYLE_DIR))
    if style is None:
        return Judges(reason="no style encoder given for these evaluation records")
    clip = _clip(config, clip_dir)
    if clip is None:
        if asked or config.eval_style is not None:
            todo = "set eval_clip to a transformers CLIPModel folder; 'emoji' is bundled"
            raise UserError("no CLIP for prompt_retrieval", "eval_clip", todo)
        return Judges(reason="no CLIP folder given")
    folder = fit_style(reals, out_dir / "style_encoder", config.seed) if style == FIT else Path(style)
    fitted = frozenset(load_style_encoder(folder).config.get("fitted_on", ()))
    return Judges(folder, clip, fitted_on=fitted, accuracy=_accuracy(folder))


def fit_style(reals: Reals, folder: Path, seed: int) -> Path:
    """A style encoder trained on half of the captions of both styles; the other half stays unseen, to be measured.

    Raises:
        UserError: fewer than twice :data:`MIN_FIT_CAPTIONS` captions.
    """
    from fastpref.emoji.style_training import Labelled, fit_style_encoder
    from fastpref.emoji.training import FitSettings, Workspace

    fingerprint = reals.fingerprint()
    if _config(folder).get("fingerprint") == fingerprint:
        return folder
    ordered = sorted(dict.fromkeys(reals.captions), key=prompt_id)
    if len(ordered) < 2 * MIN_FIT_CAPTIONS:
        what = f"{len(ordered)} captions have real images of both styles"
        raise UserError(what, "eval_style", f"fitting needs {2 * MIN_FIT_CAPTIONS}; or give a style encoder's folder")
    seen = ordered[len(ordered) // 2 :]
    sets: dict[bool, list[tuple[torch.Tensor, int, str]]] = {True: [], False: []}
    for style, target in enumerate((False, True)):
        for image, caption in reals.images((FIT_SIZE, FIT_SIZE), target=target):
            sets[caption in set(seen)].append((to_batch([image])[0], style, caption))
    names = {caption: i for i, caption in enumerate(dict.fromkeys(seen + ordered))}
    train, heldout = (
        Labelled(
            torch.stack([picture for picture, _, _ in sets[side]]),
            torch.tensor([style for _, style, _ in sets[side]]),
            torch.tensor([names[caption] for _, _, caption in sets[side]]),
        )
        for side in (True, False)
    )
    settings = FitSettings("style", steps=FIT_STEPS, learning_rate=2e-3, warmup=30, weight_decay=0.02, ema_decay=0.98)
    with tempfile.TemporaryDirectory() as scratch:
        extra = {"fitted_on": [prompt_id(caption) for caption in seen], "fingerprint": fingerprint}
        styles = ("base", "target")
        work = Workspace(Path(scratch), seed, resume=False)
        fit_style_encoder(train, heldout, folder, work, settings, batch=FIT_BATCH, styles=styles, extra=extra)
    return folder


def _clip(config: Config, clip_dir: Path | None) -> Path | None:
    from fastpref.models.similarity import resolve_clip_dir

    name = config.eval_clip or config.clip
    return clip_dir if clip_dir is not None or name is None else resolve_clip_dir(name)


def _config(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _accuracy(folder: Path) -> dict[str, float] | None:
    return _config(folder).get("style_accuracy", {}).get("heldout")
