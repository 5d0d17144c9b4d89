"""Finds features: by words in what is known of them, or by a text that makes them active.

    found = Search(index).words("san francisco")          # best first
    found = rank_by_activity(acts, index)                 # acts of an example, token by token

Words are looked up in labels, rules, the tokens of contexts (a token counts as strongly as the
feature is active there, and less the farther away), promoted tokens and cluster names, and
ranked by BM25 (Robertson 1994) over weights in the place of counts. A word that no feature has
is taken for those most like it by spelling.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fortpoint.features.understanding.index import Context, Feature, Index

MAX_QUERY_CHARS = 2000
_MAX_QUERY_WORDS = 32
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)?|[^\w\s]", re.UNICODE)  # noqa: RUF001

_LABEL, _RULE, _PROMOTED, _CLUSTER, _PHRASE = 2.0, 1.5, 0.8, 0.3, 3.0
_SATURATION = 1.2
_LENGTH_SHARE = 0.3
_ALIKE = 0.45
_ALIKE_WEIGHT = 0.6
_MAX_ALIKE = 6
_SIGHT = 8
_IN_SIGHT = 0.4
_AFTER = 0.12
_FAR = 0.05

Expand = Callable[[str], Iterable[tuple[str, float]]]
"""A word to words of like meaning, each with a weight up to 1."""


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
            weights = _weights(feature, name)
            lengths[feature.index] = sum(weights.values())
            for word, weight in weights.items():
                self._postings[word][feature.index] = weight
        alive = lengths[lengths > 0]
        self._lengths = lengths / (alive.mean() if len(alive) else 1.0)
        self._trigrams = _Trigrams(self._postings)

    def words(self, query: str, n: int = 10, expand: Expand | None = None) -> list[Hit]:
        """The ``n`` best features for a few words."""
        asked = words_of(query[:MAX_QUERY_CHARS])[:_MAX_QUERY_WORDS]
        scores: dict[int, float] = defaultdict(float)
        for word in dict.fromkeys(asked):
            for feature, score in self._scores(self._meant(word, expand)).items():
                scores[feature] += score
        if len(asked) > 1:
            self._add_phrases(asked, scores)
        best = sorted(scores.items(), key=lambda item: (-item[1], item[0]))
        return [Hit(feature, round(float(score), 4)) for feature, score in best[:n]]

    def _meant(self, word: str, expand: Expand | None) -> dict[str, float]:
        """Words to look up, with their weights."""
        meant = {word: 1.0} if word in self._postings else {}
        if not meant:
            meant = {
                other: _ALIKE_WEIGHT * closeness for other, closeness in self._trigrams.alike(word)
            }
        for other, weight in expand(word) if expand else ():
            for part in words_of(other):
                if part in self._postings:
                    meant[part] = max(meant.get(part, 0.0), weight)
        return meant

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
                share = sum(_has_phrase(c, asked) for c in contexts) / len(contexts)
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


def words_of(text: str) -> list[str]:
    """Lower-case words without their commonest endings, and marks one by one."""
    return [_stem(word) for word in _WORD.findall(text.lower())]


def _stem(word: str) -> str:
    """Plural and possessive only: "bridges" finds "bridge", "glass" stays."""
    word = re.sub(r"['’]s$", "", word)  # noqa: RUF001
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ches", "shes", "sses", "xes")):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def _weights(feature: Feature, cluster: str) -> dict[str, float]:
    """Every word of one feature."""
    weights: dict[str, float] = defaultdict(float)
    if feature.frequency == 0:
        return weights
    for word in set(words_of(feature.label)):
        weights[word] += _LABEL
    if feature.rule is not None:
        for rank, term in enumerate(feature.rule.terms):
            if not term.value.isdigit():
                for word in words_of(term.value):
                    weights[word] += _RULE / (1 + rank / 4)
    near: dict[str, float] = defaultdict(float)
    for context in feature.contexts:
        for word, weight in context_words(context).items():
            near[word] += weight
    for word, weight in near.items():
        weights[word] += 4 * weight / max(len(feature.contexts), 1)
    for effect in feature.promoted:
        for word in words_of(effect.token):
            weights[word] += _PROMOTED
    for word in words_of(cluster):
        weights[word] += _CLUSTER
    return weights


def context_words(context: Context) -> dict[str, float]:
    """Words of a context by how strongly the feature is active at them, 0 to 1, or, where it is
    not, by whether they stand in sight of its peak."""
    found: dict[str, float] = {}
    for word, first, last in _spans(context):
        strength = max(context.strengths[first : last + 1]) / 100
        before = context.peak - last
        nearby = _IN_SIGHT if 0 <= before <= _SIGHT else _AFTER if before < 0 else _FAR
        found[word] = max(found.get(word, 0.0), strength, nearby)
    return found


def _spans(context: Context) -> Iterator[tuple[str, int, int]]:
    """Words with the first and the last token that each lies in."""
    text = "".join(context.tokens)
    ends = np.cumsum([len(token) for token in context.tokens])
    for match in _WORD.finditer(text.lower()):
        first = int(np.searchsorted(ends, match.start(), side="right"))
        last = int(np.searchsorted(ends, match.end() - 1, side="right"))
        if last < len(context.tokens):  # lower case may be longer than what it is made of
            yield _stem(match[0]), first, last


def _has_phrase(context: Context, asked: Sequence[str]) -> bool:
    """The words stand there in their order, with an active token among them."""
    spans = list(_spans(context))
    words = [word for word, _, _ in spans]
    for start in range(len(words) - len(asked) + 1):
        if words[start : start + len(asked)] == list(asked):
            first, last = spans[start][1], spans[start + len(asked) - 1][2]
            if any(context.strengths[first : last + 2]):
                return True
    return False


class _Trigrams:
    """Words by the triples of letters in them."""

    def __init__(self, words: Iterable[str]) -> None:
        self._words: dict[str, list[str]] = defaultdict(list)
        for word in words:
            for gram in _grams(word):
                self._words[gram].append(word)

    def alike(self, word: str) -> list[tuple[str, float]]:
        """The words most like one, with their likeness: 1 where one begins with the other,
        else the share of triples in common (Dice)."""
        grams = _grams(word)
        shared: dict[str, int] = defaultdict(int)
        for gram in grams:
            for other in self._words.get(gram, ()):
                shared[other] += 1
        found = []
        for other, n in shared.items():
            likeness = 2 * n / (len(grams) + len(_grams(other)))
            if min(len(word), len(other)) > 3 and (word in other or other in word):
                likeness = max(likeness, 0.9)
            if likeness >= _ALIKE:
                found.append((other, likeness))
        return sorted(found, key=lambda item: (-item[1], item[0]))[:_MAX_ALIKE]


def _grams(word: str) -> set[str]:
    padded = f" {word} "
    return {padded[i : i + 3] for i in range(len(padded) - 2)}
