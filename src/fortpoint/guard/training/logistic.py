"""Weighted logistic regression with an L2 penalty, for dense and sparse inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.sparse import issparse

Float64 = NDArray[np.float64]


def fit(
    x: Any,
    y: NDArray[np.int64],
    weight: Float64,
    penalty: float | Float64,
    n_iterations: int = 60,
) -> tuple[Float64, float]:
    """Minimise ``sum(weight * loss) + sum(penalty * w**2) / 2``; the bias is not penalised.

    ``x`` is [n, d], ``y`` 1 or 0, ``weight`` sums to about 1. Returns ``w`` [d] and the bias.
    The same input gives the same result: the start is zero and nothing is drawn at random.
    """
    sign = np.where(y > 0, 1.0, -1.0)
    transposed = x.T.tocsr() if issparse(x) else x.T

    def loss(parameters: Float64) -> tuple[float, Float64]:
        w, bias = parameters[:-1], parameters[-1]
        margin = sign * (x @ w.astype(np.float32) + bias)
        slope = -weight * sign / (1.0 + np.exp(np.clip(margin, -50, 50)))
        value = (weight * np.logaddexp(0.0, -margin)).sum() + 0.5 * (penalty * w**2).sum()
        gradient = transposed @ slope.astype(np.float32) + penalty * w
        return float(value), np.append(gradient, slope.sum())

    start = np.zeros(x.shape[1] + 1)
    options = {"maxiter": n_iterations, "maxcor": 8}
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x
    return found[:-1], float(found[-1])
