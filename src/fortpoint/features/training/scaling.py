"""How a dictionary gets better with its width and its text: a law, with its interval.

    FVU(N, T) = floor + (N0 / N) ** alpha + (T0 / T) ** beta

for ``N`` features that saw ``T`` tokens at a fixed number of active ones, after Gao et al.
(arXiv 2406.04093) and, for the form, Hoffmann et al. (arXiv 2203.15556). The fit is robust
(Huber) in log FVU; the interval is from residuals drawn anew.

    law = fit(widths, tokens, fvus)
    law.fvu(9216, 20e6), law.interval(9216, 20e6)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fortpoint.errors import InvalidRequest

Doubles = NDArray[np.float64]

MIN_POINTS = 8
_PARAMETERS = 5
_HUBER = 0.02  # in log FVU: a few per cent
_UNITS = np.array([1e3, 1e6])


@dataclass(frozen=True, eq=False)
class Law:
    """``parameters`` are log floor, log N0 in thousands, alpha, log T0 in millions, beta.

    ``drawn`` ``[n, 5]`` are the parameters of the fits to residuals drawn anew.
    """

    parameters: Doubles
    drawn: Doubles
    residual: float

    @property
    def alpha(self) -> float:
        return float(self.parameters[2])

    @property
    def beta(self) -> float:
        return float(self.parameters[4])

    @property
    def floor(self) -> float:
        return float(np.exp(self.parameters[0]))

    def fvu(self, width: float, tokens: float) -> float:
        return float(_predict(self.parameters, np.array([[width, tokens]]))[0])

    def interval(self, width: float, tokens: float, level: float = 0.95) -> tuple[float, float]:
        """Of the law's own value there; a single run scatters about it by ``residual`` more."""
        values = [_predict(one, np.array([[width, tokens]]))[0] for one in self.drawn]
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)

    def spread(self, which: int, level: float = 0.95) -> tuple[float, float]:
        """The interval of one parameter."""
        low, high = np.quantile(self.drawn[:, which], [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


def fit(
    widths: Sequence[float],
    tokens: Sequence[float],
    fvus: Sequence[float],
    n_draws: int = 200,
    seed: int = 0,
) -> Law:
    """Raises ``InvalidRequest`` for points that cannot bear a law."""
    points, y = np.array([widths, tokens], float).T, np.array(fvus, float)
    if len(y) < MIN_POINTS or min(len(set(widths)), len(set(tokens))) < 3:
        raise InvalidRequest(
            f"a law needs {MIN_POINTS} dictionaries or more, of three widths and three amounts "
            "of text at least"
        )
    if not (np.isfinite(y).all() and (y > 0).all() and (points > 0).all()):
        raise InvalidRequest("widths, tokens and FVU are positive numbers")
    best = _fit(points, y, _starts(y))
    predicted = np.log(_predict(best, points))
    residuals = np.log(y) - predicted
    random = np.random.default_rng(seed)
    freedom = np.sqrt(len(y) / max(len(y) - _PARAMETERS, 1))
    drawn = [
        _fit(points, np.exp(predicted + freedom * random.choice(residuals, len(y))), [best])
        for _ in range(n_draws)
    ]
    return Law(best, np.array(drawn), float(np.sqrt(np.mean(residuals**2)) * freedom))


def _starts(y: Doubles) -> list[Doubles]:
    return [
        np.array([np.log(floor * y.min()), np.log(0.02), alpha, np.log(0.01), beta])
        for floor in (0.2, 0.7)
        for alpha in (0.3, 0.8)
        for beta in (0.4, 1.0)
    ]


def _fit(points: Doubles, y: Doubles, starts: Sequence[Doubles]) -> Doubles:
    from scipy.optimize import least_squares

    def residual(parameters: Doubles) -> Any:
        return np.log(_predict(parameters, points)) - np.log(y)

    low = [-20, -30, 0.01, -30, 0.01]
    high = [0, 10, 4, 10, 4]
    found = [
        least_squares(
            residual,
            np.clip(start, np.array(low) + 1e-6, np.array(high) - 1e-6),
            loss="huber",
            f_scale=_HUBER,
            bounds=(low, high),
        )
        for start in starts
    ]
    best: Doubles = min(found, key=lambda one: one.cost).x
    return best


def _predict(parameters: Doubles, points: Doubles) -> Doubles:
    log_floor, log_n, alpha, log_t, beta = parameters
    width, tokens = np.log(points / _UNITS).T
    fvu: Doubles = (
        np.exp(log_floor) + np.exp(alpha * (log_n - width)) + np.exp(beta * (log_t - tokens))
    )
    return fvu
