"""Words that are spelled to be read by people only: leetspeak, s p a c e d, sp.lit, joined.

Each looks for the tell of one spelling and yields what it says only where English words come
out that were not there before.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator

from fortpoint.guard.obfuscation.codes import readable
from fortpoint.guard.obfuscation.english import (
    WORD,
    is_word,
    known_share,
    rarity,
    segmented,
)
from fortpoint.guard.obfuscation.span import Span

_LEET = {
    "4": "a", "@": "a", "8": "b", "3": "e", "\u20ac": "e", "6": "gb", "9": "g", "1": "il",
    "!": "i", "|": "li", "0": "o", "5": "s", "$": "s", "7": "t", "+": "t", "2": "z",
}  # fmt: skip
_LEET_TELL = re.compile(
    r"[A-Za-z][0-9@$!|+\u20ac]+[A-Za-z]|(?<![A-Za-z0-9])[0-9@$|!+]{1,2}[A-Za-z]"
)
_LEET_TOKEN = re.compile(r"[A-Za-z0-9@$!|+\u20ac]+")
_LEET_CHAR = re.compile(r"[0-9@$!|+\u20ac]")
_TRAILING = "!|+"
_MAX_READINGS = 16
_MOSTLY = 4


def leetspeak(text: str) -> Iterator[Span]:
    """Words of digits and signs for letters, where enough of them are words once read."""
    if _LEET_TELL.search(text) is None:
        return
    read = [_leet_word(token) for token in _LEET_TOKEN.finditer(text) if _is_leet(token[0])]
    words = [span for span, known in read if known]
    n_sure = sum(any(map(str.isalpha, text[one.start : one.end])) for one in words)
    if n_sure >= _MOSTLY:
        yield from (
            span for span, known in read if known or _LETTER.search(text, span.start, span.end)
        )
    elif n_sure >= 2:
        yield from words
    elif n_sure:
        yield from (one for one in words if len(one.text) >= 5)


_LETTER = re.compile(r"[A-Za-z]")


def _is_leet(token: str) -> bool:
    return len(token) <= 40 and _LEET_CHAR.search(token) is not None


def _leet_word(token: re.Match[str]) -> tuple[Span, bool]:
    """What a token says, and whether that is a known word."""
    raw = token[0]
    cores = [core for core in dict.fromkeys((raw.rstrip(_TRAILING), raw)) if core]
    readings = [(word, core) for core in cores for word in _readings(core)]
    word, core = min(readings, key=lambda one: rarity(one[0]))
    start = token.start()
    return Span(start, start + len(core), word, "leetspeak"), is_word(word)


def _readings(core: str) -> Iterator[str]:
    options = [_LEET.get(char, char.lower()) for char in core]
    return itertools.islice(map("".join, itertools.product(*options)), _MAX_READINGS)


_GAP = r"[ \t.\-_*|/\\,~+=:;'\"^\u00b7\u2022\n]"
_ALPHABET = "abcdefghijklmnopqrstuvwxyz"
_SPACED = re.compile(rf"(?<!\w)(?:[A-Za-z0-9@$]{_GAP}{{1,8}}){{3,}}[A-Za-z0-9@$](?!\w)")


def spaced(text: str) -> Iterator[Span]:
    """Letters with something between them, on one line or one below the other."""
    for run in _SPACED.finditer(text):
        said = _unspaced(run[0])
        letters = sum(map(str.isalpha, said))
        plausible = known_share(said) >= 0.7 or (letters >= 12 and readable(said))
        if letters >= 4 and _wordy(said) and plausible:
            yield Span(run.start(), run.end(), said, "spaced")


def _unspaced(run: str) -> str:
    """Joined; a gap that is wider than the usual one parts words."""
    gaps = re.findall(rf"{_GAP}+", run)
    usual = max(set(gaps), key=gaps.count)
    words = [""]
    for char, gap in zip(re.findall(r"[A-Za-z0-9@$]", run), [*gaps, ""], strict=True):
        words[-1] += char
        if gap and gap != usual and (len(gap) > len(usual) or gap.isspace()):
            words.append("")
    if len("".join(words)) <= 12 * len(words) and len(words) > 1:
        return " ".join(words)
    return " ".join(map(segmented, words))


def _wordy(said: str) -> bool:
    """Whether there is a word in it that letters by chance would hardly make."""
    return any(len(word) >= 4 and word.lower() not in _ALPHABET for word in said.split())


# How often a sign must cut a word before it counts: some stand between words anyway.
_CUTS = {"-": 4, "/": 4, ".": 4} | dict.fromkeys("*_~^|\\+=:\u00b7", 2)
_PARTED = {
    sign: re.compile(rf"(?<![A-Za-z])[A-Za-z]+(?:{re.escape(sign)}[A-Za-z]+)+") for sign in _CUTS
}


def parted(text: str) -> Iterator[Span]:
    """Words with a sign in the middle (ig*nore, pre_vi_ous), where the parts are no words."""
    for sign, least in _CUTS.items():
        if text.count(sign) < least:
            continue
        spans = []
        n_cut = 0
        for token in _PARTED[sign].finditer(text):
            parts = token[0].split(sign)
            word = "".join(parts)
            known = is_word(word.lower())
            n_cut += known and not all(is_word(part.lower()) for part in parts)
            if known or least == 2:
                spans.append(Span(token.start(), token.end(), word, "parted"))
        if n_cut >= least:
            yield from spans


def fragments(text: str) -> Iterator[Span]:
    """Words cut in two by a gap (prev ious), where that makes no words of the parts."""
    tokens = list(WORD.finditer(text))
    spans = []
    index = 0
    while index < len(tokens) - 1:
        first, second = tokens[index], tokens[index + 1]
        index += 1
        gap = text[first.end() : second.start()]
        if gap == " " and _is_cut(first[0].lower(), second[0].lower()):
            spans.append(Span(first.start(), second.end(), first[0] + second[0], "fragments"))
            index += 1
    if len(spans) >= 3 or len(spans) >= max(2, len(tokens) // 6):
        yield from spans


_RARE_NATS = 10.5


def _is_cut(first: str, second: str) -> bool:
    """Whether both together are a word, and more usual than one of them alone."""
    rarest = max(rarity(first), rarity(second))
    whole = rarity(first + second)
    return len(first + second) >= 4 and rarest > max(_RARE_NATS, whole) and math.isfinite(whole)


_JOINED = re.compile(r"(?<![A-Za-z0-9/._%+\-])[A-Za-z]{20,}(?![A-Za-z/_%+\-])")


def joined(text: str) -> Iterator[Span]:
    """Words without gaps between them."""
    for run in _JOINED.finditer(text):
        said = segmented(run[0])
        words = said.split()
        if known_share(said) >= 0.75 and len(words) >= 4 and len(run[0]) >= 3 * len(words):
            yield Span(run.start(), run.end(), said, "joined")
