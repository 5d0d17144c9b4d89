"""What a card and a report say: AUROC, catch rates and false positives with their intervals."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fortpoint.guard.calibration import Calibration
from fortpoint.guard.training.examples import Example
from fortpoint.guard.training.folds import Mask
from fortpoint.guard.training.joining import Evidence, probability

ATTACK = "attack"  # jailbreak or injection: the higher of the two scores

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Rate:
    """``hits`` of ``n``, with the 95 % Wilson interval."""

    hits: int
    n: int

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.share:.1%} ({self.hits}/{self.n}; {low:.1%} to {high:.1%})"

    @property
    def share(self) -> float:
        return self.hits / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson (1927), at 95 %."""
        if not self.n:
            return 0.0, 1.0
        z, n, p = 1.959964, self.n, self.hits / self.n
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Scored:
    """Cross-fitted probabilities [n] a detector in one mode, and what was blocked."""

    examples: Sequence[Example]
    scores: Mapping[str, Float64]
    blocked: Mask

    @classmethod
    def of(
        cls,
        examples: Sequence[Example],
        evidence: Mapping[str, Evidence],
        calibrations: Mapping[str, Calibration],
        name: str,
    ) -> Scored:
        scores, blocked = {}, np.zeros(len(examples), dtype=bool)
        for detector, calibration in calibrations.items():
            mode = getattr(calibration, name)
            scores[detector] = probability(mode, evidence[detector].columns(name))
            blocked |= scores[detector] >= mode.threshold
        attacks = [scores[name] for name in ("jailbreak", "injection") if name in scores]
        if attacks:
            scores[ATTACK] = np.max(attacks, axis=0)
        return cls(examples, scores, blocked)

    def families(self, labels: Sequence[str]) -> list[str]:
        """Of the attacks with these labels, without texts of our own making."""
        return sorted({one.family for one in self.examples if one.label in labels})

    def auroc(
        self,
        detector: str,
        positive: Callable[[Example], bool],
        negative: Callable[[Example], bool] = lambda one: one.benign,
    ) -> float:
        """Positives against benign texts, each benign set as the root of its size."""
        above, below = self.mask(positive), self.mask(negative)
        weight = self.balance(below)
        scores = self.scores[detector]
        return auroc(scores[above], scores[below], weight[below])

    def caught_at(
        self,
        detector: str,
        positive: Callable[[Example], bool],
        share: float,
        negative: Callable[[Example], bool] = lambda one: one.benign,
    ) -> float:
        """The share of positives above the score that ``share`` of the negatives exceed."""
        below = self.mask(negative)
        threshold = cut(self.scores[detector][below], self.balance(below)[below], share)
        return float((self.scores[detector][self.mask(positive)] > threshold).mean())

    def rate(self, belongs: Callable[[Example], bool]) -> Rate:
        """Blocked by any detector."""
        mask = self.mask(belongs)
        return Rate(int(self.blocked[mask].sum()), int(mask.sum()))

    def mask(self, belongs: Callable[[Example], bool]) -> Mask:
        return np.array([belongs(one) for one in self.examples], dtype=bool)

    def balance(self, group: Mask) -> Float64:
        """[n] weights in which a set of n counts as the root of n."""
        sizes = Counter(
            one.source for one, inside in zip(self.examples, group, strict=True) if inside
        )
        return np.array([max(sizes[one.source], 1) ** -0.5 for one in self.examples])


def auroc(positive: Float64, negative: Float64, weight: Float64) -> float:
    """The chance that a positive scores above a (weighted) negative; ties count half."""
    if not len(positive) or not len(negative):
        return math.nan
    order = np.argsort(negative)
    below = np.concatenate([[0.0], np.cumsum(weight[order])])
    left = below[np.searchsorted(negative[order], positive, side="left")]
    right = below[np.searchsorted(negative[order], positive, side="right")]
    return float(((left + right) / 2).mean() / below[-1])


def cut(negative: Float64, weight: Float64, share: float) -> float:
    """The lowest of the scores that at most ``share`` of the (weighted) negatives exceed."""
    order = np.argsort(-negative, kind="stable")
    above = np.cumsum(weight[order])
    first = int(np.searchsorted(above, share * above[-1], side="right"))
    return float(negative[order][min(first, len(order) - 1)])
