"""label_noise: which pairs are exchanged, and that everything that belongs to a side goes with it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastpref.config import Config
from fastpref.data.store import StoreBatch
from fastpref.train.batch import BatchBuilder, PairBatch, _exchange
from fastpref.train.job import TrainJob

MakeConfig = Callable[..., Config]


def built(config: Config, step: int = 0) -> tuple[BatchBuilder, PairBatch, torch.Tensor, tuple[torch.Tensor, ...]]:
    job = TrainJob.open(config)
    plan = job.trainer.sampler.batch(step)
    batches = job.trainer.batches
    everything = slice(0, config.batch_size)
    return batches, batches.build(plan, everything), torch.from_numpy(plan.indices), batches.embeddings(plan)


@pytest.mark.parametrize("seed", [0, 1])
def test_mislabelled_pairs_are_exchanged_whole_and_the_others_are_untouched(sd15_config: MakeConfig, seed: int) -> None:
    common = ["method=rpo", f"seed={seed}", "batch_size=16"]
    _, clean, ids, embeddings = built(sd15_config(*common))
    batches, noisy, _, exchanged = built(sd15_config(*common, "label_noise=0.4"))
    wrong = batches._mislabelled(ids)
    assert 0 < wrong.sum() < 16
    rows = torch.arange(16)
    source = torch.cat([torch.where(wrong, rows + 16, rows), torch.where(wrong, rows, rows + 16)])
    assert torch.equal(noisy.noisy, clean.noisy[source])
    assert torch.equal(noisy.timesteps, clean.timesteps)
    assert torch.equal(torch.cat(exchanged), torch.cat(embeddings)[source])


def test_sizes_and_the_posterior_go_with_the_picture() -> None:
    wrong = torch.tensor([True, False])
    fields = {f"{name}_{side}": torch.rand(2, 3) for name in ("posterior_std", "time_ids") for side in "wl"}
    rest = dict.fromkeys(["pooled_prompt_embeds", "clip_text", "clip_image_w", "clip_image_l"])
    latents = torch.rand(2, 2, 4, 8, 8)
    pairs = StoreBatch(*latents, prompt_embeds=torch.rand(2, 3, 4), label=torch.ones(2), **fields, **rest)
    found = _exchange(pairs, wrong, ("latents", "posterior_std", "time_ids"))
    assert torch.equal(found.latents_w, torch.stack([latents[1, 0], latents[0, 1]]))
    for name in ("posterior_std", "time_ids"):
        winner, loser = fields[f"{name}_w"], fields[f"{name}_l"]
        assert torch.equal(getattr(found, f"{name}_w"), torch.stack([loser[0], winner[1]]))
        assert torch.equal(getattr(found, f"{name}_l"), torch.stack([winner[0], loser[1]]))
    assert found.prompt_embeds is pairs.prompt_embeds


def test_a_wrong_label_stays_with_its_pair_and_the_share_is_the_one_asked_for(one_level_config: MakeConfig) -> None:
    batches = TrainJob.open(one_level_config("method=dpo", "label_noise=0.3")).trainer.batches
    ids = torch.arange(20_000)
    wrong = batches._mislabelled(ids)
    assert abs(float(wrong.double().mean()) - 0.3) < 4 * (0.3 * 0.7 / 20_000) ** 0.5
    order = torch.randperm(20_000)
    assert torch.equal(batches._mislabelled(ids[order]), wrong[order])
    other = TrainJob.open(one_level_config("method=dpo", "label_noise=0.3", "seed=5")).trainer.batches
    assert abs(float((other._mislabelled(ids) == wrong).double().mean()) - (0.3**2 + 0.7**2)) < 0.02


def test_sft_on_wrong_labels_alone_learns_from_the_losers(sd15_config: MakeConfig) -> None:
    _, clean, _, _ = built(sd15_config("method=dpo"))
    job = TrainJob.open(sd15_config("method=sft", "label_noise=1.0"))
    wrong = job.trainer.batches.build(job.trainer.sampler.batch(0), slice(0, 8))
    assert torch.equal(wrong.noisy, clean.noisy[8:])
