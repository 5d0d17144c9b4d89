"""Reads named tensors from a safetensors file that nobody vouches for.

A file is looked at before it is believed: its header has a limit, a tensor's shape and type
are checked before a byte of it is read, and a value that is not finite refuses the file.
Tensors that were not asked for are never read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fortpoint.errors import ModelError

MAX_HEADER_BYTES = 1024 * 1024
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})

Shape = tuple[int, ...]


def read(
    path: Path, required: Mapping[str, Shape], optional: Mapping[str, Shape] | None = None
) -> dict[str, Tensor]:
    """The named tensors as float32, each of exactly the shape given. Raises ``ModelError``."""
    wanted = {**required, **(optional or {})}
    try:
        _check_header(path)
        with safe_open(path, framework="pt") as file:
            present = set(file.keys())
            if missing := sorted(required.keys() - present):
                raise ModelError(f"{path.name} has no tensor {missing[0]}")
            tensors = {
                name: _tensor(path.name, file.get_slice(name), name, shape)
                for name, shape in wanted.items()
                if name in present
            }
    except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError) as error:
        raise ModelError(f"{path.name} cannot be read: {type(error).__name__}") from None
    return tensors


def _check_header(path: Path) -> None:
    if not path.is_file():
        raise ModelError(f"{path.name} is not there")
    with path.open("rb") as file:
        n_bytes = int.from_bytes(file.read(8), "little")
    if n_bytes > MAX_HEADER_BYTES:
        raise ModelError(f"the header of {path.name} is larger than {MAX_HEADER_BYTES} bytes")


def _tensor(file_name: str, part: object, name: str, shape: Shape) -> Tensor:
    """``part`` is safetensors' slice: it knows shape and type before it reads."""
    found, dtype = tuple(part.get_shape()), part.get_dtype()  # type: ignore[attr-defined]
    if found != shape:
        raise ModelError(f"{name} in {file_name} has the shape {_text(found)}, not {_text(shape)}")
    if dtype not in _FLOATS:
        raise ModelError(f"{name} in {file_name} is {dtype}, not a floating-point type")
    tensor: Tensor = part[...].float()  # type: ignore[index]
    if not torch.isfinite(tensor).all():
        raise ModelError(f"{name} in {file_name} holds values that are not finite")
    return tensor


def _text(shape: Shape) -> str:
    return "x".join(map(str, shape[:8])) or "of a single number"
