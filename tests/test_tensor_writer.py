"""What is written is what torch would have stored, whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fortpoint.errors import ModelError, StorageError
from fortpoint.vault import tensor_file, tensor_writer

KINDS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
TRICKY = [
    *(0.0, -0.0, 1.0, -1.0, 1.00390625, 1.01171875, 1.0 + 2**-9, 1.0 + 2**-8 + 2**-16),
    *(6.1e-5, -5.9e-8, 1e-40, 65504.0, 3.0e-39, -1e-45, 2.0**-126),
]


def values(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_rounded_as_torch_rounds_them(tmp_path: Path, kind: Any) -> None:
    tensors = {"a": values(7, 5), "tricky": np.array(TRICKY, np.float32), "one": values()}
    tensors["none"] = np.empty((0, 3), np.float32)
    tensor_writer.write(tmp_path / "x.safetensors", tensors, kind)
    got = load_file(tmp_path / "x.safetensors")
    assert got.keys() == tensors.keys()
    for name, array in tensors.items():
        expected = torch.from_numpy(array).to(KINDS[kind])
        assert got[name].dtype == KINDS[kind]
        assert got[name].shape == expected.shape
        bits, wanted = (t.flatten().view(torch.uint8) for t in (got[name], expected))
        assert torch.equal(bits, wanted)


def test_tensors_come_back_as_the_reader_of_ours_reads_them(tmp_path: Path) -> None:
    tensors = {"wide": values(4, 6), "turned": values(6, 4).T, "double": values(3).astype("f8")}
    tensor_writer.write(tmp_path / "x.safetensors", tensors)
    got = tensor_file.read(tmp_path / "x.safetensors", {n: a.shape for n, a in tensors.items()})
    for name, array in tensors.items():
        np.testing.assert_array_equal(got[name], array.astype(np.float32))


def test_kinds_may_differ_and_stay_aligned(tmp_path: Path) -> None:
    tensors = {"odd": values(3), "even": values(4), "last": values(5)}
    kinds: dict[str, Any] = {"odd": "BF16", "even": "F32", "last": "F16"}
    tensor_writer.write(tmp_path / "x.safetensors", tensors, kinds)
    got = load_file(tmp_path / "x.safetensors")
    assert {name: tensor.dtype for name, tensor in got.items()} == {
        name: KINDS[kind] for name, kind in kinds.items()
    }
    assert torch.equal(got["even"], torch.from_numpy(tensors["even"]))
    assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in got.values())


def test_large_tensor_is_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_writer, "_CHUNK", 7)
    array = values(11, 4)
    tensor_writer.write(tmp_path / "x.safetensors", {"a": array}, "BF16")
    expected = torch.from_numpy(array).bfloat16()
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], expected)


def test_metadata_is_in_the_header(tmp_path: Path) -> None:
    tensor_writer.write(tmp_path / "x.safetensors", {"a": values(2)}, metadata={"step": "12"})
    with safe_open(tmp_path / "x.safetensors", "np") as file:
        assert file.metadata() == {"step": "12"}


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("F32", np.nan),
        ("F32", -np.inf),
        ("BF16", np.nan),
        ("BF16", np.finfo(np.float32).max),  # rounds up to an infinity
        ("F16", 70_000.0),
    ],
)
def test_value_that_cannot_be_stored_is_refused_and_the_old_file_stays(
    tmp_path: Path, kind: Any, value: float
) -> None:
    path = tmp_path / "x.safetensors"
    tensor_writer.write(path, {"a": values(2)})
    before = path.read_bytes()
    odd = np.array([1.0, value], np.float32)
    with pytest.raises(ModelError, match=f"b holds values that are not finite in {kind}"):
        tensor_writer.write(path, {"a": values(2), "b": odd}, kind)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_double_that_float32_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not finite"):
        tensor_writer.write(tmp_path / "x.safetensors", {"a": np.array([1e300])})


def test_full_disk_is_a_storage_error_and_the_old_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    tensor_writer.write(path, {"a": values(2)})
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"x\.safetensors: No space left on device; make room"):
        tensor_writer.write(path, {"a": values(3)})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_folder_that_is_not_there_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file"):
        tensor_writer.write(tmp_path / "nowhere" / "x.safetensors", {"a": values(2)})
