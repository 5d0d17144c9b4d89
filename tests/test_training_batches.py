"""Batches come in an order that can be gone on with, and leave the sinks out."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

import harvested
from fortpoint.errors import ModelError
from fortpoint.features.activations import ActivationStore
from fortpoint.features.training.batches import Batches, Scaling, measure_scaling, sample


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return harvested.store(tmp_path_factory.mktemp("store") / "harvest", n_shards=20)


def batches(store: ActivationStore, batch: int = 128, **changes: int) -> Batches:
    scaling = measure_scaling(store, harvested.LAYER, store.shards)
    return Batches(store, harvested.LAYER, store.shards, batch, scaling, **changes)


def test_scaling_makes_the_mean_zero_and_the_mean_square_one(store: ActivationStore) -> None:
    x = np.concatenate(list(islice(batches(store).since(0), 60)))
    assert np.abs(x.mean(axis=0)).max() < 0.1
    assert np.square(x).mean() == pytest.approx(1, abs=0.05)


def test_batches_from_a_step_on_are_the_same_as_from_the_start(store: ActivationStore) -> None:
    made = batches(store)
    whole = list(islice(made.since(0), made.per_epoch + 40))
    later = list(islice(made.since(130), len(whole) - 130))
    for one, same in zip(whole[130:], later, strict=True):
        np.testing.assert_array_equal(one, same)


def test_batches_of_an_epoch_hold_no_row_twice_and_no_sink(store: ActivationStore) -> None:
    made = batches(store)
    rows = np.concatenate(list(islice(made.since(0), made.per_epoch)))
    assert len(np.unique(rows, axis=0)) == len(rows)
    assert np.linalg.norm(rows, axis=1).max() < 100
    assert len(rows) > 0.98 * made.n_tokens


def test_batches_of_another_epoch_come_in_another_order(store: ActivationStore) -> None:
    made = batches(store)
    first = next(made.since(0))
    again = next(made.since(made.per_epoch))
    assert not np.array_equal(first, again)


def test_ranks_share_the_shards_without_overlap(store: ActivationStore) -> None:
    rows = [
        np.concatenate(list(islice(one.since(0), one.per_epoch)))
        for one in (batches(store, rank=0, n_ranks=2), batches(store, rank=1, n_ranks=2))
    ]
    together = np.concatenate(rows)
    assert len(np.unique(together, axis=0)) == len(together)


def test_batches_larger_than_the_text_are_refused(store: ActivationStore) -> None:
    with pytest.raises(ModelError, match="harvest more"):
        batches(store, batch=65_536)


def test_scaling_of_activations_that_do_not_vary_is_refused(
    store: ActivationStore, tmp_path: Path
) -> None:
    from fortpoint.features import activations

    activations.begin(tmp_path / "flat", harvested.plan(256))
    places = {name: np.arange(256) % 64 for name in ("tokens", "document", "position", "role")}
    flat = np.ones((256, harvested.D_MODEL), np.float32)
    activations.write_shard(tmp_path / "flat", 0, places, {harvested.LAYER: flat})
    flat_store = ActivationStore(tmp_path / "flat")
    with pytest.raises(ModelError, match="nothing to learn"):
        measure_scaling(flat_store, harvested.LAYER, flat_store.shards)


def test_unscaled_rows_are_those_of_the_store(store: ActivationStore) -> None:
    nothing = Scaling(np.zeros(harvested.D_MODEL, np.float32), 1.0)
    made = Batches(store, harvested.LAYER, store.shards, 128, nothing)
    row = next(made.since(0))[0]
    assert any(
        (np.abs(harvested.planted(2048, seed=n)[0] - row).max(axis=1) < 0.05).any()
        for n in range(20)
    )


def test_sample_takes_rows_of_every_shard_and_no_sink(store: ActivationStore) -> None:
    rows = sample(store, harvested.LAYER, store.shards, n_rows=200)
    assert len(rows) == 200
    assert np.linalg.norm(rows, axis=1).max() < 100
    assert len(np.unique(rows, axis=0)) == 200
