"""Products of rows with one tile of a packed matrix (``packed.py``).

For integer kinds each row was rounded to signed bytes with one scale for each group of 32
inputs (``rows.py``); products are summed exactly in int32 within a group, then as float32
over the groups in order. A row's sum is the same whatever number of rows is computed at once.
"""

from __future__ import annotations

import functools
from typing import Any

from numba import types
from numba.core import cgutils

from fortpoint.engine.compiled.packed import (
    GROUP,
    INT4_GROUP_BYTES,
    INT8_GROUP_BYTES,
    Kind,
)
from fortpoint.engine.compiled.vector import (
    BYTE,
    BYTES,
    FLOAT,
    FLOATS,
    HALFS,
    INT,
    INTS,
    LANES,
    LONG,
    SHORTS,
    Instructions,
    constant,
    dot_bytes,
    fma,
    intrinsic,
    load,
    long,
    native,
    number,
    pointer,
    spread,
    store,
    widen,
)

_ROWS = (8, 4, 2, 1)
"""Rows computed at once: as many as fit in registers, then what is left."""


def _float_tile(kind: Kind, rows: int) -> Any:
    """``out[r] = x[r] . tile`` for ``rows`` rows of float32."""

    @intrinsic
    def tile(typingctx: Any, x: Any, stride: Any, weights: Any, n: Any, out: Any, step: Any) -> Any:
        """``stride`` and ``step`` are floats between rows of ``x`` and of ``out``."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            x, stride, weights, n, out, step = args
            totals = [_total(builder) for _ in range(rows)]
            width = 4 if kind == "float32" else 2
            with cgutils.for_range(builder, n, intp=LONG) as loop:
                base = pointer(builder, weights, BYTE, builder.mul(loop.index, long(width * LANES)))
                w = load(builder, base, FLOATS if width == 4 else SHORTS)
                w = w if width == 4 else widen(builder, w)
                for r in range(rows):
                    where = builder.add(builder.mul(stride, long(r)), loop.index)
                    one = builder.load(pointer(builder, x, FLOAT, where))
                    _add(builder, totals[r], spread(builder, one, FLOATS), w)
            _write(builder, totals, out, step)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), codegen

    return tile


def _integer_tile(kind: Kind, rows: int, which: Instructions) -> Any:
    """The same for rows of bytes. ``sums`` is scale times sum (int4), or -128 sums (int8)."""
    group_bytes = INT4_GROUP_BYTES if kind == "int4" else INT8_GROUP_BYTES

    @intrinsic
    def tile(
        typingctx: Any, x: Any, scales: Any, sums: Any, weights: Any, n: Any, out: Any, step: Any
    ) -> Any:
        """``n`` groups; ``step`` floats between rows of ``out``."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            x, scales, sums, weights, n, out, step = args
            totals = [_total(builder) for _ in range(rows)]
            with cgutils.for_range(builder, n, intp=LONG) as loop:
                group = loop.index
                where = [builder.add(builder.mul(n, long(r)), group) for r in range(rows)]
                base = pointer(builder, weights, BYTE, builder.mul(group, long(group_bytes)))
                dots = _starts(builder, kind, sums, where)
                for quad, levels in enumerate(_levels(builder, kind, base)):
                    for r in range(rows):
                        four = builder.add(builder.mul(where[r], long(GROUP // 4)), long(quad))
                        one = builder.load(pointer(builder, x, INT, four))
                        bytes_ = builder.bitcast(spread(builder, one, INTS), BYTES)
                        most = 15 if kind == "int4" else 255
                        dots[r] = dot_bytes(builder, which, dots[r], levels, bytes_, most)
                _scale(builder, kind, totals, dots, base, scales, sums, where)
            _write(builder, totals, out, step)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), codegen

    return tile


def _total(builder: Any) -> Any:
    return cgutils.alloca_once_value(builder, constant(FLOATS, 0.0))


def _add(builder: Any, total: Any, a: Any, b: Any) -> None:
    builder.store(fma(builder, a, b, builder.load(total)), total)


def _write(builder: Any, totals: list[Any], out: Any, step: Any) -> None:
    for r, total in enumerate(totals):
        base = pointer(builder, out, FLOAT, builder.mul(step, long(r)))
        store(builder, builder.load(total), base)


def _starts(builder: Any, kind: Kind, sums: Any, where: list[Any]) -> list[Any]:
    """What each row's integer sum starts from: int8 levels are raised by 128."""
    if kind == "int4":
        return [constant(INTS, 0)] * len(where)
    return [spread(builder, builder.load(pointer(builder, sums, INT, w)), INTS) for w in where]


def _levels(builder: Any, kind: Kind, base: Any) -> Any:
    """The levels of a group in the order of inputs: four of each output at a time."""
    for i in range(GROUP * LANES // (128 if kind == "int4" else 64)):
        packed = load(builder, builder.gep(base, [long(64 * i)]), BYTES)
        if kind == "int8":
            yield packed
            continue
        yield builder.and_(packed, constant(BYTES, 15))
        yield builder.lshr(packed, constant(BYTES, 4))


def _scale(
    builder: Any,
    kind: Kind,
    totals: list[Any],
    dots: list[Any],
    base: Any,
    scales: Any,
    sums: Any,
    where: list[Any],
) -> None:
    """``total += dot * (scale of weights * scale of the row)``, and the minima's part."""
    first = GROUP * LANES // (2 if kind == "int4" else 1)
    step = builder.fpext(load(builder, builder.gep(base, [long(first)]), HALFS), FLOATS)
    minimum = None
    if kind == "int4":
        after = builder.gep(base, [long(first + 2 * LANES)])
        minimum = builder.fpext(load(builder, after, HALFS), FLOATS)
    for total, dot, at in zip(totals, dots, where, strict=True):
        scale = spread(builder, builder.load(pointer(builder, scales, FLOAT, at)), FLOATS)
        _add(builder, total, builder.sitofp(dot, FLOATS), builder.fmul(step, scale))
        if minimum is not None:
            sum_ = spread(builder, builder.load(pointer(builder, sums, FLOAT, at)), FLOATS)
            _add(builder, total, minimum, sum_)


@functools.cache
def tile_product(kind: Kind, which: Instructions) -> int:
    """The address of ``product(weights, n_rows, n_in, acts, out, step)``.

    The rows at ``acts`` (``rows.ACTS`` addresses) are multiplied with the tile at ``weights``;
    the sums of a row are written to ``out``, ``step`` floats after those of the row before.
    """
    return _integers(kind, which) if kind in ("int4", "int8") else _floats(kind)


def _integers(kind: Kind, which: Instructions) -> int:
    eight, four, two, one = (_integer_tile(kind, rows, which) for rows in _ROWS)
    raised = 4 if kind == "int8" else 3

    @native(6)
    def product(weights: Any, n_rows: Any, n_in: Any, acts: Any, out: Any, step: Any) -> None:
        groups = n_in // GROUP
        x, scales, sums = number(acts, 1), number(acts, 2), number(acts, raised)
        r = 0
        while r < n_rows:
            left = n_rows - r
            a, o = x + r * n_in, out + r * step * 4
            b, c = scales + r * groups * 4, sums + r * groups * 4
            if left >= 8:
                eight(a, b, c, weights, groups, o, step)
                r += 8
            elif left >= 4:
                four(a, b, c, weights, groups, o, step)
                r += 4
            elif left >= 2:
                two(a, b, c, weights, groups, o, step)
                r += 2
            else:
                one(a, b, c, weights, groups, o, step)
                r += 1

    return product


def _floats(kind: Kind) -> int:
    eight, four, two, one = (_float_tile(kind, rows) for rows in _ROWS)

    @native(6)
    def product(weights: Any, n_rows: Any, n_in: Any, acts: Any, out: Any, step: Any) -> None:
        x = number(acts, 0)
        r = 0
        while r < n_rows:
            left = n_rows - r
            a, o = x + r * n_in * 4, out + r * step * 4
            if left >= 8:
                eight(a, n_in, weights, n_in, o, step)
                r += 8
            elif left >= 4:
                four(a, n_in, weights, n_in, o, step)
                r += 4
            elif left >= 2:
                two(a, n_in, weights, n_in, o, step)
                r += 2
            else:
                one(a, n_in, weights, n_in, o, step)
                r += 1

    return product
