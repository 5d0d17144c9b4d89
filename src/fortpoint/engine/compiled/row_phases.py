"""The phases whose tasks are rows, and attention, whose tasks are rows by key heads.

Each gives the address of a native function ``(table, layer, thread)``.
"""

from __future__ import annotations

import functools
from typing import Any

from fortpoint.engine.compiled.attention import BLOCK, attention, keep
from fortpoint.engine.compiled.packed import KINDS, tile_bytes_of
from fortpoint.engine.compiled.rows import (
    adapt,
    copy,
    embed,
    norm,
    rotate,
    round_to_bytes,
    steer,
)
from fortpoint.engine.compiled.table import N_COLUMNS, SITES, Column, Table
from fortpoint.engine.compiled.tasks import meet, take
from fortpoint.engine.compiled.vector import LANES, call10, jit, native, number, real, set_real

FLOAT_KINDS = KINDS.index("bfloat16")
"""The greatest number of a kind whose products need no bytes."""


@jit()
def layer_entry(t: Any, layer: Any, column: Any) -> Any:
    """The address of a layer's columns from ``column`` on."""
    return number(t, Table.LAYERS) + (layer * N_COLUMNS + column) * 8


@jit()
def pair_of(t: Any, adapter: Any, layer: Any, site: Any) -> Any:
    """Of an adapter: addresses of A and B, rank."""
    index = (adapter * number(t, Table.N_LAYERS) + layer) * SITES + site
    return number(t, Table.PAIRS) + index * 24


@jit()
def prepare_row(t: Any, matrix: Any, acts: Any, row: Any, layer: Any, site: Any) -> None:
    """What the product with ``matrix`` needs of a row whose values are in place."""
    n_in = number(matrix, 3)
    if number(t, Table.ADAPTERS) != 0:
        adapter = number(number(t, Table.ADAPTERS), row)
        if adapter >= 0:
            values = number(acts, 0) + row * n_in * 4
            inner = number(t, Table.INNER) + row * number(t, Table.INNER_SIZE) * 4
            adapt(values, n_in, pair_of(t, adapter, layer, site), inner)
    if number(matrix, 1) > FLOAT_KINDS:
        round_to_bytes(acts, row, n_in)


@jit()
def _norm_and_prepare(t: Any, layer: Any, row: Any, column: Any, matrix: Any, site: Any) -> None:
    """A row of the residual stream becomes the input of one of its block's matrices."""
    d, acts = number(t, Table.D_MODEL), number(t, Table.ACTS)
    weight, eps = number(layer_entry(t, layer, column), 0), real(number(t, Table.SCALARS), 0)
    norm(number(t, Table.X) + row * d * 4, weight, eps, number(acts, 0) + row * d * 4, d)
    prepare_row(t, layer_entry(t, layer, matrix), acts, row, layer, site)


@jit()
def _leave(t: Any, layer: Any, row: Any, x: Any) -> None:
    """After a block: the row is steered, then read."""
    d, place = number(t, Table.D_MODEL), layer * number(t, Table.N_ROWS) + row
    if place + 1 < number(t, Table.N_EDITS):
        starts = number(t, Table.EDIT_STARTS)
        first, last = number(starts, place), number(starts, place + 1)
        if first < last:
            steer(x, first, last, number(t, Table.EDITS), row, d)
    slot = number(number(t, Table.TAP_SLOTS), layer)
    if slot >= 0:
        seen = slot * number(t, Table.SEEN_ROWS) + row
        copy(x, number(t, Table.SEEN) + seen * d * 4, d)


@jit()
def _embed_row(t: Any, row: Any, x: Any) -> None:
    matrix, token = number(t, Table.EMBEDDING), number(number(t, Table.TOKENS), row)
    code, d = number(matrix, 1), number(t, Table.D_MODEL)
    tile = number(matrix, 0) + token // LANES * tile_bytes_of(code, d)
    embed(code, tile, token % LANES, x, d)


@functools.cache
def begin_phase() -> int:
    """Finish the block before (or embed the tokens); prepare this block's first product."""
    column, matrix = int(Column.NORM_ATTENTION), int(Column.QKV)

    @native(3)
    def begin(t: Any, layer: Any, thread: Any) -> None:
        row = take(t, 1)
        while row < number(t, Table.N_ROWS):
            x = number(t, Table.X) + row * number(t, Table.D_MODEL) * 4
            if layer == 0:
                _embed_row(t, row, x)
            else:
                _leave(t, layer - 1, row, x)
            if layer <= number(t, Table.LAST_LAYER):
                _norm_and_prepare(t, layer, row, column, matrix, 0)
            row = take(t, 1)
        meet(t)

    return begin


@functools.cache
def middle_phase() -> int:
    """Prepare the MLP's first product."""
    column, matrix = int(Column.NORM_MLP), int(Column.GATE_UP)

    @native(3)
    def middle(t: Any, layer: Any, thread: Any) -> None:
        row = take(t, 1)
        while row < number(t, Table.N_ROWS):
            _norm_and_prepare(t, layer, row, column, matrix, 2)
            row = take(t, 1)
        meet(t)

    return middle


@functools.cache
def prepare_phase(column: Column) -> int:
    """Prepare what a phase has left in place: for ``OUT`` or ``DOWN``."""
    matrix_column, is_out = int(column), column is Column.OUT
    acts, site = (int(Table.ACTS), 1) if is_out else (int(Table.WIDE), 3)

    @native(3)
    def prepare(t: Any, layer: Any, thread: Any) -> None:
        matrix = layer_entry(t, layer, matrix_column)
        if number(matrix, 1) <= FLOAT_KINDS and number(t, Table.ADAPTERS) == 0:
            return
        row = take(t, 1)
        while row < number(t, Table.N_ROWS):
            prepare_row(t, matrix, number(t, acts), row, layer, site)
            row = take(t, 1)
        meet(t)

    return prepare


@functools.cache
def last_phase() -> int:
    """The final norm of the rows that want logits, side by side."""

    @native(3)
    def last(t: Any, layer: Any, thread: Any) -> None:
        d, acts, eps = (
            number(t, Table.D_MODEL),
            number(t, Table.ACTS),
            real(number(t, Table.SCALARS), 0),
        )
        i = take(t, 1)
        while i < number(t, Table.N_LOGITS):
            x = number(t, Table.X) + number(number(t, Table.LOGIT_ROWS), i) * d * 4
            norm(x, number(t, Table.FINAL_NORM), eps, number(acts, 0) + i * d * 4, d)
            if number(number(t, Table.HEAD), 1) > FLOAT_KINDS:
                round_to_bytes(acts, i, d)
            i = take(t, 1)
        meet(t)

    return last


@functools.cache
def rotate_phase() -> int:
    """Rotary positions, in place; keys and values go to the cache."""

    @native(3)
    def rotate_rows(t: Any, layer: Any, thread: Any) -> None:
        n_all = number(t, Table.N_HEADS) + 2 * number(t, Table.N_KV_HEADS)
        row = take(t, 1)
        while row < number(t, Table.N_ROWS):
            heads = number(t, Table.QKV) + row * n_all * number(t, Table.HEAD_DIM) * 4
            place = number(t, Table.PLACE) + row * 16
            _rotate_heads(t, layer, heads, number(place, 0))
            _keep_row(t, layer, heads, number(place, 0), number(place, 1))
            row = take(t, 1)
        meet(t)

    return rotate_rows


@jit()
def _rotate_heads(t: Any, layer: Any, heads: Any, position: Any) -> None:
    d, n_heads = number(t, Table.HEAD_DIM), number(t, Table.N_HEADS)
    norms, eps = layer_entry(t, layer, _NORM_QUERY), real(number(t, Table.SCALARS), 0)
    cos, sin = number(t, Table.COS) + position * d * 2, number(t, Table.SIN) + position * d * 2
    for h in range(n_heads + number(t, Table.N_KV_HEADS)):
        head = heads + h * d * 4
        weight = number(norms, 0 if h < n_heads else 1)
        if weight != 0:
            norm(head, weight, eps, head, d)
        rotate(head, cos, sin, d)


@jit()
def _keep_row(t: Any, layer: Any, heads: Any, position: Any, chain: Any) -> None:
    d, n_heads, n_kv = (
        number(t, Table.HEAD_DIM),
        number(t, Table.N_HEADS),
        number(t, Table.N_KV_HEADS),
    )
    sizes, blocks = (
        number(t, Table.KV_SIZES),
        number(t, Table.CHAINS) + chain * number(t, Table.CHAIN) * 8,
    )
    block = number(t, Table.KV_BASE) + layer * number(t, Table.KV_LAYER)
    block += number(blocks, position // BLOCK) * number(sizes, 1)
    for h in range(n_kv):
        key = heads + (n_heads + h) * d * 4
        base = block + h * 2 * number(sizes, 0)
        keep(number(t, Table.KV_HALF), key, key + n_kv * d * 4, base, position % BLOCK, d)


_NORM_QUERY, _WINDOW = int(Column.NORM_QUERY), int(Column.WINDOW)


@functools.cache
def attend_phase(half: bool) -> int:
    """Mix the values of each row's past; what comes out is the input of ``OUT``."""
    attend = attention(half)

    @native(3)
    def attend_tasks(t: Any, layer: Any, thread: Any) -> None:
        d, n_kv = number(t, Table.HEAD_DIM), number(t, Table.N_KV_HEADS)
        group = number(t, Table.N_HEADS) // n_kv
        sizes, width = number(t, Table.KV_SIZES), group * d
        window = number(layer_entry(t, layer, _WINDOW), 0)
        queries = number(t, Table.SCRATCH) + thread * number(t, Table.SCRATCH_SIZE) * 4
        values = number(number(t, Table.ACTS), 0)
        index = take(t, 1)
        while index < number(t, Table.N_TASKS):
            task = number(t, Table.TASKS) + index * 24
            row, n_rows, head = number(task, 0), number(task, 1), number(task, 2)
            n = n_rows * group
            mixed, scores = queries + n * d * 4, queries + 2 * n * d * 4
            for i in range(n_rows):
                source = (
                    number(t, Table.QKV) + ((row + i) * (n_kv * (group + 2)) * d + head * width) * 4
                )
                _scaled(source, queries + i * width * 4, real(number(t, Table.SCALARS), 1), width)
            place = number(t, Table.PLACE) + row * 16
            chain = number(t, Table.CHAINS) + number(place, 1) * number(t, Table.CHAIN) * 8
            base = number(t, Table.KV_BASE) + layer * number(t, Table.KV_LAYER)
            base += head * 2 * number(sizes, 0)
            call10(
                attend, queries, n, d, number(place, 0), window, chain, base, sizes, scores, mixed
            )
            for i in range(n_rows):
                target = values + ((row + i) * n_kv + head) * width * 4
                copy(mixed + i * width * 4, target, width)
            index = take(t, 1)
        meet(t)

    return attend_tasks


@jit()
def _scaled(source: Any, target: Any, scale: Any, n: Any) -> None:
    for j in range(n):
        set_real(target, j, real(source, j) * scale)
