"""Tokens as a reader sees them: words put together from pieces, shapes, classes of like meaning.

    lexicon = Lexicon(texts)                   # the text of every token id
    words = lexicon.words(passages)            # each token's whole word, across its pieces
    lexicon.names[words.of_token[4]]           # "francisco"

Words are compared in lower case and shown as they are most often written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fortpoint.features.understanding.passages import Passages
from fortpoint.features.understanding.token_classes import TokenClasses

Numbers = NDArray[np.int64]

SHAPES = (
    "capitalised",
    "capitals",
    "single letter",
    "digits",
    "punctuation",
    "symbols",
    "line break",
    "spaces",
    "foreign letters",
    "word piece",
    "special token",
    "plain word",
)
_PUNCTUATION = frozenset(".,;:!?'\"()-`’‘“”–—…")  # noqa: RUF001
_LEAST_WORD = 3


@dataclass(frozen=True, eq=False)
class Words:
    """Each token's word: ``of_token`` ``[n]`` numbers into ``Lexicon.names``.

    A run of tokens that spell one word is a group: ``group`` ``[n]``; ``of_group`` has its word
    and ``first`` its first row.
    """

    of_token: Numbers
    group: Numbers
    of_group: Numbers
    first: Numbers


class Lexicon:
    """Grows with the words that it meets; ``classes`` group tokens of like meaning."""

    def __init__(self, texts: Sequence[str], classes: TokenClasses | None = None) -> None:
        self.texts = tuple(texts)
        self.classes = classes or TokenClasses.none(len(self.texts))
        self.names: list[str] = []
        self._numbers: dict[str, int] = {}
        self._surfaces: dict[int, tuple[int, str]] = {}
        self.pieces = np.array([self.number(_piece(text)) for text in self.texts], np.int64)

    def number(self, name: str) -> int:
        """The number of a word in lower case, a new one if need be."""
        known = self._numbers.get(name)
        if known is None:
            known = self._numbers[name] = len(self.names)
            self.names.append(name)
        return known

    def token(self, text: str) -> int | None:
        """The first token of exactly this text."""
        return self._tokens.get(text)

    def find(self, name: str) -> int | None:
        return self._numbers.get(name)

    def surface(self, number: int) -> str:
        """The word as it is most often written."""
        return self._surfaces.get(number, (0, self.names[number]))[1]

    def learn_surfaces(self, counts: Numbers) -> None:
        """``counts`` ``[n_vocab]``: how often each token occurs."""
        for token in np.flatnonzero(counts).tolist():
            written, number = self.texts[token].strip(), int(self.pieces[token])
            if written and counts[token] > self._surfaces.get(number, (0, ""))[0]:
                self._surfaces[number] = (int(counts[token]), written)

    def words(self, passages: Passages) -> Words:
        """Put the words together."""
        tokens = passages.tokens
        joined = self._begins[tokens] & np.append(False, self._ends[tokens[:-1]])
        joined &= ~passages.starts
        group = np.cumsum(~joined) - 1
        first = np.flatnonzero(~joined)
        of_group = self.pieces[tokens[first]]
        sizes = np.diff(np.append(first, len(tokens)))
        for number in np.flatnonzero(sizes > 1).tolist():
            start = int(first[number])
            run = tokens[start : start + int(sizes[number])].tolist()
            of_group[number] = self._joined(run)
        return Words(of_group[group], group, of_group, first)

    def content(self) -> NDArray[np.bool_]:
        """For every word so far: whether it is one of three letters or more."""
        sound = [len(name) >= _LEAST_WORD and name.isalpha() for name in self.names]
        return np.array(sound, np.bool_)

    def _joined(self, run: Sequence[int]) -> int:
        written = "".join(self.texts[token] for token in run).strip()
        number = self.number(written.lower())
        self._surfaces.setdefault(number, (1, written))
        return number

    @cached_property
    def _tokens(self) -> dict[str, int]:
        return {text: number for number, text in reversed(list(enumerate(self.texts)))}

    @cached_property
    def _begins(self) -> NDArray[np.bool_]:
        return np.array([text[:1].isalpha() for text in self.texts], np.bool_)

    @cached_property
    def _ends(self) -> NDArray[np.bool_]:
        return np.array([text[-1:].isalpha() for text in self.texts], np.bool_)

    @cached_property
    def shapes(self) -> NDArray[np.bool_]:
        """``[n_vocab, len(SHAPES)]``."""
        return np.array([_shapes(text) for text in self.texts], np.bool_)


def _piece(text: str) -> str:
    stripped = text.strip()
    if stripped:
        return stripped.lower()
    return "\n" if "\n" in text else " "


def _shapes(text: str) -> list[bool]:
    inner = text.strip()
    letters = inner.isalpha()
    marks = bool(inner) and not any(c.isalnum() or c.isspace() for c in inner)
    special = inner.startswith("<|") and inner.endswith("|>")
    return [
        letters and len(inner) > 1 and inner[0].isupper() and not inner.isupper(),
        letters and len(inner) > 1 and inner.isupper(),
        letters and len(inner) == 1,
        inner.isdigit(),
        marks and set(inner) <= _PUNCTUATION,
        marks and not set(inner) <= _PUNCTUATION,
        not inner and "\n" in text,
        not inner and "\n" not in text,
        any(c.isalpha() and not c.isascii() for c in inner),
        letters and text[:1].isalpha(),
        special,
        letters and len(inner) > 1 and inner.islower() and not text[:1].isalpha(),
    ]
