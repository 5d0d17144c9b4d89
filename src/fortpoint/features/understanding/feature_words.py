"""All words by which a feature may be looked up, each with what it counts.

The words of its label, rule, keywords, promoted tokens and cluster, and those of its contexts: a
token counts as strongly as the feature is active there, and less where it only stands in sight.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from fortpoint.features.understanding.index import Context, Feature, Rule
from fortpoint.features.understanding.wording import WORD, stem, words_of

_LABEL, _RULE, _KEYWORD, _CONTEXT, _PROMOTED, _CLUSTER = 0.5, 1.5, 4.0, 4.0, 0.8, 0.3
_SIGHT = 8
_IN_SIGHT = 0.4
_AFTER = 0.12
_FAR = 0.05


def words_with_weights(feature: Feature, cluster: str, classes: Sequence[str]) -> dict[str, float]:
    """None for a dead feature. ``cluster`` is its cluster's name, ``classes`` are the names of
    the index's classes of tokens."""
    weights: dict[str, float] = defaultdict(float)
    if feature.frequency == 0:
        return weights
    for word, weight in _told(feature, cluster, classes):
        weights[word] += weight
    share = _CONTEXT / max(len(feature.contexts), 1)
    for context in feature.contexts:
        for word, strength in context_words(context).items():
            weights[word] += share * strength
    return weights


def _told(feature: Feature, cluster: str, classes: Sequence[str]) -> Iterator[tuple[str, float]]:
    for word in set(words_of(feature.label)):
        yield word, _LABEL
    if feature.rule is not None:
        yield from _of_rule(feature.rule, classes)
    for keyword in feature.keywords:
        for word in words_of(keyword.word):
            yield word, _KEYWORD * keyword.share / 100
    for effect in feature.promoted:
        for word in words_of(effect.token):
            yield word, _PROMOTED
    for word in words_of(cluster):
        yield word, _CLUSTER


def _of_rule(rule: Rule, classes: Sequence[str]) -> Iterator[tuple[str, float]]:
    for rank, term in enumerate(rule.terms):
        spoken = term.value
        if "class" in term.kind or term.kind == "topic":
            number = int(spoken) if spoken.isdigit() else len(classes)
            spoken = classes[number] if number < len(classes) else ""
        for word in words_of(spoken):
            yield word, _RULE / (1 + rank / 4)


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
    for match in WORD.finditer(text.lower()):
        first = int(np.searchsorted(ends, match.start(), side="right"))
        last = int(np.searchsorted(ends, match.end() - 1, side="right"))
        if last < len(context.tokens):  # lower case may be longer than what it is made of
            yield stem(match[0]), first, last


def has_phrase(context: Context, asked: Sequence[str]) -> bool:
    """The words stand there in their order, with an active token among them."""
    spans = list(_spans(context))
    words = [word for word, _, _ in spans]
    for start in range(len(words) - len(asked) + 1):
        if words[start : start + len(asked)] == list(asked):
            first, last = spans[start][1], spans[start + len(asked) - 1][2]
            if any(context.strengths[first : last + 2]):
                return True
    return False
