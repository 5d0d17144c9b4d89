"""What happens to one row at a time: norms, rounding to bytes, steering, rotary positions.

A row is one token of one sequence. Nothing here looks at another row, so a request's numbers
do not depend on its neighbours. Arguments named after vectors are their addresses.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from fortpoint.engine.compiled.packed import GROUP, INT4_GROUP_BYTES, INT8_GROUP_BYTES
from fortpoint.engine.compiled.vector import (
    FAST,
    FLOAT,
    FLOATS,
    LANES,
    byte,
    constant,
    exp,
    half_as_float,
    halfword,
    intrinsic,
    jit,
    load,
    number,
    pointer,
    real,
    set_byte,
    set_int,
    set_real,
    store,
    wide,
)

MAX_GROWTH = 1e4
"""A change that multiplies a row's norm by more has diverged."""


class Activations:
    """Room for the inputs of products, row after row without gaps.

    ``values`` are float32; for integer matrices ``levels`` are their bytes with one scale for
    each group of 32, ``sums`` scale times the sum of levels, ``raised`` -128 times that sum.
    """

    def __init__(self, n_values: int) -> None:
        groups = -(-n_values // GROUP)
        self.values = np.zeros(n_values, np.float32)
        self.levels = np.zeros(n_values, np.int8)
        self.scales = np.zeros(groups, np.float32)
        self.sums = np.zeros(groups, np.float32)
        self.raised = np.zeros(groups, np.int32)
        arrays = (self.values, self.levels, self.scales, self.sums, self.raised)
        self.addresses = np.array([array.ctypes.data for array in arrays], np.int64)
        """What the kernels are given: the address of these five."""


@jit(fastmath=FAST)
def norm(x: Any, weight: Any, eps: Any, out: Any, d: Any) -> None:
    """RMS norm (arXiv 1910.07467) of one row ``[d]``; ``out`` may be ``x``."""
    total = np.float32(0.0)
    for j in range(d):
        total += real(x, j) * real(x, j)
    scale = np.float32(1.0) / np.sqrt(total / np.float32(d) + eps)
    for j in range(d):
        set_real(out, j, real(x, j) * scale * real(weight, j))


@jit(fastmath=FAST)
def round_to_bytes(acts: Any, row: Any, n: Any) -> None:
    """``values`` of a row of ``n`` inputs to ``levels`` of -127 to 127.

    ``acts`` are the five addresses of ``Activations``.
    """
    for g in range(row * n // GROUP, (row + 1) * n // GROUP):
        values, levels = number(acts, 0) + g * GROUP * 4, number(acts, 1) + g * GROUP
        largest = sum_ = np.float32(0.0)
        for j in range(GROUP):
            largest = max(largest, abs(real(values, j)))
            sum_ += abs(real(values, j))
        # What is not finite (it is in the sum) becomes NaN for its row, and for no other.
        usable = sum_ <= np.float32(3e38)
        inverse = np.float32(0.0)
        if usable and largest > np.float32(1e-30):
            inverse = np.float32(127.0) / largest
        total = np.int32(0)
        for j in range(GROUP):
            level = np.int32(np.rint(real(values, j) * inverse)) if usable else np.int32(0)
            set_byte(levels, j, np.int8(level))
            total += level
        scale = largest / np.float32(127.0) if usable else np.float32(np.nan)
        set_real(number(acts, 2), g, scale)
        set_real(number(acts, 3), g, scale * np.float32(total))
        set_int(number(acts, 4), g, np.int32(-128) * total)


@intrinsic
def gated(typingctx: Any, gate: Any, up: Any, out: Any) -> Any:
    """``silu(gate) * up`` (arXiv 2002.05202), sixteen numbers."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        gate, up = (load(builder, pointer(builder, base, FLOAT), FLOATS) for base in args[:2])
        one = constant(FLOATS, 1.0)
        below = builder.fadd(one, exp(builder, builder.fsub(constant(FLOATS, -0.0), gate)))
        product = builder.fmul(builder.fdiv(gate, below), up)
        store(builder, product, pointer(builder, args[2], FLOAT))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@jit(fastmath=FAST)
def rotate(head: Any, cos: Any, sin: Any, d: Any) -> None:
    """Rotary positions (arXiv 2104.09864) of one head ``[d]``, in place."""
    half = d // 2
    for i in range(half):
        a, b = real(head, i), real(head, i + half)
        set_real(head, i, a * real(cos, i) - b * real(sin, i))
        set_real(head, i + half, b * real(cos, i) + a * real(sin, i))


@jit(fastmath=FAST)
def dot(a: Any, b: Any, d: Any) -> Any:
    total = np.float32(0.0)
    for j in range(d):
        total += real(a, j) * real(b, j)
    return total


@jit()
def copy(source: Any, target: Any, d: Any) -> None:
    for j in range(d):
        set_real(target, j, real(source, j))


@jit()
def add_to(target: Any, source: Any, scale: Any, d: Any) -> None:
    """``target += scale * source``."""
    for j in range(d):
        set_real(target, j, real(target, j) + scale * real(source, j))


@jit()
def steer(x: Any, first: Any, last: Any, edits: Any, row: Any, d: Any) -> None:
    """Read this row's conditions and make its changes at one layer, in order.

    ``x`` is ``[d]``; ``edits`` are the addresses of a ``steering.EditTable``'s columns, and
    ``first`` to ``last`` the entries.
    """
    truths, diverged = number(edits, 7), number(edits, 8)
    for e in range(first, last):
        z = dot(x, number(number(edits, 0), e), d) + real(number(edits, 2), e)
        over = z > real(number(edits, 3), e)
        gate, truth = number(number(edits, 5), e), number(number(edits, 6), e)
        if truth >= 0:
            set_byte(truths, truth, np.int8(1 if over else 0))
            continue
        if gate >= 0 and byte(truths, gate) == 0:
            continue
        amount = real(number(edits, 4), e) - (z if over else np.float32(0.0))
        before = np.sqrt(dot(x, x, d))
        add_to(x, number(number(edits, 1), e), amount, d)
        after = np.sqrt(dot(x, x, d))
        if not after <= max(before * np.float32(MAX_GROWTH), np.float32(1.0)):
            set_byte(diverged, row, np.int8(1))


@jit()
def adapt(values: Any, n: Any, pair: Any, out: Any) -> None:
    """A LoRA adapter's inner numbers (arXiv 2106.09685): ``out[i] = A[i] . values``, ``[n]``.

    ``pair`` is (address of A ``[rank, n]``, address of B, rank).
    """
    for i in range(number(pair, 2)):
        set_real(out, i, dot(number(pair, 0) + i * n * 4, values, n))


@jit()
def add_adapted(inner: Any, pair: Any, tile: Any, out: Any) -> None:
    """``out += B inner`` for sixteen outputs; B lies as ``[n_tiles, rank, 16]``."""
    rank = number(pair, 2)
    b = number(pair, 1) + tile * rank * LANES * 4
    for i in range(rank):
        add_to(out, b + i * LANES * 4, real(inner, i), LANES)


@jit()
def embed(code: Any, tile: Any, lane: Any, out: Any, n: Any) -> None:
    """One row ``[n]`` of a packed embedding (``packed.py``): output ``lane`` of ``tile``."""
    for j in range(n):
        if code == 0:
            set_real(out, j, real(tile, j * LANES + lane))
        elif code == 1:
            set_real(out, j, wide(halfword(tile, j * LANES + lane)))
        elif code == 2:
            set_real(out, j, _of_int8(tile + j // GROUP * INT8_GROUP_BYTES, lane, j % GROUP))
        else:
            set_real(out, j, _of_int4(tile + j // GROUP * INT4_GROUP_BYTES, lane, j % GROUP))


@jit()
def _of_int8(group: Any, lane: Any, j: Any) -> Any:
    level = np.float32(byte(group, (j // 4) * 64 + lane * 4 + j % 4)) - np.float32(128)
    return level * half_as_float(halfword(group + GROUP * LANES, lane))


@jit()
def _of_int4(group: Any, lane: Any, j: Any) -> Any:
    both = byte(group, (j // 8) * 64 + lane * 4 + j % 4)
    level = np.float32((both >> 4) if j % 8 >= 4 else (both & 15))
    numbers = group + GROUP * LANES // 2
    minimum = half_as_float(halfword(numbers, LANES + lane))
    return level * half_as_float(halfword(numbers, lane)) + minimum
