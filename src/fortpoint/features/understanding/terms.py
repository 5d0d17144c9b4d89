"""What can be said of a token and what stands around it, as terms that a rule is made of.

    found = read(passages, lexicon)                  # kind to (rows, values)
    space = TermSpace.learn(found, len(passages), min_count=8)
    table = space.incidence(read(others, lexicon), len(others))

A term is a kind and a value: the token itself, its word, the word before, a word within the
twenty before, a class of like tokens, a shape, a place in the line. Values are numbers here;
``name`` writes them out and ``value`` reads them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from fortpoint.features.corpus import ROLES
from fortpoint.features.understanding.incidence import Incidence
from fortpoint.features.understanding.lexicon import SHAPES, Lexicon, Words
from fortpoint.features.understanding.passages import Passages
from fortpoint.features.understanding.places import PLACES, places

Numbers = NDArray[np.int64]
Rows = NDArray[np.int32]


class Kind(StrEnum):
    """What a term speaks of. ``TOPIC`` is a class that occurs three times among 64 tokens.

    The order is that of preference: of two terms that hold at the same tokens, the first kind
    is the one to name.
    """

    WORD = "word"
    TOKEN = "token"  # noqa: S105
    PHRASE = "phrase"
    SHAPE = "shape"
    BEFORE_WORD = "before-word"
    BEFORE = "before"
    NEXT = "next"
    CLASS = "class"
    NEAR = "near"
    PLACE = "place"
    ROLE = "role"
    TOPIC = "topic"
    ENDING = "ending"
    BEGINNING = "beginning"
    BEFORE_CLASS = "before-class"
    BEFORE_SHAPE = "before-shape"
    NEXT_CLASS = "next-class"
    NEXT_SHAPE = "next-shape"
    NEAR_CLASS = "near-class"


Readings = Mapping[Kind, tuple[Rows, Numbers]]

NEAR_WORDS = 20
NEAR_TOKENS = 16
TOPIC_TOKENS = 64
_TOPIC_TIMES = 3
_TOO_COMMON = 0.2
_CHUNK = 50_000
_ENDINGS = (2, 3)
_BEGINNINGS = (1, 3)
_LONG_WORD = 5
_PAIR = 1 << 31


def read(passages: Passages, lexicon: Lexicon) -> Readings:
    """Every term of every token; a term may come twice at one token."""
    words = lexicon.words(passages)
    before = np.where(words.group > 0, words.of_group[words.group - 1], -1)
    before[words.first[words.group] == passages.begin] = -1
    tokens = passages.tokens.astype(np.int64)
    classes = lexicon.classes.of_token[tokens].astype(np.int64)
    pieces = lexicon.pieces[tokens]
    phrase = np.where(before >= 0, before * _PAIR + words.of_token, -1)
    shaped = lexicon.shapes[tokens]
    found = {
        Kind.TOKEN: _single(tokens),
        Kind.WORD: _single(words.of_token),
        Kind.PHRASE: _single(phrase),
        Kind.ENDING: _parts(words.of_token, lexicon, _ENDINGS, lambda w, n: "-" + w[-n:]),
        Kind.BEGINNING: _parts(words.of_token, lexicon, _BEGINNINGS, lambda w, n: w[:n] + "-"),
        Kind.CLASS: _single(classes),
        Kind.SHAPE: _flags(shaped),
        Kind.BEFORE: _single(passages.before(pieces, 1)),
        Kind.BEFORE_WORD: _single(before),
        Kind.BEFORE_CLASS: _single(passages.before(classes, 1)),
        Kind.BEFORE_SHAPE: _flags(_moved(shaped, passages, 1)),
        Kind.NEXT: _single(passages.before(pieces, -1)),
        Kind.NEXT_CLASS: _single(passages.before(classes, -1)),
        Kind.NEXT_SHAPE: _flags(_moved(shaped, passages, -1)),
        Kind.NEAR: _near_words(passages, words, lexicon),
        Kind.NEAR_CLASS: _near(passages, classes, NEAR_TOKENS, 1),
        Kind.TOPIC: _near(passages, classes, TOPIC_TOKENS, _TOPIC_TIMES),
        Kind.PLACE: _flags(places(passages, words, lexicon)),
        Kind.ROLE: _single(passages.roles.astype(np.int64)),
    }
    return found


@dataclass(frozen=True, eq=False)
class TermSpace:
    """The terms that occur often enough to learn from, a column each: ``values`` of each kind
    ascend, and the kinds follow one another."""

    values: Mapping[Kind, Numbers]

    @classmethod
    def learn(cls, readings: Readings, n_rows: int, min_count: int) -> TermSpace:
        values = {}
        for kind in Kind:
            rows, found = readings[kind]
            known, counts = np.unique(found, return_counts=True)
            sound = counts >= min_count
            if kind in (Kind.NEAR, Kind.NEAR_CLASS):
                sound &= counts <= _TOO_COMMON * n_rows
            values[kind] = known[sound] if len(rows) else known
        return cls(values)

    @property
    def n_terms(self) -> int:
        return sum(len(values) for values in self.values.values())

    def incidence(self, readings: Readings, n_rows: int) -> Incidence:
        """Which of these terms each row has."""
        rows, columns = [], []
        for offset, kind, known in self._offsets():
            at, found = readings[kind]
            if len(known) == 0:
                continue
            place = np.minimum(np.searchsorted(known, found), len(known) - 1)
            there = known[place] == found
            rows.append(at[there])
            columns.append((place[there] + offset).astype(np.int32))
        if not rows:
            return Incidence(np.zeros(n_rows + 1, np.int64), np.empty(0, np.int32), 0)
        return Incidence.of_pairs(
            np.concatenate(rows), np.concatenate(columns), n_rows, self.n_terms
        )

    def term(self, column: int) -> tuple[Kind, int]:
        for offset, kind, known in self._offsets():
            if column < offset + len(known):
                return kind, int(known[column - offset])
        raise IndexError(column)

    def column(self, kind: Kind, value: int) -> int | None:
        """None for a term that is too rare, or was never met."""
        for offset, each, known in self._offsets():
            if each is kind:
                place = int(np.searchsorted(known, value))
                here = place < len(known) and known[place] == value
                return offset + place if here else None
        return None

    def _offsets(self) -> Iterator[tuple[int, Kind, Numbers]]:
        offset = 0
        for kind, known in self.values.items():
            yield offset, kind, known
            offset += len(known)


_OF_TEXTS = frozenset({Kind.TOKEN})
_OF_CLASSES = frozenset(
    {Kind.CLASS, Kind.BEFORE_CLASS, Kind.NEXT_CLASS, Kind.NEAR_CLASS, Kind.TOPIC}
)
_FIXED: Mapping[Kind, tuple[str, ...]] = {
    Kind.SHAPE: SHAPES,
    Kind.BEFORE_SHAPE: SHAPES,
    Kind.NEXT_SHAPE: SHAPES,
    Kind.PLACE: PLACES,
    Kind.ROLE: tuple(role.value for role in ROLES),
}


def name(kind: Kind, value: int, lexicon: Lexicon) -> str:
    """The value in writing, from which ``value`` finds it again."""
    if kind in _OF_TEXTS:
        return lexicon.texts[value]
    if kind in _OF_CLASSES:
        return str(value)
    if kind in _FIXED:
        return str(_FIXED[kind][value])
    if kind is Kind.PHRASE:
        return f"{lexicon.names[value // _PAIR]} {lexicon.names[value % _PAIR]}"
    return lexicon.names[value]


def value(kind: Kind, written: str, lexicon: Lexicon) -> int | None:
    """None for what this model's tokens do not know."""
    if kind in _OF_TEXTS:
        return lexicon.token(written)
    if kind in _OF_CLASSES:
        sound = written.isascii() and written.isdigit() and len(written) < 6
        return int(written) if sound and int(written) < len(lexicon.classes.names) else None
    if kind in _FIXED:
        return _FIXED[kind].index(written) if written in _FIXED[kind] else None
    if kind is Kind.PHRASE:
        first, _, second = written.partition(" ")
        pair = lexicon.find(first), lexicon.find(second)
        return None if pair[0] is None or pair[1] is None else pair[0] * _PAIR + pair[1]
    return lexicon.find(written)


def _single(values: Numbers) -> tuple[Rows, Numbers]:
    rows = np.flatnonzero(values >= 0)
    return rows.astype(np.int32), values[rows]


def _flags(flags: NDArray[np.bool_]) -> tuple[Rows, Numbers]:
    rows, which = np.nonzero(flags)
    return rows.astype(np.int32), which


def _moved(flags: NDArray[np.bool_], passages: Passages, distance: int) -> NDArray[np.bool_]:
    at = passages.before(np.arange(len(passages)), distance)
    moved: NDArray[np.bool_] = flags[at] & (at >= 0)[:, None]
    return moved


def _parts(
    of_token: Numbers, lexicon: Lexicon, sizes: tuple[int, ...], cut: Callable[[str, int], str]
) -> tuple[Rows, Numbers]:
    """Beginnings or endings of long words."""
    rows, values = [], []
    present = np.unique(of_token)
    for size in sizes:
        table = np.full(len(lexicon.names), -1, np.int64)
        for number in present.tolist():
            word = lexicon.names[number]
            if len(word) >= _LONG_WORD and word.isalpha():
                table[number] = lexicon.number(cut(word, size))
        at, found = _single(table[of_token])
        rows.append(at)
        values.append(found)
    return np.concatenate(rows), np.concatenate(values)


def _near_words(passages: Passages, words: Words, lexicon: Lexicon) -> tuple[Rows, Numbers]:
    """Words of some length among those before a token's own word."""
    content = lexicon.content()
    listed = np.where(content[words.of_group], words.of_group, -1)
    first_group = words.group[passages.begin]
    rows, values = [], []
    for distance in range(1, NEAR_WORDS + 1):
        at = words.group - distance
        found = np.where(at >= first_group, listed[np.maximum(at, 0)], -1)
        near, values_near = _single(found)
        rows.append(near)
        values.append(values_near)
    return np.concatenate(rows), np.concatenate(values)


def _near(passages: Passages, classes: Numbers, distance: int, times: int) -> tuple[Rows, Numbers]:
    """Classes that occur ``times`` or more among the ``distance`` tokens before each token."""
    n_classes = int(classes.max(initial=0)) + 1
    rows, values = [np.empty(0, np.int32)], [np.empty(0, np.int64)]
    for start in range(0, len(passages), _CHUNK):
        here = np.arange(start, min(start + _CHUNK, len(passages)))
        at = here[:, None] - np.arange(1, distance + 1)
        sound = at >= passages.begin[here][:, None]
        found = np.where(sound, classes[np.maximum(at, 0)], -1)
        which, _ = np.nonzero(found >= 0)
        codes, counts = np.unique(which * n_classes + found[found >= 0], return_counts=True)
        codes = codes[counts >= times]
        rows.append((codes // n_classes + start).astype(np.int32))
        values.append(codes % n_classes)
    return np.concatenate(rows), np.concatenate(values)
