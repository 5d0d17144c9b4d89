"""Weight matrices as the kernels read them: tiles of sixteen outputs, one after the other.

A tile holds its weights in the order in which they are multiplied, so that memory is read
straight through:

    float32, bfloat16   for each input: sixteen weights
    int8, int4          for each group of 32 inputs: levels (0 to 255, 0 to 15), then sixteen
                        scales, for int4 then sixteen minima (float16)

    int8   w = scale * (level - 128)       llama.cpp's Q8_0
    int4   w = scale * level + minimum     llama.cpp's Q4_1

Both integer grids are those of llama.cpp: a checkpoint that was made there keeps its values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fortpoint.engine.compiled.vector import LANES, jit

Kind = Literal["float32", "bfloat16", "int8", "int4"]
Floats = NDArray[np.float32]

KINDS: tuple[Kind, ...] = ("float32", "bfloat16", "int8", "int4")
GROUP = 32
"""Inputs that share a scale."""

INT8_GROUP_BYTES = GROUP * LANES + 2 * LANES
INT4_GROUP_BYTES = GROUP * LANES // 2 + 4 * LANES


@jit()
def tile_bytes_of(code: int, n_inputs: int) -> int:
    """Bytes of one tile of a matrix of the kind with this number."""
    if code == 3:
        return n_inputs // GROUP * INT4_GROUP_BYTES
    if code == 2:
        return n_inputs // GROUP * INT8_GROUP_BYTES
    return n_inputs * LANES * (2 if code == 1 else 4)


@dataclass(frozen=True, eq=False)
class Packed:
    """A matrix ``[n_outputs, n_inputs]``. ``data`` is ``[n_tiles, bytes]``, ``bias`` padded."""

    kind: Kind
    data: NDArray[np.uint8]
    n_outputs: int
    n_inputs: int
    bias: Floats | None = None

    @property
    def n_tiles(self) -> int:
        return len(self.data)

    @property
    def code(self) -> int:
        """The kind's number in the kernels."""
        return KINDS.index(self.kind)


def pack(weight: Floats, kind: Kind, bias: Floats | None = None) -> Packed:
    """``weight`` ``[n_outputs, n_inputs]``; missing outputs of the last tile are zeros."""
    n_outputs, n_inputs = weight.shape
    missing = -n_outputs % LANES
    if missing:
        weight = np.concatenate([weight, np.zeros((missing, n_inputs), np.float32)])
    if bias is not None:
        bias = np.concatenate([bias, np.zeros(missing, np.float32)]).astype(np.float32)
    return Packed(kind, _PACKERS[kind](weight), n_outputs, n_inputs, bias)


def fits_integers(weight: Floats) -> bool:
    """The integer kinds need whole groups of inputs."""
    return bool(weight.shape[1] % GROUP == 0)


def to_int8(weight: Floats) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Levels ``[n_outputs, n_inputs]`` from -127 to 127; scales ``[n_outputs, n_groups]``."""
    groups = _groups(weight)
    scales = (np.abs(groups).max(-1) / 127).astype(np.float16)
    steps = np.where(scales > 0, scales, np.float16(1)).astype(np.float32)
    levels = np.rint(groups / steps[..., None]).clip(-127, 127).astype(np.int8)
    return levels.reshape(weight.shape), scales


def to_int4(weight: Floats) -> tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.float16]]:
    """Levels ``[n_outputs, n_inputs]`` of 0 to 15; scales and minima ``[n_outputs, n_groups]``."""
    groups = _groups(weight)
    minima = groups.min(-1).astype(np.float16)
    scales = ((groups.max(-1) - minima.astype(np.float32)) / 15).astype(np.float16)
    steps = np.where(scales > 0, scales, np.float16(1)).astype(np.float32)
    levels = np.rint((groups - minima.astype(np.float32)[..., None]) / steps[..., None])
    return levels.clip(0, 15).astype(np.uint8).reshape(weight.shape), scales, minima


def from_int8(levels: NDArray[np.int8], scales: NDArray[np.float16]) -> Floats:
    return (_groups(levels) * scales.astype(np.float32)[..., None]).reshape(levels.shape)


def from_int4(
    levels: NDArray[np.uint8], scales: NDArray[np.float16], minima: NDArray[np.float16]
) -> Floats:
    groups = _groups(levels) * scales.astype(np.float32)[..., None]
    return (groups + minima.astype(np.float32)[..., None]).reshape(levels.shape)


def rounding_error(weight: Floats, kind: Kind) -> float:
    """Relative error (root mean square) of holding ``weight`` as ``kind``."""
    held = _held(weight, kind)
    return float(np.linalg.norm(held - weight) / max(float(np.linalg.norm(weight)), 1e-12))


def _held(weight: Floats, kind: Kind) -> Floats:
    if kind == "int4":
        return from_int4(*to_int4(weight))
    if kind == "int8":
        return from_int8(*to_int8(weight))
    return weight if kind == "float32" else _from_bfloat16(_to_bfloat16(weight))


def _groups(values: NDArray[np.generic]) -> NDArray[np.float32]:
    n_outputs, n_inputs = values.shape
    return values.reshape(n_outputs, n_inputs // GROUP, GROUP).astype(np.float32, copy=False)


def _to_bfloat16(weight: Floats) -> NDArray[np.uint16]:
    """To the nearest even (weights are finite)."""
    bits = np.ascontiguousarray(weight).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _from_bfloat16(halves: NDArray[np.uint16]) -> Floats:
    return (halves.astype(np.uint32) << 16).view(np.float32)


def _pack_float32(weight: Floats) -> NDArray[np.uint8]:
    return _by_input(weight.astype(np.float32, copy=False))


def _pack_bfloat16(weight: Floats) -> NDArray[np.uint8]:
    return _by_input(_to_bfloat16(weight))


def _by_input(weight: NDArray[np.generic]) -> NDArray[np.uint8]:
    n_outputs, n_inputs = weight.shape
    tiles = weight.reshape(n_outputs // LANES, LANES, n_inputs).transpose(0, 2, 1)
    return np.ascontiguousarray(tiles).view(np.uint8).reshape(n_outputs // LANES, -1)


def _pack_int8(weight: Floats) -> NDArray[np.uint8]:
    levels, scales = to_int8(weight)
    raised = (levels.astype(np.int16) + 128).astype(np.uint8)
    tiles, n_groups = len(weight) // LANES, scales.shape[1]
    quads = raised.reshape(tiles, LANES, n_groups, GROUP // 4, 4).transpose(0, 2, 3, 1, 4)
    parts = [quads.reshape(tiles, n_groups, -1), _numbers(scales)]
    return np.concatenate(parts, axis=-1).reshape(tiles, -1)


def _pack_int4(weight: Floats) -> NDArray[np.uint8]:
    levels, scales, minima = to_int4(weight)
    tiles, n_groups = len(weight) // LANES, scales.shape[1]
    # Low halves of bytes hold four inputs of each output, high halves the next four.
    split = levels.reshape(tiles, LANES, n_groups, GROUP // 8, 2, 4)
    both = split[..., 0, :] | (split[..., 1, :] << 4)
    quads = both.transpose(0, 2, 3, 1, 4).reshape(tiles, n_groups, -1)
    return np.concatenate([quads, _numbers(scales), _numbers(minima)], axis=-1).reshape(tiles, -1)


def _numbers(per_group: NDArray[np.float16]) -> NDArray[np.uint8]:
    """``[n_outputs, n_groups]`` as the bytes ``[n_tiles, n_groups, 32]``."""
    n_outputs, n_groups = per_group.shape
    tiles = per_group.reshape(n_outputs // LANES, LANES, n_groups).transpose(0, 2, 1)
    return np.ascontiguousarray(tiles).view(np.uint8)


_PACKERS = {
    "float32": _pack_float32,
    "bfloat16": _pack_bfloat16,
    "int8": _pack_int8,
    "int4": _pack_int4,
}
