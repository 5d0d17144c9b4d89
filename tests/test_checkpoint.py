"""Tensors come out of a checkpoint as they went in, and nothing of a damaged one comes out."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fortpoint.engine.checkpoint import INDEX, SINGLE, Checkpoint
from fortpoint.errors import ModelError

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def _raw(path: Path, header: object, data: bytes = b"") -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


def _entry(**changes: object) -> dict[str, object]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensor_of_every_kind_comes_out_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: torch.randn(5, 3).to(dtype) for name in ("first", "second")}
    save_file(tensors, tmp_path / SINGLE)
    checkpoint = Checkpoint(tmp_path)
    for name, tensor in tensors.items():
        got = checkpoint.get(name, (5, 3))
        assert got.dtype == np.float32
        assert got.flags.writeable
        np.testing.assert_array_equal(got, tensor.float().numpy())
    assert sorted(checkpoint.names) == ["first", "second"]
    assert "first" in checkpoint
    assert "third" not in checkpoint


def test_tensors_of_a_sharded_checkpoint_come_from_their_files(tmp_path: Path) -> None:
    files = {f"part-{i}.safetensors": {f"t{i}": torch.full((2,), float(i))} for i in range(3)}
    for file, tensors in files.items():
        save_file(tensors, tmp_path / file)
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    checkpoint = Checkpoint(tmp_path)
    assert [checkpoint.get(f"t{i}", (2,))[0] for i in range(3)] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    "file", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", "", ".safetensors"]
)
def test_index_that_leads_out_of_the_folder_is_refused(tmp_path: Path, file: str) -> None:
    save_file({"a": torch.ones(2)}, tmp_path.parent / "other.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(ModelError, match="no file of its folder"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b'{"weight_map": {"a": 1}}', b"\xff\xfe"])
def test_index_that_is_damaged_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / INDEX).write_bytes(raw)
    with pytest.raises(ModelError, match="index"):
        Checkpoint(tmp_path)


def test_index_that_is_wrong_names_the_tensor(tmp_path: Path) -> None:
    save_file({"b": torch.ones(2)}, tmp_path / "x.safetensors")
    weight_map = {"a": "x.safetensors", "c": "absent.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match="lacks a, which the index says"):
        Checkpoint(tmp_path).get("a", (2,))
    with pytest.raises(ModelError, match=r"absent\.safetensors cannot be read"):
        Checkpoint(tmp_path).get("c", (2,))


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(ModelError, match="neither"):
        Checkpoint(tmp_path)


def test_tensor_that_is_absent_or_of_another_shape_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4, 2)}, tmp_path / SINGLE)
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(ModelError, match=r"lack b\.weight"):
        checkpoint.get("b.weight", (1,))
    with pytest.raises(ModelError, match="a has the shape 4x2, not 2x4"):
        checkpoint.get("a", (2, 4))


def test_tensor_of_integers_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4, dtype=torch.int8)}, tmp_path / SINGLE)
    with pytest.raises(ModelError, match="a is 'I8'"):
        Checkpoint(tmp_path).get("a", (4,))


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (_entry(), b"\0" * 7),
        (_entry(data_offsets=[0, 4]), b"\0" * 8),
        (_entry(data_offsets=[-8, 0]), b"\0" * 8),
        (_entry(data_offsets=[1 << 62, (1 << 62) + 8]), b"\0" * 8),
        (_entry(shape=[2, 0]), b"\0" * 8),
    ],
)
def test_tensor_outside_of_its_file_is_refused(tmp_path: Path, header: object, data: bytes) -> None:
    _raw(tmp_path / SINGLE, header, data)
    with pytest.raises(ModelError, match=r"\ba\b"):
        Checkpoint(tmp_path).get("a", (2,))


@pytest.mark.parametrize(
    "header",
    [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, {"a": 1}, _entry(data_offsets=[0])],
    ids=lambda header: str(header)[:20],
)
def test_file_that_is_no_safetensors_is_refused(tmp_path: Path, header: object) -> None:
    _raw(tmp_path / SINGLE, header)
    with pytest.raises(ModelError, match=r"model\.safetensors is no safetensors file"):
        Checkpoint(tmp_path)


def test_header_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", 1 << 63))
    with pytest.raises(ModelError, match="a header of more than"):
        Checkpoint(tmp_path)


def test_no_file_stays_open(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / SINGLE)
    checkpoint = Checkpoint(tmp_path)
    checkpoint.get("a", (4,))
    held = Path("/proc/self/maps").read_text(encoding="utf-8")
    assert str(tmp_path / SINGLE) not in held
