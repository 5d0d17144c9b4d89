"""Frequencies of rotary position embedding, written from the papers rather than taken over.

A pair of numbers ``i`` of a head turns by ``position * inv_freq[i]``; long-context models are
trained with changed frequencies, of which these kinds are known:

    default   theta ** (-2 i / head_dim)                        (arXiv 2104.09864)
    linear    all frequencies divided by ``factor``             (arXiv 2306.15595)
    llama3    only the slow ones divided, with a ramp between   (arXiv 2407.21783)
    yarn      the same with a ramp over dimensions, and larger sines  (arXiv 2309.00071)

    rotary = Rotary.of({"rope_theta": 1e6}, head_dim=64, max_positions=4096)
    angles = np.outer(positions, rotary.inv_freq)

Checked here: that every number is finite and in range. Not protected: whether the frequencies
are those that the model was trained with, which only its makers know.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from fortpoint.errors import ModelError

KINDS = ("default", "linear", "llama3", "yarn")
"""Kinds whose frequencies are the same at every length of a sequence."""

_Factor = Annotated[float, Meta(gt=0, le=1e6)]
_Length = Annotated[int, Meta(ge=1, le=1 << 30)]


class _Parameters(msgspec.Struct, frozen=True):
    """What ``rope_parameters`` (transformers 5) or ``rope_scaling`` (4) may say."""

    rope_theta: Annotated[float, Meta(gt=1, le=1e12)] = 10_000.0
    rope_type: str = "default"
    factor: _Factor | None = None
    original_max_position_embeddings: _Length | None = None
    low_freq_factor: _Factor | None = None
    high_freq_factor: _Factor | None = None
    attention_factor: _Factor | None = None
    beta_fast: _Factor | None = None
    beta_slow: _Factor | None = None
    mscale: _Factor | None = None
    mscale_all_dim: _Factor | None = None
    truncate: bool = True


@dataclass(frozen=True, eq=False)
class Rotary:
    """``inv_freq`` is ``[head_dim / 2]`` in radians a position; cosines and sines are
    multiplied by ``scale``."""

    inv_freq: NDArray[np.float32]
    scale: float

    @classmethod
    def of(cls, parameters: Mapping[str, Any], head_dim: int, max_positions: int) -> Rotary:
        """From ``config.json``'s parameters. Raises ``ModelError``."""
        try:
            p = msgspec.convert(parameters, _Parameters)
        except msgspec.ValidationError as error:
            raise ModelError(f"config.json: rotary embedding: {error}") from None
        plain = p.rope_theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        trained = p.original_max_position_embeddings or max_positions
        if p.rope_type == "default":
            return cls(plain.astype(np.float32), 1.0)
        if p.rope_type == "linear":
            return cls((plain / _given(p.factor, "factor")).astype(np.float32), 1.0)
        if p.rope_type == "llama3":
            return cls(_llama3(plain, p, trained).astype(np.float32), 1.0)
        if p.rope_type == "yarn":
            factor = max_positions / trained if p.factor is None else p.factor
            inv_freq = _yarn(plain, p, factor, trained, head_dim)
            return cls(inv_freq.astype(np.float32), _yarn_scale(p, factor))
        raise ModelError(f"rotary embedding of the kind {p.rope_type[:64]!r} is not known here")


def _given(value: float | None, name: str) -> float:
    if value is None:
        raise ModelError(f"config.json: rotary embedding lacks {name!r}")
    return value


def _llama3(plain: NDArray[np.float64], p: _Parameters, trained: int) -> NDArray[np.float64]:
    """Waves that fit ``high`` times into the trained length stay, those that do not even fit
    ``low`` times are stretched by ``factor``."""
    factor = _given(p.factor, "factor")
    low, high = (
        _given(p.low_freq_factor, "low_freq_factor"),
        _given(p.high_freq_factor, "high_freq_factor"),
    )
    if low >= high:
        raise ModelError("config.json: rotary embedding: low_freq_factor is not the smaller one")
    turns = trained * plain / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return plain * (kept + (1 - kept) / factor)


def _yarn(
    plain: NDArray[np.float64], p: _Parameters, factor: float, trained: int, head_dim: int
) -> NDArray[np.float64]:
    """As in "YaRN", section 3.2, with the ramp over dimensions as its authors' code has it."""

    def dimension(turns: float) -> float:
        """Where a wave fits ``turns`` times into the trained length."""
        wave = trained / (turns * 2 * math.pi)
        return head_dim * math.log(wave) / (2 * math.log(p.rope_theta))

    first, last = dimension(p.beta_fast or 32.0), dimension(p.beta_slow or 1.0)
    if p.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001
    stretched = np.clip((np.arange(head_dim // 2) - first) / (last - first), 0.0, 1.0)
    mixed: NDArray[np.float64] = plain * (1 - stretched) + plain / factor * stretched
    return mixed


def _yarn_scale(p: _Parameters, factor: float) -> float:
    if p.attention_factor is not None:
        return p.attention_factor
    if p.mscale and p.mscale_all_dim:
        return _temperature(factor, p.mscale) / _temperature(factor, p.mscale_all_dim)
    return _temperature(factor, 1.0)


def _temperature(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
