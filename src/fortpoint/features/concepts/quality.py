"""How well a concept is told apart, from texts that its direction was not made of.

    quality = measure(positives, others, threshold)   # scores of held-out texts
    quality.auroc.value, quality.auroc.low, quality.recall.low

An AUROC's interval is bootstrapped over texts. A handful of texts that are all on the right side
leave nothing to bootstrap, so the shares at the threshold carry Wilson's interval, which does
not end at 1 for ten of ten.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]

_DRAWS = 2000
_Z = 1.959964  # two-sided 95 %


class Interval(msgspec.Struct, frozen=True):
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


class Quality(msgspec.Struct, frozen=True):
    """Over the threshold: ``recall`` of positives, ``false_positive_rate`` of all others."""

    auroc: Interval
    recall: Interval
    false_positive_rate: Interval
    n_positives: int
    n_others: int


def measure(positives: Doubles, others: Doubles, threshold: float, seed: int = 0) -> Quality:
    """Scores of held-out texts; those over ``threshold`` are taken for the concept."""
    return Quality(
        auroc=auroc_interval(positives, others, seed),
        recall=share(int((positives > threshold).sum()), len(positives)),
        false_positive_rate=share(int((others > threshold).sum()), len(others)),
        n_positives=len(positives),
        n_others=len(others),
    )


def auroc(positives: Doubles, others: Doubles) -> float:
    """How often a positive scores higher than another text; ties count half."""
    ordered = np.sort(others)
    below = np.searchsorted(ordered, positives, "left")
    ties = np.searchsorted(ordered, positives, "right") - below
    return float((below + 0.5 * ties).mean() / len(others))


def auroc_interval(positives: Doubles, others: Doubles, seed: int = 0) -> Interval:
    """Percentile bootstrap, both sides drawn anew."""
    source = np.random.default_rng(seed)
    drawn = [
        auroc(source.choice(positives, len(positives)), source.choice(others, len(others)))
        for _ in range(_DRAWS)
    ]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Interval(auroc(positives, others), float(low), float(high))


def share(n_hits: int, n: int) -> Interval:
    """Wilson's score interval of ``n_hits`` in ``n``."""
    p = n_hits / n
    middle = p + _Z**2 / (2 * n)
    half = _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    scale = 1 + _Z**2 / n
    return Interval(p, max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale))


def separation(positives: Doubles, others: Doubles) -> float:
    """Distance of the means in pooled standard deviations: goes on where an AUROC is 1."""
    spread = math.sqrt((positives.var() + others.var()) / 2) or 1e-12
    return float((positives.mean() - others.mean()) / spread)
