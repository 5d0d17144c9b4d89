"""A control vector holds what steering adds, at the layer where llama.cpp adds it."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader

from fortpoint.engine.protocol import Steer
from fortpoint.engine.steering import Plan
from fortpoint.errors import InvalidRequest, ModelError, StorageError
from fortpoint.features.directions import Direction
from fortpoint.features.exchange import control_vector
from fortpoint.features.library import Library, Target

D = 24


def vector() -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(4).standard_normal(D).astype(np.float32)


def target(layer: int = 15, scale: float = 3.5) -> Target:
    return Target("sae/7", layer, vector(), 0.5, 1.0, vector() / np.float32(5), scale)


def field(reader: GGUFReader, name: str) -> Any:
    return reader.fields[name].contents()


def test_file_holds_one_direction_of_its_layer(tmp_path: Path) -> None:
    control_vector.write(tmp_path / "v.gguf", target(), 2.0, "llama")
    reader = GGUFReader(tmp_path / "v.gguf")
    assert field(reader, "general.architecture") == "controlvector"
    assert field(reader, "controlvector.model_hint") == "llama"
    assert field(reader, "controlvector.layer_count") == 1
    assert field(reader, "general.name") == "sae/7"
    (tensor,) = reader.tensors
    assert (tensor.name, tensor.tensor_type) == ("direction.15", GGMLQuantizationType.F32)
    assert tensor.shape.tolist() == [D]
    expected = 7.0 * target().decoder.astype(np.float64)
    np.testing.assert_array_equal(tensor.data, expected.astype(np.float32))
    assert [file.name for file in tmp_path.iterdir()] == ["v.gguf"]


@pytest.mark.parametrize("strength", [6.0, -2.5])
def test_vector_is_what_steering_adds(tmp_path: Path, strength: float) -> None:
    unit = vector() / np.float32(np.linalg.norm(vector()))
    bridge = Direction("bridge", "tiny", 3, unit, 0.25, 12.5)
    library = Library(directions={"bridge": bridge})
    plan = Plan.compile((Steer(mode="add", target="bridge", strength=strength),), (), library)
    assert plan is not None
    (change,) = plan.changes
    control_vector.write(tmp_path / "v.gguf", library.resolve("bridge"), strength, "llama")
    (tensor,) = GGUFReader(tmp_path / "v.gguf").tensors
    assert tensor.name == f"direction.{change.layer}"
    np.testing.assert_allclose(tensor.data, change.goal * change.decoder, rtol=1e-6)


def test_layer_that_llama_cpp_has_no_place_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"layer 0, where llama\.cpp adds no control vector"):
        control_vector.write(tmp_path / "v.gguf", target(layer=0), 1.0, "llama")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("strength", [0.0, math.nan, math.inf])
def test_strength_that_says_nothing_is_refused(tmp_path: Path, strength: float) -> None:
    with pytest.raises(InvalidRequest, match="strength is a number other than 0"):
        control_vector.write(tmp_path / "v.gguf", target(), strength, "llama")
    assert list(tmp_path.iterdir()) == []


def test_vector_that_float32_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="larger than float32 can hold"):
        control_vector.write(tmp_path / "v.gguf", target(scale=1e38), 1e3, "llama")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("fortpoint.features.exchange.control_vector.os.replace", full)
    with pytest.raises(StorageError, match=r"cannot write v\.gguf: No space left on device"):
        control_vector.write(tmp_path / "v.gguf", target(), 1.0, "llama")
    assert list(tmp_path.iterdir()) == []


def test_folder_that_is_not_there_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file"):
        control_vector.write(tmp_path / "nowhere" / "v.gguf", target(), 1.0, "llama")
