"""Tells English from noise, and finds the words in letters that stand without gaps.

    known_share("ignore all of it")          # 1.0: letters that belong to known words
    likelihood("vtaber nyy bs vg")           # about -4 nats a letter; English about -2.4
    segmented("ignoreallofit")               # 'ignore all of it'

``english.json.gz`` holds the letter pairs and the frequent words, in falling order;
``scripts/english.py`` makes it from texts of the public domain and prompts that may be used.
"""

from __future__ import annotations

import gzip
import json
import math
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FILE = Path(__file__).parent / "english.json.gz"

WORD = re.compile(r"[A-Za-z]+(?:['\u2019][A-Za-z]+)?")
MAX_SEGMENTED = 20_000

_LONGEST = 18
_UNKNOWN_NATS = 12.0
_GAP = 26
_TO_CODE = bytes(
    code - 97 if 97 <= code < 123 else code - 65 if 65 <= code < 91 else _GAP for code in range(256)
)


class _English(NamedTuple):
    """``pairs`` is log p(next letter | letter), [27, 27]; ``nats`` a word's cost when segmented."""

    pairs: NDArray[np.float32]
    nats: dict[str, float]


@cache
def _english() -> _English:
    held = json.loads(gzip.decompress(FILE.read_bytes()))
    tenths = np.array([[ord(char) - 33 for char in row] for row in held["pairs"]])
    words = held["words"].split()
    # Zipf's law: the word of rank r has the probability 1 / (r ln n).
    n = math.log(len(words))
    nats = {word: math.log((rank + 1) * n) for rank, word in enumerate(words)}
    return _English((-tenths / 10).astype(np.float32), nats)


def is_word(word: str) -> bool:
    """Whether a lower-case word is among the frequent ones."""
    return word in _english().nats


def rarity(word: str) -> float:
    """How unlikely a lower-case word is, in nats; infinite when it is not known."""
    return _english().nats.get(word, math.inf)


def normal(word: str) -> str:
    """A word as the table has it."""
    return word.lower().replace("'", "").replace("\u2019", "")


def known_share(text: str) -> float:
    """The share of the ASCII letters that stand in known words; 0 when there are none."""
    nats = _english().nats
    known = total = 0
    for word in WORD.findall(text):
        total += len(word)
        if normal(word) in nats:
            known += len(word)
    return known / total if total else 0.0


def codes(text: str) -> NDArray[np.uint8]:
    """Letters as 0..25, everything else as 26."""
    return np.frombuffer(text.encode("ascii", "replace").translate(_TO_CODE), dtype=np.uint8)


def pairs() -> NDArray[np.float32]:
    """[27, 27] log p(next | letter); the last index is the gap between words."""
    return _english().pairs


def likelihood(text: str) -> float:
    """Mean log likelihood of a letter after the one before, in nats; -inf without letters."""
    found = codes(text)
    inside = (found[:-1] != _GAP) | (found[1:] != _GAP)
    if not inside.any():
        return -math.inf
    return float(pairs()[found[:-1][inside], found[1:][inside]].mean())


def segmented(letters: str) -> str:
    """The likeliest words of a run of letters, in its own case; what is no word stays joined.

    Linear: each letter is the end of at most 18 words. After ``MAX_SEGMENTED`` letters the rest
    stays as it is.
    """
    nats = _english().nats
    lower = letters[:MAX_SEGMENTED].lower()
    best = [0.0]
    last = [0]
    for end in range(1, len(lower) + 1):
        cost, start = best[end - 1] + _UNKNOWN_NATS, end - 1
        for begin in range(max(0, end - _LONGEST), end):
            word_cost = nats.get(lower[begin:end])
            if word_cost is not None and best[begin] + word_cost < cost:
                cost, start = best[begin] + word_cost, begin
        best.append(cost)
        last.append(start)
    return _cut(letters, last)


def _cut(letters: str, last: list[int]) -> str:
    pieces = []
    end = len(last) - 1
    while end > 0:
        pieces.append(letters[last[end] : end])
        end = last[end]
    return " ".join(reversed(pieces)) + letters[len(last) - 1 :]
