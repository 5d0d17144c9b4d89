"""Finds features: by words in what is known of them, or by a text that makes them active.

    found = Search(index).words("san francisco")          # best first
    found = rank_by_activity(acts, index)                 # acts of an example, token by token

Words are looked up in what ``feature_words.py`` gathers, and ranked by BM25 (Robertson 1994) over
weights in the place of counts. Words that grew from the
one asked for count less; a word that no feature has is taken for those most like it by spelling.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fortpoint.features.understanding.feature_words import has_phrase, words_with_weights
from fortpoint.features.understanding.index import Index
from fortpoint.features.understanding.kinds import members
from fortpoint.features.understanding.spelling import Spellings
from fortpoint.features.understanding.wording import meanings, shares, stem, words_of

MAX_QUERY_CHARS = 2000
_MAX_QUERY_WORDS = 32

_PHRASE = 3.0
_SATURATION = 4.0
_LENGTH_SHARE = 0.3
_GROWN, _ALIKE, _MEMBER = 0.7, 0.6, 0.5


@dataclass(frozen=True)
class Hit:
    """One feature found, and how well it fits; scores compare within one search alone."""

    feature: int
    score: float


class Search:
    """All features' words, turned round once: some seconds for large dictionaries."""

    def __init__(self, index: Index) -> None:
        self._features = index.features
        self._postings: dict[str, dict[int, float]] = defaultdict(dict)
        lengths = np.zeros(len(index.features))
        for feature in index.features:
            name = ""
            if feature.cluster >= 0:
                name = index.header.clusters[feature.cluster].name
            weights = words_with_weights(feature, name, index.header.classes)
            lengths[feature.index] = sum(weights.values())
            for word, weight in weights.items():
                self._postings[word][feature.index] = weight
        alive = lengths[lengths > 0]
        self._lengths = lengths / (alive.mean() if len(alive) else 1.0)
        self._spellings = Spellings(self._postings)

    def words(self, query: str, n: int = 10) -> list[Hit]:
        """The ``n`` best features for a few words."""
        asked = words_of(query[:MAX_QUERY_CHARS])[:_MAX_QUERY_WORDS]
        scores: dict[int, float] = defaultdict(float)
        share = shares(asked)
        for word in dict.fromkeys(asked):
            for feature, score in self._scores(self._meant(word, asked)).items():
                scores[feature] += share[word] * score
        for kind in members(asked).values():
            for member in {stem(word) for word in kind}.intersection(self._postings):
                for feature, score in self._scores({member: 1.0}).items():
                    scores[feature] += _MEMBER * score
        if len(asked) > 1:
            self._add_phrases(asked, scores)
        best = sorted(scores.items(), key=lambda item: (-item[1], item[0]))
        return [Hit(feature, round(float(score), 4)) for feature, score in best[:n]]

    def _meant(self, word: str, asked: Sequence[str]) -> dict[str, float]:
        """Words to look up, with their weights: what it means, its like by spelling."""
        known = {w: share for w, share in meanings(word, asked).items() if w in self._postings}
        if word not in meanings(word, asked):  # it names a mark
            return known
        meant = {w: _GROWN * share for w, share in self._spellings.grown_from(word)}
        if not known and not meant:
            return {other: _ALIKE * share for other, share in self._spellings.alike(word)}
        return meant | known

    def _scores(self, meant: dict[str, float]) -> dict[int, float]:
        """BM25 of one word of the query: the best of what it may mean."""
        found: dict[int, float] = {}
        for word, share in meant.items():
            postings = self._postings[word]
            rarity = math.log(
                1 + (len(self._features) - len(postings) + 0.5) / (len(postings) + 0.5)
            )
            for feature, weight in postings.items():
                length = 1 - _LENGTH_SHARE + _LENGTH_SHARE * self._lengths[feature]
                full = weight * (_SATURATION + 1) / (weight + _SATURATION * length)
                found[feature] = max(found.get(feature, 0.0), share * rarity * full)
        return found

    def _add_phrases(self, asked: Sequence[str], scores: dict[int, float]) -> None:
        """More for features that are active within the very words of the query."""
        best = sorted(scores, key=lambda feature: -scores[feature])[:200]
        for feature in best:
            contexts = self._features[feature].contexts
            if contexts:
                share = sum(has_phrase(c, asked) for c in contexts) / len(contexts)
                scores[feature] += _PHRASE * share


def rank_by_activity(
    acts: NDArray[np.float32], index: Index, n: int = 10, unit: NDArray[np.float32] | None = None
) -> list[Hit]:
    """``acts`` ``[n_tokens, n_features]`` of an example without its first token.

    A feature counts by its mean strength over its three strongest tokens, in parts of ``unit``
    (its maximum), times its rarity: the logarithm of one over its frequency.
    """
    if unit is None:
        unit = np.array([feature.max_activation for feature in index.features], np.float32)
    k = min(3, len(acts))
    if k == 0:
        return []
    strongest = np.sort(acts, axis=0)[-k:].mean(axis=0) / np.maximum(unit, np.float32(1e-9))
    n_tokens = max(index.header.n_tokens, 1)
    frequency = np.array([feature.frequency for feature in index.features])
    scores = np.minimum(strongest, 1.5) * -np.log(np.maximum(frequency, 1 / n_tokens))
    best = np.argsort(-scores, kind="stable")[:n]
    return [Hit(int(i), round(float(scores[i]), 4)) for i in best if scores[i] > 0]
