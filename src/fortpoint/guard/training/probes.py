"""Fits the linear probes, and scores every example by probes that never saw its fold.

readings = of_tokens(activations)
probe = train(examples, readings, "jailbreak", side)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fortpoint.errors import InvalidRequest
from fortpoint.guard.training import folds
from fortpoint.guard.training.examples import Example
from fortpoint.guard.training.logistic import fit

WINDOW_TOKENS = 16
_WINDOWS_JOINED = 4  # a rolling mean over 64 tokens, as the guard's
PENALTY = {"jailbreak": 1.5, "injection": 1.5, "harmful_request": 0.2}
N_ITERATIONS = 50
ALSO = {"jailbreak": ("injection", 0.5), "injection": ("jailbreak", 0.5)}

Float16 = NDArray[np.float16]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Activations:
    """One text: ``windows`` [n_windows, n_layers, d_model], ``tail`` [n_layers, d_model].

    ``x / rms(x)``: its means over ``WINDOW_TOKENS`` tokens of the text, and what it is at the
    template's last token after it. ``n_tokens`` counts the text's tokens that were read.
    """

    windows: Float16
    tail: Float16
    n_tokens: int


@dataclass(frozen=True)
class Readings:
    """``x`` [n_windows, n_layers * d_model] and which text each window is of."""

    x: Float32
    owner: NDArray[np.int64]
    n_texts: int


def of_tokens(found: Sequence[Activations]) -> Readings:
    """Means over windows of up to 64 tokens, half overlapping, as the guard's rolling means."""
    parts, owner = [], []
    for index, one in enumerate(found):
        windows = one.windows.astype(np.float32).reshape(len(one.windows), -1)
        sizes = np.full(len(windows), float(WINDOW_TOKENS), dtype=np.float32)
        sizes[-1] = one.n_tokens - WINDOW_TOKENS * (len(windows) - 1)
        last = max(0, len(windows) - _WINDOWS_JOINED)
        for start in (*range(0, last, _WINDOWS_JOINED // 2), last):
            size = sizes[start : start + _WINDOWS_JOINED, None]
            joined = windows[start : start + _WINDOWS_JOINED] * size
            parts.append(joined.sum(0) / size.sum())
            owner.append(index)
    return _checked(Readings(np.stack(parts), np.array(owner), len(found)))


def of_tail(found: Sequence[Activations]) -> Readings:
    """The template's last token, which ends the prompt."""
    x = np.stack([one.tail.astype(np.float32).reshape(-1) for one in found])
    return _checked(Readings(x, np.arange(len(found)), len(found)))


def _checked(readings: Readings) -> Readings:
    if not np.isfinite(readings.x).all():
        raise InvalidRequest("the model gives activations that are not finite; use --text-only")
    return readings


@dataclass(frozen=True)
class Probe:
    """``logit = x @ w + b`` on activations that are not standardised."""

    w: Float64
    b: float


def train(
    examples: Sequence[Example],
    readings: Readings,
    detector: str,
    side: folds.Mask,
    also: Mapping[str, tuple[str, float]] = ALSO,
) -> Probe:
    """A probe from the examples of ``side``."""
    y, weight = folds.objective(examples, detector, side, also)
    share = 1.0 / np.bincount(readings.owner, minlength=readings.n_texts)
    of_window = (weight * share)[readings.owner]
    kept = of_window > 0
    x = readings.x[kept]
    mean, scale = x.mean(0), x.std(0) + 1e-3
    w, bias = fit(
        (x - mean) / scale,
        y[readings.owner][kept],
        of_window[kept],
        PENALTY[detector],
        N_ITERATIONS,
    )
    return Probe(w / scale, bias - float((w / scale) @ mean))


def score(readings: Readings, probe: Probe) -> Float64:
    """[n_texts]: the highest window's logit."""
    scores = np.full(readings.n_texts, -np.inf)
    np.maximum.at(scores, readings.owner, readings.x @ probe.w.astype(np.float32) + probe.b)
    return scores


def cross_fitted(
    examples: Sequence[Example], readings: Readings, detector: str, parts: folds.Folds
) -> Float64:
    """[n] by probes that did not see the example's fold."""
    scores = np.full(len(examples), -np.inf)
    for number in parts.numbers:
        left_out = parts.of == number
        side = folds.training_side(examples, left_out)
        probe = train(examples, readings, detector, side)
        scores[left_out] = score(readings, probe)[left_out]
    return scores
