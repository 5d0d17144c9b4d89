"""Where in its text a token stands: in the line, the sentence, quotes, brackets, code, again."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fortpoint.features.understanding.lexicon import SHAPES, Lexicon, Words
from fortpoint.features.understanding.passages import Passages

Flags = NDArray[np.bool_]
Numbers = NDArray[np.int64]

PLACES = (
    "line start",
    "sentence start",
    "paragraph start",
    "text start",
    "inside quotes",
    "inside brackets",
    "inside code",
    "inside a word",
    "repeated word",
    "repeated pair of words",
    "far into a text",
)
_EARLY = 8
_LATE = 256
_CODE_WINDOW = 32
_CODE_SHARE = 0.12
_ENDS = frozenset(".!?:")
_SYMBOLS = SHAPES.index("symbols")


def places(passages: Passages, words: Words, lexicon: Lexicon) -> Flags:
    """``[n, len(PLACES)]``."""
    marks = _Marks(passages, lexicon)
    line, paragraph = marks.before("\n"), marks.before("\n\n")
    first = passages.place == 0
    sentence = marks.before_end() | line | first
    return np.stack(
        [
            line | first,
            sentence,
            paragraph | first,
            passages.place < _EARLY,
            marks.odd_so_far('"'),
            marks.depth() > 0,
            marks.share_of_symbols() >= _CODE_SHARE,
            np.arange(len(passages)) > words.first[words.group],
            _repeated(passages, words.of_token),
            _repeated_pair(passages, words),
            passages.place >= _LATE,
        ],
        axis=1,
    )


class _Marks:
    """Counts of characters, looked up by token."""

    def __init__(self, passages: Passages, lexicon: Lexicon) -> None:
        self._passages = passages
        self._lexicon = lexicon

    def before(self, part: str) -> Flags:
        """The token before has ``part`` in it."""
        has = np.array([part in text for text in self._lexicon.texts], np.int64)
        return np.asarray(self._passages.before(has[self._passages.tokens], 1) == 1)

    def before_end(self) -> Flags:
        """The token before ends a sentence."""
        ends = np.array([t.strip()[-1:] in _ENDS and t.strip() != "" for t in self._lexicon.texts])
        found = self._passages.before(ends.astype(np.int64)[self._passages.tokens], 1)
        return np.asarray(found == 1)

    def odd_so_far(self, mark: str) -> Flags:
        """An odd number of ``mark`` stands before the token in its window."""
        counts = np.array([text.count(mark) for text in self._lexicon.texts], np.int64)
        return np.asarray(self._sum_before(counts) % 2 == 1)

    def depth(self) -> Numbers:
        """Brackets open before the token and not closed, at the least since its window began."""
        turns = [
            sum(text.count(c) for c in "([{") - sum(text.count(c) for c in ")]}")
            for text in self._lexicon.texts
        ]
        so_far = self._sum_before(np.array(turns, np.int64))
        # Windows are moved below all earlier ones, so that one running minimum serves them all.
        span = int(np.abs(so_far).max(initial=0)) * 2 + 1
        lowered = so_far - self._passages.window * span
        return lowered - np.minimum.accumulate(lowered)

    def share_of_symbols(self) -> NDArray[np.float64]:
        """Among the tokens before, in the window."""
        so_far = self._sum_before(self._lexicon.shapes[:, _SYMBOLS].astype(np.int64))
        back = np.maximum(np.arange(len(so_far)) - _CODE_WINDOW, self._passages.begin)
        size = np.maximum(np.arange(len(so_far)) - back, 1)
        return (so_far - so_far[back]) / size

    def _sum_before(self, of_token: Numbers) -> Numbers:
        each = of_token[self._passages.tokens]
        total = np.cumsum(each) - each
        return total - total[self._passages.begin]


def _repeated(passages: Passages, keys: Numbers) -> Flags:
    """An earlier token of the window has the same key."""
    order = np.lexsort((keys, passages.window))
    same = (keys[order][1:] == keys[order][:-1]) & (
        passages.window[order][1:] == passages.window[order][:-1]
    )
    found = np.zeros(len(keys), np.bool_)
    found[order[1:]] = same
    return found


def _repeated_pair(passages: Passages, words: Words) -> Flags:
    before = passages.before(words.of_token, 1)
    pairs = np.where(before >= 0, before * (1 << 31) + words.of_token, -1)
    found = _repeated(passages, pairs)
    found[before < 0] = False
    return found
