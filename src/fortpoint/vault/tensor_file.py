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

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from fortpoint.errors import ModelError

MAX_HEADER_BYTES = 64 * 1024 * 1024
MAX_UNVOUCHED_HEADER_BYTES = 1024 * 1024
MAX_TENSORS = 1_000_000

Shape = tuple[int, ...]
Floats = NDArray[np.float32]

_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16}
_OTHER_BITS = {"I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8}


class _Entry(msgspec.Struct, frozen=True):
    """A tensor in a safetensors header; offsets are from the header's end."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class ByteSource(Protocol):
    """Where a file's bytes come from: the disk, or a sealed model."""

    name: str

    def n_bytes(self) -> int: ...

    def read(self, start: int, n_bytes: int) -> NDArray[np.uint8]:
        """An array of its own, shorter where the file ends. Raises ``ModelError``."""
        ...


class TensorFile:
    """Where one file's tensors are. Raises ``ModelError`` for what is no safetensors file."""

    def __init__(self, source: Path | ByteSource, max_header_bytes: int = MAX_HEADER_BYTES) -> None:
        self._source = _OnDisk(source) if isinstance(source, Path) else source
        self._entries, self._start = _read_header(self._source, max_header_bytes)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    @property
    def names(self) -> list[str]:
        """Of all tensors, as the header lists them."""
        return list(self._entries)

    def check(self) -> None:
        """Raises ``ModelError`` where a tensor has a shape or place that no writer gives it.

        Tensors must lie one after another, without gap or overlap, up to the file's end.
        """
        if len(self._entries) > MAX_TENSORS:
            raise ModelError(f"{self._source.name} names more than {MAX_TENSORS} tensors")
        end = 0
        for name, entry in sorted(self._entries.items(), key=lambda item: item[1].data_offsets):
            start = entry.data_offsets[0]
            if start != end:
                raise ModelError(f"{name[:64]} of {self._source.name} overlaps, or leaves a gap")
            end = start + _n_bytes(name, entry)
            if entry.data_offsets[1] != end:
                raise ModelError(f"{name[:64]} has another number of bytes than its shape")
        if self._start + end != self._source.n_bytes():
            raise ModelError(f"{self._source.name} does not end where its last tensor does")

    def shape(self, name: str) -> Shape:
        """Of a tensor that is there."""
        return tuple(self._entries[name].shape)

    def dtype(self, name: str) -> str:
        """As the header has it: ``F16``."""
        return self._entries[name].dtype

    def get(self, name: str, shape: Shape) -> Floats:
        """The tensor as float32, an array of its own. Raises ``ModelError`` naming it."""
        entry = self._entries.get(name)
        if entry is None:
            raise ModelError(f"{self._source.name} lacks {name}")
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
        if start + n_bytes > self._source.n_bytes():
            raise ModelError(f"{self._source.name} ends before {name} does")
        try:
            raw = self._source.read(start, n_bytes)
        except MemoryError:
            raise ModelError(f"{name} cannot be read: MemoryError") from None
        if len(raw) != n_bytes:  # it shrank meanwhile
            raise ModelError(f"{self._source.name} ends before {name} does")
        return raw


class _OnDisk:
    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._path = path

    def n_bytes(self) -> int:
        try:
            return self._path.stat().st_size
        except OSError as error:
            raise ModelError(f"{self.name} cannot be read: {error.strerror}") from None

    def read(self, start: int, n_bytes: int) -> NDArray[np.uint8]:
        try:
            with self._path.open("rb") as file:
                file.seek(start)
                return np.fromfile(file, np.uint8, n_bytes)
        except OSError as error:
            raise ModelError(f"{self.name} cannot be read: {error.strerror}") from None


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


def _read_header(source: ByteSource, max_bytes: int) -> tuple[dict[str, _Entry], int]:
    """Entries by name, and the position of their data (safetensors' format)."""
    try:
        (n_bytes,) = struct.unpack("<Q", source.read(0, 8).tobytes())
        if n_bytes > max_bytes:
            raise ModelError(f"{source.name} has a header of more than {max_bytes} bytes")
        header = msgspec.json.decode(source.read(8, n_bytes).tobytes(), type=dict[str, Any])
        header.pop("__metadata__", None)
        return msgspec.convert(header, dict[str, _Entry]), 8 + n_bytes
    except (struct.error, UnicodeDecodeError, RecursionError, msgspec.MsgspecError):
        raise ModelError(f"{source.name} is no safetensors file") from None


def _n_bytes(name: str, entry: _Entry) -> int:
    """Of an entry's shape, in Python's own numbers, which do not overflow."""
    bits = _BITS.get(entry.dtype) or _OTHER_BITS.get(entry.dtype)
    if bits is None or len(entry.shape) > 8 or any(n < 0 for n in entry.shape):
        raise ModelError(f"{name[:64]} has a type or a shape that is none")
    return math.prod(entry.shape) * bits // 8


def _shown(shape: Shape | list[int]) -> str:
    return "x".join(map(str, shape[:8])) or "of a single number"
