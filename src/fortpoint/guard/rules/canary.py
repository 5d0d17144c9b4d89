"""Planted strings that must never come out, found through simple disguises.

    canaries = Canaries({"system prompt": "harbour-4711-lantern"})
    canaries.find("R U 9 O Y m 9 1 ...")

Text and canary are reduced to the same alphabet (letters and digits; case, accents, look-alike
digits and everything between them removed), so case, spacing and punctuation change nothing.
A canary is looked for as it is, backwards, in ROT13, and as hexadecimal, Base64, Base32,
decimal or binary bytes. Two thirds of one in a row are enough: a cut canary has leaked too. All
forms of all canaries are one automaton (Aho and Corasick, 1975), so a text is read once.

Does not find: a translation, an acrostic, a cipher other than these, or a canary told in
pieces with words between them.
"""

from __future__ import annotations

import base64
import codecs
import math
import unicodedata
from collections.abc import Callable, Iterator, Mapping

from fortpoint.errors import ConfigError
from fortpoint.guard.rules.finding import Finding

DETECTOR = "canary"
MIN_CHARS = 8
MAX_CHARS = 4096
SHARE = 2 / 3
_SLICE = 64

_LOOK_ALIKE = str.maketrans("0134578l", "oieastbi")


def _reduced(char: str) -> str:
    """What is left of one character: nothing, or one or more letters and digits."""
    parts = unicodedata.normalize("NFKD", char).casefold()
    return "".join(part for part in parts if part.isalnum()).translate(_LOOK_ALIKE)


_ASCII = tuple(_reduced(chr(code)) for code in range(128))


def reduced(char: str) -> str:
    return _ASCII[ord(char)] if char < "\x80" else _reduced(char)


def reduced_text(text: str) -> str:
    return "".join(map(reduced, text))


class Canaries:
    """Finds any of these strings. The names stand in findings; the strings never do."""

    def __init__(self, canaries: Mapping[str, str]) -> None:
        """Raises ``ConfigError`` for a canary too short to find, or for too many characters."""
        self._edges: dict[tuple[int, str], int] = {}
        self._depth = [0]
        self._found: list[tuple[str, int] | None] = [None]
        if sum(map(len, canaries.values())) > MAX_CHARS:
            raise ConfigError(f"canaries may have {MAX_CHARS} characters together, not more")
        for name, secret in canaries.items():
            if len(reduced_text(secret)) < MIN_CHARS:
                raise ConfigError(
                    f"the canary {name!r} is too short: it needs {MIN_CHARS} letters or digits"
                )
            for form in _forms(secret):
                self._plant(name, form)
        self._fail = self._failures()

    def _plant(self, name: str, form: str) -> None:
        """Stretches of two thirds of the form, which overlap and cover it."""
        window = max(MIN_CHARS, math.ceil(SHARE * len(form)))
        last = len(form) - window
        for start in {*range(0, last, max(len(form) // 6, 1)), last}:
            state = 0
            for char in form[start : start + window]:
                child = self._edges.get((state, char))
                if child is None:
                    child = self._edges[state, char] = len(self._depth)
                    self._depth.append(self._depth[state] + 1)
                    self._found.append(None)
                state = child
            self._found[state] = (name, window)

    def _failures(self) -> list[int]:
        """Of each state, that of its longest proper suffix; its finding is inherited."""
        fail = [0] * len(self._depth)
        by_depth = sorted(self._edges.items(), key=lambda edge: self._depth[edge[1]])
        for (parent, char), child in by_depth:
            if parent:
                fail[child] = self._step(fail[parent], char, fail)
            if self._found[child] is None:
                self._found[child] = self._found[fail[child]]
        return fail

    def _step(self, state: int, char: str, fail: list[int]) -> int:
        while (child := self._edges.get((state, char))) is None:
            if not state:
                return 0
            state = fail[state]
        return child

    def scan(self, text: str, start: int = 0) -> tuple[tuple[Finding, ...], int]:
        """Findings from ``start`` on, and where the part begins that may yet become one."""
        positions: list[int] = []
        state = 0
        findings: list[Finding] = []
        for at, char in self._letters(text, start):
            positions.append(at)
            state = self._step(state, char, self._fail)
            found = self._found[state]
            if found is not None:
                name, window = found
                findings.append(Finding(positions[-window], at + 1, DETECTOR, name, 1.0))
        depth = self._depth[state]
        return tuple(findings), positions[-depth] if depth else len(text)

    def find(self, text: str) -> tuple[Finding, ...]:
        """Every canary in a text; neighbouring findings overlap (see ``disjoint``)."""
        return self.scan(text)[0]

    def _letters(self, text: str, start: int) -> Iterator[tuple[int, str]]:
        for at in range(start, len(text)):
            for char in reduced(text[at]):
                yield at, char


def _forms(secret: str) -> set[str]:
    """The secret and its disguises, in the reduced alphabet; a long one slice by slice."""
    forms = set()
    for start in range(0, max(len(secret) - _SLICE // 2, 1), _SLICE):
        part = secret[start : start + _SLICE]
        for spelled in (part, part[::-1]):
            forms |= {spelled, codecs.encode(spelled, "rot13")}
        for data in {part.encode("utf-8", "replace"), part.lower().encode("utf-8", "replace")}:
            forms.update(_byte_forms(data))
    reduced_forms = {reduced_text(form) for form in forms}
    return {form for form in reduced_forms if len(form) >= MIN_CHARS}


def _byte_forms(data: bytes) -> Iterator[str]:
    for spec in ("02x", "08b", "d", "o"):
        yield "".join(format(byte, spec) for byte in data)
    for prefix in ("x", "0x", "u00"):
        yield "".join(f"{prefix}{byte:02x}" for byte in data)
    yield from (_inner(base64.b64encode, data, skip, 3, 4) for skip in range(3))
    yield from (_inner(base64.b32encode, data, skip, 5, 8) for skip in range(5))


def _inner(
    encode: Callable[[bytes], bytes], data: bytes, skip: int, n_bytes: int, n_chars: int
) -> str:
    """The encoded characters that ``data`` alone decides, when ``skip`` bytes come before it."""
    text = encode(bytes(skip) + data).decode("ascii")
    first = math.ceil(skip * n_chars / n_bytes)
    return text[first : (skip + len(data)) * n_chars // n_bytes]
