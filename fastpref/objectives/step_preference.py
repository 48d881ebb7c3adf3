"""The loss of the step-aware preference model: two-way cross-entropy with soft labels (SPO, arXiv 2406.04314).

For a pair with scores s_w, s_l and label p (the probability that the winner is preferred, one half for a tie):

    l = -p·log σ(s_w - s_l) - (1 - p)·log σ(s_l - s_w) - H(p)

H(p), the entropy of the label, makes zero the least value for ties too. The batch's loss is Σ w_i·l_i, where w_i is
proportional to 1 / number of pairs with that prompt and sums to 1 over the global batch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def preference_cross_entropy(score_w: Tensor, score_l: Tensor, label: Tensor) -> Tensor:
    """(n,) losses of n pairs, each with its graph; ``label`` (n,) in [0, 1]."""
    margin = score_w - score_l
    entropy = torch.special.entr(label) + torch.special.entr(1 - label)
    return -label * logsigmoid(margin) - (1 - label) * logsigmoid(-margin) - entropy


def prompt_weights(pairs_per_prompt: Tensor) -> Tensor:
    """(B,) fp64 weights that sum to 1, proportional to 1 / ``pairs_per_prompt`` (B,)."""
    weights = pairs_per_prompt.double().reciprocal()
    return weights / weights.sum()
