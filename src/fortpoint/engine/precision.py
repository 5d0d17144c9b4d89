"""How weights are held: measured on this machine, never rounded unasked.

``auto`` holds each matrix in the kind that multiplies fastest here among those that keep its
values: a checkpoint that was made of four-bit weights (llama.cpp's Q4_1) keeps them, one in
bfloat16 stays that. ``int8`` and ``int4`` round as they are told; the embedding and the output
matrix then have eight bits. Activations are float32; for integer kinds they are rounded to
bytes with a scale for each 32, as llama.cpp does.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from fortpoint.engine.compiled.packed import KINDS, Kind, fits_integers, pack, rounding_error
from fortpoint.engine.compiled.product import tile_product
from fortpoint.engine.compiled.rows import Activations
from fortpoint.engine.compiled.vector import LANES, call6, instructions, jit

Wanted = Literal["auto", "float32", "bfloat16", "int8", "int4"]

ROWS = (1, 8, 32, 128)
_SHAPE = (1536, 576)  # outputs, inputs
_N_MATRICES = 8  # together larger than a core's own cache, in every kind
_REPEATS = 4
_SAMPLE = 128
_LOSSLESS = {"int4": 1e-3, "int8": 1e-3, "bfloat16": 0.0, "float32": 0.0}
"""Relative error up to which a kind keeps the values: for integers below bfloat16's rounding."""


class Precision(msgspec.Struct, frozen=True):
    """``seconds`` has each kind's time for the same products at ``ROWS`` rows."""

    wanted: Wanted
    seconds: Mapping[Kind, tuple[float, ...]]

    def kind_of(self, weight: NDArray[np.float32], *, head: bool = False) -> Kind:
        """How to hold ``weight`` ``[n_outputs, n_inputs]``; ``head``: embedding or output."""
        if self.wanted == "auto":
            return next(kind for kind in self.by_speed() if _keeps(weight, kind))
        if self.wanted in ("int8", "int4"):
            if not fits_integers(weight):
                return "bfloat16"
            return "int8" if head else self.wanted
        return self.wanted

    def by_speed(self) -> list[Kind]:
        """Kinds, the fastest for a few rows first: one row and eight count alike."""
        return sorted(KINDS, key=lambda kind: self.seconds[kind][0] * self.seconds[kind][1])


def choose(wanted: Wanted) -> Precision:
    """The precision that configuration's ``engine.dtype`` stands for here."""
    return Precision(wanted, measure(rows=ROWS[:2]) if wanted == "auto" else {})


def measure(
    kinds: Iterable[Kind] = KINDS, rows: Sequence[int] = ROWS
) -> dict[Kind, tuple[float, ...]]:
    """Time each kind in one thread; takes about a second, most of it to compile."""
    weight = np.ones(_SHAPE, np.float32)
    return {kind: _time(kind, weight, rows) for kind in kinds}


def plain(kind: Kind) -> Precision:
    """``kind`` for all matrices, without a measurement."""
    return Precision(kind, {})


def _keeps(weight: NDArray[np.float32], kind: Kind) -> bool:
    """Looks at some rows, spread over the matrix: checkpoints are rounded as a whole."""
    if kind in ("int4", "int8") and not fits_integers(weight):
        return False
    some = weight[:: max(1, len(weight) // _SAMPLE)]
    return rounding_error(some, kind) <= _LOSSLESS[kind]


def _time(kind: Kind, weight: NDArray[np.float32], each: Sequence[int]) -> tuple[float, ...]:
    tiles = np.concatenate([pack(weight, kind).data] * _N_MATRICES)
    product = tile_product(kind, instructions())
    acts = Activations(max(ROWS) * _SHAPE[1])
    out = np.empty((max(ROWS), LANES), np.float32)
    seconds = []
    for rows in each:
        work = (product, tiles, rows, _SHAPE[1], acts.addresses.ctypes.data, out.ctypes.data)
        seconds.append(min(_seconds(work) for _ in range(_REPEATS)))
    return tuple(seconds)


def _seconds(work: tuple[object, ...]) -> float:
    start = time.perf_counter()
    _multiply(*work)
    return time.perf_counter() - start


@jit()
def _multiply(
    product: int, tiles: NDArray[np.uint8], rows: int, n_inputs: int, acts: int, out: int
) -> None:
    for i in range(len(tiles)):
        call6(product, tiles[i].ctypes.data, rows, n_inputs, acts, out, LANES)
