"""Reads probes and features in rows of the residual stream.

A dictionary's encoder is held twice: rounded to bytes, to find the few features that may be
active, and as it is, to compute those exactly. What is found is exact; what is missed lies
within the rounding of its threshold (``MARGIN``, some eight standard deviations).

Both are native functions that hold no interpreter lock.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from enum import auto
from typing import Any

import numpy as np

from fortpoint.engine.compiled.packed import KINDS, tile_bytes_of
from fortpoint.engine.compiled.product import tile_product
from fortpoint.engine.compiled.rows import dot, round_to_bytes
from fortpoint.engine.compiled.table import Entries
from fortpoint.engine.compiled.vector import (
    LANES,
    call6,
    instructions,
    jit,
    native,
    number,
    real,
    set_int,
    set_real,
    whole,
)

MARGIN = 0.002
"""Of the product of a row's and a feature's length: more than rounding to bytes changes."""

_INT8 = KINDS.index("int8")
_STRIDE = 32
"""Features that are looked at together: mostly none of them is active."""


class Reading(Entries):
    """What ``feature_reader`` reads: int64 numbers, most of them addresses."""

    # the dictionary
    D = auto()
    N_FEATURES = auto()
    K = auto()  # at most so many are active at a token; 0 for no limit
    ROUGH = auto()  # int8 tiles (packed.py)
    EXACT = auto()  # float32 [n_features, d]
    BIAS = auto()  # float32 [n_features], and so on
    THRESHOLD = auto()
    SCALE = auto()  # 1 / training maximum
    LENGTH = auto()
    CENTER = auto()  # float32 [d]
    # what is read
    X = auto()  # float32 [rows, d]
    N_ROWS = auto()
    ROWS = auto()  # int64 [n_rows]: which
    TOP = auto()
    INDICES = auto()  # int32 [n_rows, top], -1 where there are no more
    VALUES = auto()  # float32 [n_rows, top], strongest first
    # room to work in
    ACTS = auto()  # rows.Activations of n_rows * d
    Z = auto()  # float32 [n_rows, n_features padded]
    BEST = auto()  # float32 [max(top, k)]
    BEST_INDICES = auto()  # int32 of the same size


@functools.cache
def probe_reader() -> Callable[..., None]:
    """``read(x, n_rows, d, weights, n_probes, logits)``: adds one layer's part.

    ``logits[r] += W (x[r] / rms(x[r]))`` for ``W`` ``[n_probes, d]``; all are addresses.
    """

    @native(6)
    def read(x: Any, n_rows: Any, d: Any, weights: Any, n_probes: Any, logits: Any) -> None:
        for r in range(n_rows):
            row, out = x + r * d * 4, logits + r * n_probes * 4
            mean = dot(row, row, d) / np.float32(d)
            scale = np.float32(1.0) / np.sqrt(mean + np.float32(1e-6))
            for p in range(n_probes):
                part = dot(row, weights + p * d * 4, d) * scale
                set_real(out, p, real(out, p) + part)

    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 6)(read)


@functools.cache
def target_reader() -> Callable[..., None]:
    """``read(x, n_rows, d, encoders, n_targets, out)``: how far each row lies along each target.

    ``out[r, t] = x[r] . encoders[t]``; ``x``, ``encoders`` and ``out`` are addresses.
    """

    @native(6)
    def read(x: Any, n_rows: Any, d: Any, encoders: Any, n_targets: Any, out: Any) -> None:
        for r in range(n_rows):
            for i in range(n_targets):
                along = dot(x + r * d * 4, encoders + i * d * 4, d)
                set_real(out, r * n_targets + i, along)

    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 6)(read)


@functools.cache
def feature_reader() -> Callable[[int], None]:
    """``read(address of a Reading's numbers)``: the strongest features of each row."""
    product = tile_product("int8", instructions())

    @native(1)
    def read(t: Any) -> None:
        n, d, acts = number(t, Reading.N_ROWS), number(t, Reading.D), number(t, Reading.ACTS)
        for i in range(n):
            x = number(t, Reading.X) + number(number(t, Reading.ROWS), i) * d * 4
            _center(x, number(t, Reading.CENTER), number(acts, 0) + i * d * 4, d)
            round_to_bytes(acts, i, d)
        n_tiles = -(-number(t, Reading.N_FEATURES) // LANES)
        size = tile_bytes_of(_INT8, d)
        for tile in range(n_tiles):
            where, out = number(t, Reading.ROUGH) + tile * size, tile * LANES * 4
            call6(product, where, n, d, acts, number(t, Reading.Z) + out, n_tiles * LANES)
        for i in range(n):
            _strongest(t, i, n_tiles)

    return ctypes.CFUNCTYPE(None, ctypes.c_int64)(read)


@jit()
def _center(x: Any, center: Any, out: Any, d: Any) -> None:
    for j in range(d):
        set_real(out, j, real(x, j) - real(center, j))


@jit()
def _strongest(t: Any, i: Any, n_tiles: Any) -> None:
    """One row: by reading, or the k largest activations and of these by reading."""
    d, k, top = number(t, Reading.D), number(t, Reading.K), number(t, Reading.TOP)
    x = number(number(t, Reading.ACTS), 0) + i * d * 4
    z = number(t, Reading.Z) + i * n_tiles * LANES * 4
    margin = np.float32(MARGIN) * np.sqrt(dot(x, x, d))
    most = k if k > 0 else top
    best, found = number(t, Reading.BEST), number(t, Reading.BEST_INDICES)
    biases, lengths = number(t, Reading.BIAS), number(t, Reading.LENGTH)
    thresholds, n = number(t, Reading.THRESHOLD), 0
    for first in range(0, number(t, Reading.N_FEATURES), _STRIDE):
        last = min(first + _STRIDE, number(t, Reading.N_FEATURES))
        whole_stride = last == first + _STRIDE
        if whole_stride and not _any_over(z, biases, lengths, thresholds, margin, first):
            continue
        for f in range(first, last):
            bias, threshold = real(biases, f), real(thresholds, f)
            bound = real(z, f) + bias + margin * real(lengths, f)
            weight = np.float32(1.0) if k > 0 else real(number(t, Reading.SCALE), f)
            if bound <= threshold or (n == most and bound * weight <= real(best, most - 1)):
                continue
            value = dot(x, number(t, Reading.EXACT) + f * d * 4, d) + bias
            if value > threshold:
                n = _insert(best, found, n, most, value * weight, f)
    _write(t, i, n)


@jit()
def _write(t: Any, i: Any, n: Any) -> None:
    """The ``n`` best of a row, strongest first."""
    top = number(t, Reading.TOP)
    values, indices = (
        number(t, Reading.VALUES) + i * top * 4,
        number(t, Reading.INDICES) + i * top * 4,
    )
    for j in range(top):
        set_real(values, j, np.float32(0.0))
        set_int(indices, j, np.int32(-1))
    kept = 0
    for j in range(n):
        f = whole(number(t, Reading.BEST_INDICES), j)
        value = real(number(t, Reading.BEST), j)
        if number(t, Reading.K) > 0:
            value *= real(number(t, Reading.SCALE), f)
        kept = _insert(values, indices, kept, top, value, f)


@jit()
def _insert(values: Any, indices: Any, n: Any, most: Any, value: Any, index: Any) -> Any:
    """Into a list of at most ``most``, largest first, that has ``n``; returns how many it has."""
    if n == most and value <= real(values, most - 1):
        return n
    place = min(n, most - 1)
    while place > 0 and real(values, place - 1) < value:
        set_real(values, place, real(values, place - 1))
        set_int(indices, place, np.int32(whole(indices, place - 1)))
        place -= 1
    set_real(values, place, np.float32(value))
    set_int(indices, place, np.int32(index))
    return min(n + 1, most)


@jit()
def _any_over(z: Any, biases: Any, lengths: Any, thresholds: Any, margin: Any, first: Any) -> Any:
    """Whether one of ``_STRIDE`` features from ``first`` on may be active."""
    found = 0
    for f in range(first, first + _STRIDE):
        bound = real(z, f) + real(biases, f) + margin * real(lengths, f)
        found |= 1 if bound > real(thresholds, f) else 0
    return found
