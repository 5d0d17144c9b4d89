"""Named tensors of a file that nobody vouches for are exactly what was asked for, or refused.

``test_checkpoint.py`` has what is so of every safetensors file.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fortpoint.errors import ModelError
from fortpoint.vault.tensor_file import MAX_UNVOUCHED_HEADER_BYTES, read


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tensors_asked_for_come_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a": torch.randn(3, 5).to(dtype), "b": torch.tensor(0.25).to(dtype)}
    save_file({**tensors, "other": torch.ones(2, dtype=torch.int8)}, tmp_path / "x.safetensors")
    got = read(tmp_path / "x.safetensors", {"a": (3, 5)}, {"b": (), "c": (2,)})
    assert got.keys() == {"a", "b"}
    for name, tensor in tensors.items():
        assert got[name].dtype == np.float32
        assert got[name].flags.c_contiguous
        np.testing.assert_array_equal(got[name], tensor.float().numpy())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e300])
def test_value_that_float32_cannot_hold_refuses_the_file(tmp_path: Path, value: float) -> None:
    tensor = torch.ones(4, dtype=torch.float64)
    tensor[2] = value
    save_file({"a": tensor}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=r"a in x\.safetensors holds values that are not finite"):
        read(tmp_path / "x.safetensors", {"a": (4,)})


def test_tensor_that_is_absent_or_another_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=r"x\.safetensors lacks b"):
        read(tmp_path / "x.safetensors", {"b": (4, 2)})
    with pytest.raises(ModelError, match="a has the shape 4x2, not 2x4"):
        read(tmp_path / "x.safetensors", {}, {"a": (2, 4)})


def test_header_longer_than_an_unvouched_one_may_be_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", MAX_UNVOUCHED_HEADER_BYTES + 1) + b" " * 100)
    with pytest.raises(ModelError, match="a header of more than"):
        read(path, {})


@pytest.mark.parametrize("what", ["nothing", "a folder"])
def test_file_that_is_none_is_refused(tmp_path: Path, what: str) -> None:
    if what == "a folder":
        (tmp_path / "x.safetensors").mkdir()
    with pytest.raises(ModelError, match=r"x\.safetensors is not there"):
        read(tmp_path / "x.safetensors", {})
