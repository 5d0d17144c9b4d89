"""Attention over keys and values that lie in blocks of 32 tokens (``kv_cache.py``).

A block of one layer and key head holds its keys as ``[head_dim, 32]``, so that the scores of
32 tokens are computed side by side, and its values as ``[32, head_dim]``. The query heads that
share a key head, and a few rows of a prompt, are computed together: a block's numbers are
widened once for all of them.

Scores of all tokens are kept, then their softmax, then the values are mixed. Each query's
arithmetic is the same for one row as for many.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import types
from numba.core import cgutils

from fortpoint.engine.compiled.vector import (
    FLOAT,
    FLOATS,
    LANES,
    LONG,
    SHORT,
    SHORTS,
    constant,
    exp,
    fma,
    intrinsic,
    jit,
    load,
    long,
    narrow,
    native,
    number,
    operation,
    pointer,
    real,
    set_halfword,
    set_real,
    spread,
    store,
    widen,
)

BLOCK = 32
"""Tokens of a block."""

_QUERIES = (8, 4, 3, 2, 1)


def _vector(builder: Any, half: bool, base: Any, where: Any) -> Any:
    """Sixteen kept numbers, as float32."""
    kept = pointer(builder, base, SHORT if half else FLOAT, where)
    return widen(builder, load(builder, kept, SHORTS)) if half else load(builder, kept, FLOATS)


def _scores(half: bool, n: int) -> Any:
    """``out[q, t] = query[q] . key[t]`` for ``n`` queries and the tokens of one block."""

    @intrinsic
    def scores(typingctx: Any, queries: Any, keys: Any, d: Any, out: Any, step: Any) -> Any:
        """``queries`` are ``d`` floats apart, rows of ``out`` ``step``."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            queries, keys, d, out, step = args
            zero = constant(FLOATS, 0.0)
            totals = [[cgutils.alloca_once_value(builder, zero) for _ in (0, 1)] for _ in range(n)]
            with cgutils.for_range(builder, d, intp=LONG) as loop:
                row = builder.mul(loop.index, long(BLOCK))
                parts = [
                    _vector(builder, half, keys, builder.add(row, long(i * LANES))) for i in (0, 1)
                ]
                for q in range(n):
                    where = builder.add(builder.mul(d, long(q)), loop.index)
                    one = spread(
                        builder, builder.load(pointer(builder, queries, FLOAT, where)), FLOATS
                    )
                    for total, part in zip(totals[q], parts, strict=True):
                        builder.store(fma(builder, one, part, builder.load(total)), total)
            for q in range(n):
                for i in (0, 1):
                    where = builder.add(builder.mul(step, long(q)), long(i * LANES))
                    store(builder, builder.load(totals[q][i]), pointer(builder, out, FLOAT, where))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    return scores


def _mix(half: bool, n: int) -> Any:
    """``out[q] += sum over t of weights[q, t] * value[t]`` over ``n_tokens`` of one block."""

    @intrinsic
    def mix(
        typingctx: Any, weights: Any, step: Any, values: Any, n_tokens: Any, d: Any, out: Any
    ) -> Any:
        """Sixteen numbers of the head at a time; rows of ``weights`` are ``step`` apart."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            weights, step, values, n_tokens, d, out = args
            n_slices = builder.sdiv(d, long(LANES))
            with cgutils.for_range(builder, n_slices, intp=LONG) as slices:
                first = builder.mul(slices.index, long(LANES))
                places = [
                    pointer(builder, out, FLOAT, builder.add(builder.mul(d, long(q)), first))
                    for q in range(n)
                ]
                totals = [
                    cgutils.alloca_once_value(builder, load(builder, place, FLOATS))
                    for place in places
                ]
                for place, total in zip(places, totals, strict=True):
                    builder.store(load(builder, place, FLOATS), total)
                with cgutils.for_range(builder, n_tokens, intp=LONG) as tokens:
                    t = tokens.index
                    value = _vector(builder, half, values, builder.add(builder.mul(t, d), first))
                    for q in range(n):
                        where = builder.add(builder.mul(step, long(q)), t)
                        weight = builder.load(pointer(builder, weights, FLOAT, where))
                        weight = spread(builder, weight, FLOATS)
                        total = totals[q]
                        builder.store(fma(builder, weight, value, builder.load(total)), total)
                for place, total in zip(places, totals, strict=True):
                    store(builder, builder.load(total), place)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), codegen

    return mix


@intrinsic
def softmax(typingctx: Any, scores: Any, n: Any) -> Any:
    """Of ``n`` times sixteen numbers, in place; what is -inf becomes exactly 0.

    Sums run by lanes and then in order: a row's result depends on the places of its numbers
    only, not on how many zeros stand around them.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base, n = args
        infinite = constant(FLOATS, float("-inf"))
        highest = cgutils.alloca_once_value(builder, infinite)
        total = cgutils.alloca_once_value(builder, constant(FLOATS, 0.0))
        for_range = functools.partial(cgutils.for_range, builder, n, intp=LONG)

        def place(index: Any) -> Any:
            return pointer(builder, base, FLOAT, builder.mul(index, long(LANES)))

        with for_range() as loop:
            part = load(builder, place(loop.index), FLOATS)
            most = operation(builder, "llvm.maxnum.v16f32", FLOATS, builder.load(highest), part)
            builder.store(most, highest)
        most = operation(builder, "llvm.vector.reduce.fmax.v16f32", FLOAT, builder.load(highest))
        most = spread(builder, most, FLOATS)
        with for_range() as loop:
            at_ = place(loop.index)
            part = exp(builder, builder.fsub(load(builder, at_, FLOATS), most))
            store(builder, part, at_)
            builder.store(builder.fadd(builder.load(total), part), total)
        zero = FLOAT(-0.0)
        sum_ = operation(
            builder, "llvm.vector.reduce.fadd.v16f32", FLOAT, zero, builder.load(total)
        )
        inverse = spread(builder, builder.fdiv(FLOAT(1.0), sum_), FLOATS)
        with for_range() as loop:
            at_ = place(loop.index)
            store(builder, builder.fmul(load(builder, at_, FLOATS), inverse), at_)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


def _score_all(half: bool) -> Any:
    """``_scores`` for any number of queries."""
    scores8, scores4, scores3, scores2, scores1 = (_scores(half, n) for n in _QUERIES)

    @jit()
    def score_all(queries: Any, n: Any, d: Any, keys: Any, out: Any, step: Any) -> None:
        q = 0
        while q < n:
            a, o, left = queries + q * d * 4, out + q * step * 4, n - q
            if left >= 8:
                scores8(a, keys, d, o, step)
                q += 8
            elif left >= 4:
                scores4(a, keys, d, o, step)
                q += 4
            elif left == 3:
                scores3(a, keys, d, o, step)
                q += 3
            elif left == 2:
                scores2(a, keys, d, o, step)
                q += 2
            else:
                scores1(a, keys, d, o, step)
                q += 1

    return score_all


def _mix_all(half: bool) -> Any:
    """``_mix`` for any number of queries."""
    mix8, mix4, mix3, mix2, mix1 = (_mix(half, n) for n in _QUERIES)

    @jit()
    def mix_all(weights: Any, step: Any, n: Any, values: Any, m: Any, d: Any, out: Any) -> None:
        q = 0
        while q < n:
            w, o, left = weights + q * step * 4, out + q * d * 4, n - q
            if left >= 8:
                mix8(w, step, values, m, d, o)
                q += 8
            elif left >= 4:
                mix4(w, step, values, m, d, o)
                q += 4
            elif left == 3:
                mix3(w, step, values, m, d, o)
                q += 3
            elif left == 2:
                mix2(w, step, values, m, d, o)
                q += 2
            else:
                mix1(w, step, values, m, d, o)
                q += 1

    return mix_all


@functools.cache
def attention(half: bool) -> int:
    """The address of ``attend(...)`` for keys and values in bfloat16 (``half``) or float32."""
    score_all, mix_all = _score_all(half), _mix_all(half)

    @native(10)
    def attend(
        queries: Any,
        n: Any,
        d: Any,
        start: Any,
        window: Any,
        chain: Any,
        layer: Any,
        sizes: Any,
        scores: Any,
        mixed: Any,
    ) -> None:
        """``n`` queries of one key head, at positions ``start`` and on.

        ``queries`` and ``mixed`` are ``[n, d]``; ``scores`` ``[n, capacity]`` is room to work
        in; ``chain`` has the sequence's blocks; ``layer`` is the address of this layer's and
        head's keys in block 0; ``sizes`` are (bytes of a head, bytes of a block, queries of a
        row, capacity). A row sees the last ``window`` tokens, all where that is 0.
        """
        head_bytes, block_bytes = number(sizes, 0), number(sizes, 1)
        group, step = number(sizes, 2), number(sizes, 3)
        end = start + n // group
        last_block = (end - 1) // BLOCK
        first_block = max(start - window + 1, 0) // BLOCK if window > 0 else 0
        for b in range(first_block, last_block + 1):
            keys = layer + number(chain, b) * block_bytes
            score_all(queries, n, d, keys, scores + b * BLOCK * 4, step)
        first, high = first_block * BLOCK, (last_block + 1) * BLOCK
        unseen = np.float32(-np.inf)
        for q in range(n):
            row, own = scores + q * step * 4, start + q // group + 1
            low = max(own - window, first) if window > 0 else first
            for j in range(first, low):
                set_real(row, j, unseen)
            for j in range(own, high):
                set_real(row, j, unseen)
            softmax(row + first * 4, (high - first) // LANES)
        for j in range(n * d):
            set_real(mixed, j, np.float32(0.0))
        for b in range(first_block, last_block + 1):
            values = layer + number(chain, b) * block_bytes + head_bytes
            m = min(BLOCK, end - b * BLOCK)
            mix_all(scores + b * BLOCK * 4, step, n, values, m, d, mixed)

    return attend


@jit()
def keep(half: Any, key: Any, value: Any, keys: Any, place: Any, d: Any) -> None:
    """Put one token's key and value ``[d]`` into a block at ``keys``, the address of its head."""
    if half:
        for j in range(d):
            set_halfword(keys, j * BLOCK + place, narrow(real(key, j)))
        for j in range(d):
            set_halfword(keys, (BLOCK + place) * d + j, narrow(real(value, j)))
    else:
        for j in range(d):
            set_real(keys, j * BLOCK + place, real(key, j))
        for j in range(d):
            set_real(keys, (BLOCK + place) * d + j, real(value, j))
