"""The phases whose tasks are tiles of sixteen outputs of a matrix, for all rows.

Each gives the address of a native function ``(table, layer, thread)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fortpoint.engine.compiled.packed import KINDS, Kind, tile_bytes_of
from fortpoint.engine.compiled.product import tile_product
from fortpoint.engine.compiled.row_phases import layer_entry, pair_of
from fortpoint.engine.compiled.rows import add_adapted, gated
from fortpoint.engine.compiled.table import Column, Table
from fortpoint.engine.compiled.tasks import meet, share, take
from fortpoint.engine.compiled.vector import (
    LANES,
    Instructions,
    call6,
    jit,
    native,
    number,
    real,
    set_real,
)

Product = Callable[[Any], Any]


def products(kinds: frozenset[Kind], which: Instructions) -> Product:
    """The address of the product for the number of a kind."""
    float32, bfloat16, int8, int4 = (
        tile_product(kind, which) if kind in kinds else 0 for kind in KINDS
    )

    @jit()
    def product(code: Any) -> Any:
        if code == 0:
            return float32
        if code == 1:
            return bfloat16
        return int8 if code == 2 else int4

    return product  # type: ignore[no-any-return]


@jit()
def _add_sixteen(out: Any, source: Any) -> None:
    for j in range(LANES):
        set_real(out, j, real(out, j) + real(source, j))


@jit()
def _finish(
    t: Any, matrix: Any, tile: Any, layer: Any, site: Any, out: Any, step: Any, n_rows: Any
) -> None:
    """Bias and adapters of one tile of all rows, which are ``step`` floats apart."""
    if number(matrix, 4) != 0:
        for r in range(n_rows):
            _add_sixteen(out + r * step * 4, number(matrix, 4) + tile * LANES * 4)
    if number(t, Table.ADAPTERS) != 0 and site >= 0:
        for r in range(n_rows):
            adapter = number(number(t, Table.ADAPTERS), r)
            if adapter >= 0:
                inner = number(t, Table.INNER) + r * number(t, Table.INNER_SIZE) * 4
                add_adapted(inner, pair_of(t, adapter, layer, site), tile, out + r * step * 4)


def store_phase(product: Product, column: Column | None) -> int:
    """``QKV`` of all rows; None: the logits."""
    is_head, place, site = column is None, int(Column.QKV), -1 if column is None else 0

    @native(3)
    def multiply(t: Any, layer: Any, thread: Any) -> None:
        matrix = number(t, Table.HEAD) if is_head else layer_entry(t, layer, place)
        n_rows = number(t, Table.N_LOGITS) if is_head else number(t, Table.N_ROWS)
        out = number(t, Table.LOGITS) if is_head else number(t, Table.QKV)
        code, n_tiles, n_in = number(matrix, 1), number(matrix, 2), number(matrix, 3)
        size, step, chunk = tile_bytes_of(code, n_in), n_tiles * LANES, share(t, n_tiles)
        acts, kernel = number(t, Table.ACTS), product(code)
        first = take(t, chunk)
        while first < n_tiles:
            for i in range(first, min(first + chunk, n_tiles)):
                to = out + i * LANES * 4
                call6(kernel, number(matrix, 0) + i * size, n_rows, n_in, acts, to, step)
                _finish(t, matrix, i, layer, site, to, step, n_rows)
            first = take(t, chunk)
        meet(t)

    return multiply


def add_phase(product: Product, column: Column) -> int:
    """``x += matrix . row`` for ``OUT`` or ``DOWN``."""
    place, is_out = int(column), column is Column.OUT
    source, site = (int(Table.ACTS), 1) if is_out else (int(Table.WIDE), 3)

    @native(3)
    def add(t: Any, layer: Any, thread: Any) -> None:
        matrix = layer_entry(t, layer, place)
        code, n_tiles, n_in = number(matrix, 1), number(matrix, 2), number(matrix, 3)
        n_rows, d = number(t, Table.N_ROWS), number(t, Table.D_MODEL)
        size, chunk = tile_bytes_of(code, n_in), share(t, n_tiles)
        to = number(t, Table.TILES) + thread * number(t, Table.TILES_SIZE) * 4
        acts, kernel = number(t, source), product(code)
        first = take(t, chunk)
        while first < n_tiles:
            for i in range(first, min(first + chunk, n_tiles)):
                call6(kernel, number(matrix, 0) + i * size, n_rows, n_in, acts, to, LANES)
                _finish(t, matrix, i, layer, site, to, LANES, n_rows)
                for r in range(n_rows):
                    x = number(t, Table.X) + (r * d + i * LANES) * 4
                    _add_sixteen(x, to + r * LANES * 4)
            first = take(t, chunk)
        meet(t)

    return add


def gate_phase(product: Product) -> int:
    """``silu(gate . row) * (up . row)``, the input of ``DOWN``; tiles of both alternate."""
    place = int(Column.GATE_UP)

    @native(3)
    def gate_up(t: Any, layer: Any, thread: Any) -> None:
        matrix, n_rows = layer_entry(t, layer, place), number(t, Table.N_ROWS)
        code, n_pairs, n_in = number(matrix, 1), number(matrix, 2) // 2, number(matrix, 3)
        size, chunk = tile_bytes_of(code, n_in), share(t, n_pairs)
        gate = number(t, Table.TILES) + thread * number(t, Table.TILES_SIZE) * 4
        up = gate + number(t, Table.TILES_SIZE) * 2
        acts, kernel = number(t, Table.ACTS), product(code)
        values, d_mlp = number(number(t, Table.WIDE), 0), number(t, Table.D_MLP)
        first = take(t, chunk)
        while first < n_pairs:
            for i in range(first, min(first + chunk, n_pairs)):
                where = number(matrix, 0) + 2 * i * size
                call6(kernel, where, n_rows, n_in, acts, gate, LANES)
                call6(kernel, where + size, n_rows, n_in, acts, up, LANES)
                _finish(t, matrix, 2 * i, layer, 2, gate, LANES, n_rows)
                _finish(t, matrix, 2 * i + 1, layer, 2, up, LANES, n_rows)
                for r in range(n_rows):
                    to = values + (r * d_mlp + i * LANES) * 4
                    gated(gate + r * LANES * 4, up + r * LANES * 4, to)
            first = take(t, chunk)
        meet(t)

    return gate_up
