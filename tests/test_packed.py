"""Packed matrices hold what they should, and every processor's product is the same."""

from __future__ import annotations

import numpy as np
import pytest

from fortpoint.engine.compiled.packed import (
    KINDS,
    Kind,
    from_int4,
    from_int8,
    pack,
    rounding_error,
    tile_bytes_of,
    to_int4,
    to_int8,
)
from fortpoint.engine.compiled.product import tile_product
from fortpoint.engine.compiled.rows import Activations, embed, round_to_bytes
from fortpoint.engine.compiled.vector import LANES, call6, instructions, jit

SOURCE = np.random.default_rng(5)
N_OUTPUTS, N_INPUTS = 40, 96  # not whole tiles


@jit()
def _call(address, weights, n_rows, n_inputs, acts, out, step):
    call6(address, weights, n_rows, n_inputs, acts, out, step)


@jit()
def _round(acts, row, n):
    round_to_bytes(acts, row, n)


@jit()
def _embed(code, tile, lane, out, n):
    embed(code, tile, lane, out, n)


def held(weight: np.ndarray, kind: Kind) -> np.ndarray:
    """The values that a packed matrix stands for."""
    if kind == "int4":
        return from_int4(*to_int4(weight))
    if kind == "int8":
        return from_int8(*to_int8(weight))
    if kind == "bfloat16":
        bits = np.ascontiguousarray(weight).view(np.uint32)
        return (
            ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
        )
    return weight


def product(weight: np.ndarray, kind: Kind, x: np.ndarray, which: str) -> np.ndarray:
    packed = pack(weight, kind)
    acts = Activations(x.size)
    acts.values[:] = x.ravel()
    if kind in ("int8", "int4"):
        for row in range(len(x)):
            _round(acts.addresses.ctypes.data, row, x.shape[1])
    out = np.empty((len(x), packed.n_tiles * LANES), np.float32)
    address = tile_product(kind, which)
    for tile in range(packed.n_tiles):
        _call(
            address,
            packed.data[tile].ctypes.data,
            len(x),
            x.shape[1],
            acts.addresses.ctypes.data,
            out.ctypes.data + tile * LANES * 4,
            out.shape[1],
        )
    return out[:, : len(weight)]


def bytes_of(x: np.ndarray) -> np.ndarray:
    """``x`` as integer products see it."""
    groups = x.reshape(len(x), -1, 32)
    largest = np.abs(groups).max(-1, keepdims=True)
    levels = np.rint(groups * (np.float32(127) / largest))
    return (levels * (largest / np.float32(127))).reshape(x.shape)


def usable() -> list[str]:
    order = ["any", "avx2", "avx512vnni"]
    return order[: order.index(instructions()) + 1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_rows", [1, 2, 3, 7, 8, 15])
def test_product_is_that_of_the_values_held(kind: Kind, n_rows: int) -> None:
    weight = SOURCE.normal(size=(N_OUTPUTS, N_INPUTS)).astype(np.float32)
    x = SOURCE.normal(size=(n_rows, N_INPUTS)).astype(np.float32)
    seen = bytes_of(x) if kind in ("int8", "int4") else x
    expected = seen.astype(np.float64) @ held(weight, kind).astype(np.float64).T
    np.testing.assert_allclose(product(weight, kind, x, instructions()), expected, atol=2e-4)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("which", usable())
def test_product_has_the_same_bits_on_every_processor(kind: Kind, which: str) -> None:
    weight = (SOURCE.normal(size=(32, 64)) * 5).astype(np.float32)
    weight[0] = 5.0  # one level of 255 or 15 beside the largest bytes: sums that must not saturate
    x = np.full((3, 64), 9.0, np.float32)
    x[1] *= -1
    x[2] = SOURCE.normal(size=64)
    assert np.array_equal(product(weight, kind, x, which), product(weight, kind, x, instructions()))


@pytest.mark.parametrize("kind", KINDS)
def test_product_of_a_row_does_not_depend_on_the_number_of_rows(kind: Kind) -> None:
    weight = SOURCE.normal(size=(16, 64)).astype(np.float32)
    x = SOURCE.normal(size=(13, 64)).astype(np.float32)
    together = product(weight, kind, x, instructions())
    alone = [product(weight, kind, x[i : i + 1], instructions())[0] for i in range(13)]
    assert np.array_equal(together, np.array(alone))


@pytest.mark.parametrize("kind", KINDS)
def test_embedding_row_is_what_the_matrix_holds(kind: Kind) -> None:
    weight = SOURCE.normal(size=(N_OUTPUTS, N_INPUTS)).astype(np.float32)
    packed, expected = pack(weight, kind), held(weight, kind)
    out = np.empty(N_INPUTS, np.float32)
    for token in (0, 17, N_OUTPUTS - 1):
        tile = packed.data[token // LANES].ctypes.data
        _embed(packed.code, tile, token % LANES, out.ctypes.data, N_INPUTS)
        np.testing.assert_allclose(out, expected[token], atol=1e-6)


def test_int4_of_llama_cpps_values_loses_nothing() -> None:
    levels = SOURCE.integers(0, 16, (8, 64)).astype(np.float32)
    levels[:, ::32], levels[:, 1::32] = 0, 15  # a group's least and largest value are in it
    scale = SOURCE.uniform(0.01, 0.1, (8, 2)).astype(np.float16).astype(np.float32)
    minimum = SOURCE.normal(size=(8, 2)).astype(np.float16).astype(np.float32)
    spread = (levels.reshape(8, 2, 32) * scale[..., None] + minimum[..., None]).reshape(8, 64)
    assert rounding_error(spread, "int4") < 1e-3
    assert rounding_error(SOURCE.normal(size=(8, 64)).astype(np.float32), "int4") > 0.01


def test_int8_of_a_zero_matrix_is_zero() -> None:
    weight = np.zeros((16, 32), np.float32)
    assert not from_int8(*to_int8(weight)).any()
    assert not from_int4(*to_int4(weight)).any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_row_that_is_not_finite_gives_no_number_and_harms_no_other(value: float) -> None:
    weight = SOURCE.normal(size=(16, 64)).astype(np.float32)
    x = SOURCE.normal(size=(3, 64)).astype(np.float32)
    alone = product(weight, "int4", x[2:], instructions())
    x[1, 5] = value
    got = product(weight, "int4", x, instructions())
    assert np.isnan(got[1]).all()
    assert np.array_equal(got[2:], alone)


@pytest.mark.parametrize("kind", KINDS)
def test_tile_has_the_bytes_that_the_kernels_expect(kind: Kind) -> None:
    packed = pack(np.zeros((N_OUTPUTS, N_INPUTS), np.float32), kind)
    assert packed.data.shape == (3, tile_bytes_of(packed.code, N_INPUTS))
