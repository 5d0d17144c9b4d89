"""GGUF control vectors: a feature or direction that llama.cpp, repeng and EasySteer can add.

    write(Path("bridge.gguf"), library.resolve("golden-gate"), strength=6, model_type="llama")
    llama-cli -m model.gguf --control-vector bridge.gguf

The file holds one float32 tensor ``direction.<layer>`` ``[d_model]``, here
``strength * training_max * decoder``: used with scale 1 it does at every token what our steering
does in the mode ``add``. Clamping and ablation read the stream, and cannot be written so.

Layers: ``direction.15`` is added to the residual stream after block 15, counted from 0, which
is our layer 15 and ``blocks.15.hook_resid_post``. (llama.cpp puts ``direction.N`` at position
``N - 1`` of a buffer that it reads from position ``il - 1`` on for block ``il``:
``common_control_vector_load_one``, ``llama_adapter_cvec::apply``.) It has no place for block 0.
"""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
from gguf import GGUFWriter
from numpy.typing import NDArray

from fortpoint.errors import InvalidRequest, ModelError, StorageError
from fortpoint.features.library import Target

ARCHITECTURE = "controlvector"


def write(path: Path, target: Target, strength: float, model_type: str) -> None:
    """``strength`` is in units of the feature's training maximum, as everywhere.

    ``model_type`` is the model's, as ``config.json`` calls it (``llama``): a hint for readers.
    Raises ``InvalidRequest`` for a layer or strength that no file can hold, ``StorageError``
    when the file cannot be written; then none appears.
    """
    if target.layer < 1:
        raise InvalidRequest(
            f"{target.name} is of layer 0, where llama.cpp adds no control vector; choose a "
            "feature of another layer"
        )
    vector = _vector(target, strength)
    partial = path.with_name(path.name + ".partial")
    try:
        _write(partial, target, vector, f"adds {strength:g} training maxima", model_type)
        os.replace(partial, path)
    except OSError as error:
        raise StorageError(
            f"cannot write {path.name}: {error.strerror or error}; make room or choose another "
            "place, then do it again"
        ) from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _vector(target: Target, strength: float) -> NDArray[np.float32]:
    if not math.isfinite(strength) or strength == 0:
        raise InvalidRequest("a control vector's strength is a number other than 0")
    vector = np.float64(strength * target.training_max) * target.decoder.astype(np.float64)
    if not (np.abs(vector) < np.finfo(np.float32).max).all():
        raise ModelError(f"{target.name} times {strength:g} is larger than float32 can hold")
    return vector.astype(np.float32)


def _write(
    path: Path, target: Target, vector: NDArray[np.float32], description: str, model_type: str
) -> None:
    writer = GGUFWriter(path, ARCHITECTURE)
    try:
        writer.add_name(target.name)
        writer.add_description(f"{description} of {target.name}")
        writer.add_string(f"{ARCHITECTURE}.model_hint", model_type)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", 1)
        writer.add_tensor(f"direction.{target.layer}", vector)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
