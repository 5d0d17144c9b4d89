"""Words that are spelled alike: grown from one another, or mistyped."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable

_LEAST_STEM, _LEAST_ROOT = 4, 3
_LEAST_SHARE = 0.5
_LEAST_LIKENESS = 0.55
_MOST = 8


class Spellings:
    """Over all words of an index."""

    def __init__(self, words: Iterable[str]) -> None:
        self._sorted = sorted(words)
        self._known = frozenset(self._sorted)
        self._with: dict[str, list[str]] = defaultdict(list)
        for word in self._sorted:
            for gram in _grams(word):
                self._with[gram].append(word)

    def grown_from(self, word: str) -> list[tuple[str, float]]:
        """Words that begin with this one, or that it begins with ("except", "exception"), with
        the shorter one's share of the longer."""
        if not word.isalpha():
            return []
        found = []
        at = bisect_left(self._sorted, word) if len(word) >= _LEAST_STEM else len(self._sorted)
        while at < len(self._sorted) and self._sorted[at].startswith(word):
            found.append(self._sorted[at])
            at += 1
        roots = (word[:size] for size in range(_LEAST_ROOT, len(word)))
        found += [root for root in roots if root in self._known]
        alike = [(o, min(len(o), len(word)) / max(len(o), len(word))) for o in found if o != word]
        alike = [pair for pair in alike if pair[1] >= _LEAST_SHARE]
        return sorted(alike, key=lambda pair: (-pair[1], pair[0]))[:_MOST]

    def alike(self, word: str) -> list[tuple[str, float]]:
        """The words most like one, with their likeness: the share of pairs of letters in
        common (Dice)."""
        grams = _grams(word)
        shared: dict[str, int] = defaultdict(int)
        for gram in grams:
            for other in self._with.get(gram, ()):
                shared[other] += 1
        found = [(o, 2 * n / (len(grams) + len(_grams(o)))) for o, n in shared.items()]
        found = [pair for pair in found if pair[1] >= _LEAST_LIKENESS]
        return sorted(found, key=lambda pair: (-pair[1], pair[0]))[:_MOST]


def _grams(word: str) -> set[str]:
    padded = f" {word} "
    return {padded[i : i + 2] for i in range(len(padded) - 1)}
