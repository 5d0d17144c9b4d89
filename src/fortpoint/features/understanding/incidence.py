"""Which columns each row has: a sparse matrix of ones, or of values, in three flat arrays.

found = Incidence.of_pairs(rows, columns, n_rows, n_columns)
found.row(7)                      # the columns of row 7, ascending
which, columns = found.take([7, 7, 9])
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]
Columns = NDArray[np.int32]
Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Incidence:
    """Row ``r`` has ``columns[starts[r] : starts[r + 1]]``, and as many ``values`` if any."""

    starts: Numbers
    columns: Columns
    n_columns: int
    values: Floats | None = None

    @classmethod
    def of_pairs(
        cls, rows: NDArray[np.integer], columns: NDArray[np.integer], n_rows: int, n_columns: int
    ) -> Incidence:
        """Pairs in any order, each counted once."""
        codes = rows.astype(np.int64)
        codes *= max(n_columns, 1)
        codes += columns
        codes = np.unique(codes)
        counts = np.bincount(codes // max(n_columns, 1), minlength=n_rows)
        codes %= max(n_columns, 1)
        return cls(_starts(counts), codes.astype(np.int32), n_columns)

    @classmethod
    def of_sorted(
        cls,
        rows: NDArray[np.integer],
        columns: NDArray[np.integer],
        values: Floats,
        n_rows: int,
        n_columns: int,
    ) -> Incidence:
        """Pairs with ``rows`` ascending and no pair twice."""
        counts = np.bincount(rows, minlength=n_rows)
        return cls(_starts(counts), columns.astype(np.int32, copy=False), n_columns, values)

    @property
    def n_rows(self) -> int:
        return len(self.starts) - 1

    @property
    def sizes(self) -> Numbers:
        """How many columns each row has."""
        return np.diff(self.starts)

    def row(self, row: int) -> Columns:
        return self.columns[self.starts[row] : self.starts[row + 1]]

    def row_values(self, row: int) -> Floats:
        """Raises ``ValueError`` where there are only ones."""
        if self.values is None:
            raise ValueError("these pairs have no values")
        return self.values[self.starts[row] : self.starts[row + 1]]

    def take(self, rows: NDArray[np.integer]) -> tuple[Numbers, Columns]:
        """All pairs of ``rows``: places in ``rows``, and columns."""
        starts = self.starts[rows]
        sizes = self.starts[np.asarray(rows) + 1] - starts
        which = np.repeat(np.arange(len(rows)), sizes)
        first = np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)
        return which, self.columns[first + np.arange(len(which))]

    def transposed(self) -> Incidence:
        """Columns become rows; each one's rows ascend."""
        rows = np.repeat(np.arange(self.n_rows, dtype=np.int32), self.sizes)
        order = np.argsort(self.columns, kind="stable")
        counts = np.bincount(self.columns, minlength=self.n_columns)
        values = None if self.values is None else self.values[order]
        return Incidence(_starts(counts), rows[order], self.n_rows, values)


def _starts(counts: NDArray[np.integer]) -> Numbers:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
