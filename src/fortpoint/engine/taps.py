"""Reads probes and features in the residual stream, for next to nothing.

While a step is computed, only references to the layers' residuals are kept (nobody changes
them in place). At its end all probes are one product over all rows and layers, and each
dictionary that somebody watches is one product over the rows that watch it.

    step = taps.begin([Rows(0, 1, watch=None), Rows(1, 65, watch=Watch(("l15",), top=32))])
    step.see(layer, x)  # after each block, and after steering
    parts = step.finish()  # one ``Part`` for each ``Rows``
    reading = taps.reading(parts_of_the_prompt, segments)

A prompt that was computed in chunks has a part of each; ``reading`` puts them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fortpoint.engine.linear_probe import LinearProbes
from fortpoint.engine.protocol import Watch
from fortpoint.errors import InvalidRequest
from fortpoint.features.library import Library
from fortpoint.features.sae import Dictionary
from fortpoint.types import FeatureReading, Reading, Segment

MAX_TOP = 256


@dataclass(frozen=True)
class Rows:
    """Rows ``start`` to ``end`` of a step and which dictionaries to read there."""

    start: int
    end: int
    watch: Watch | None = None


@dataclass(frozen=True)
class FeaturePart:
    """``indices`` (int32, -1 where fewer were active) and ``values`` are ``[n_rows, top]``."""

    dictionary: str
    indices: NDArray[np.int32]
    values: NDArray[np.float32]


@dataclass(frozen=True)
class Part:
    """What was read at some rows: probes' logits ``[n_rows, n_probes]``, and features."""

    logits: NDArray[np.float32]
    features: tuple[FeaturePart, ...] = ()


class Taps:
    """What can be read. ``check`` a request's wishes before its rows are begun."""

    def __init__(self, library: Library, probes: LinearProbes) -> None:
        self.probes = probes
        self._library = library
        self._encoders: dict[str, _Encoder] = {}

    def check(self, watch: Watch | None) -> None:
        """Raises ``InvalidRequest`` for a dictionary that is not here or a bad ``top``."""
        if watch is None:
            return
        if not 1 <= watch.top <= MAX_TOP:
            raise InvalidRequest(f"top is a number from 1 to {MAX_TOP}", param="watch")
        if len(set(watch.dictionaries)) != len(watch.dictionaries):
            raise InvalidRequest("a dictionary is named twice", param="watch")
        for name in watch.dictionaries:
            self._library.dictionary(name)

    def last_layer(self, watch: Watch | None = None) -> int:
        """The last layer that a reading needs; -1 when it needs none."""
        names = () if watch is None else watch.dictionaries
        layers = [self._library.dictionary(name).layer for name in names]
        return max(layers, default=self.probes.last_layer)

    def begin(self, rows: Sequence[Rows]) -> StepTaps:
        """Watch these rows of one step."""
        watched: dict[str, list[Rows]] = {}
        for part in rows:
            for name in part.watch.dictionaries if part.watch else ():
                watched.setdefault(name, []).append(part)
        encoders = {name: self._encoder(name) for name in watched}
        return StepTaps(self.probes, rows, watched, encoders)

    def reading(self, parts: Sequence[Part], segments: tuple[Segment, ...] = ()) -> Reading:
        """One reading of the parts' tokens in order. Without segments it names no probes."""
        logits = np.concatenate([part.logits for part in parts])
        features = tuple(
            FeatureReading(
                dictionary=same[0].dictionary,
                top=same[0].indices.shape[1],
                indices=np.concatenate([part.indices for part in same]).tobytes(),
                values=np.concatenate([part.values for part in same]).tobytes(),
            )
            for same in zip(*(part.features for part in parts), strict=True)
        )
        names = self.probes.names if segments else ()
        return Reading(names, len(logits), logits.tobytes(), segments, features)

    def _encoder(self, name: str) -> _Encoder:
        if name not in self._encoders:
            self._encoders[name] = _Encoder(self._library.dictionary(name))
        return self._encoders[name]


class StepTaps:
    """One step: ``see`` every layer, then ``finish``."""

    def __init__(
        self,
        probes: LinearProbes,
        rows: Sequence[Rows],
        watched: dict[str, list[Rows]],
        encoders: dict[str, _Encoder],
    ) -> None:
        self._probes = probes
        self._rows = rows
        self._watched = watched
        self._encoders = encoders
        self._layers = {*probes.layers, *(encoder.layer for encoder in encoders.values())}
        self._seen: dict[int, Tensor] = {}

    def see(self, layer: int, x: Tensor) -> None:
        """``x`` ``[n_rows, d_model]`` after block ``layer``; nobody may change it in place."""
        if layer in self._layers:
            self._seen[layer] = x

    def finish(self) -> list[Part]:
        """What was read, in the order of the rows given."""
        n_rows = max((rows.end for rows in self._rows), default=0)
        logits = self._probes.read(self._seen, n_rows).numpy()
        features: dict[int, list[FeaturePart]] = {id(rows): [] for rows in self._rows}
        for name, groups in self._watched.items():
            for rows, part in zip(groups, self._features(name, groups), strict=True):
                features[id(rows)].append(part)
        return [
            Part(logits[rows.start : rows.end], tuple(features[id(rows)])) for rows in self._rows
        ]

    def _features(self, name: str, groups: list[Rows]) -> list[FeaturePart]:
        encoder = self._encoders[name]
        x = self._seen[encoder.layer]
        wanted = [row for rows in groups for row in range(rows.start, rows.end)]
        if len(wanted) < len(x):
            x = x[torch.tensor(wanted)]
        top = max(rows.watch.top for rows in groups if rows.watch)
        indices, values = encoder.strongest(x, top)
        parts, end = [], 0
        for rows in groups:
            start, end = end, end + rows.end - rows.start
            top = rows.watch.top if rows.watch else 0
            parts.append(FeaturePart(name, indices[start:end, :top], values[start:end, :top]))
        return parts


class _Encoder:
    """A dictionary's encoder."""

    def __init__(self, dictionary: Dictionary) -> None:
        self.layer = dictionary.layer
        self._dictionary = dictionary

    def strongest(self, x: Tensor, top: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """The ``top`` features of each row, strongest first."""
        acts = self._dictionary.encode(x) / self._dictionary.training_max
        values, indices = torch.topk(acts, min(top, acts.shape[1]), dim=-1)
        indices = indices.int().masked_fill_(values <= 0, -1)
        return indices.numpy(), values.numpy()
