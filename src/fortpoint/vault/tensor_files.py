"""Tensors by name over one safetensors file or several; ``fingerprint.Weights``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from fortpoint.errors import ModelError
from fortpoint.vault.tensor_file import Floats, Shape, TensorFile

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


class TensorFiles:
    """Where a name is in several files, the last counts."""

    def __init__(self, files: Sequence[TensorFile]) -> None:
        self._files = {name: file for file in files for name in file.names}

    def __contains__(self, name: str) -> bool:
        return name in self._files

    @property
    def names(self) -> list[str]:
        return list(self._files)

    def shape(self, name: str) -> Shape:
        return self._file(name).shape(name)

    def dtype(self, name: str) -> str:
        """As the file holds it: ``F16``."""
        return self._file(name).dtype(name)

    def get(self, name: str, shape: Shape | None = None) -> Floats:
        """The tensor as float32, an array of its own; ``shape`` where it must be that."""
        file = self._file(name)
        return file.get(name, file.shape(name) if shape is None else shape)

    def _file(self, name: str) -> TensorFile:
        if name not in self._files:
            raise ModelError(f"the weights lack {name[:64]}")
        return self._files[name]


def weight_files(names: Sequence[str], read: Callable[[str], bytes]) -> list[str]:
    """Where there are both, the single file counts, as in transformers."""
    if SINGLE in names:
        return [SINGLE]
    if INDEX not in names:
        raise ModelError(f"the model has neither {SINGLE} nor {INDEX}")
    try:
        index = msgspec.json.decode(read(INDEX), type=_Index)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise ModelError(f"{INDEX} is damaged") from None
    return sorted(set(index.weight_map.values()))
