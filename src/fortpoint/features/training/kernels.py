"""The sparse part of a training step, compiled: everything but the encoder's product.

Of ``d_sae`` features some forty are active at a token, so decoding, both gradients and the
exact activations are sums over few pairs of token and feature. Pairs lie by token: ``cols`` and
``values`` ``[n, most]``, of which the first ``counts[i]`` of row ``i`` are in use, ascending by
feature. Each function works on rows or features ``first`` to ``last``, so that threads share it
out; none holds the interpreter's lock.

Rough activations are products of bytes: ``sums`` int32 ``[n, d_sae]``, in units of both rows'
scales. They only say where to look; what is kept is decided by the exact ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

_FAST = {"nsz", "arcp", "contract", "afn", "reassoc"}  # a value that is no number stays one
_STEP_DOWN = np.float32(0.85)
_TINY = np.float32(1e-4)


@njit(nogil=True, fastmath=_FAST)
def quantise(rows: Any, quantised: Any, scales: Any, first: Any, last: Any) -> None:
    """Rows in bytes: ``rows[i]`` is about ``scales[i] * quantised[i]``."""
    for i in range(first, last):
        row, most = rows[i], np.float32(0.0)
        for j in range(len(row)):
            most = max(most, abs(row[j]))
        inverse = np.float32(127.0) / max(most, np.float32(1e-30))
        for j in range(len(row)):
            quantised[i, j] = np.int8(np.rint(row[j] * inverse))
        scales[i] = most / np.float32(127.0)


@njit(nogil=True, fastmath=_FAST)
def find_over(
    sums: Any,
    scales: Any,
    own_scales: Any,
    lifts: Any,
    cols: Any,
    counts: Any,
    first: Any,
    last: Any,
) -> None:
    """Features whose rough activation is over their floor; ``lifts`` ``[d_sae]`` are the
    encoder's bias less the floor, ``scales`` are the rows' and ``own_scales`` the features'."""
    flags = _flags(len(own_scales))
    for i in range(first, last):
        counts[i] = _over(sums[i], scales[i], own_scales, lifts, np.float32(0.0), flags, cols[i])


@njit(nogil=True, fastmath=_FAST)
def find_most(
    sums: Any,
    scales: Any,
    own_scales: Any,
    bias: Any,
    least: Any,
    floors: Any,
    cols: Any,
    counts: Any,
    first: Any,
    last: Any,
) -> None:
    """In each row the ``least`` largest rough activations, if so many are positive; ``floors``
    ``[n]`` are guesses below them."""
    flags = _flags(len(own_scales))
    for i in range(first, last):
        row, scale, lowest, n = sums[i], scales[i], floors[i], 0
        while True:
            n = _over(row, scale, own_scales, bias, lowest, flags, cols[i])
            if n >= least or lowest <= 0:
                break
            lowest = lowest * _STEP_DOWN if lowest > _TINY else np.float32(0.0)
        if n > least:
            rough = np.empty(n, np.float32)
            for p in range(n):
                f = cols[i, p]
                rough[p] = row[f] * own_scales[f] * scale + bias[f]
            limit, n_found = np.partition(rough, n - least)[n - least], n
            n = 0
            for p in range(n_found):
                cols[i, n] = cols[i, p]
                n += rough[p] >= limit
        counts[i] = n


@njit(nogil=True, fastmath=_FAST)
def _over(
    sums: Any, scale: Any, own_scales: Any, lifts: Any, floor: Any, flags: Any, cols: Any
) -> Any:
    """Few features are over it: they are flagged, then looked for eight at a time."""
    width = len(own_scales)
    for f in range(width):
        flags[f] = sums[f] * own_scales[f] * scale + lifts[f] > floor
    n, eights = 0, flags.view(np.uint64)
    for e in range(len(eights)):
        if eights[e]:
            for f in range(8 * e, min(8 * e + 8, width)):
                cols[n] = f
                n += flags[f]
    return n


@njit
def _flags(width: Any) -> Any:
    return np.zeros((width + 7) // 8 * 8, np.uint8)


@njit(nogil=True)
def keep_largest(k: Any, cols: Any, values: Any, counts: Any, first: Any, last: Any) -> None:
    """The ``k`` largest pairs of each row."""
    for i in range(first, last):
        n = counts[i]
        if n <= k:
            continue
        row = values[i]
        limit = np.partition(row[:n], n - k)[n - k]
        ties = k
        for p in range(n):
            ties -= row[p] > limit
        kept = 0
        for p in range(n):
            over, tied = row[p] > limit, row[p] == limit and ties > 0
            if over or tied:
                ties -= tied
                cols[i, kept] = cols[i, p]
                row[kept] = row[p]
                kept += 1
        counts[i] = kept


@njit(nogil=True)
def keep_from(limit: Any, cols: Any, values: Any, counts: Any, first: Any, last: Any) -> None:
    """Drop pairs whose activation is below ``limit``."""
    for i in range(first, last):
        kept = 0
        for p in range(counts[i]):
            cols[i, kept] = cols[i, p]
            values[i, kept] = values[i, p]
            kept += values[i, p] >= limit
        counts[i] = kept


@njit(nogil=True)
def histogram(bits: Any, counts: Any, above: Any, bins: Any) -> None:
    """How many pairs have each upper half of the bits of their float32, which for numbers that
    are not negative has their order; with ``above`` 0 or more, of those pairs that have this
    upper half, each lower one (less its last bit). ``bins`` int64 ``[32768]``, zeroed."""
    for i in range(len(counts)):
        for p in range(counts[i]):
            if above < 0:
                bins[bits[i, p] >> 16] += 1
            elif bits[i, p] >> 16 == above:
                bins[(bits[i, p] & 0xFFFF) >> 1] += 1


@njit(nogil=True, fastmath=_FAST)
def exact(
    x: Any, W_enc: Any, b_enc: Any, cols: Any, counts: Any, values: Any, first: Any, last: Any
) -> None:
    """The pairs' activations in float32; what turns out negative is 0."""
    for i in range(first, last):
        row = x[i]
        for p in range(counts[i]):
            weights = W_enc[cols[i, p]]
            total = np.float32(0.0)
            for j in range(len(row)):
                total += row[j] * weights[j]
            values[i, p] = max(total + b_enc[cols[i, p]], np.float32(0.0))


@njit(nogil=True, fastmath=_FAST)
def decode(
    x: Any,
    W_dec: Any,
    ends: Any,
    cols: Any,
    counts: Any,
    values: Any,
    errors: Any,
    slopes: Any,
    losses: Any,
    first: Any,
    last: Any,
) -> None:
    """Reconstructions' errors and what each pair's activation does to the loss.

    ``ends`` ``[n_groups]`` are the nested prefixes of features (Matryoshka, arXiv 2503.17547);
    one that ends at ``d_sae`` for the others. ``errors`` ``[n, n_groups, d]`` becomes, for each
    group, the mean over prefixes of the errors of those that include it; ``slopes`` has the
    pairs' shape; ``losses`` ``[n]`` is the whole dictionary's squared error.
    """
    for i in range(first, last):
        _reconstruct(x[i], W_dec, ends, cols[i], counts[i], values[i], errors[i])
        whole, total = errors[i, len(ends) - 1], np.float32(0.0)
        for j in range(len(whole)):
            total += whole[j] * whole[j]
        losses[i] = total
        _average(errors[i])
        g = 0
        for p in range(counts[i]):
            while cols[i, p] >= ends[g]:
                g += 1
            error, weights = errors[i, g], W_dec[cols[i, p]]
            total = np.float32(0.0)
            for j in range(len(error)):
                total += error[j] * weights[j]
            slopes[i, p] = total


@njit(nogil=True, fastmath=_FAST)
def _reconstruct(
    x: Any, W_dec: Any, ends: Any, cols: Any, count: Any, values: Any, errors: Any
) -> None:
    """One row's error with each prefix of the features."""
    p = 0
    for g in range(len(ends)):
        error = errors[g]
        for j in range(len(error)):
            error[j] = -x[j] if g == 0 else errors[g - 1, j]
        while p < count and cols[p] < ends[g]:
            value, weights = values[p], W_dec[cols[p]]
            for j in range(len(error)):
                error[j] += value * weights[j]
            p += 1


@njit(nogil=True, fastmath=_FAST)
def _average(errors: Any) -> None:
    """Each prefix's error becomes the sum, over it and the longer ones, of their shares."""
    n_groups = len(errors)
    share = np.float32(1.0 / n_groups)
    for g in range(n_groups - 1, -1, -1):
        for j in range(errors.shape[1]):
            errors[g, j] *= share
            if g + 1 < n_groups:
                errors[g, j] += errors[g + 1, j]


@njit(nogil=True)
def by_feature(cols: Any, counts: Any, starts: Any, rows: Any, places: Any) -> None:
    """The pairs by feature: those of ``f`` are ``starts[f]`` to ``starts[f + 1]``.

    ``starts`` is ``[d_sae + 2]`` and zeroed; ``rows`` and ``places`` have room for all pairs.
    """
    for i in range(len(counts)):
        for p in range(counts[i]):
            starts[cols[i, p] + 2] += 1
    for f in range(2, len(starts)):
        starts[f] += starts[f - 1]
    for i in range(len(counts)):
        for p in range(counts[i]):
            at = starts[cols[i, p] + 1]
            rows[at] = i
            places[at] = p
            starts[cols[i, p] + 1] = at + 1


@njit(nogil=True, fastmath=_FAST)
def gradients(
    x: Any,
    errors: Any,
    ends: Any,
    values: Any,
    slopes: Any,
    starts: Any,
    rows: Any,
    places: Any,
    scale: Any,
    g_enc: Any,
    g_dec: Any,
    g_bias: Any,
    hits: Any,
    first: Any,
    last: Any,
) -> None:
    """Of the loss, ``scale`` times the sum over rows: by encoder, decoder and encoder bias.

    A pair whose activation is 0 adds nothing, as through a ReLU; ``hits`` ``[d_sae]`` becomes
    how many pairs of a feature have more.
    """
    g = 0
    for f in range(first, last):
        while f >= ends[g]:
            g += 1
        to_enc, to_dec, to_bias, n_hits = g_enc[f], g_dec[f], np.float32(0.0), 0
        for j in range(len(to_enc)):
            to_enc[j] = np.float32(0.0)
            to_dec[j] = np.float32(0.0)
        for q in range(starts[f], starts[f + 1]):
            i, p = rows[q], places[q]
            value = values[i, p] * scale
            slope = slopes[i, p] * scale if value > 0 else np.float32(0.0)
            row, error = x[i], errors[i, g]
            for j in range(len(to_enc)):
                to_enc[j] += slope * row[j]
                to_dec[j] += value * error[j]
            to_bias += slope
            n_hits += value > 0
        g_bias[f] = to_bias
        hits[f] = n_hits


@njit(nogil=True, fastmath=_FAST)
def settle(W_dec: Any, g_enc: Any, g_dec: Any, squares: Any, first: Any, last: Any) -> None:
    """Take out of each decoder row's gradient what would only change its length; ``squares``
    ``[d_sae]`` becomes the squared length of both matrices' gradients."""
    for f in range(first, last):
        row, slope, other = W_dec[f], g_dec[f], g_enc[f]
        along, total = np.float32(0.0), np.float32(0.0)
        for j in range(len(row)):
            along += row[j] * slope[j]
        for j in range(len(row)):
            slope[j] -= along * row[j]
            total += slope[j] * slope[j] + other[j] * other[j]
        squares[f] = total


@njit(nogil=True, fastmath=_FAST)
def adam(
    weights: Any,
    slopes: Any,
    means: Any,
    squares: Any,
    rate: Any,
    shrink: Any,
    betas: Any,
    corrections: Any,
    unit: Any,
    first: Any,
    last: Any,
) -> None:
    """Adam (arXiv 1412.6980) on rows; ``shrink`` is the clipping factor of the gradient.

    ``corrections`` are ``1 - beta ** step``; with ``unit`` rows get length 1 afterwards.
    """
    b1, b2 = betas[0], betas[1]
    c1, c2 = np.float32(1.0) / corrections[0], np.float32(1.0) / corrections[1]
    one, tiny = np.float32(1.0), np.float32(1e-8)
    for f in range(first, last):
        w, g, m, s = weights[f], slopes[f], means[f], squares[f]
        for j in range(len(w)):
            slope = g[j] * shrink
            m[j] = b1 * m[j] + (one - b1) * slope
            s[j] = b2 * s[j] + (one - b2) * slope * slope
            w[j] -= rate * (m[j] * c1) / (np.sqrt(s[j] * c2) + tiny)
        if unit:
            total = np.float32(0.0)
            for j in range(len(w)):
                total += w[j] * w[j]
            inverse = one / max(np.sqrt(total), tiny)
            for j in range(len(w)):
                w[j] *= inverse
