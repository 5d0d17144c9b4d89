"""Shuffled batches of an activation store, the same ones whenever they are asked for again.

Each epoch takes the shards in another order, a window of them at a time into memory, and mixes
all tokens of a window. Documents are in random order on disk, so a window is a fair sample of
all text. The next window is read while this one is used.

    batches = Batches(store, layer=15, shards=train, batch=2048, scaling=scaling, seed=0)
    for x in batches.since(step):  # float32 [batch, d_model], without end
        ...
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fortpoint.errors import ModelError
from fortpoint.features.activations import ActivationStore, Bits, Shard, widen

Floats = NDArray[np.float32]

WINDOW_SHARDS = 8
_SAMPLE_SHARDS = 4
_SAMPLE_ROWS = 16_384


@dataclass(frozen=True, eq=False)
class Scaling:
    """``(x - mean) * factor`` has the mean 0 and, over all its numbers, the mean square 1."""

    mean: Floats
    factor: float

    def apply(self, x: Floats) -> Floats:
        return (x - self.mean) * np.float32(self.factor)


def measure_scaling(store: ActivationStore, layer: int, shards: Sequence[Shard]) -> Scaling:
    """From the first shards' tokens that are no sinks. Raises ``ModelError``."""
    total, square, n = np.zeros(store.plan.d_model), 0.0, 0
    for shard in shards[:_SAMPLE_SHARDS]:
        x = widen(shard.bits(layer)[store.kept(shard, layer)])
        if not np.isfinite(x).all():
            raise ModelError(f"{shard.path.name} holds activations that are not finite")
        total += x.sum(axis=0, dtype=np.float64)
        square += float(np.square(x, dtype=np.float64).sum())
        n += len(x)
    mean = total / max(n, 1)
    spread = square / max(n, 1) - float(mean @ mean)
    if not (n and np.isfinite(spread) and spread > 1e-12):
        raise ModelError("the harvested activations do not vary: there is nothing to learn")
    return Scaling(mean.astype(np.float32), (spread / len(mean)) ** -0.5)


def sample(
    store: ActivationStore, layer: int, shards: Sequence[Shard], n_rows: int = 16_384
) -> Floats:
    """Some rows of every shard that are no sinks, ``[n, d_model]``: all kinds of text."""
    parts, each = [], max(1, n_rows // len(shards))
    for shard in shards:
        kept = store.kept(shard, layer)
        chosen = kept[np.linspace(0, len(kept) - 1, min(each, len(kept))).astype(int)]
        parts.append(widen(shard.bits(layer)[chosen]))
    return np.concatenate(parts)


class Batches:
    """``rank`` of ``n_ranks`` processes takes its own share of the shards."""

    def __init__(
        self,
        store: ActivationStore,
        layer: int,
        shards: Sequence[Shard],
        batch: int,
        scaling: Scaling,
        seed: int = 0,
        rank: int = 0,
        n_ranks: int = 1,
    ) -> None:
        store.check_layer(layer)
        self._store, self._layer, self._batch = store, layer, batch
        self._shards = list(shards)[rank::n_ranks]
        self._scaling, self._seed = scaling, seed + 1_000_003 * rank
        self._kept = [store.kept(shard, layer) for shard in self._shards]
        if not self.per_epoch:
            raise ModelError(
                f"{sum(map(len, self._kept))} tokens make no batch of {batch}: harvest more text"
            )

    @property
    def n_tokens(self) -> int:
        """In an epoch, of this process."""
        return sum(len(rows) for rows in self._kept)

    @property
    def per_epoch(self) -> int:
        """Whole batches in an epoch; what is left of a window is dropped."""
        return min(
            sum(self._n_batches(window) for window in self._windows(epoch)) for epoch in range(4)
        )

    def sample(self) -> Floats:
        """Some rows of the first shard, scaled."""
        rows = self._kept[0][:_SAMPLE_ROWS]
        return self._scaling.apply(widen(self._shards[0].bits(self._layer)[rows]))

    def since(self, step: int) -> Iterator[Floats]:
        """All batches from number ``step`` on, without end; each is made while one is used."""
        plan = self._plan(step)
        with ThreadPoolExecutor(1, "windows") as reader, ThreadPoolExecutor(1, "batch") as maker:
            coming: Future[tuple[Bits, NDArray[np.int64], int]]
            coming = reader.submit(self._load, *next(plan))
            made: Future[Floats] | None = None
            while True:
                bits, order, skip = coming.result()
                coming = reader.submit(self._load, *next(plan))
                for n in range(skip, len(order) // self._batch):
                    rows = order[n * self._batch : (n + 1) * self._batch]
                    before, made = made, maker.submit(self._make, bits, rows)
                    if before is not None:
                        yield before.result()

    def _make(self, bits: Bits, rows: NDArray[np.int64]) -> Floats:
        return self._scaling.apply(widen(bits[rows]))

    def _plan(self, step: int) -> Iterator[tuple[int, int, NDArray[np.int64], int]]:
        """Epoch, number of the window, its shards, and how many of its batches are over."""
        epoch, passed = 0, 0
        while True:
            for number, window in enumerate(self._windows(epoch)):
                n = self._n_batches(window)
                if passed + n > step:
                    yield epoch, number, window, max(step - passed, 0)
                passed += n
            epoch += 1

    def _windows(self, epoch: int) -> list[NDArray[np.int64]]:
        order = np.random.default_rng((self._seed, epoch)).permutation(len(self._shards))
        return [order[i : i + WINDOW_SHARDS] for i in range(0, len(order), WINDOW_SHARDS)]

    def _n_batches(self, window: NDArray[np.int64]) -> int:
        return sum(len(self._kept[i]) for i in window) // self._batch

    def _load(
        self, epoch: int, number: int, window: NDArray[np.int64], skip: int
    ) -> tuple[Bits, NDArray[np.int64], int]:
        bits = np.concatenate([self._shards[i].bits(self._layer)[self._kept[i]] for i in window])
        order = np.random.default_rng((self._seed, epoch, number)).permutation(len(bits))
        return bits, order, skip
