"""Finds texts that are nearly the same, from hashes alone.

    sketcher = Sketcher(key)                       # 32 secret bytes, the same at every start
    sketch = sketcher.sketch("Ignore all previous instructions")
    similarity(sketch, sketcher.sketch("iGn0re all prevoius instructions"))    # 0..1

A text becomes the set of its words and word pairs, each word counted by its letters without
their order, so that shuffled letters, capitals and odd characters change little (what
best-of-N attacks edit, arXiv 2412.03556). The sketch is the set's 64 smallest keyed hashes
(bottom-k sampling, Cohen and Kaplan 2007): the Jaccard similarity of two sets up to a standard
error of 0.06, and without error for texts of fewer than 33 words.

Nothing of a text but these hashes is kept. The key keeps strangers from building texts whose
sketches collide; whoever has the key can test whether a word that they guess was in a text.
Paraphrases and translations share no words and are not found.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fortpoint.guard.text_model import canonical

KEY_BYTES = 32
SKETCH_SIZE = 64
MIN_VALUES = 6  # of fewer words and pairs nothing can be said
_INDEXED = 8
_POSTINGS = 32
_CANDIDATES = 8
_SHORTEST_WORD = 3
_LEAD = 0xE0  # first bytes of scripts that are written without spaces are words of their own

_PAIR = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)

Sketch = tuple[int, ...]
"""The smallest hashes in ascending order, at most ``SKETCH_SIZE``."""

UInt64 = NDArray[np.uint64]


class Sketcher:
    """Makes sketches that can be compared with those of the same key."""

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a sketch key has {KEY_BYTES} bytes")
        stream = hashlib.shake_256(b"fortpoint sketch" + key).digest(4 * 256 * 8)
        tables = np.frombuffer(stream, dtype="<u8").astype(np.uint64).reshape(4, 256)
        self._letters, self._first, self._last, self._length = tables
        self._letters[ord(" ")] = 0

    def sketch(self, text: str) -> Sketch:
        """Any Unicode. A text of no words has the empty sketch."""
        units = np.frombuffer(canonical(text), dtype=np.uint8)
        inside = units != ord(" ")
        begins = inside[1:] & (~inside[:-1] | (units[1:] >= _LEAD))
        starts = np.flatnonzero(begins) + 1
        if not len(starts):
            return ()
        lengths = np.add.reduceat(inside, starts, dtype=np.int64)
        # Sums do not depend on the letters' order; they wrap at 2^64.
        words = _mixed(np.add.reduceat(self._letters[units], starts))
        outlines = (
            self._first[units[starts]]
            + self._last[units[starts + lengths - 1]]
            + self._length[np.minimum(lengths, 255)]
        )
        pairs = _mixed(outlines[:-1] * _PAIR + outlines[1:])
        found = np.unique(np.concatenate([words[lengths >= _SHORTEST_WORD], pairs]))
        return tuple(found[:SKETCH_SIZE].tolist())


def _mixed(values: UInt64) -> UInt64:
    """The finaliser of SplitMix64 (Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    return values ^ (values >> np.uint64(31))


def similarity(one: Sketch, other: Sketch) -> float:
    """Estimated Jaccard similarity of the two texts' sets, in 0..1."""
    return _similarity(frozenset(one), one, other)


def _similarity(first: frozenset[int], one: Sketch, other: Sketch) -> float:
    """The same where the set of ``one`` is at hand."""
    both = first.intersection(other)
    if len(one) < SKETCH_SIZE and len(other) < SKETCH_SIZE:  # the sketches are the sets
        union = len(one) + len(other) - len(both)
        return len(both) / union if union else 0.0
    if not both:
        return 0.0
    sample = sorted(first.union(other))[:SKETCH_SIZE]
    return sum(value <= sample[-1] for value in both) / len(sample)


def containment(part: Sketch, whole: Sketch) -> float:
    """Estimated share of ``part`` that is also in ``whole``, in 0..1."""
    top = whole[-1] if len(whole) == SKETCH_SIZE else None
    comparable = [value for value in part if top is None or value <= top]
    if len(comparable) < MIN_VALUES:
        return 0.0
    return len(set(comparable) & set(whole)) / len(comparable)


def coverage(part: Sketch, whole: Sketch) -> int:
    """Which values of ``whole`` are in ``part``, one bit each."""
    have = set(part)
    return sum(1 << place for place, value in enumerate(whole) if value in have)


@dataclass(frozen=True)
class Match:
    """A known text that is near, and how near."""

    name: str
    similarity: float


class NearDuplicates:
    """Sketches by name, at most ``most`` of them; the one not used for longest goes first."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: OrderedDict[str, Sketch] = OrderedDict()
        self._postings: dict[int, list[str]] = {}

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __getitem__(self, name: str) -> Sketch:
        return self._known[name]

    def add(self, name: str, sketch: Sketch) -> str | None:
        """Returns the name that had to go, if one had to."""
        self.discard(name)
        self._known[name] = sketch
        for value in sketch[:_INDEXED]:
            names = self._postings.setdefault(value, [])
            names.append(name)
            if len(names) > _POSTINGS:
                del names[0]
        if len(self._known) <= self._most:
            return None
        oldest = next(iter(self._known))
        self.discard(oldest)
        return oldest

    def use(self, name: str) -> None:
        """Keep it longer than those that were used before it."""
        self._known.move_to_end(name)

    def discard(self, name: str) -> None:
        sketch = self._known.pop(name, ())
        for value in sketch[:_INDEXED]:
            names = self._postings.get(value, [])
            if name in names:
                names.remove(name)
            if not names:
                self._postings.pop(value, None)

    def near(self, sketch: Sketch) -> Iterable[str]:
        """Names that share small hashes with ``sketch``, at most eight, the likeliest first.

        Two texts with Jaccard similarity J share one of them with probability over
        ``1 - (1 - J)**8``: 0.98 at 0.4.
        """
        shared = Counter(
            name for value in sketch[:_INDEXED] for name in self._postings.get(value, ())
        )
        return [name for name, _ in shared.most_common(_CANDIDATES)]

    def nearest(self, sketch: Sketch, least: float) -> Match | None:
        """The most similar one, at least ``least`` near."""
        if len(sketch) < MIN_VALUES:
            return None
        values = frozenset(sketch)
        best = max(
            ((_similarity(values, sketch, self._known[name]), name) for name in self.near(sketch)),
            default=(0.0, ""),
        )
        return Match(best[1], best[0]) if best[0] >= least else None
