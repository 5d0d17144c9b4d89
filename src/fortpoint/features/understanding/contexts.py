"""Where a feature is active, shown: tokens around a place, each with its strength there.

The strongest places come first, each from another document; then some of lesser strength, so
that a label can be judged by more than its best cases.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fortpoint.features.activations import ActivationStore, Shard, widen
from fortpoint.features.sae import Dictionary
from fortpoint.features.understanding.index import Context
from fortpoint.features.understanding.survey import SHARD_PLACES, Part, Survey, activations_at

Numbers = NDArray[np.int64]

LEVELS = (0.7, 0.3)
"""Quantiles of a feature's activations at which lesser contexts are taken."""

_CHUNK = 400
_TRIES = 12


@dataclass(frozen=True, eq=False)
class Chosen:
    """Contexts to be shown: feature ``features[i]`` at ``places[i]``; ``levels[i]`` is 0 for a
    strongest one, else one more than its place in ``LEVELS``."""

    features: Numbers
    places: Numbers
    levels: Numbers


def choose(survey: Survey, n_top: int, n_lesser: int) -> Chosen:
    """``n_top`` of the strongest, and ``n_lesser`` (at most two) others, of every feature."""
    top = survey.leaders.places[:, :n_top]
    features, ranks = np.nonzero(top >= 0)
    chosen = [(features, top[features, ranks], np.zeros(len(features), np.int64))]
    used = survey.leaders.documents[:, :n_top]
    for level, quantile in enumerate(LEVELS[:n_lesser]):
        found = [
            (feature, place)
            for feature in range(len(top))
            if (place := _at_quantile(survey.study, feature, quantile, used[feature])) >= 0
        ]
        pairs = np.array(found, np.int64).reshape(-1, 2)
        chosen.append((pairs[:, 0], pairs[:, 1], np.full(len(pairs), level + 1, np.int64)))
    return Chosen(*(np.concatenate(each) for each in zip(*chosen, strict=True)))


def contexts(
    store: ActivationStore,
    dictionary: Dictionary,
    survey: Survey,
    chosen: Chosen,
    texts: Sequence[str],
    reach: tuple[int, int] = (12, 6),
) -> list[list[Context]]:
    """The chosen contexts of each feature, strongest first, with so many tokens before and after
    the one chosen."""
    found: list[list[Context]] = [[] for _ in range(dictionary.n_features)]
    order = np.argsort(chosen.places, kind="stable")
    ready: dict[int, Context] = {}
    numbers = chosen.places[order] // SHARD_PLACES
    for number, shard in enumerate(survey.learned):
        here = order[numbers == number]
        if len(here):
            reader = _Reader(store, shard, dictionary, survey.maximum, texts, reach)
            rows = chosen.places[here] % SHARD_PLACES
            made = reader.read(chosen.features[here], rows, chosen.levels[here])
            ready.update(zip(here.tolist(), made, strict=True))
    for number, feature in enumerate(chosen.features.tolist()):
        found[feature].append(ready[number])
    return found


class _Reader:
    """Contexts of one shard."""

    def __init__(
        self,
        store: ActivationStore,
        shard: Shard,
        dictionary: Dictionary,
        maximum: NDArray[np.float32],
        texts: Sequence[str],
        reach: tuple[int, int],
    ) -> None:
        self._reach = reach
        self._dictionary = dictionary
        self._maximum = maximum
        self._texts = texts
        self._tokens = np.asarray(shard.tokens)
        self._bits = shard.bits(dictionary.layer)
        self._sound = np.zeros(len(shard), np.bool_)
        self._sound[store.kept(shard, dictionary.layer)] = True
        self._bounds = np.append(np.flatnonzero(shard.position == 0), len(shard))

    def read(self, features: Numbers, rows: Numbers, levels: Numbers) -> Iterator[Context]:
        for start in range(0, len(rows), _CHUNK):
            part = slice(start, start + _CHUNK)
            yield from self._chunk(features[part], rows[part], levels[part])

    def _chunk(self, features: Numbers, rows: Numbers, levels: Numbers) -> Iterator[Context]:
        window = np.searchsorted(self._bounds, rows, side="right")
        starts = np.maximum(self._bounds[window - 1], rows - self._reach[0])
        ends = np.minimum(self._bounds[window], rows + self._reach[1] + 1)
        sizes = ends - starts
        offsets = np.cumsum(sizes) - sizes
        at = np.repeat(starts - offsets, sizes) + np.arange(int(sizes.sum()))
        of_feature = np.repeat(features, sizes)
        values = activations_at(self._dictionary, widen(self._bits[at]), of_feature)
        values *= self._sound[at]
        share = values / np.maximum(self._maximum[of_feature], np.float32(1e-9))
        percent = np.where(values > 0, np.clip(np.rint(share * 100), 1, 100), 0).astype(int)
        for i in range(len(rows)):
            part = slice(int(offsets[i]), int(offsets[i] + sizes[i]))
            yield Context(
                tokens=tuple(self._texts[token] for token in self._tokens[at[part]].tolist()),
                strengths=tuple(percent[part].tolist()),
                peak=int(rows[i] - starts[i]),
                level=int(levels[i]),
            )


def _at_quantile(part: Part, feature: int, quantile: float, used: Numbers) -> int:
    """A place of about that strength, in a document that is not ``used``; -1 for none."""
    rows = part.by_feature.row(feature)
    if len(rows) == 0:
        return -1
    order = np.argsort(part.by_feature.row_values(feature), kind="stable")
    middle = int(quantile * (len(rows) - 1))
    for step in range(_TRIES):
        at = middle - step
        if at < 0:
            break
        row = int(rows[order[at]])
        if part.documents[row] not in used:
            return int(part.places[row])
    return -1
