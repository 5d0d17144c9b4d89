"""A few words for each cluster of features: those that its features have oftener than others.

Scored by log-odds with the whole as prior (Monroe, Colaresi and Quinn 2008), over the features'
keywords, the words of their rules, and the tokens at which they are strongest. Where no word is
shared, the name says what sort of token it is: "inside a word".
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from fortpoint.features.understanding.index import Feature
from fortpoint.features.understanding.terms import Kind
from fortpoint.features.understanding.wording import WORD, stem
from fortpoint.features.understanding.writing import visible

_SHOWN = 3
_LEAST_SHARE = 0.07
_PRIOR = 0.1
_N_KEYWORDS = 3
_N_TERMS = 6

_OF_WORDS = frozenset({Kind.WORD, Kind.TOKEN, Kind.PHRASE, Kind.NEAR, Kind.BEFORE_WORD, Kind.NEXT})
_OF_SORTS = frozenset({Kind.SHAPE, Kind.PLACE, Kind.BEFORE_SHAPE})


def names(features: Sequence[Feature], of_feature: NDArray[np.int64], n: int) -> list[str]:
    """``of_feature`` is each feature's cluster, -1 for none. No two names are the same."""
    words = [Counter[str]() for _ in range(n)]
    sorts = [Counter[str]() for _ in range(n)]
    written: dict[str, Counter[str]] = defaultdict(Counter)
    sizes = Counter(of_feature.tolist())
    for feature, own in zip(features, of_feature.tolist(), strict=True):
        if own >= 0:
            forms = {stem(form.lower()): form for form in _spoken(feature)}
            words[own].update(forms.keys())
            sorts[own].update(_sorts(feature))
            for word, form in forms.items():
                written[word][form] += 1
    total, total_sorts = sum(words, Counter[str]()), sum(sorts, Counter[str]())
    found: list[str] = []
    for own in range(n):
        best = _best(words[own], total, sizes[own])
        parts = [written[word].most_common(1)[0][0] for word in best[:_SHOWN]]
        if len(parts) < 2:
            parts += _best(sorts[own], total_sorts, sizes[own])[: _SHOWN - 1]
        found.append(_unlike(visible(" / ".join(parts) or "unnamed"), found))
    return found


def _unlike(name: str, taken: Sequence[str]) -> str:
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name} ({number})"
    return free


def _spoken(feature: Feature) -> Iterator[str]:
    """Words of one feature as they are written, three letters or more, no digits."""
    texts = [keyword.word for keyword in feature.keywords[:_N_KEYWORDS]]
    if feature.rule is not None:
        texts += [t.value for t in feature.rule.terms[:_N_TERMS] if t.kind in _OF_WORDS]
    texts += [c.tokens[c.peak] for c in feature.contexts if c.level == 0]
    for text in texts:
        for word in WORD.findall(text):
            if len(word) > 2 and not word.isdigit():
                yield word


def _sorts(feature: Feature) -> set[str]:
    if feature.rule is None:
        return set()
    return {term.value for term in feature.rule.terms[:_N_TERMS] if term.kind in _OF_SORTS}


def _best(own: Counter[str], total: Counter[str], size: int) -> list[str]:
    """Words that enough features of the cluster share, the most telling first."""
    least = max(2 if size > 3 else 1, _LEAST_SHARE * size)
    shared = [word for word, n in own.items() if n >= least]
    sizes = own.total(), total.total()
    scored = {word: _log_odds(own[word], total[word], *sizes) for word in shared}
    return sorted((w for w in shared if scored[w] > 0), key=lambda w: (-scored[w], w))


def _log_odds(n: int, n_all: int, size: int, size_all: int) -> float:
    """z-score of a word's log-odds in the cluster against the rest."""
    prior, prior_size = _PRIOR * n_all, _PRIOR * size_all
    inside, outside = n + prior, n_all - n + prior
    odds = np.log(inside / (size + prior_size - inside + 1e-9))
    odds -= np.log(outside / (size_all - size + prior_size - outside + 1e-9))
    return float(odds / np.sqrt(1 / inside + 1 / outside))
