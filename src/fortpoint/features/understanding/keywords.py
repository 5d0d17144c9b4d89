"""Words that stand in sight where a feature is strongest, and seldom elsewhere.

A feature for dogs need not be active on the word itself, and a rule may speak of all animals;
the words before and at its strongest tokens say "dog" and "pet".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fortpoint.features.activations import Shard
from fortpoint.features.understanding.index import Keyword
from fortpoint.features.understanding.lexicon import Lexicon
from fortpoint.features.understanding.passages import Passages
from fortpoint.features.understanding.survey import SHARD_PLACES, Survey

Numbers = NDArray[np.int64]

SIGHT = 8
"""Tokens before the one that is read."""

_WHOLE_WORD = 3  # tokens after it, in which its word may go on
_N_ELSEWHERE = 50_000
_LEAST_TIMES = 2
_LEAST_SHARE = 0.08
_LEAST_LIFT = 1.5


@dataclass(frozen=True, eq=False)
class _Sights:
    """Each word in each sight once: ``sight`` and ``word``, of ``n`` sights."""

    sight: Numbers
    word: Numbers
    n: int


def keywords(survey: Survey, lexicon: Lexicon, n: int, seed: int = 0) -> list[tuple[Keyword, ...]]:
    """At most ``n`` words for each feature, by how often they are in sight of its strongest
    tokens times how much oftener than elsewhere (in nats)."""
    places = survey.leaders.places
    features, ranks = np.nonzero(places >= 0)
    near = _sights(survey.learned, places[features, ranks], lexicon)
    elsewhere = _sights(survey.learned, _anywhere(survey, seed), lexicon)
    n_words = len(lexicon.names)
    base = (np.bincount(elsewhere.word, minlength=n_words) + 0.5) / max(elsewhere.n, 1)
    codes, times = np.unique(features[near.sight] * n_words + near.word, return_counts=True)
    feature, word = np.divmod(codes, n_words)
    share = times / np.bincount(features, minlength=len(places))[feature]
    telling = np.array([bool(name.strip()) for name in lexicon.names])
    sound = (times >= _LEAST_TIMES) & (share >= _LEAST_SHARE) & telling[word]
    sound &= share > _LEAST_LIFT * base[word]
    feature, word, share = feature[sound], word[sound], share[sound]
    score = share * np.log(share / base[word])
    found: list[tuple[Keyword, ...]] = [()] * len(places)
    order = np.lexsort((word, -score, feature))
    starts = np.searchsorted(feature[order], np.arange(len(places) + 1))
    for i in range(len(places)):
        best = order[starts[i] : min(starts[i] + n, starts[i + 1])]
        found[i] = tuple(
            Keyword(lexicon.surface(int(word[at]))[:64], round(100 * float(share[at])))
            for at in best
        )
    return found


def _anywhere(survey: Survey, seed: int) -> Numbers:
    rng = np.random.default_rng((seed, 7))
    kept = survey.study.kept
    rows = rng.choice(kept, min(len(kept), _N_ELSEWHERE), replace=False)
    places: Numbers = survey.study.places[rows]
    return places


def _sights(shards: Sequence[Shard], places: Numbers, lexicon: Lexicon) -> _Sights:
    """What stands from eight tokens before each place up to the word that it is in."""
    tokens, starts = [np.empty(0, np.int32)], [np.empty(0, np.bool_)]
    order, peaks, n = [np.empty(0, np.int64)], np.zeros(len(places), np.int64), 0
    for number, shard in enumerate(shards):
        here = np.flatnonzero(places // SHARD_PLACES == number)
        rows = places[here] % SHARD_PLACES
        bounds = np.append(np.flatnonzero(shard.position == 0), len(shard))
        window = np.searchsorted(bounds, rows, side="right")
        begins = np.maximum(bounds[window - 1], rows - SIGHT)
        sizes = np.minimum(bounds[window], rows + 1 + _WHOLE_WORD) - begins
        offsets = np.cumsum(sizes) - sizes
        at = np.repeat(begins - offsets, sizes) + np.arange(int(sizes.sum()))
        first = np.zeros(len(at), np.bool_)
        first[offsets] = True
        tokens.append(np.asarray(shard.tokens)[at])
        starts.append(first)
        peaks[here] = n + offsets + rows - begins
        order.append(here)
        n += len(at)
    joined = np.concatenate(tokens)
    passages = Passages(joined, np.zeros(len(joined), np.uint8), np.concatenate(starts))
    words = lexicon.words(passages)
    sight = np.concatenate(order)[passages.window[words.first]]
    seen = words.first <= peaks[sight]
    codes = np.unique(sight[seen] * len(lexicon.names) + words.of_group[seen])
    return _Sights(codes // len(lexicon.names), codes % len(lexicon.names), len(places))
