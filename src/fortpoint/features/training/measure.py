"""How good a dictionary is, on text that it never saw, attention sinks left out.

``explained`` is the share of the variance that the reconstruction explains (EV). The loss is
the next token's negative log-likelihood in nats while the reconstruction takes the layer's
place; how much of it is recovered is told against two ways of losing the layer: zeros, and the
layer's mean, the harder one.

    pass_ = pass_over(dictionary, store, shards)      # activations: EV, L0, frequencies, maxima
    losses = measure_losses(dictionary, store, shards, stream)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from fortpoint.errors import ModelError
from fortpoint.features.activations import (
    SINK_NORM,
    ActivationStore,
    Shard,
    widen,
    windows_of,
)
from fortpoint.features.sae import Dictionary

Floats = NDArray[np.float32]
Progress = Callable[[str, int, int], None]

_ROWS = 2048


class LossStream(Protocol):
    """What is needed of the engine's ``ResidualStream``."""

    def losses(
        self,
        sequences: Sequence[Sequence[int]],
        layer: int | None = None,
        replace: Callable[[Floats, NDArray[np.int64]], Floats] | None = None,
    ) -> Floats: ...


@dataclass(frozen=True, eq=False)
class Passed:
    """Of a pass over activations: ``frequency`` (share of tokens) and ``maximum`` by feature."""

    n_tokens: int
    explained: float
    explained_with_sinks: float
    l0: float
    frequency: NDArray[np.float64]
    maximum: Floats

    @property
    def dead_share(self) -> float:
        return float((self.frequency == 0).mean())


class Losses(msgspec.Struct, frozen=True):
    """Nats a token: as it is, with the reconstruction, with zeros, with the layer's mean."""

    n_tokens: int
    clean: float
    replaced: float
    zeroed: float
    averaged: float

    @property
    def rise(self) -> float:
        return self.replaced - self.clean

    @property
    def recovered_against_zero(self) -> float:
        return (self.zeroed - self.replaced) / (self.zeroed - self.clean)

    @property
    def recovered_against_mean(self) -> float:
        return (self.averaged - self.replaced) / (self.averaged - self.clean)


class Coder:
    """Encodes and reconstructs many rows; products in float32, on all cores."""

    def __init__(self, dictionary: Dictionary) -> None:
        import torch

        torch.set_num_threads(os.cpu_count() or 1)
        self._torch = torch
        self._dictionary = dictionary
        self._encoder = torch.from_numpy(np.ascontiguousarray(dictionary.encoder.T))
        self._decoder = torch.from_numpy(dictionary.decoder)
        self._center = torch.from_numpy(dictionary.center)
        self._bias = torch.from_numpy(dictionary.bias)
        self._threshold = torch.from_numpy(dictionary.threshold)

    def acts(self, x: Floats) -> Any:
        """``[n, d_in]`` to activations ``[n, d_sae]``, as a tensor."""
        torch = self._torch
        with torch.inference_mode():
            rows = torch.from_numpy(np.ascontiguousarray(x, np.float32))
            z = torch.addmm(self._bias, rows - self._center, self._encoder)
            acts = torch.where(z > self._threshold, z, 0)
            k = self._dictionary.k
            if k is None or k >= acts.shape[1]:
                return acts
            top = torch.topk(acts, k, dim=1)
            return torch.zeros_like(acts).scatter_(1, top.indices, top.values)

    def reconstruct(self, x: Floats) -> Floats:
        """``[n, d_in]`` to what the dictionary makes of it."""
        return self.decode(self.acts(x))

    def decode(self, acts: Any) -> Floats:
        with self._torch.inference_mode():
            made: Floats = self._torch.addmm(self._center, acts, self._decoder).numpy()
            return made


def pass_over(
    dictionary: Dictionary,
    store: ActivationStore,
    shards: Sequence[Shard],
    progress: Progress | None = None,
) -> Passed:
    """Encode every token of ``shards`` once."""
    coder, d_sae = Coder(dictionary), dictionary.n_features
    sums = _Sums(d_sae, store.plan.d_model)
    for number, shard in enumerate(shards):
        bits = shard.bits(dictionary.layer)
        kept = np.zeros(len(shard), bool)
        kept[store.kept(shard, dictionary.layer)] = True
        for first in range(0, len(shard), _ROWS):
            x = widen(bits[first : first + _ROWS])
            sums.add(coder, x, kept[first : first + _ROWS])
        if progress is not None:
            progress("measure", number + 1, len(shards))
    return sums.passed()


class _Sums:
    def __init__(self, d_sae: int, d_model: int) -> None:
        self.active = np.zeros(d_sae, np.int64)
        self.maximum = np.zeros(d_sae, np.float32)
        self.n = np.zeros(2, np.int64)  # of kept tokens, and of all
        self.errors = np.zeros(2)
        self.squares = np.zeros(2)
        self.totals = np.zeros((2, d_model))

    def add(self, coder: Coder, x: Floats, kept: NDArray[np.bool_]) -> None:
        acts = coder.acts(x)
        errors = np.square(coder.decode(acts) - x).sum(axis=1, dtype=np.float64)
        for i, rows in enumerate((kept, np.ones(len(x), bool))):
            self.n[i] += rows.sum()
            self.errors[i] += errors[rows].sum()
            self.squares[i] += float(np.square(x[rows], dtype=np.float64).sum())
            self.totals[i] += x[rows].sum(axis=0, dtype=np.float64)
        own = acts.numpy()[kept]
        self.active += np.count_nonzero(own, axis=0)
        np.maximum(self.maximum, own.max(axis=0, initial=0), out=self.maximum)

    def passed(self) -> Passed:
        n = np.maximum(self.n, 1)
        variance = self.squares - np.square(self.totals).sum(axis=1) / n
        explained = 1 - self.errors / np.maximum(variance, 1e-12)
        return Passed(
            n_tokens=int(self.n[0]),
            explained=float(explained[0]),
            explained_with_sinks=float(explained[1]),
            l0=float(self.active.sum() / n[0]),
            frequency=self.active / n[0],
            maximum=self.maximum,
        )


def measure_losses(
    dictionary: Dictionary,
    store: ActivationStore,
    shards: Sequence[Shard],
    stream: LossStream,
    max_tokens: int = 40_000,
    progress: Progress | None = None,
) -> Losses:
    """Run the model over the shards' windows four times. Raises ``ModelError`` without text.

    Sinks keep their activations in all four, since no dictionary is asked to explain them.
    """
    windows = _windows(store, shards, max_tokens)
    limit = SINK_NORM * store.median_norm(dictionary.layer)
    coder = Coder(dictionary)
    x = widen(shards[0].bits(dictionary.layer)[store.kept(shards[0], dictionary.layer)])
    mean = x.mean(axis=0)
    makers: dict[str, Callable[[Floats], Floats] | None] = {
        "clean": None,
        "replaced": coder.reconstruct,
        "zeroed": np.zeros_like,
        "averaged": lambda rows: np.broadcast_to(mean, rows.shape),
    }
    found: dict[str, float] = {}
    n = 0
    for number, (name, make) in enumerate(makers.items()):
        if make is None:
            losses = stream.losses(windows)
        else:
            replace = _outside_sinks(make, limit)
            losses = stream.losses(windows, dictionary.layer, replace)
        found[name], n = float(losses.mean(dtype=np.float64)), len(losses)
        if progress is not None:
            progress("losses", number + 1, len(makers))
    return Losses(n_tokens=n, **found)


def measure_rise(
    dictionary: Dictionary,
    store: ActivationStore,
    shards: Sequence[Shard],
    stream: LossStream,
    max_tokens: int = 8_000,
) -> float:
    """How many nats a token the loss rises by with the reconstruction: half of the work."""
    windows = _windows(store, shards, max_tokens)
    limit = SINK_NORM * store.median_norm(dictionary.layer)
    replace = _outside_sinks(Coder(dictionary).reconstruct, limit)
    replaced = stream.losses(windows, dictionary.layer, replace)
    return float((replaced - stream.losses(windows)).mean(dtype=np.float64))


def _outside_sinks(
    make: Callable[[Floats], Floats], limit: float
) -> Callable[[Floats, NDArray[np.int64]], Floats]:
    def replace(x: Floats, positions: NDArray[np.int64]) -> Floats:
        made = np.array(make(x))
        sinks = (positions == 0) | (np.linalg.norm(x, axis=1) > limit)
        made[sinks] = x[sinks]
        return made

    return replace


def _windows(store: ActivationStore, shards: Sequence[Shard], max_tokens: int) -> list[list[int]]:
    """The shards' texts, none that reaches into text to learn from."""
    first = shards[0].document[0]
    windows: list[list[int]] = []
    n = 0
    for shard in shards:
        for rows in windows_of(shard):
            if n >= max_tokens:
                return windows
            if shard.document[rows.start] != first or store.shards[0] is shards[0]:
                windows.append(shard.tokens[rows].tolist())
                n += rows.stop - rows.start
    if not windows:
        raise ModelError("the held-out shards have no text of their own: harvest more")
    return windows
