"""Writes tensors to a safetensors file, in bfloat16 too, without torch.

    write(folder / "sae_weights.safetensors", {"W_enc": encoder, "b_enc": bias}, dtype="BF16")

The counterpart of ``tensor_file``, which reads what is written here: a value that it would
refuse, because it is not finite in the type it is stored in, is refused before the file appears.
A file appears whole or not at all, and one of the same name is replaced in one step.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from fortpoint.errors import ModelError, StorageError

Dtype = Literal["F32", "BF16", "F16"]
Array = NDArray[np.floating[Any]]

_BYTES: Mapping[Dtype, int] = {"F32": 4, "BF16": 2, "F16": 2}
_METADATA = "__metadata__"
_ALIGNMENT = 8
_CHUNK = 1 << 22  # values at a time


def write(
    path: Path,
    tensors: Mapping[str, Array],
    dtype: Dtype | Mapping[str, Dtype] = "F32",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Each array in its shape, rounded to the nearest value of ``dtype`` and to even.

    ``dtype`` is one for all, or one for each name. ``metadata`` goes into the header as it is.
    Raises ``ModelError`` for values that are not finite, ``StorageError`` when the file cannot
    be written; then what was at ``path`` is as it was.
    """
    kinds = {name: dtype if isinstance(dtype, str) else dtype[name] for name in tensors}
    order = sorted(tensors, key=lambda name: -_BYTES[kinds[name]])  # so that all are aligned
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(_header({name: tensors[name] for name in order}, kinds, metadata or {}))
            for name in order:
                _write_values(file, name, tensors[name], kinds[name])
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise StorageError(
            f"cannot write {path.name}: {error.strerror or error}; make room or choose another "
            "place, then do it again"
        ) from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def to_bfloat16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves of float32 numbers, rounded to the nearest and to even.

    What is not a number becomes an infinity or anything else: check before.
    """
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))
    return (rounded >> 16).astype(np.uint16)


def _header(
    tensors: Mapping[str, Array], kinds: Mapping[str, Dtype], metadata: Mapping[str, str]
) -> bytes:
    if _METADATA in tensors:
        raise ValueError(f"no tensor can be named {_METADATA}")
    entries: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    start = 0
    for name, array in tensors.items():
        end = start + array.size * _BYTES[kinds[name]]
        shape = list(array.shape)
        entries[name] = {"dtype": kinds[name], "shape": shape, "data_offsets": [start, end]}
        start = end
    text = msgspec.json.encode(entries)
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _write_values(file: IO[bytes], name: str, array: Array, kind: Dtype) -> None:
    for chunk in _chunks(array):
        with np.errstate(all="ignore"):  # what does not fit is found by what became of it
            values = _narrow(chunk.astype(np.float32, copy=False), kind)
        if values is None:
            raise ModelError(f"{name} holds values that are not finite in {kind}; none is written")
        file.write(values.tobytes())


def _chunks(array: Array) -> Iterator[Array]:
    flat = np.ascontiguousarray(array).reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        yield flat[start : start + _CHUNK]


def _narrow(x: NDArray[np.float32], kind: Dtype) -> NDArray[Any] | None:
    """Little-endian, as stored; None when a value is not finite, or no longer."""
    if not np.isfinite(x).all():
        return None
    if kind == "BF16":
        bits = to_bfloat16(x)
        whole = (bits & 0x7F80) != 0x7F80  # an exponent of ones is an infinity
        return bits.astype("<u2", copy=False) if whole.all() else None
    stored = x.astype("<f4" if kind == "F32" else "<f2", copy=False)
    return stored if np.isfinite(stored).all() else None
