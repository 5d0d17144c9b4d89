"""Tensors of a checkpoint by name, from one safetensors file or several, believed only as far
as they are of the expected shape.

    checkpoint = Checkpoint(folder)
    weight = checkpoint.get("model.embed_tokens.weight", (49152, 576))  # float32

A file is opened for each tensor: a map that stays open keeps its pages in memory. The index of
a sharded checkpoint may name files of its folder alone. Headers and the index have limits. The
format is read here because safetensors' own reader needs torch for bfloat16, which would take
the engine more memory than the small models that it serves.

Not protected here: values. A weight that is not finite shows in what is computed, and the
bytes themselves are pinned by ``vault/model_folder.py``.
"""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from fortpoint.errors import ModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 64 * 1024 * 1024
MAX_INDEX_BYTES = 64 * 1024 * 1024

Shape = tuple[int, ...]

_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}\.safetensors")
_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16}


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


class _Entry(msgspec.Struct, frozen=True):
    """A tensor in a safetensors header; offsets are from the header's end."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class Checkpoint:
    """The tensors of a model's folder, or of one ``file`` in it.

    Raises ``ModelError`` when there are none to be found.
    """

    def __init__(self, folder: Path, file: str | None = None) -> None:
        self._headers: dict[str, _Header] = {}
        self._files = _files(folder) if file is None else _names(folder / file)
        self._folder = folder

    def __contains__(self, name: str) -> bool:
        return name in self._files

    @property
    def names(self) -> list[str]:
        """Of all tensors, as the files list them."""
        return list(self._files)

    def get(self, name: str, shape: Shape) -> NDArray[np.float32]:
        """The tensor as float32, an array of its own. Raises ``ModelError`` naming it."""
        if name not in self._files:
            raise ModelError(f"the weights lack {name}")
        file = self._files[name]
        if file not in self._headers:
            self._headers[file] = _Header(self._folder / file)
        return self._headers[file].get(name, shape)


class _Header:
    """Where one file's tensors are."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.entries, self._start = _read_header(path)

    def get(self, name: str, shape: Shape) -> NDArray[np.float32]:
        entry = self.entries.get(name)
        if entry is None:
            raise ModelError(f"{self._path.name} lacks {name}, which the index says it holds")
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
                return np.fromfile(file, np.uint8, n_bytes)
        except (OSError, MemoryError) as error:
            raise ModelError(f"{name} cannot be read: {type(error).__name__}") from None


def _floats(raw: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    if dtype == "BF16":  # the upper half of a float32
        wide = raw.view("<u2").astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    kind = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]
    return raw.view(kind).astype(np.float32, copy=False)


def _read_header(path: Path) -> tuple[dict[str, _Entry], int]:
    """Entries by name, and the position of their data (safetensors' format)."""
    try:
        with path.open("rb") as file:
            (n_bytes,) = struct.unpack("<Q", file.read(8))
            if n_bytes > MAX_HEADER_BYTES:
                raise ModelError(f"{path.name} has a header of more than {MAX_HEADER_BYTES} bytes")
            raw = file.read(n_bytes)
        header = msgspec.json.decode(raw, type=dict[str, Any])
        header.pop("__metadata__", None)
        return msgspec.convert(header, dict[str, _Entry]), 8 + n_bytes
    except OSError as error:
        raise ModelError(f"{path.name} cannot be read: {error.strerror}") from None
    except (struct.error, UnicodeDecodeError, RecursionError, msgspec.MsgspecError):
        raise ModelError(f"{path.name} is no safetensors file") from None


def _files(folder: Path) -> dict[str, str]:
    """Each tensor's file. Where there are both, the single file counts, as in transformers."""
    if (folder / SINGLE).is_file():
        return _names(folder / SINGLE)
    if not (folder / INDEX).is_file():
        raise ModelError(f"the model has neither {SINGLE} nor {INDEX}")
    return _read_index(folder / INDEX)


def _names(path: Path) -> dict[str, str]:
    entries, _ = _read_header(path)
    return dict.fromkeys(entries, path.name)


def _read_index(path: Path) -> dict[str, str]:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_INDEX_BYTES + 1)
        if len(raw) > MAX_INDEX_BYTES:
            raise ModelError(f"{INDEX} is larger than {MAX_INDEX_BYTES} bytes")
        files = msgspec.json.decode(raw, type=_Index).weight_map
    except OSError as error:
        raise ModelError(f"{INDEX} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, RecursionError, msgspec.MsgspecError):
        raise ModelError(f"{INDEX} is damaged") from None
    for name in set(files.values()):
        if not _FILE.fullmatch(name):
            raise ModelError(f"{INDEX} names {name[:64]!r}, which is no file of its folder")
    return files


def _shown(shape: Shape | list[int]) -> str:
    return "x".join(map(str, shape[:8])) or "of a single number"
