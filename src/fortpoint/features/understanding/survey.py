"""One pass over a harvest: how often, how strongly and where each feature is active.

    found = survey(store, dictionary, Settings(n_held_out=4), progress)
    found.frequency, found.maximum               # [n_features]
    found.leaders.places[3]                      # where feature 3 is strongest
    found.study.active, found.held_out.active    # every active token of a part of the text

Sinks are left out. The study part is what labels are learned from; the held-out part, the last
shards, is read for nothing but to judge them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fortpoint.errors import ModelError
from fortpoint.features.activations import ActivationStore, Shard, widen
from fortpoint.features.sae import Dictionary
from fortpoint.features.understanding.incidence import Incidence
from fortpoint.features.understanding.leaders import Leaders
from fortpoint.features.understanding.passages import Passages

Numbers = NDArray[np.int64]
Floats = NDArray[np.float32]
Progress = Callable[[str, int, int], None]

SHARD_PLACES = 1 << 32
"""A place is ``shard * SHARD_PLACES + row``."""

_BATCH = 2048
_MAX_BATCH_CELLS = 1 << 24
_OCTAVE_BINS = 8
_LEAST_EXPONENT = -10
_N_LOG_BINS = 24 * _OCTAVE_BINS


@dataclass(frozen=True)
class Settings:
    """``n_tokens`` bounds what is read, evenly over the shards (None reads all);
    ``study_tokens`` and ``held_out_tokens`` bound what is kept in memory."""

    n_held_out: int = 4
    n_tokens: int | None = None
    study_tokens: int = 500_000
    held_out_tokens: int = 300_000
    n_leaders: int = 32


@dataclass(frozen=True, eq=False)
class Part:
    """Some shards in memory: ``active`` has a row for each token and a column for each feature,
    with activations; ``kept`` are the rows that are no sinks, ``documents`` and ``places`` say
    where each row comes from."""

    passages: Passages
    active: Incidence
    kept: Numbers
    documents: Numbers
    places: Numbers

    @cached_property
    def by_feature(self) -> Incidence:
        """A row for each feature: the tokens at which it is active."""
        return self.active.transposed()


@dataclass(frozen=True, eq=False)
class Survey:
    """``counts`` ``[n_features]`` of active tokens among ``n_tokens``; ``log_counts`` by
    strength, for ``histogram``."""

    n_tokens: int
    counts: Numbers
    maximum: Floats
    log_counts: NDArray[np.int32]
    leaders: Leaders
    study: Part
    held_out: Part
    learned: tuple[Shard, ...]

    @property
    def frequency(self) -> NDArray[np.float64]:
        """Share of tokens on which each feature is active."""
        return self.counts / max(self.n_tokens, 1)

    def histogram(self, n_bins: int) -> Numbers:
        """``[n_features, n_bins]``: active tokens in equal bins from 0 to each maximum.

        Made from bins of an eighth of an octave, so a count may be off by a neighbour's few.
        """
        exponents = (np.arange(_N_LOG_BINS) + 0.5) / _OCTAVE_BINS + _LEAST_EXPONENT
        share = np.exp2(exponents)[None, :] / np.maximum(self.maximum, 1e-9)[:, None]
        bins = np.minimum((share * n_bins).astype(np.int64), n_bins - 1)
        found = np.zeros((len(self.counts), n_bins), np.int64)
        rows = np.repeat(np.arange(len(self.counts)), _N_LOG_BINS)
        np.add.at(found, (rows, bins.ravel()), self.log_counts.ravel())
        return found


def survey(
    store: ActivationStore, dictionary: Dictionary, settings: Settings, progress: Progress
) -> Survey:
    """Raises ``ModelError`` for a layer that was not harvested, a dictionary of another width,
    or a harvest of too few shards."""
    store.check_layer(dictionary.layer)
    if store.plan.d_model != dictionary.encoder.shape[1]:
        raise ModelError(
            f"{dictionary.name} reads {dictionary.encoder.shape[1]} numbers a token, the harvest "
            f"has {store.plan.d_model}"
        )
    shards, held_out = store.split(settings.n_held_out)
    learned = _spread(shards, settings.n_tokens)
    judged = _spread(held_out, settings.held_out_tokens)
    studied = {shard.path for shard in _spread(learned, settings.study_tokens)}
    tally, study = _Tally(dictionary.n_features, settings.n_leaders), _PartMaker()
    n_shards = len(learned) + len(judged)
    for number, shard in enumerate(learned):
        pairs = encode_shard(store, shard, dictionary)
        tally.add(pairs, shard, number)
        if shard.path in studied:
            study.add(shard, pairs, number)
        progress("read", number + 1, n_shards)
    last = int(shards[-1].document[-1])
    unseen_part = _PartMaker()
    for number, shard in enumerate(judged, len(learned)):
        unseen_part.add(shard, encode_shard(store, shard, dictionary), number, but=last)
        progress("read", number + 1, n_shards)
    return Survey(
        n_tokens=tally.n_tokens,
        counts=tally.counts,
        maximum=tally.maximum,
        log_counts=tally.log_counts,
        leaders=tally.leaders,
        study=study.made(dictionary.n_features),
        held_out=unseen_part.made(dictionary.n_features),
        learned=tuple(learned),
    )


def unseen(
    store: ActivationStore, dictionary: Dictionary, n_held_out: int, progress: Progress
) -> Part:
    """The held-out part alone, as ``survey`` reads it with the same number of shards.

    Raises ``ModelError``.
    """
    store.check_layer(dictionary.layer)
    learned, held_out = store.split(n_held_out)
    judged = _spread(held_out, Settings().held_out_tokens)
    maker, last = _PartMaker(), int(learned[-1].document[-1])
    for number, shard in enumerate(judged):
        pairs = encode_shard(store, shard, dictionary)
        maker.add(shard, pairs, len(learned) + number, but=last)
        progress("read", number + 1, len(judged))
    return maker.made(dictionary.n_features)


@dataclass(frozen=True, eq=False)
class Pairs:
    """The active tokens of one shard: rows ascend; ``kept`` are its rows without sinks."""

    rows: NDArray[np.int32]
    features: NDArray[np.int32]
    values: Floats
    kept: Numbers


def encode_shard(store: ActivationStore, shard: Shard, dictionary: Dictionary) -> Pairs:
    """Raises ``ModelError`` for activations that are not finite."""
    kept = store.kept(shard, dictionary.layer)
    bits = shard.bits(dictionary.layer)
    parts = [(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32))]
    for rows in _batches(kept, dictionary.n_features):
        x = widen(bits[rows])
        if not np.isfinite(x).all():
            raise ModelError(
                f"{shard.path.name} holds activations that are not finite; harvest again"
            )
        acts = _activations(dictionary, x)
        flat = np.flatnonzero(acts > 0)
        at, features = np.divmod(flat, dictionary.n_features)
        parts.append((rows[at].astype(np.int32), features.astype(np.int32), acts.ravel()[flat]))
    joined = [np.concatenate(each) for each in zip(*parts, strict=True)]
    return Pairs(joined[0], joined[1], joined[2].astype(np.float32, copy=False), kept)


def activations_at(dictionary: Dictionary, x: Floats, features: NDArray[np.integer]) -> Floats:
    """Row ``i`` of ``x`` ``[n, d_in]`` read by ``features[i]`` alone: ``[n]``. For a dictionary
    that keeps the k largest of a token, whether others are larger is not looked at."""
    z = np.einsum("nd,nd->n", x - dictionary.center, dictionary.encoder[features])
    z += dictionary.bias[features]
    return np.where(z > dictionary.threshold[features], z, 0).astype(np.float32)


def _activations(dictionary: Dictionary, x: Floats) -> Floats:
    if dictionary.k is not None:
        return dictionary.encode(x)
    z = dictionary.preactivations(x)
    z *= z > dictionary.threshold
    return z


def _batches(kept: Numbers, n_features: int) -> Iterator[Numbers]:
    size = max(32, min(_BATCH, _MAX_BATCH_CELLS // n_features))
    for start in range(0, len(kept), size):
        yield kept[start : start + size]


def _spread(shards: Sequence[Shard], n_tokens: int | None) -> list[Shard]:
    """As many of ``shards`` as have so many tokens, evenly chosen, at least one."""
    if n_tokens is None or not shards:
        return list(shards)
    size = max(1, len(shards[0]))
    n = min(len(shards), max(1, n_tokens // size))
    chosen = np.unique(np.linspace(0, len(shards) - 1, n).round().astype(int))
    return [shards[number] for number in chosen.tolist()]


class _Tally:
    """Sums over shards."""

    def __init__(self, n_features: int, n_leaders: int) -> None:
        self.n_tokens = 0
        self.counts = np.zeros(n_features, np.int64)
        self.maximum = np.zeros(n_features, np.float32)
        self.log_counts = np.zeros((n_features, _N_LOG_BINS), np.int32)
        self.leaders = Leaders(n_features, n_leaders)

    def add(self, pairs: Pairs, shard: Shard, number: int) -> None:
        n_features = len(self.counts)
        self.n_tokens += len(pairs.kept)
        self.counts += np.bincount(pairs.features, minlength=n_features)
        np.maximum.at(self.maximum, pairs.features, pairs.values)
        bins = np.floor((np.log2(pairs.values) - _LEAST_EXPONENT) * _OCTAVE_BINS)
        bins = np.clip(bins, 0, _N_LOG_BINS - 1).astype(np.int64)
        flat = np.bincount(pairs.features * np.int64(_N_LOG_BINS) + bins, minlength=0)
        self.log_counts.ravel()[: len(flat)] += flat.astype(np.int32)
        places = number * SHARD_PLACES + pairs.rows.astype(np.int64)
        documents = shard.document[pairs.rows].astype(np.int64)
        self.leaders.offer(pairs.features, pairs.values, places, documents)


class _PartMaker:
    """Shards one after another, to be one ``Part``."""

    def __init__(self) -> None:
        self._shards: list[Shard] = []
        self._pairs: list[Pairs] = []
        self._places: list[Numbers] = []
        self._n = 0

    def add(self, shard: Shard, pairs: Pairs, number: int, but: int | None = None) -> None:
        """``number`` is the shard's among those read; ``but`` is a document to be left out."""
        if but is not None:
            inside = shard.document[pairs.rows] != but
            pairs = Pairs(
                pairs.rows[inside],
                pairs.features[inside],
                pairs.values[inside],
                pairs.kept[shard.document[pairs.kept] != but],
            )
        moved = Pairs(pairs.rows + self._n, pairs.features, pairs.values, pairs.kept + self._n)
        self._shards.append(shard)
        self._places.append(number * SHARD_PLACES + np.arange(len(shard)))
        self._pairs.append(moved)
        self._n += len(shard)

    def made(self, n_features: int) -> Part:
        rows, features = np.empty(0, np.int32), np.empty(0, np.int32)
        values, kept = np.empty(0, np.float32), np.empty(0, np.int64)
        active = Incidence.of_sorted(
            np.concatenate([rows, *(pairs.rows for pairs in self._pairs)]),
            np.concatenate([features, *(pairs.features for pairs in self._pairs)]),
            np.concatenate([values, *(pairs.values for pairs in self._pairs)]),
            self._n,
            n_features,
        )
        documents = [shard.document.astype(np.int64) for shard in self._shards]
        return Part(
            passages=Passages.of_shards(self._shards),
            active=active,
            kept=np.concatenate([kept, *(pairs.kept for pairs in self._pairs)]),
            documents=np.concatenate([kept, *documents]),
            places=np.concatenate([kept, *self._places]),
        )
