"""Which features are active: rough products of bytes say where to look, exact ones decide."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fortpoint.features.training import kernels
from fortpoint.features.training.settings import Settings
from fortpoint.features.training.trainer import Trainer

D_IN, D_SAE, BATCH, K = 24, 203, 32, 7  # a width that is no multiple of eight

Floats = NDArray[np.float32]


def rows(n: int, seed: int, d: int = D_IN) -> Floats:
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def quantised(x: Floats) -> tuple[NDArray[np.int8], Floats]:
    found, scales = np.empty(x.shape, np.int8), np.empty(len(x), np.float32)
    kernels.quantise(x, found, scales, 0, len(x))
    return found, scales


def test_quantise_is_within_half_a_step_of_every_number() -> None:
    x = rows(50, 0) * np.float32(1e3)
    found, scales = quantised(x)
    assert np.abs(found).max() == 127
    assert np.abs(found * scales[:, None] - x).max() <= 0.51 * scales.max()


def test_quantise_of_a_row_of_zeros_is_zeros() -> None:
    found, scales = quantised(np.zeros((2, D_IN), np.float32))
    assert not found.any()
    assert not scales.any()


def test_find_over_finds_what_a_dense_comparison_finds() -> None:
    x, weights, lifts = rows(BATCH, 1), rows(D_SAE, 2), rows(1, 3, D_SAE)[0] - 2
    (x8, x_scales), (w8, w_scales) = quantised(x), quantised(weights)
    sums = x8.astype(np.int32) @ w8.T.astype(np.int32)
    cols = np.empty((BATCH, D_SAE), np.int32)
    counts = np.zeros(BATCH, np.int64)
    kernels.find_over(sums, x_scales, w_scales, lifts, cols, counts, 0, BATCH)
    dense = sums * w_scales * x_scales[:, None] + lifts > 0
    found = [cols[i, : counts[i]].tolist() for i in range(BATCH)]
    assert found == [np.flatnonzero(row).tolist() for row in dense]
    assert 0 < counts.sum() < BATCH * D_SAE


def test_find_over_finds_every_feature_where_all_are_over() -> None:
    cols, counts = np.empty((1, D_SAE), np.int32), np.zeros(1, np.int64)
    ones = np.ones(D_SAE, np.float32)
    kernels.find_over(np.ones((1, D_SAE), np.int32), ones[:1], ones, ones, cols, counts, 0, 1)
    assert cols[0].tolist() == list(range(D_SAE))
    assert counts[0] == D_SAE


@pytest.mark.parametrize("floor", [0.0, 1.0, 1e6])
def test_find_most_finds_as_many_whatever_the_guess(floor: float) -> None:
    sums = np.random.default_rng(4).permutation(BATCH * D_SAE).reshape(BATCH, D_SAE)
    sums = (sums - sums.mean()).astype(np.int32)
    ones, bias = np.ones(D_SAE, np.float32), np.zeros(D_SAE, np.float32)
    cols, counts = np.empty((BATCH, D_SAE), np.int32), np.zeros(BATCH, np.int64)
    floors = np.full(BATCH, floor, np.float32)
    kernels.find_most(sums, ones[:BATCH], ones, bias, K, floors, cols, counts, 0, BATCH)
    assert (counts == K).all()
    for i in range(BATCH):
        assert cols[i, :K].tolist() == sorted(np.argsort(-sums[i])[:K].tolist())


def test_keep_largest_keeps_so_many_of_equal_ones() -> None:
    values = np.array([[1, 2, 2, 2, 3]], np.float32)
    cols, counts = np.arange(5, dtype=np.int32)[None].copy(), np.array([5])
    kernels.keep_largest(3, cols, values, counts, 0, 1)
    assert (cols[0, :3].tolist(), values[0, :3].tolist()) == ([1, 2, 4], [2, 2, 3])
    assert counts[0] == 3


def active(architecture: str, x: Floats) -> NDArray[np.bool_]:
    """``[batch, d_sae]``: what a trainer that has learned a little finds active."""
    settings = Settings(architecture=architecture, d_sae=D_SAE, k=K, batch=BATCH, warmup_steps=0)  # type: ignore[arg-type]
    trainer = Trainer(settings, D_IN, 100, n_threads=2)
    for seed in range(8):
        trainer.step(rows(BATCH, 100 + seed))
    limit = trainer._find(x - trainer.parameters["b_dec"])
    pairs = trainer._pairs
    if limit > 0:
        kernels.keep_from(limit, pairs.cols, pairs.values, pairs.counts, 0, BATCH)
    found = np.zeros((BATCH, D_SAE), np.bool_)
    for i in range(BATCH):
        found[i, pairs.cols[i, : pairs.counts[i]]] = True
    z = (x - trainer.parameters["b_dec"]) @ trainer.parameters["W_enc"].T
    acts = torch.from_numpy(np.maximum(z + trainer.parameters["b_enc"], 0))
    flat = acts if architecture == "topk" else acts.reshape(1, -1)
    best = flat.topk(K if architecture == "topk" else K * BATCH, dim=1).indices
    exact = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, best, value=True)
    trainer.close()
    assert found.sum() == K * BATCH
    return found & ~exact.reshape(acts.shape).numpy()


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_features_found_are_the_most_active_ones(architecture: str) -> None:
    wrong = active(architecture, rows(BATCH, 7))
    assert wrong.sum() <= 0.01 * K * BATCH
