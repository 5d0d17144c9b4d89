"""What the card reports: AUROC, catch rates and false positives with their intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fortpoint.guard.calibration import Calibration
from training.calibrate import Evidence, probability
from training.folds import Mask
from training.rows import BENIGN, DETECTORS, Row

BENIGN_GROUPS: tuple[tuple[str, Callable[[Row], bool]], ...] = (
    ("plain benign, rows that may train", lambda row: row.label == "benign" and row.train),
    ("XSTest-safe", lambda row: row.dataset == "xstest"),
    (
        "NotInject (one, two, three)",
        lambda row: row.dataset == "piguard_notinject" and row.label == "benign_hard",
    ),
    ("JailbreakBench benign", lambda row: row.dataset == "jailbreakbench"),
    (
        "role prompts (awesome_chatgpt_prompts)",
        lambda row: row.dataset == "awesome_chatgpt_prompts",
    ),
    ("alpaca_instructions, evaluation only", lambda row: row.dataset == "alpaca_instructions"),
    ("wizardlm_testset, evaluation only", lambda row: row.dataset == "wizardlm_testset"),
    (
        "safety_tuned_llamas benign, evaluation only",
        lambda row: row.dataset == "safety_tuned_llamas",
    ),
    (
        "dialogues, encyclopaedia, technical documents, evaluation only",
        lambda row: row.dataset in ("sgd_dialogues", "wikipedia", "ml_docs"),
    ),
)

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Rate:
    """``hits`` of ``n``, with the 95 % Wilson interval."""

    hits: int
    n: int

    def __str__(self) -> str:
        low, high = self.interval
        share = self.hits / self.n if self.n else math.nan
        return f"{share:.1%} ({self.hits}/{self.n}; {low:.1%} to {high:.1%})"

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
    """Cross-fitted probabilities [n_rows] a detector in one mode, and what was blocked."""

    rows: Sequence[Row]
    scores: Mapping[str, Float64]
    blocked: Mask

    @classmethod
    def of(
        cls,
        rows: Sequence[Row],
        evidence: Mapping[str, Evidence],
        calibrations: Mapping[str, Calibration],
        name: str,
    ) -> Scored:
        scores, blocked = {}, np.zeros(len(rows), dtype=bool)
        for detector in DETECTORS:
            mode = getattr(calibrations[detector], name)
            scores[detector] = probability(mode, evidence[detector].columns(name))
            blocked |= scores[detector] >= mode.threshold
        scores["attack"] = np.maximum(scores["jailbreak"], scores["injection"])
        return cls(rows, scores, blocked)

    def families(self, labels: Sequence[str]) -> list[str]:
        found = {row.family for row in self.rows if row.label in labels and not row.hidden}
        return sorted(found)

    def auroc(
        self, detector: str, labels: Sequence[str], family: str, benign: Sequence[str]
    ) -> float:
        """A family's positives against the benign rows, each benign set as the root of its size."""
        positive = self._mask(lambda r: r.label in labels and r.family == family and not r.hidden)
        negative = self._mask(lambda r: r.label in benign)
        sizes: dict[str, int] = {}
        for row, inside in zip(self.rows, negative, strict=True):
            if inside:
                sizes[row.dataset] = sizes.get(row.dataset, 0) + 1
        weight = np.array([sizes.get(row.dataset, 1) ** -0.5 for row in self.rows])
        return auroc(
            self.scores[detector][positive], self.scores[detector][negative], weight[negative]
        )

    def caught(self, labels: Sequence[str], family: str) -> Rate:
        """Blocked by any detector."""
        return self._rate(lambda r: r.label in labels and r.family == family and not r.hidden)

    def caught_hidden(self) -> Rate:
        return self._rate(lambda r: r.hidden)

    def false_positives(self, belongs: Callable[[Row], bool]) -> Rate:
        """Blocked by any detector."""
        return self._rate(lambda row: row.label in BENIGN and belongs(row))

    def _mask(self, belongs: Callable[[Row], bool]) -> Mask:
        return np.array([belongs(row) for row in self.rows])

    def _rate(self, belongs: Callable[[Row], bool]) -> Rate:
        mask = self._mask(belongs)
        return Rate(int(self.blocked[mask].sum()), int(mask.sum()))


def auroc(positive: Float64, negative: Float64, weight: Float64) -> float:
    """The chance that a positive scores above a (weighted) negative; ties count half."""
    if not len(positive) or not len(negative):
        return math.nan
    order = np.argsort(negative)
    below = np.concatenate([[0.0], np.cumsum(weight[order])])
    left = below[np.searchsorted(negative[order], positive, side="left")]
    right = below[np.searchsorted(negative[order], positive, side="right")]
    return float(((left + right) / 2).mean() / below[-1])
