"""Pairs of rows and columns: taken, turned round, counted once."""

from __future__ import annotations

import numpy as np

from fortpoint.features.understanding.incidence import Incidence


def dense(found: Incidence) -> np.ndarray:
    made = np.zeros((found.n_rows, found.n_columns), int)
    for row in range(found.n_rows):
        made[row, found.row(row)] += 1
    return made


def test_pairs_given_twice_count_once() -> None:
    found = Incidence.of_pairs(np.array([2, 0, 2, 2]), np.array([1, 3, 1, 0]), 4, 5)
    expected = np.zeros((4, 5), int)
    expected[[2, 0, 2], [1, 3, 0]] = 1
    assert dense(found).tolist() == expected.tolist()
    assert found.sizes.tolist() == [1, 0, 2, 0]


def test_transposed_is_the_matrix_turned_with_its_values() -> None:
    rng = np.random.default_rng(0)
    matrix = (rng.random((40, 17)) < 0.2) * rng.random((40, 17)).astype(np.float32)
    rows, columns = np.nonzero(matrix)
    found = Incidence.of_sorted(rows, columns, matrix[rows, columns], 40, 17)
    turned = found.transposed()
    assert (dense(found) == dense(turned).T).all()
    for column in range(17):
        assert turned.row_values(column).tolist() == matrix[turned.row(column), column].tolist()
        assert (np.diff(turned.row(column)) > 0).all()


def test_take_gives_all_pairs_of_rows_in_the_order_asked() -> None:
    found = Incidence.of_pairs(np.array([0, 0, 2]), np.array([4, 1, 3]), 3, 5)
    which, columns = found.take(np.array([2, 1, 0, 0]))
    assert which.tolist() == [0, 2, 2, 3, 3]
    assert columns.tolist() == [3, 1, 4, 1, 4]


def test_empty_pairs_have_empty_rows() -> None:
    empty = np.empty(0, np.int64)
    found = Incidence.of_pairs(empty, empty, 3, 0)
    assert found.sizes.tolist() == [0, 0, 0]
    assert found.take(np.array([0, 2]))[1].tolist() == []
    assert found.transposed().n_rows == 0
