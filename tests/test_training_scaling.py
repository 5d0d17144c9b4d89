"""A law is found again from points that follow it, and says how sure it is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fortpoint.errors import InvalidRequest
from fortpoint.features.training.scaling import fit

WIDTHS = (576, 1152, 2304, 4608, 9216)
TOKENS = (2.5e5, 5e5, 1e6, 2e6, 4e6)


def points(noise: float, seed: int = 0) -> tuple[list[float], list[float], list[float]]:
    random = np.random.default_rng(seed)
    grid = list(itertools.product(WIDTHS, TOKENS))
    widths, tokens = [float(n) for n, _ in grid], [t for _, t in grid]
    fvus = [
        (0.05 + (20 / n) ** 0.5 + (2e4 / t) ** 0.8) * np.exp(noise * random.standard_normal())
        for n, t in grid
    ]
    return widths, tokens, fvus


def test_fit_of_exact_points_finds_their_law() -> None:
    law = fit(*points(0.0), n_draws=3)
    assert law.alpha == pytest.approx(0.5, rel=0.02)
    assert law.beta == pytest.approx(0.8, rel=0.02)
    assert law.floor == pytest.approx(0.05, rel=0.05)
    expected = 0.05 + (20 / 18_432) ** 0.5 + (2e4 / 2e7) ** 0.8
    assert law.fvu(18_432, 2e7) == pytest.approx(expected, rel=0.02)


def test_fit_of_noisy_points_covers_the_truth_with_its_interval() -> None:
    expected = 0.05 + (20 / 18_432) ** 0.5 + (2e4 / 8e6) ** 0.8
    covered = 0
    for seed in range(10):
        low, high = fit(*points(0.02, seed), n_draws=60, seed=seed).interval(18_432, 8e6)
        assert low < high < 2 * low
        covered += low <= expected <= high
    assert covered >= 7


def test_fit_is_not_led_away_by_one_failed_run() -> None:
    widths, tokens, fvus = points(0.003)
    fvus[7] *= 2
    assert fit(widths, tokens, fvus, n_draws=3).alpha == pytest.approx(0.5, rel=0.2)


@pytest.mark.parametrize(
    ("widths", "tokens", "fvus"),
    [
        ([576.0], [1e6], [0.2]),
        ([576.0] * 9, list(np.linspace(1e5, 1e6, 9)), [0.2] * 9),
        ([576.0, 1152.0, 2304.0] * 3, [1e5, 2e5, 3e5] * 3, [0.2] * 8 + [float("nan")]),
    ],
)
def test_fit_of_points_that_bear_no_law_is_refused(
    widths: list[float], tokens: list[float], fvus: list[float]
) -> None:
    with pytest.raises(InvalidRequest):
        fit(widths, tokens, fvus)
