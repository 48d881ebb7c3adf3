"""A store of very many records opens at once and stays small: only its index is read."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from large_store import make_large_store  # noqa: E402

from fastpref.data.sampling import Sampler  # noqa: E402
from fastpref.data.store import Store  # noqa: E402

RECORDS = 200_000


def test_opening_and_sampling_do_not_grow_with_the_records(sdxl_store: Path, tmp_path: Path) -> None:
    """A fifth of a million: CPU seconds of opening, and a batch of a late epoch without those before it."""
    path = make_large_store(sdxl_store, tmp_path / "large", RECORDS)
    began = time.process_time()
    store = Store.open(path)
    assert time.process_time() - began < 1.0
    assert len(store) == RECORDS
    sampler = Sampler(store.bucket_ids, batch_size=512, group_size=8, seed=1)
    began = time.process_time()
    plan = sampler.batch(1000 * sampler.batches_per_epoch + 7)
    assert time.process_time() - began < 0.2
    assert plan.epoch == 1000 and len(set(plan.indices.tolist())) == 512
    small, large = Store.open(sdxl_store), store.batch(np.arange(4))
    assert large.latents_w.shape[1:] == small.batch([0]).latents_w.shape[1:]
    assert large.time_ids_l is not None and large.time_ids_l.tolist() == [[512, 512, 0, 0, 32, 32]] * 4
