"""How well a label predicts a feature on text that was not used to make it.

Half of the tokens judged are active, drawn evenly over all strengths; half are not: most at
random, some where a feature of similar direction is active. The score is balanced accuracy:
the mean of the share of active tokens called active and of the others called not. A coin has
.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fortpoint.features.understanding.rules import Fitted, Table, easy_cases, hard_cases

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Settings:
    """How many tokens of each side; ``n_hard`` of the inactive ones are hard."""

    n_each: int = 60
    n_hard: int = 15
    least: int = 8
    seed: int = 1


@dataclass(frozen=True)
class Score:
    """``recall`` of active tokens, ``rejection`` of inactive ones, and of the random ones alone
    (``rejection_random``). ``n`` active tokens were judged."""

    recall: float
    rejection: float
    rejection_random: float
    n: int

    @property
    def balanced(self) -> float:
        return (self.recall + self.rejection) / 2

    @property
    def balanced_random(self) -> float:
        """Without the hard cases."""
        return (self.recall + self.rejection_random) / 2


@dataclass(frozen=True, eq=False)
class Trial:
    """Tokens to judge: rows of the held-out part, active ones the weakest
    first; the first ``n_hard`` inactive ones are hard."""

    active: Numbers
    inactive: Numbers
    n_hard: int


def trial(table: Table, feature: int, alike: Numbers, settings: Settings) -> Trial | None:
    """None where the feature is active on too few held-out tokens to say anything."""
    rows = table.active.row(feature)
    if len(rows) < settings.least:
        return None
    order = np.argsort(table.active.row_values(feature), kind="stable")
    n = min(settings.n_each, len(rows))
    picked = order[np.linspace(0, len(rows) - 1, n).round().astype(np.int64)]
    rng = np.random.default_rng((settings.seed, feature))
    n_hard = settings.n_hard * n // settings.n_each
    hard = hard_cases(table, feature, alike, n_hard, rng)
    easy = easy_cases(table, feature, n - len(hard), rng)
    return Trial(rows[picked].astype(np.int64), np.concatenate([hard, easy]), len(hard))


def score(trial: Trial, called: Sequence[bool] | NDArray[np.bool_]) -> Score:
    """``called`` says of all active, then all inactive tokens whether they were called active."""
    said = np.asarray(called, np.bool_)
    n = len(trial.active)
    rejected = ~said[n:]
    random = rejected[trial.n_hard :]
    return Score(
        recall=float(said[:n].mean()),
        rejection=float(rejected.mean()) if len(rejected) else 0.0,
        rejection_random=float(random.mean()) if len(random) else 0.0,
        n=n,
    )


def judge(table: Table, fitted: Fitted | None, trial: Trial) -> Score:
    """What the rule says of the trial's tokens; without a rule it says nothing is active."""
    rows = np.concatenate([trial.active, trial.inactive])
    if fitted is None:
        return score(trial, np.zeros(len(rows), np.bool_))
    return score(trial, fitted.scores(table.terms, rows) > 0)
