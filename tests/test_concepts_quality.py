"""The figures of a concept's quality are those of the textbooks."""

from __future__ import annotations

import numpy as np
import pytest

from fortpoint.features.concepts.quality import auroc, auroc_interval, measure, separation, share


def test_auroc_counts_pairs_and_halves_ties() -> None:
    positives, others = np.array([1.0, 2.0, 3.0]), np.array([0.0, 2.0])
    pairs = [(p > o) + 0.5 * (p == o) for p in positives for o in others]
    assert auroc(positives, others) == pytest.approx(np.mean(pairs))


def test_auroc_knows_no_unit() -> None:
    source = np.random.default_rng(0)
    positives, others = source.normal(1, 1, 40), source.normal(0, 1, 60)
    assert auroc(np.exp(positives), np.exp(others)) == auroc(positives, others)
    assert auroc(others, positives) == pytest.approx(1 - auroc(positives, others))


def test_bootstrap_interval_holds_the_truth_as_often_as_it_says() -> None:
    truth, held = 0.760250, 0  # normals one standard deviation apart
    for seed in range(60):
        source = np.random.default_rng(seed)
        found = auroc_interval(source.normal(1, 1, 40), source.normal(0, 1, 60), seed)
        held += found.low <= truth <= found.high
    assert held >= 52


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(10, 10, 0.7225, 1.0), (0, 20, 0.0, 0.1611), (81, 263, 0.2553, 0.3662)],
)
def test_share_has_wilsons_interval(hits: int, n: int, low: float, high: float) -> None:
    """The last from Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    found = share(hits, n)
    assert found.value == hits / n
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


def test_quality_counts_what_is_over_the_threshold() -> None:
    positives, others = np.array([3.0, 1.0, 2.0, 2.0]), np.array([0.0, 1.0, 2.0, 2.5])
    found = measure(positives, others, threshold=2.0)
    assert (found.recall.value, found.false_positive_rate.value) == (0.25, 0.25)
    assert (found.n_positives, found.n_others) == (4, 4)
    assert found.auroc.low <= found.auroc.value <= found.auroc.high


def test_separation_grows_where_the_auroc_is_full() -> None:
    source = np.random.default_rng(1)
    others = source.normal(0, 1, 50)
    near, far = 8 + source.normal(0, 1, 10), 16 + source.normal(0, 1, 10)
    assert auroc(near, others) == auroc(far, others) == 1.0
    assert separation(far, others) > separation(near, others) + 5
