"""Features and directions that are read at every token of every request.

    targets = TargetReader.load(("golden-gate", "l15/1207"), library)
    targets.read(seen, out)      # out [n_rows, 2]

A reading is the target's own formula on the residual stream ``x`` as it is, not normalised:

    z = x . encoder + bias;   z / training_max where z > threshold, else 0

Few rows of weights are read, so this is one small product a layer, in a fixed order for each
row: what a request reads does not depend on the rows beside it. Without targets nothing is
compiled, kept or computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np

from fortpoint.engine.compiled.reading import target_reader
from fortpoint.engine.model import Floats
from fortpoint.errors import ConfigError, InvalidRequest
from fortpoint.features.library import Library, Target


class TargetReader:
    """``names`` are the columns of what is read, in order."""

    def __init__(self, targets: Sequence[Target] = ()) -> None:
        self.names = tuple(target.name for target in targets)
        self.layers = tuple(sorted({target.layer for target in targets}))
        self.last_layer = max(self.layers, default=-1)
        self._readers = [_LayerReader(layer, targets) for layer in self.layers]

    @classmethod
    def load(cls, names: Sequence[str], library: Library) -> Self:
        """Raises ``ConfigError`` for a name of nothing that is loaded.

        The engine does not start then: one that ran on without watching what its operator
        asked for would look just like one that sees nothing.
        """
        try:
            return cls([library.resolve(name) for name in names])
        except InvalidRequest as error:
            raise ConfigError(f"watch.targets: {error.message}") from None

    def read(self, seen: Mapping[int, Floats], out: Floats) -> None:
        """Fill ``out`` ``[n_rows, n_targets]`` from the first rows of ``seen``.

        What is not finite in the stream is not finite here.
        """
        for reader in self._readers:
            out[:, reader.columns] = reader.read(seen[reader.layer], len(out))


class _LayerReader:
    """The targets of one layer, as the compiled reader takes them."""

    def __init__(self, layer: int, targets: Sequence[Target]) -> None:
        own = [(column, one) for column, one in enumerate(targets) if one.layer == layer]
        self.layer = layer
        self.columns = np.array([column for column, _ in own])
        self._encoders = np.ascontiguousarray([one.encoder for _, one in own], np.float32)
        self._bias = np.array([one.bias for _, one in own], np.float32)
        self._threshold = np.array([one.threshold for _, one in own], np.float32)
        self._scale = np.array([1 / one.training_max for _, one in own], np.float32)
        self._product = target_reader()  # compiled now, not in the first request's time

    def read(self, x: Floats, n_rows: int) -> Floats:
        """``[n_rows, n]`` in units of each target's training maximum."""
        x = np.ascontiguousarray(x[:n_rows], np.float32)
        n, d_model = self._encoders.shape
        z = np.empty((n_rows, n), np.float32)
        self._product(x.ctypes.data, n_rows, d_model, self._encoders.ctypes.data, n, z.ctypes.data)
        with np.errstate(all="ignore"):
            z += self._bias
            # Asked this way round, what is not a number stays so, and is found.
            read: Floats = np.where(z <= self._threshold, np.float32(0), z) * self._scale
        return read
