"""Tensors of a safetensors file by name, believed only as far as they are of the expected shape.

    file = TensorFile(folder / "model.safetensors")
    weight = file.get("model.embed_tokens.weight", (49152, 576))  # float32

The header has a limit, and a tensor's type, shape and place are checked before a byte of it is
read. The file is opened for each tensor: a map that stays open keeps its pages in memory. The
format is read here because safetensors' own reader needs torch for bfloat16, which would take
the engine more memory than the small models that it serves.

Not protected by ``TensorFile``: values. ``read`` refuses those that are not finite, for files
that nobody vouches for.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from fortpoint.errors import ModelError

MAX_HEADER_BYTES = 64 * 1024 * 1024
MAX_UNVOUCHED_HEADER_BYTES = 1024 * 1024

Shape = tuple[int, ...]
Floats = NDArray[np.float32]

_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16}


class _Entry(msgspec.Struct, frozen=True):
    """A tensor in a safetensors header; offsets are from the header's end."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class TensorFile:
    """Where one file's tensors are. Raises ``ModelError`` for what is no safetensors file."""

    def __init__(self, path: Path, max_header_bytes: int = MAX_HEADER_BYTES) -> None:
        self._path = path
        self._entries, self._start = _read_header(path, max_header_bytes)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    @property
    def names(self) -> list[str]:
        """Of all tensors, as the header lists them."""
        return list(self._entries)

    def get(self, name: str, shape: Shape) -> Floats:
        """The tensor as float32, an array of its own. Raises ``ModelError`` naming it."""
        entry = self._entries.get(name)
        if entry is None:
            raise ModelError(f"{self._path.name} lacks {name}")
        bits = _BITS.get(entry.dtype)
        if bits is None:
            raise ModelError(f"{name} is {entry.dtype[:16]!r}, not a floating-point type")
        if tuple(entry.shape) != shape:
            raise ModelError(f"{name} has the shape {_shown(entry.shape)}, not {_shown(shape)}")
        start, end = entry.data_offsets
        n_bytes = int(np.prod(shape, dtype=np.int64)) * bits // 8
        if start < 0 or end - start != n_bytes:
            raise ModelError(f"{name} has {end - start} bytes, not the {n_bytes} of its shape")
        raw = self._read(self._start + start, n_bytes, name)
        return _floats(raw, entry.dtype).reshape(shape)

    def _read(self, start: int, n_bytes: int, name: str) -> NDArray[np.uint8]:
        try:
            with self._path.open("rb") as file:
                if start + n_bytes > file.seek(0, os.SEEK_END):
                    raise ModelError(f"{self._path.name} ends before {name} does")
                file.seek(start)
                raw = np.fromfile(file, np.uint8, n_bytes)
        except (OSError, MemoryError) as error:
            raise ModelError(f"{name} cannot be read: {type(error).__name__}") from None
        if len(raw) != n_bytes:  # it shrank meanwhile
            raise ModelError(f"{self._path.name} ends before {name} does")
        return raw


def read(
    path: Path, required: Mapping[str, Shape], optional: Mapping[str, Shape] | None = None
) -> dict[str, Floats]:
    """The named tensors of a file that nobody vouches for, each of exactly the shape given.

    Raises ``ModelError``, also for values that are not finite. Tensors that were not asked for
    are never read.
    """
    if not path.is_file():
        raise ModelError(f"{path.name} is not there")
    file = TensorFile(path, MAX_UNVOUCHED_HEADER_BYTES)
    present = {name: shape for name, shape in (optional or {}).items() if name in file}
    tensors = {name: file.get(name, shape) for name, shape in {**required, **present}.items()}
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise ModelError(f"{name} in {path.name} holds values that are not finite")
    return tensors


def _floats(raw: NDArray[np.uint8], dtype: str) -> Floats:
    if dtype == "BF16":  # the upper half of a float32
        wide = raw.view("<u2").astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    kind = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]
    with np.errstate(all="ignore"):  # what float32 cannot hold becomes infinite
        return raw.view(kind).astype(np.float32, copy=False)


def _read_header(path: Path, max_bytes: int) -> tuple[dict[str, _Entry], int]:
    """Entries by name, and the position of their data (safetensors' format)."""
    try:
        with path.open("rb") as file:
            (n_bytes,) = struct.unpack("<Q", file.read(8))
            if n_bytes > max_bytes:
                raise ModelError(f"{path.name} has a header of more than {max_bytes} bytes")
            raw = file.read(n_bytes)
        header = msgspec.json.decode(raw, type=dict[str, Any])
        header.pop("__metadata__", None)
        return msgspec.convert(header, dict[str, _Entry]), 8 + n_bytes
    except OSError as error:
        raise ModelError(f"{path.name} cannot be read: {error.strerror}") from None
    except (struct.error, UnicodeDecodeError, RecursionError, msgspec.MsgspecError):
        raise ModelError(f"{path.name} is no safetensors file") from None


def _shown(shape: Shape | list[int]) -> str:
    return "x".join(map(str, shape[:8])) or "of a single number"
