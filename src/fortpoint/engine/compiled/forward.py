"""The forward pass: every phase of every block, computed by all threads of a team together.

    for each block: begin    rows: finish the block before (edits, taps), norm, round to bytes
                    qkv      tiles of outputs
                    rotate   rows: rotary positions; keys and values into the cache
                    attend   rows by key heads
                    prepare  rows: round to bytes
                    out      tiles, added to the residual stream
                    middle   rows: norm, round to bytes
                    gate up  tiles in pairs
                    prepare  rows
                    down     tiles, added to the residual stream
    then the last rows, the final norm and the logits

The residual stream is float32 throughout. Each phase is compiled on its own and reads what it
works on from a ``Table`` of numbers.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

from fortpoint.engine.compiled import row_phases, tile_phases
from fortpoint.engine.compiled.packed import Kind
from fortpoint.engine.compiled.table import Column, Table
from fortpoint.engine.compiled.vector import Instructions, call3, native, number


def row_programs() -> tuple[int, int, int, int]:
    """The phases that no matrix changes: half of the work of compiling, to begin with."""
    return (
        row_phases.begin_phase(),
        row_phases.rotate_phase(),
        row_phases.middle_phase(),
        row_phases.last_phase(),
    )


@functools.cache
def forward_pass(kinds: frozenset[Kind], half: bool, which: Instructions) -> Callable[..., None]:
    """The program for matrices of these kinds and keys in bfloat16 (``half``) or float32.

    ``forward(address of the table, thread)``, called in every thread at once, releases the
    interpreter's lock.
    """
    begin, rotate, middle, last = row_programs()
    attend = row_phases.attend_phase(half)
    prepare_out = row_phases.prepare_phase(Column.OUT)
    prepare_down = row_phases.prepare_phase(Column.DOWN)
    product = tile_phases.products(kinds, which)
    qkv = tile_phases.store_phase(product, Column.QKV)
    logits = tile_phases.store_phase(product, None)
    out = tile_phases.add_phase(product, Column.OUT)
    down = tile_phases.add_phase(product, Column.DOWN)
    gate_up = tile_phases.gate_phase(product)

    @native(2)
    def forward(t: Any, thread: Any) -> None:
        for layer in range(number(t, Table.LAST_LAYER) + 1):
            call3(begin, t, layer, thread)
            call3(qkv, t, layer, thread)
            call3(rotate, t, layer, thread)
            call3(attend, t, layer, thread)
            call3(prepare_out, t, layer, thread)
            call3(out, t, layer, thread)
            call3(middle, t, layer, thread)
            call3(gate_up, t, layer, thread)
            call3(prepare_down, t, layer, thread)
            call3(down, t, layer, thread)
        call3(begin, t, number(t, Table.LAST_LAYER) + 1, thread)
        if number(t, Table.N_LOGITS) > 0:
            call3(last, t, 0, thread)
            call3(logits, t, 0, thread)

    return ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)(forward)
