"""What a run cost, in rows of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass


@dataclass
class Work:
    """Rows that went through each model; guidance makes two UNet rows of a sample, winner and loser are two samples.

    The order of the fields is that of the counts in a checkpoint: append, never insert.
    """

    unet_forwards: int = 0
    unet_recomputed: int = 0
    unet_backwards: int = 0
    vae_encodes: int = 0
    vae_decodes: int = 0
    text_forwards: int = 0
    scorer_forwards: int = 0

    @classmethod
    def sum(cls, parts: Sequence[Work]) -> Work:
        """What several processes did."""
        return cls(*(sum(counts) for counts in zip(*map(astuple, parts), strict=True)))
