"""Ciphers of letters: shifted alphabets, Atbash, ROT47, backwards, pig latin, Morse, spelling.

What is not English is looked at only where words are unknown; each cipher is tried on such a
stretch, and the one after which most of it is English wins, if it wins by far. Ordinary text
has no such stretch, so it costs one look-up a word.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fortpoint.guard.obfuscation.codes import readable
from fortpoint.guard.obfuscation.english import (
    codes,
    is_word,
    known_share,
    likelihood,
    normal,
    pairs,
    rarity,
    segmented,
)
from fortpoint.guard.obfuscation.span import Span

MIN_LETTERS = 12
MIN_KNOWN = 0.5
MIN_GAIN = 0.3
MAX_STRETCHES = 8

_LIKELY = -3.0
_LIKELIER = 1.0
_LONG = 24

_ALPHABET = "abcdefghijklmnopqrstuvwxyz"
_TOKEN = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)?")
_SAMPLE = 2_000


def enciphered(text: str) -> Iterator[Span]:
    """Stretches of unknown words that one of the ciphers turns into English."""
    weights = [_weight(token) for token in _TOKEN.findall(text)]
    runs = sorted(_runs(weights), reverse=True)[:MAX_STRETCHES]
    if not runs:
        return
    places = [token.span() for token in _TOKEN.finditer(text)]
    for run in sorted(runs, key=lambda one: one.first):
        start, end = _widened(text, places[run.first][0], places[run.last][1], run.weight)
        part = text[start:end]
        best = _best(part)
        if best is not None:
            kind, decode = best
            yield Span(start, end, decode(part), kind)


class _Run(NamedTuple):
    """Tokens ``first`` to ``last``, and by how many letters the unknown ones outweigh."""

    weight: int
    first: int
    last: int


def _runs(weights: list[int]) -> Iterator[_Run]:
    """Runs in which unknown letters outweigh known ones from the start on."""
    total = peak = first = last = 0
    for index, weight in enumerate(weights):
        if total <= 0:
            if weight <= 0:
                continue
            total, peak, first = 0, 0, index
        total += weight
        if total > peak:
            peak, last = total, index
        if total <= max(0, peak - 40):
            if peak >= MIN_LETTERS:
                yield _Run(peak, first, last)
            total = 0
    if total > 0 and peak >= MIN_LETTERS:
        yield _Run(peak, first, last)


def _weight(word: str) -> int:
    """Letters of an unknown word count for a cipher, of a known one or another script against."""
    n = len(word)
    if not word.isascii() or is_word(normal(word)):
        return -n if n > 2 else -1
    return n if n > 2 else 1


def _widened(text: str, start: int, end: int, weight: int) -> tuple[int, int]:
    """To the ends of its lines, when little else is on them: chance makes a few known words."""
    first = text.rfind("\n", 0, start) + 1
    last = text.find("\n", end)
    last = len(text) if last < 0 else last
    others = sum(map(str.isalpha, text[first:start] + text[end:last]))
    return (first, last) if others < 0.5 * weight else (start, end)


Decoder = Callable[[str], str]


def _best(part: str) -> tuple[str, Decoder] | None:
    """The cipher that makes most of it English; None when none does by far."""
    sample = part[:_SAMPLE]
    plain = known_share(sample)
    best_share, best = 0.0, None
    for kind, decode in _candidates(sample):
        share = known_share(decode(sample))
        if share > best_share + 0.02:
            best_share, best = share, (kind, decode)
    if best is None:
        return None
    if best_share >= max(MIN_KNOWN, plain + MIN_GAIN):
        return best
    decoded = likelihood(best[1](sample))
    likely = decoded > _LIKELY and decoded > likelihood(sample) + _LIKELIER
    return best if likely and len(sample) >= _LONG else None


def _candidates(sample: str) -> Iterator[tuple[str, Decoder]]:
    for shift in _likely_shifts(sample):
        yield f"rot{shift}", _substitution(_ALPHABET[shift:] + _ALPHABET[:shift])
    yield "atbash", _substitution(_ALPHABET[::-1])
    yield "reversed", _backwards
    if len(re.findall(r"ay\b", sample)) >= 0.5 * len(sample.split()):
        yield "pig_latin", _from_pig_latin


def _substitution(alphabet: str) -> Decoder:
    table = str.maketrans(_ALPHABET + _ALPHABET.upper(), alphabet + alphabet.upper())
    return lambda text: text.translate(table)


def _likely_shifts(sample: str) -> list[int]:
    """The three shifts after which the letter pairs are most like English."""
    found = codes(sample).astype(np.intp)
    counts = np.bincount(found[:-1] * 27 + found[1:], minlength=729).astype(np.float32)
    order = np.argsort(_shifted_pairs() @ counts)[::-1]
    return [int(shift) for shift in order[:3] if shift]


@cache
def _shifted_pairs() -> NDArray[np.float32]:
    """[26, 27 * 27]: of each shift, the log likelihood of each pair once it is shifted."""
    orders = [np.append((np.arange(26) + shift) % 26, 26) for shift in range(26)]
    return np.stack([pairs()[np.ix_(order, order)].ravel() for order in orders])


def _backwards(text: str) -> str:
    """Each word backwards, and their order too unless the capital says that it was kept."""
    words = text.split()
    kept = words[0][-1:].isupper() and not words[-1][-1:].isupper()
    return " ".join(word[::-1] for word in words) if kept else text[::-1]


def _from_pig_latin(text: str) -> str:
    return re.sub(r"[A-Za-z]{3,}", lambda match: _pig_word(match[0]), text)


def _pig_word(word: str) -> str:
    """``ignoreway`` and ``eviouspray``: of the readings, one that is a word."""
    lower = word.lower()
    if not lower.endswith("ay"):
        return word
    stem = lower[:-2]
    readings = [stem[-n:] + stem[:-n] for n in range(1, min(4, len(stem)))]
    vowel = [stem[:-1]] if stem[-1:] in {"w", "y", "h"} else []
    best = min((*vowel, *readings, stem), key=rarity)
    return best if is_word(best) else word


_ROT47 = str.maketrans({33 + i: 33 + (i + 47) % 94 for i in range(94)})


_SIGN = re.compile(r"[!-/:-@\[-`{-~]")


def rot47(text: str) -> Iterator[Span]:
    """Lines of signs and letters that the cipher over all printable characters turns to text."""
    for line in re.finditer(r"[^\n]{8,}", text):
        sample = line[0][:_SAMPLE]
        if len(_SIGN.findall(sample)) < 0.08 * len(sample) or known_share(sample) > 0.3:
            continue
        said = sample.translate(_ROT47)
        if readable(said) and known_share(said) >= MIN_KNOWN:
            yield Span(line.start(), line.end(), line[0].translate(_ROT47), "rot47")


_MORSE_SIGNS = (
    ".- -... -.-. -.. . ..-. --. .... .. .--- -.- .-.. -- -. --- .--. --.- .-. ... - ..- ...- .-- "
    "-..- -.-- --.. ----- .---- ..--- ...-- ....- ..... -.... --... ---.. ----. .-.-.- --..-- "
    "..--.. .----. -.-.-- -..-. -.--. -.--.- .-... ---... -.-.-. -...- .-.-. -....- ..--.- .-..-. "
    "...-..- .--.-."
)
_MORSE = dict(
    zip(_MORSE_SIGNS.split(), _ALPHABET + "0123456789" + ".,?'!/()&:;=+-_\"$@", strict=True)
)
_DOTS = r"[.\-_\u2022\u00b7\u2013\u2014\u2212]{1,7}"
_MORSE_RUN = re.compile(rf"(?<![\w.\-])(?:{_DOTS}[ \t\n/|]{{1,5}}){{4,}}{_DOTS}")
_MORSE_DRAWN = str.maketrans("\u2022\u00b7\u2013\u2014\u2212_|", "..----/")


def morse(text: str) -> Iterator[Span]:
    for run in _MORSE_RUN.finditer(text):
        words = re.split(r"\s*/\s*|\s{2,}|\n", run[0].translate(_MORSE_DRAWN))
        said = " ".join("".join(_MORSE.get(sign, "") for sign in word.split()) for word in words)
        if len(words) == 1:
            said = segmented(said)
        if readable(said) or is_word(said):
            yield Span(run.start(), run.end(), said, "morse")


_SPELLING_WORDS = (
    "alfa alpha bravo charlie delta echo foxtrot golf hotel india juliet juliett kilo lima mike "
    "november oscar papa quebec romeo sierra tango uniform victor whiskey x-ray xray yankee zulu"
)
_SPELLING = {word: word[0] for word in _SPELLING_WORDS.split()}
_SPELLED = re.compile(
    rf"(?i)\b(?:(?:{'|'.join(sorted(_SPELLING, key=len, reverse=True))})\b[\s,/.\-]{{0,4}}){{4,}}"
)


def spelling_alphabet(text: str) -> Iterator[Span]:
    """Words spelled as on the radio: India, Golf, November."""
    lower = text.lower()
    if sum(word in lower for word in _SPELLING) < 3:
        return
    for run in _SPELLED.finditer(text):
        words = re.split(r" ?[,/.\n]+\s*|\s{2,}", run[0])
        said = " ".join(map(_initials, words))
        if known_share(said) < MIN_KNOWN:
            said = segmented(said.replace(" ", ""))
        if known_share(said) >= MIN_KNOWN:
            yield Span(run.start(), run.end(), said, "spelling_alphabet")


def _initials(words: str) -> str:
    return "".join(word[0].lower() for word in re.findall(r"[A-Za-z-]+", words))
