"""The scorers a recipe can name: preference models of pictures, latent reward models and any Python callable.

A callable gets, for n candidates, ``fn(images, prompts, t)``: images (n, 3, H, W) in [0, 1], the decoded x̂0, in the
VAE's precision (fp32 or fp64); prompts a list of n strings; t the timestep, an int. It returns n floats, higher is
better. With an attribute ``takes = "latents"`` it gets the noisy latents (n, C, h, w), scaled as the UNet takes them,
in place of images; then nothing is decoded and x̂0 is never predicted. It may be called on a second CUDA stream.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from fastpref.errors import UserError
from fastpref.models.latent_reward import LatentRewardModel, text_rows
from fastpref.models.one_step import LatentDecoder
from fastpref.models.policy import Conditioning
from fastpref.models.prompt_book import PromptBook
from fastpref.models.step_preference import ClipScorer
from fastpref.models.work import Work


class PreferenceScorer:
    """A preference model of pictures (step-aware, folded or plain) that looks at the decoded x̂0.

    Args:
        decoder: the VAE's, or a small one that stands in for it.
        exact: with a small decoder, the same model behind the VAE's, to measure :func:`agreement` with.
    """

    needs_x0 = True

    def __init__(
        self, model: ClipScorer, decoder: LatentDecoder, work: Work, exact: PreferenceScorer | None = None
    ) -> None:
        self.model, self.decoder, self.work, self.exact = model, decoder, work, exact
        # On the model's device: reading them back would make the host wait for the scoring stream.
        self._known: dict[str, Tensor] = {} if exact is None else exact._known

    @torch.no_grad()
    def score(self, latents: Tensor, x0: Tensor | None, t: int, prompts: Sequence[str]) -> Tensor:
        """(n,) scores; see :class:`fastpref.rollout.scoring.StepScorer`. x0 is decoded in the decoder's chunks."""
        assert x0 is not None
        rows = self.rows(x0, t)
        self.work.scorer_forwards += len(x0)
        return self.model.score(rows, self._texts(prompts)).to(x0.device)

    @torch.no_grad()
    def rows(self, x0: Tensor, t: int) -> Tensor:
        """(n, E) what the model sees in ``x0`` (n, C, h, w), decoded in the decoder's chunks."""
        parts = x0.split(self.decoder.chunk)
        return torch.cat([self.model.embed_images(self.decoder.images(p), torch.full((len(p),), t)) for p in parts])

    def _texts(self, prompts: Sequence[str]) -> Tensor:
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._known:  # each alone, as in PromptBook: a resumed run meets them in another order
                self._known[prompt] = self.model.embed_texts([prompt])[0]
                self.work.text_forwards += 1
        return torch.stack([self._known[prompt] for prompt in prompts])


class LatentScorer:
    """A latent reward model that looks at the noisy candidates; no VAE, no x̂0."""

    needs_x0 = False

    def __init__(self, model: LatentRewardModel, book: PromptBook, work: Work) -> None:
        self.model, self.book, self.work = model, book, work
        self._last: tuple[list[str], Conditioning, Tensor] | None = None
        self._empty: Conditioning | None = None

    @torch.no_grad()
    def score(self, latents: Tensor, x0: Tensor | None, t: int, prompts: Sequence[str]) -> Tensor:
        """(n,) scores; see :class:`fastpref.rollout.scoring.StepScorer`."""
        model, (conditioning, texts) = self.model, self._prompts(list(prompts))
        if self._empty is None:
            self._empty = self.book.conditioning([""])
        timesteps = torch.full((len(latents),), t, device=model.device)
        rows = model.embed_latents(latents.to(model.device), timesteps, conditioning, self._empty)
        self.work.scorer_forwards += model.rows(len(latents))
        return model.score(rows, texts).to(latents.device)

    def _prompts(self, prompts: list[str]) -> tuple[Conditioning, Tensor]:
        """What the model is told of the prompts; kept for the next call, for a rollout's steps have the same ones."""
        if self._last is None or self._last[0] != prompts:
            conditioning = self.book.conditioning(prompts)
            rows = text_rows(conditioning, prompts, self.book.texts.tokenizers[0])
            self._last = prompts, conditioning, self.model.embed_texts(rows)
        return self._last[1:]


class CallableScorer:
    """Any Python function of pictures or latents, as this module's first lines say.

    Args:
        decoder: None: ``fn`` gets noisy latents.
        name: what the user called it, for error messages.
    """

    def __init__(self, fn: Callable[..., Any], decoder: LatentDecoder | None, work: Work, name: str = "scorer") -> None:
        self.fn, self.decoder, self.work, self.name = fn, decoder, work, name
        self.needs_x0 = decoder is not None

    @torch.no_grad()
    def score(self, latents: Tensor, x0: Tensor | None, t: int, prompts: Sequence[str]) -> Tensor:
        """(n,) scores; see :class:`fastpref.rollout.scoring.StepScorer`.

        Raises:
            UserError: the function fails, or returns something else than n floats. NaN is passed on.
        """
        if self.decoder is None:
            return self._call(latents, prompts, t)
        assert x0 is not None
        parts, start = [], 0
        for part in x0.split(self.decoder.chunk):
            images = (self.decoder.images(part) / 2 + 0.5).clamp(0, 1)
            parts.append(self._call(images, prompts[start : start + len(part)], t))
            start += len(part)
        return torch.cat(parts).to(latents.device)

    def _call(self, inputs: Tensor, prompts: Sequence[str], t: int) -> Tensor:
        try:
            result = self.fn(inputs, list(prompts), t)
            found = result if isinstance(result, Tensor) else torch.as_tensor(result)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            what = f"the scorer failed with {type(error).__name__}: {error}"
            raise UserError(what, self.name, f"at {frame.filename}, line {frame.lineno}") from error
        self.work.scorer_forwards += len(inputs)
        if found.shape != (len(inputs),) or not found.is_floating_point():
            got = f"{tuple(found.shape)} of {str(found.dtype).removeprefix('torch.')}"
            what = f"the scorer returned {got}, must be {(len(inputs),)} of floats"
            raise UserError(what, self.name, "return one float a candidate")
        return found.detach().to(inputs.device, torch.promote_types(found.dtype, torch.float32))


def agreement(exact: Tensor, approximate: Tensor) -> dict[str, float]:
    """How far an approximate scorer chooses as the exact one does.

    Args:
        exact, approximate: (N, K) scores of N pools of K candidates. Pools with a NaN are left out.

    Returns:
        ``pools``, how many were compared; ``same_pair``, the share whose best and worst candidate are both the same;
        ``spearman``, the mean rank correlation within a pool (pools of equal scores left out). NaN where there is none.
    """
    one, two = exact.double().cpu().numpy(), approximate.double().cpu().numpy()
    known = np.isfinite(one).all(axis=1) & np.isfinite(two).all(axis=1)
    one, two = one[known], two[known]
    same = (one.argmax(1) == two.argmax(1)) & (one.argmin(1) == two.argmin(1))
    ranks = [rankdata(scores, axis=1) - (scores.shape[1] + 1) / 2 for scores in (one, two)]
    spread = np.sqrt((ranks[0] ** 2).sum(1) * (ranks[1] ** 2).sum(1))
    correlation = (ranks[0] * ranks[1]).sum(1)[spread > 0] / spread[spread > 0]
    return {
        "pools": float(len(one)),
        "same_pair": float(same.mean()) if len(one) else float("nan"),
        "spearman": float(correlation.mean()) if len(correlation) else float("nan"),
    }
