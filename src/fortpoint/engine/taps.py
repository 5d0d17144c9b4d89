"""Reads probes and features in the residual stream, for next to nothing.

The forward pass keeps a copy of the layers that somebody reads. Then all probes, and the targets
that the operator has read always, are small products over all rows, and each dictionary that
somebody watches is one product over the rows that watch it (``compiled/reading.py``), which
needs no interpreter lock: it may run while the next tokens are chosen.

    rows = [Rows(0, 1, watch=None), Rows(1, 65, watch=Watch(("l15",), top=32))]
    result = model.forward(Step(..., tap_layers=taps.layers(rows)))
    parts = taps.read(rows, result.seen)  # one ``Part`` for each ``Rows``
    reading = taps.reading(parts_of_the_prompt, segments)

A prompt that was computed in chunks has a part of each; ``reading`` puts them together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fortpoint.engine.compiled import packed
from fortpoint.engine.compiled.packed import GROUP
from fortpoint.engine.compiled.reading import Reading as Entry
from fortpoint.engine.compiled.reading import feature_reader
from fortpoint.engine.compiled.rows import Activations
from fortpoint.engine.compiled.vector import LANES
from fortpoint.engine.linear_probe import LinearProbes
from fortpoint.engine.model import Floats
from fortpoint.engine.protocol import Watch
from fortpoint.engine.target_reader import TargetReader
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
    """What was read at some rows, and features.

    ``logits`` is ``[n_rows, n_probes + n_targets]``: the probes' logits, and in its last columns
    how active each target is.
    """

    logits: NDArray[np.float32]
    features: tuple[FeaturePart, ...] = ()


class Taps:
    """What can be read. ``check`` a request's wishes before its rows are begun."""

    def __init__(
        self, library: Library, probes: LinearProbes, targets: TargetReader | None = None
    ) -> None:
        self.probes = probes
        self.targets = TargetReader() if targets is None else targets
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
            if self._library.dictionary(name).encoder.shape[1] % GROUP:
                raise InvalidRequest(
                    f"{name} reads a stream whose width is no multiple of {GROUP}, which cannot "
                    "be watched yet",
                    param="watch",
                )

    def last_layer(self, watch: Watch | None = None) -> int:
        """The last layer that a reading needs; -1 when it needs none."""
        names = () if watch is None else watch.dictionaries
        layers = [self._library.dictionary(name).layer for name in names]
        return max(layers, default=max(self.probes.last_layer, self.targets.last_layer))

    def layers(self, rows: Sequence[Rows]) -> tuple[int, ...]:
        """The layers whose residual stream ``read`` needs."""
        names = {name for part in rows if part.watch for name in part.watch.dictionaries}
        watched = {self._library.dictionary(name).layer for name in names}
        return tuple(sorted({*self.probes.layers, *self.targets.layers, *watched}))

    def read(self, rows: Sequence[Rows], seen: Mapping[int, Floats]) -> list[Part]:
        """What is at these rows, in their order; ``seen`` has all of the step's rows."""
        parts, fill = self.begin(rows, seen)
        fill()
        return parts

    def begin(
        self, rows: Sequence[Rows], seen: Mapping[int, Floats]
    ) -> tuple[list[Part], Callable[[], None]]:
        """The same, with parts that hold nothing until the second result was called.

        It needs no interpreter lock for most of its work, and ``seen`` until it returns.
        """
        logits, work = self._always(max((part.end for part in rows), default=0), seen)
        works = [work]
        watched: dict[str, list[int]] = {}
        for number, part in enumerate(rows):
            for name in part.watch.dictionaries if part.watch else ():
                watched.setdefault(name, []).append(number)
        features: list[dict[str, FeaturePart]] = [{} for _ in rows]
        for name, numbers in watched.items():
            begun, work = self._features(name, [rows[number] for number in numbers], seen)
            works.append(work)
            for number, one in zip(numbers, begun, strict=True):
                features[number][name] = one
        parts = [
            Part(
                logits[part.start : part.end],
                tuple(own[name] for name in part.watch.dictionaries) if part.watch else (),
            )
            for part, own in zip(rows, features, strict=True)
        ]
        return parts, lambda: _do(works)

    def reading(self, parts: Sequence[Part], segments: tuple[Segment, ...] = ()) -> Reading:
        """One reading of the parts' tokens in order. Without segments it names no columns."""
        always = np.concatenate([part.logits for part in parts])
        n_probes = len(self.probes.names)
        features = tuple(
            FeatureReading(
                dictionary=same[0].dictionary,
                top=same[0].indices.shape[1],
                indices=np.concatenate([part.indices for part in same]).tobytes(),
                values=np.concatenate([part.values for part in same]).tobytes(),
            )
            for same in zip(*(part.features for part in parts), strict=True)
        )
        return Reading(
            probes=self.probes.names if segments else (),
            n_tokens=len(always),
            logits=always[:, :n_probes].tobytes(),
            segments=segments,
            features=features,
            targets=self.targets.names if segments else (),
            target_values=always[:, n_probes:].tobytes(),
        )

    def last_token(self, part: Part) -> Reading:
        """What is always read, at the last of these rows."""
        row, n_probes = part.logits[-1], len(self.probes.names)
        return Reading((), 1, row[:n_probes].tobytes(), (), target_values=row[n_probes:].tobytes())

    def _always(
        self, n_rows: int, seen: Mapping[int, Floats]
    ) -> tuple[NDArray[np.float32], Callable[[], None]]:
        """Room for what is read at all of so many rows, and what fills it."""
        logits = self.probes.new_logits(n_rows)
        if not self.targets.names:
            return logits, lambda: self.probes.add(seen, logits)
        n_probes = logits.shape[1]
        always = np.empty((n_rows, n_probes + len(self.targets.names)), np.float32)

        def fill() -> None:
            self.probes.add(seen, logits)
            always[:, :n_probes] = logits
            self.targets.read(seen, always[:, n_probes:])

        return always, fill

    def _features(
        self, name: str, parts: Sequence[Rows], seen: Mapping[int, Floats]
    ) -> tuple[list[FeaturePart], Callable[[], None]]:
        encoder = self._encoder(name)
        wanted = np.concatenate([np.arange(part.start, part.end) for part in parts])
        top = max(part.watch.top for part in parts if part.watch)
        indices = np.empty((len(wanted), top), np.int32)
        values = np.empty((len(wanted), top), np.float32)
        begun, end = [], 0
        for part in parts:
            start, end = end, end + part.end - part.start
            top = part.watch.top if part.watch else 0
            begun.append(FeaturePart(name, indices[start:end, :top], values[start:end, :top]))
        return begun, lambda: encoder.strongest(seen[encoder.layer], wanted, indices, values)

    def _encoder(self, name: str) -> _Encoder:
        if name not in self._encoders:
            self._encoders[name] = _Encoder(self._library.dictionary(name))
        return self._encoders[name]


def _do(works: Sequence[Callable[[], None]]) -> None:
    for work in works:
        work()


class _Encoder:
    """A dictionary's encoder as the compiled reader takes it, and room to work in."""

    def __init__(self, dictionary: Dictionary) -> None:
        self.layer = dictionary.layer
        exact = np.ascontiguousarray(dictionary.encoder, np.float32)
        self._d, self._k = exact.shape[1], dictionary.k or 0
        self._numbers = np.zeros(len(Entry), np.int64)
        self._kept: dict[Entry, NDArray[np.generic]] = {}
        self._numbers[[Entry.D, Entry.N_FEATURES, Entry.K]] = self._d, len(exact), self._k
        self._put(Entry.ROUGH, packed.pack(exact, "int8").data)
        self._put(Entry.EXACT, exact)
        self._put(Entry.BIAS, dictionary.bias)
        self._put(Entry.THRESHOLD, dictionary.threshold)
        self._put(Entry.SCALE, 1 / dictionary.training_max)
        self._put(Entry.LENGTH, np.linalg.norm(exact, axis=1))
        self._put(Entry.CENTER, dictionary.center)
        self._n_rows = self._most = 0

    def strongest(
        self, x: Floats, rows: NDArray[np.int64], indices: NDArray[np.int32], values: Floats
    ) -> None:
        """The strongest features of each of ``x[rows]``, in order, into ``[n, top]`` arrays."""
        n, top = indices.shape
        self._make_room(n, max(top, self._k))
        for entry, array in (
            (Entry.X, np.ascontiguousarray(x, np.float32)),
            (Entry.ROWS, rows),
            (Entry.INDICES, indices),
            (Entry.VALUES, values),
        ):
            self._kept[entry] = array
            self._numbers[entry] = array.ctypes.data
        self._numbers[[Entry.N_ROWS, Entry.TOP]] = n, top
        feature_reader()(self._numbers.ctypes.data)

    def _make_room(self, n_rows: int, most: int) -> None:
        if n_rows > self._n_rows:
            self._n_rows = n_rows
            width = -(-int(self._numbers[Entry.N_FEATURES]) // LANES) * LANES
            self._acts = Activations(n_rows * self._d)
            self._numbers[Entry.ACTS] = self._acts.addresses.ctypes.data
            self._put(Entry.Z, np.empty((n_rows, width), np.float32))
        if most > self._most:
            self._most = most
            self._put(Entry.BEST, np.empty(most, np.float32))
            indices = self._kept[Entry.BEST_INDICES] = np.empty(most, np.int32)
            self._numbers[Entry.BEST_INDICES] = indices.ctypes.data

    def _put(self, entry: Entry, values: NDArray[Any]) -> None:
        """Point to ``values`` (as float32, unless they are bytes), and keep them."""
        kind = values.dtype if values.dtype == np.uint8 else np.float32
        self._kept[entry] = array = np.ascontiguousarray(values, kind)
        self._numbers[entry] = array.ctypes.data
