"""Which words of a class a feature is really about: "words like" needs examples of its own.

A rule's term says "a word of class 117"; the class is shown by the members that stand where the
feature is strongest, the most frequent first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from fortpoint.features.understanding.index import Term
from fortpoint.features.understanding.lexicon import Lexicon
from fortpoint.features.understanding.passages import Passages
from fortpoint.features.understanding.rules import Table
from fortpoint.features.understanding.terms import NEAR_TOKENS, TOPIC_TOKENS, Kind

Numbers = NDArray[np.int64]

_REACH = {
    Kind.CLASS: (0, 1),
    Kind.BEFORE_CLASS: (-1, 0),
    Kind.NEXT_CLASS: (1, 2),
    Kind.NEAR_CLASS: (-NEAR_TOKENS, 0),
    Kind.TOPIC: (-TOPIC_TOKENS, 0),
}
_STRONGEST = 100
_SHOWN = 3
_LEAST_SHARE = 0.1


class Examples:
    """Over the text that rules are learned from."""

    def __init__(self, passages: Passages, table: Table, lexicon: Lexicon) -> None:
        self._passages = passages
        self._table = table
        self._lexicon = lexicon
        self._words = lexicon.words(passages).of_token

    def of(self, feature: int, terms: Iterable[Term]) -> dict[Term, tuple[str, ...]]:
        """At most three words for each term that names a class; none where none was met."""
        values = self._table.active.row_values(feature)
        strongest = np.argsort(-values, kind="stable")[:_STRONGEST]
        rows = self._table.active.row(feature)[strongest].astype(np.int64)
        return {
            term: self._members(rows, int(term.value), *_REACH[Kind(term.kind)])
            for term in terms
            if term.kind in _REACH
        }

    def _members(self, rows: Numbers, number: int, first: int, last: int) -> tuple[str, ...]:
        at = rows[:, None] + np.arange(first, last)
        inside = (at >= 0) & (at < len(self._passages))
        at = np.where(inside, at, 0)
        inside &= self._passages.window[at] == self._passages.window[rows][:, None]
        own = self._lexicon.classes.of_token[self._passages.tokens[at]] == number
        counts = Counter(self._words[at[inside & own]].tolist())
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_SHOWN]
        least = _LEAST_SHARE * sum(counts.values())
        return tuple(self._lexicon.surface(word) for word, n in ranked if n >= least)
