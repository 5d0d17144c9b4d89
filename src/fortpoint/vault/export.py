"""Write a sealed model out in plain, marked for its lease: an act of its own, off by default.

    export(model, lease_key, Path("copy"))

``vault.plain_export`` must allow it, which ``cli`` checks; an export without a mark does not exist.
The folder appears whole or not at all. The whole model is in memory meanwhile, in float32.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import msgspec

from fortpoint.errors import ModelError, StorageError
from fortpoint.vault import tensor_writer
from fortpoint.vault.fingerprint import EPSILON, MarkedCheckpoint
from fortpoint.vault.open_sealed import SealedCheckpoint, SealedModel
from fortpoint.vault.tensor_files import INDEX, SINGLE


def export(model: SealedModel, lease_key: bytes, target: Path, epsilon: float = EPSILON) -> None:
    """Every file of the model into the new folder ``target``, the weights in one.

    Raises ``ModelError`` where it is there or a tensor has a type that cannot be written,
    ``StorageError`` where the disk is full.
    """
    if target.exists():
        raise ModelError(f"{target.name} is there already; choose another folder")
    plain = SealedCheckpoint(model)
    kinds = {name: plain.dtype(name) for name in plain.names}
    try:
        dtypes = msgspec.convert(kinds, dict[str, tensor_writer.Dtype])
    except msgspec.ValidationError:
        raise ModelError("only tensors of types F32, F16 and BF16 can be written") from None
    try:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=target.parent) as scratch:
            folder = Path(scratch) / "model"
            folder.mkdir(mode=0o700)
            for name in model.names:
                if not name.endswith(".safetensors") and name != INDEX:
                    (folder / name).write_bytes(model.read_file(name))
            marked = MarkedCheckpoint(plain, lease_key, epsilon)
            tensors = {name: marked.get(name) for name in kinds}
            tensor_writer.write(folder / SINGLE, tensors, dtypes, {"format": "pt"})
            os.rename(folder, target)
    except OSError as error:
        raise StorageError(f"cannot export: {error.strerror or error}; nothing was kept") from None
