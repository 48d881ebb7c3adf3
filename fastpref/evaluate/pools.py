"""Step pools of a run of spo or lpo: what its rollouts logged, and pictures of the candidates.

``rollouts.jsonl`` has an object a round. ``pools/round-NNNNN.safetensors`` holds what was scored of a round's first
prompt: of S segments with K candidates ``latents (S, K, C, h, w)``, ``scores (S, K)``, ``chosen (S,)``, ``kept (S,)``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fastpref.errors import UserError
from fastpref.evaluate.logs import number_or_nan, read_rows
from fastpref.evaluate.pool_sheet import PoolColumn, pool_sheet
from fastpref.evaluate.sheets import save_png
from fastpref.models.loading import load_vae, resolve_device, resolve_model_dir
from fastpref.models.one_step import LatentDecoder
from fastpref.models.work import Work

ROLLOUTS = "rollouts.jsonl"
POOLS = "pools"
MAX_COLUMNS, MAX_ROWS = 32, 8  # of a picture: what exceeds them is left out, evenly
_CHUNK = 16  # latents per decode
_PHASES = ("rollout", "scoring", "training")
_AGAIN = "delete it, the others are shown without it"


@dataclass(frozen=True)
class Round:
    """A rollout and what was kept of it; the lists have an entry a segment, in the order of denoising."""

    number: int
    step: int  # optimizer steps before it
    pools: int
    pairs_kept: int
    dropped: int  # pools without a finite score for every candidate
    timesteps: list[float]
    score_mean: list[float]
    score_best: list[float]
    score_worst: list[float]
    gap_median: list[float]
    gap_needed: list[float]  # a pair is kept above it
    kept_share: list[float]
    unet_forwards: int
    seconds: dict[str, float]  # rollout, scoring, training; NaN while it is not done


@dataclass(frozen=True)
class Pool:
    """The first prompt's candidates of one round."""

    number: int
    prompt: str
    method: str
    timesteps: list[int]
    latents: torch.Tensor  # (S, K, C, h, w) fp32
    scores: torch.Tensor  # (S, K)
    chosen: list[int]
    kept: list[bool]

    def column(self, segment: int, images: Sequence[Image.Image], shown: Sequence[int]) -> PoolColumn:
        """A segment of the picture, of whose candidates ``shown`` are seen; ``images`` are theirs."""
        winner, loser = (None if mark is None else shown.index(mark) for mark in extremes(self.scores[segment]))
        timestep, chosen = self.timesteps[segment], shown.index(self.chosen[segment])
        return PoolColumn(
            f"t = {timestep}" if timestep else "finished", images, winner, loser, chosen, self.kept[segment]
        )

    def shown(self, segment: int) -> list[int]:
        """At most ``MAX_ROWS`` candidates as drawn: those with a mark and the first of the others."""
        marked = [mark for mark in (*extremes(self.scores[segment]), self.chosen[segment]) if mark is not None]
        order = list(dict.fromkeys([*marked, *range(self.scores.shape[1])]))
        return sorted(order[:MAX_ROWS])


def extremes(scores: torch.Tensor) -> tuple[int | None, int | None]:
    """Winner and loser of a pool's scores (K,): the highest and the lowest; neither if all are equal or one is NaN."""
    if not torch.isfinite(scores).all() or scores.max() == scores.min():
        return None, None
    return int(scores.argmax()), int(scores.argmin())


def read_rounds(run_dir: Path) -> list[Round]:
    """The finished rollouts of a run, first to last; empty without ``rollouts.jsonl``.

    Raises:
        UserError: a damaged line, other than a last one cut short.
    """
    path = run_dir / ROLLOUTS
    rounds = []
    for row in read_rows(path, "round"):
        try:
            rounds.append(_round(row))
        except (KeyError, TypeError, ValueError) as error:
            what = f"round {row['round']} lacks something: {error}"
            raise UserError(what, str(path), "remove its line") from None
    return rounds


def totals(rounds: Sequence[Round]) -> dict[str, float]:
    """What the rounds come to, under the names of ``summary.json``'s ``stepwise``."""
    sums: dict[str, float] = {
        "rounds": len(rounds),
        "pools": sum(r.pools for r in rounds),
        "pairs_kept": sum(r.pairs_kept for r in rounds),
        "pools_dropped_nan": sum(r.dropped for r in rounds),
        "rollout_unet_forwards": sum(r.unet_forwards for r in rounds),
    }
    for phase in _PHASES:
        done = [r.seconds[phase] for r in rounds if math.isfinite(r.seconds[phase])]
        sums[f"seconds_{phase}"] = sum(done)
    return sums


def read_pool(path: Path) -> Pool:
    """One file of ``pools/``; a UserError if it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            latents, scores, chosen, kept = (file.get_tensor(k) for k in ("latents", "scores", "chosen", "kept"))
        timesteps = [int(t) for t in json.loads(meta["timesteps"])]
        number, prompt = int(path.stem.removeprefix("round-")), meta["prompt"]
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UserError("cannot read the pools", str(path), f"{' '.join(str(error).split())[:200]}; {_AGAIN}") from None
    segments, fits = len(timesteps), latents.ndim == 5 and scores.shape == latents.shape[:2]
    if not fits or not segments or not (latents.shape[0] == len(chosen) == len(kept) == segments):
        raise UserError("the pools' tensors do not fit together", str(path), _AGAIN)
    if not 0 <= int(chosen.min()) <= int(chosen.max()) < scores.shape[1]:
        raise UserError("the pools' values are out of bounds", str(path), _AGAIN)
    flags = [bool(flag) for flag in kept]
    return Pool(number, prompt, meta.get("method", "spo"), timesteps, latents, scores, chosen.tolist(), flags)


def draw_pools(run_dir: Path, model: str, prediction_type: str = "auto") -> tuple[list[tuple[Pool, Path]], str]:
    """Draw ``samples/pools/round-NNNNN.png`` of every file in ``pools/`` whose picture is missing or older.

    Args:
        model, prediction_type: the config's; the model's VAE decodes the latents.

    Returns:
        Pools and pictures, first round to last, and why some were not drawn (their model is not there), if so.

    Raises:
        UserError: a damaged file, a VAE that it does not fit, or a directory that cannot be written.
    """
    decoder: LatentDecoder | None = None
    drawn, reason = [], ""
    for file in sorted((run_dir / POOLS).glob("round-*.safetensors")):
        pool, picture = read_pool(file), run_dir / "samples" / POOLS / f"{file.stem}.png"
        if not picture.is_file() or picture.stat().st_mtime_ns < file.stat().st_mtime_ns:
            try:
                decoder = decoder or _decoder(model, prediction_type)
            except UserError as error:
                reason = str(error)
                continue
            save_png(picture_of(pool, decoder, file), picture)
        drawn.append((pool, picture))
    return drawn, reason


def picture_of(pool: Pool, decoder: LatentDecoder, where: Path) -> Image.Image:
    """The pools of one round as a picture: a column a denoising step, a row a candidate."""
    if pool.latents.shape[2] != decoder.vae.config.latent_channels:
        what = f"latents of {pool.latents.shape[2]} channels, the VAE takes {decoder.vae.config.latent_channels}"
        raise UserError(what, str(where), "set model in config.yaml to the one that was trained")
    segments = _evenly(len(pool.timesteps), MAX_COLUMNS)
    shown = [pool.shown(segment) for segment in segments]
    chosen = torch.cat([pool.latents[s][rows] for s, rows in zip(segments, shown, strict=True)])
    images = iter(to_pictures(decoder, chosen))
    columns = [
        pool.column(s, [next(images) for _ in rows], rows) for s, rows in zip(segments, shown, strict=True)
    ]  # fmt: skip
    return pool_sheet(columns, pool.prompt, noisy=pool.method == "lpo")


def to_pictures(decoder: LatentDecoder, latents: torch.Tensor) -> list[Image.Image]:
    """Latents (N, C, h, w) decoded; what is not finite counts as zero."""
    pixels = (
        decoder.images(torch.nan_to_num(latents, 0.0, 0.0, 0.0).to(decoder.vae.device))
        .float()
        .add(1)
        .mul(127.5)
        .round()
        .clamp(0, 255)
    )
    return [Image.fromarray(image) for image in pixels.byte().permute(0, 2, 3, 1).cpu().numpy()]


def _decoder(model: str, prediction_type: str) -> LatentDecoder:
    vae: Any = load_vae(resolve_model_dir(model, prediction_type), "auto", resolve_device("auto"), judged_in="bf16")
    return LatentDecoder(vae, _CHUNK, Work())


def _round(row: dict[str, Any]) -> Round:
    timesteps = [float(t) for t in row["timesteps"]]

    def curve(name: str) -> list[float]:
        values = [number_or_nan(value) for value in row[name]]
        if len(values) != len(timesteps) or not timesteps:
            raise ValueError(f"{name} has {len(values)} values for {len(timesteps)} timesteps")
        return values

    return Round(
        number=int(row["round"]),
        step=int(row["step"]),
        pools=int(row["pools"]),
        pairs_kept=int(row["pairs_kept"]),
        dropped=int(row.get("pools_dropped_nan") or 0),
        timesteps=timesteps,
        score_mean=curve("score_mean"),
        score_best=curve("score_best"),
        score_worst=curve("score_worst"),
        gap_median=curve("gap_median"),
        gap_needed=[2 * math.atanh(theta) for theta in curve("threshold")],
        kept_share=curve("kept_share"),
        unet_forwards=int(row.get("unet_forwards") or 0),
        seconds={phase: number_or_nan(row.get(f"seconds_{phase}")) for phase in _PHASES},
    )


def _evenly(count: int, most: int) -> list[int]:
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]
