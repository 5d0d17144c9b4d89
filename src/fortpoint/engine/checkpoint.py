"""Tensors of a checkpoint by name, from one safetensors file or several.

    checkpoint = Checkpoint(folder)
    weight = checkpoint.get("model.embed_tokens.weight", (49152, 576))  # float32

The index of a sharded checkpoint may name files of its folder alone, and has a limit.
``vault/tensor_file.py`` reads the files.

Not protected here: values. A weight that is not finite shows in what is computed, and the
bytes themselves are pinned by ``vault/model_folder.py``.
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from fortpoint.errors import ModelError
from fortpoint.vault.tensor_file import Shape, TensorFile

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 64 * 1024 * 1024

_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}\.safetensors")


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


class Checkpoint:
    """The tensors of a model's folder, or of one ``file`` in it.

    Raises ``ModelError`` when there are none to be found.
    """

    def __init__(self, folder: Path, file: str | None = None) -> None:
        self._opened: dict[str, TensorFile] = {}
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
        if file not in self._opened:
            self._opened[file] = TensorFile(self._folder / file)
        if name not in self._opened[file]:
            raise ModelError(f"{file} lacks {name}, which the index says it holds")
        return self._opened[file].get(name, shape)


def _files(folder: Path) -> dict[str, str]:
    """Each tensor's file. Where there are both, the single file counts, as in transformers."""
    if (folder / SINGLE).is_file():
        return _names(folder / SINGLE)
    if not (folder / INDEX).is_file():
        raise ModelError(f"the model has neither {SINGLE} nor {INDEX}")
    return _read_index(folder / INDEX)


def _names(path: Path) -> dict[str, str]:
    return dict.fromkeys(TensorFile(path).names, path.name)


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
