"""Carriers are what their docstring proves things of; a mark is small, and its lease's alone."""

from __future__ import annotations

import hashlib
from statistics import NormalDist

import numpy as np
import pytest

from fortpoint.vault.carriers import Carrier, table
from fortpoint.vault.fingerprint import EPSILON, MarkedCheckpoint, is_marked, row_scale
from leaking import model

UP = "model.layers.0.mlp.up_proj.weight"


def test_carrier_is_the_same_on_every_machine() -> None:
    values = Carrier(bytes(range(32)), UP).values(0, 4096)
    digest = hashlib.sha256(np.round(values * 2**16).astype("<i4").tobytes()).hexdigest()
    assert digest == "317a3194226381b65569e0ea82b82f84774be94f20da7ae621ddf170446ade12"


def test_carrier_of_a_part_is_the_part() -> None:
    carrier = Carrier(bytes(32), UP)
    np.testing.assert_array_equal(carrier.values(800, 100), carrier.values(0, 1000)[800:900])
    with pytest.raises(ValueError, match="multiple of eight"):
        carrier.values(3, 10)


def test_dot_is_the_sum_of_products_across_chunks() -> None:
    carrier, n = Carrier(bytes(32), UP), (1 << 18) + 999
    psi = np.random.default_rng(0).normal(size=n).astype(np.float32)
    exact = float(carrier.values(0, n).astype(np.float64) @ psi)
    assert carrier.dot(psi) == pytest.approx(exact, abs=0.01)
    assert carrier.dot(psi[800:], 800) == pytest.approx(
        float(carrier.values(800, n - 800).astype(np.float64) @ psi[800:]), abs=0.01
    )


def test_table_is_symmetric_and_never_further_out_than_its_slice_mean() -> None:
    numbers = table().astype(np.float64)
    np.testing.assert_array_equal(numbers, -numbers[::-1])
    assert np.all(np.diff(numbers) >= 0)
    normal = NormalDist()
    for i in (0, 1, 100, 30_000, 40_000, 65_534, 65_535):
        low, high = i / 65_536, (i + 1) / 65_536
        density = [normal.pdf(normal.inv_cdf(p)) if 0 < p < 1 else 0.0 for p in (low, high)]
        mean = 65_536 * (density[0] - density[1])
        assert abs(numbers[i]) <= abs(mean)
        assert abs(numbers[i]) == pytest.approx(abs(mean), abs=2**-15)


@pytest.mark.parametrize("t", [0.5, 1.0, 2.0, 4.0])
def test_table_moment_generating_function_is_below_the_normals(t: float) -> None:
    assert np.exp(t * table().astype(np.float64)).mean() <= np.exp(t * t / 2)


def test_table_variance_is_one_to_four_digits() -> None:
    assert 0.9999 < np.square(table().astype(np.float64)).mean() <= 1


def test_carriers_of_two_leases_or_tensors_are_unlike() -> None:
    n = 100_000
    first = Carrier(bytes(32), UP).values(0, n)
    for other in (Carrier(b"\1" + bytes(31), UP), Carrier(bytes(32), UP.replace("0", "1"))):
        assert abs(first @ other.values(0, n)) / n**0.5 < 4.5


def test_mark_is_epsilon_of_each_rows_spread_and_on_matrices_alone() -> None:
    plain = model()
    marked = MarkedCheckpoint(plain, bytes(32))
    for name in plain.names:
        difference = marked.get(name) - plain.get(name)
        if not is_marked(name):
            assert not difference.any()
            continue
        relative = difference / row_scale(plain.get(name))
        assert relative.std() == pytest.approx(EPSILON, rel=0.05)
        assert np.abs(relative).max() < 4.5 * EPSILON


def test_mark_of_a_constant_row_is_finite() -> None:
    plain = model()
    plain.tensors[UP][0] = 0
    assert np.isfinite(MarkedCheckpoint(plain, bytes(32)).get(UP)).all()
    assert (row_scale(plain.get(UP)) > 0).all()
