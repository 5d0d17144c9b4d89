"""A feature's rule: a few weighted terms that tell tokens where it is active from others.

    fitted = learn(table, feature, alike, settings)
    fitted.scores(other.terms, rows)            # above 0: active

Terms are added one at a time to a logistic regression that takes both sides as equally likely:
always the one along which its loss falls fastest, as long as that is worth a term (matching
pursuit; Lozano, Swirszcz and Abe 2011). Weights are never negative: each term speaks for the
feature, so that a rule reads as a description.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fortpoint.features.understanding.incidence import Incidence

Numbers = NDArray[np.int64]
Floats = NDArray[np.float64]

_AS_GOOD = 0.97
_NEWTON_STEPS = 12
_LONGEST_STEP = 4.0


@dataclass(frozen=True)
class Settings:
    """``least_gain`` is the slope of the loss (0.69 without any term) that a term must have."""

    max_terms: int = 12
    n_positives: int = 1000
    n_negatives: int = 1500
    n_hard: int = 300
    n_candidates: int = 120
    least_positives: int = 6
    least_gain: float = 0.01
    ridge: float = 0.002
    by_strength: float = 0.5
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Table:
    """Tokens with their terms and features.

    ``terms`` has a row a token, ``active`` a row a feature with the tokens where it is active
    and how strongly; ``kept`` are the tokens to draw from, ``totals`` how many have each term.
    """

    terms: Incidence
    active: Incidence
    kept: Numbers
    totals: Numbers

    @classmethod
    def of(cls, terms: Incidence, active: Incidence, kept: Numbers) -> Table:
        totals = np.bincount(terms.columns, minlength=terms.n_columns)
        return cls(terms, active, kept, totals)


@dataclass(frozen=True, eq=False)
class Fitted:
    """``columns`` of the term space and their ``weights``; ``bias`` is added once.

    ``worth`` is what each term does for the rule, the most first: its weight times how much
    oftener it holds at active tokens, each counting as strongly as it is active, than at others.
    """

    columns: Numbers
    weights: Floats
    worth: Floats
    bias: float

    def scores(self, table: Incidence, rows: Numbers) -> Floats:
        """One number for each of ``rows``: above 0 the rule says active."""
        weight_of = np.zeros(table.n_columns)
        weight_of[self.columns] = self.weights
        which, columns = table.take(rows)
        sums = np.bincount(which, weight_of[columns], minlength=len(rows))
        return np.asarray(sums + self.bias, np.float64)


def learn(table: Table, feature: int, alike: Numbers, settings: Settings) -> Fitted | None:
    """None where the feature is active on too few tokens. ``alike`` are features of similar
    direction: where they are active and this one is not are the hard cases."""
    positives = table.active.row(feature)
    if len(positives) < settings.least_positives:
        return None
    rng = np.random.default_rng((settings.seed, feature))
    candidates = _candidates(table, positives, settings, rng)
    if len(candidates) == 0:
        return None
    drawn = draw(np.arange(len(positives)), settings.n_positives, rng)
    chosen = positives[drawn]
    hard = hard_cases(table, feature, alike, settings.n_hard, rng)
    easy = easy_cases(table, feature, settings.n_negatives - len(hard), rng)
    others = np.concatenate([hard, easy])
    rows = np.concatenate([chosen, others])
    x = _dense(table.terms, rows, candidates)
    y = np.append(np.ones(len(chosen)), -np.ones(len(others)))
    strength = table.active.row_values(feature)[drawn].astype(np.float64)
    strength /= strength.sum()
    share = np.append(
        settings.by_strength * strength + (1 - settings.by_strength) / len(chosen),
        np.full(len(others), 1 / max(len(others), 1)),
    )
    picked, weights, bias = _pursue(x, y, share / 2, settings)
    if not picked:
        return None
    inside = strength @ x[: len(chosen), picked]
    worth = weights * (inside - x[len(chosen) :, picked].mean(axis=0, dtype=np.float64))
    order = np.argsort(-worth, kind="stable")
    columns = candidates[picked][order]
    return Fitted(columns, np.round(weights[order], 2), worth[order], round(bias, 2))


def draw(rows: NDArray[np.integer], n: int, rng: np.random.Generator) -> Numbers:
    """At most ``n`` of ``rows``, ascending."""
    if len(rows) <= n:
        return rows.astype(np.int64)
    return np.sort(rng.choice(rows, n, replace=False)).astype(np.int64)


def hard_cases(
    table: Table, feature: int, alike: Numbers, n: int, rng: np.random.Generator
) -> Numbers:
    """At most ``n`` tokens where one of ``alike`` is active and the feature is not."""
    if n == 0 or len(alike) == 0:
        return np.empty(0, np.int64)
    each = -(-2 * n // len(alike))
    near = [draw(table.active.row(int(other)), each, rng) for other in alike]
    return draw(_without(np.unique(np.concatenate(near)), table.active.row(feature)), n, rng)


def easy_cases(table: Table, feature: int, n: int, rng: np.random.Generator) -> Numbers:
    """About ``n`` random tokens where the feature is not active."""
    some = rng.choice(table.kept, min(len(table.kept), 2 * n), replace=False)
    return _without(some, table.active.row(feature))[:n]


def _without(rows: Numbers, sorted_rows: NDArray[np.integer]) -> Numbers:
    if len(sorted_rows) == 0:
        return rows
    at = np.minimum(np.searchsorted(sorted_rows, rows), len(sorted_rows) - 1)
    left: Numbers = rows[sorted_rows[at] != rows]
    return left


def _candidates(
    table: Table,
    positives: NDArray[np.integer],
    settings: Settings,
    rng: np.random.Generator,
) -> Numbers:
    """Terms that hold oftener at active tokens, ascending: the best by the information that
    each alone gives when both sides are as likely (Jensen-Shannon divergence)."""
    looked_at = draw(positives, 4000, rng)
    _, columns = table.terms.take(looked_at)
    hits = np.bincount(columns, minlength=table.terms.n_columns).astype(np.float64)
    inside = (hits + 0.05) / (len(looked_at) + 1)
    n_outside = max(len(table.kept) - len(positives), 1)
    scaled = hits * (len(positives) / len(looked_at))
    outside = np.clip(table.totals - scaled, 0.5, None) / n_outside
    outside = np.minimum(outside, 0.999)
    sound = (hits >= min(3, len(looked_at) / 3)) & (inside > outside)
    found = np.flatnonzero(sound)
    gain = _divergence(inside[found], outside[found])
    best = np.argsort(-gain, kind="stable")[: settings.n_candidates]
    return np.sort(found[best])


def _divergence(p: Floats, q: Floats) -> Floats:
    middle = (p + q) / 2
    return _entropy(middle) - (_entropy(p) + _entropy(q)) / 2


def _entropy(p: Floats) -> Floats:
    sound = np.clip(p, 1e-9, 1 - 1e-9)
    found: Floats = -(sound * np.log(sound) + (1 - sound) * np.log(1 - sound))
    return found


def _dense(terms: Incidence, rows: Numbers, columns: Numbers) -> NDArray[np.float32]:
    """``[len(rows), len(columns)]`` of zeros and ones."""
    place = np.full(terms.n_columns, -1, np.int64)
    place[columns] = np.arange(len(columns))
    which, found = terms.take(rows)
    at = place[found]
    dense = np.zeros((len(rows), len(columns)), np.float32)
    dense[which[at >= 0], at[at >= 0]] = 1
    return dense


def _pursue(
    x: NDArray[np.float32], y: Floats, share: Floats, settings: Settings
) -> tuple[list[int], Floats, float]:
    """Columns in the order in which they were taken, their weights, and the bias.

    ``share`` is what each row counts; all of them add up to 1.

    Of columns that are almost as good as the best the first is taken: columns stand in the
    order in which terms are preferred.
    """
    picked: list[int] = []
    weights, bias = np.empty(0), 0.0
    out = np.zeros(x.shape[1], np.bool_)
    while len(picked) < settings.max_terms:
        margin = (x[:, picked] @ weights + bias) * y
        gains = (share * y * _sigmoid(-margin)).astype(np.float32) @ x
        gains[out] = -np.inf
        if gains.max() < settings.least_gain:
            break
        column = int(np.flatnonzero(gains >= _AS_GOOD * gains.max())[0])
        out[column] = True
        picked.append(column)
        weights, bias = _newton(x[:, picked].astype(np.float64), y, share, settings.ridge)
        if (weights <= 0).any():
            picked = [c for c, weight in zip(picked, weights, strict=True) if weight > 0]
            weights, bias = _newton(x[:, picked].astype(np.float64), y, share, settings.ridge)
    return picked, weights, bias


def _newton(x: Floats, y: Floats, share: Floats, ridge: float) -> tuple[Floats, float]:
    """Weights and bias of the logistic regression with a small quadratic penalty."""
    with_bias = np.hstack([x, np.ones((len(x), 1))])
    penalty = np.append(np.full(x.shape[1], ridge), 1e-9)
    w = np.zeros(with_bias.shape[1])
    for _ in range(_NEWTON_STEPS):
        miss = _sigmoid(-(with_bias @ w) * y)
        slope = with_bias.T @ (-share * y * miss) + penalty * w
        bend = (with_bias * (share * miss * (1 - miss) + 1e-9)[:, None]).T @ with_bias
        step = np.linalg.solve(bend + np.diag(penalty + 1e-9), slope)
        longest = float(np.abs(step).max())
        w = w - step * min(1.0, _LONGEST_STEP / max(longest, 1e-12))
        if longest < 1e-3:
            break
    return w[:-1], float(w[-1])


def _sigmoid(x: Floats) -> Floats:
    found: Floats = 1 / (1 + np.exp(np.clip(-x, -40, 40)))
    return found
