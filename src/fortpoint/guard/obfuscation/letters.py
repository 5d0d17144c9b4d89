"""Letters that only look like others, or that are hidden or drawn: each read as what it shows.

Compatibility forms (full width, mathematical, circled), accents, invisible characters and tags
are folded by the text model itself (``text_model.canonical``); here is what Unicode does not
relate: look-alikes of other scripts, small capitals, letters upside down, Braille, and bytes
in variation selectors or in invisible operators.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache

from fortpoint.guard.obfuscation.codes import readable
from fortpoint.guard.obfuscation.english import is_word
from fortpoint.guard.obfuscation.span import Span

# Characters that print nothing and split words for a matcher but not for a reader.
INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180e\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffb\U000e0100-\U000e01ef]+"
)
_TAGS = "".join(map(chr, range(0xE0020, 0xE007F)))


def _table(**looks: str) -> dict[int, str]:
    return {ord(char): letter for letter, chars in looks.items() for char in chars}


# Cyrillic, Greek, Cherokee, Armenian, Lisu, phonetic letters and small capitals.
_LOOK_ALIKE = _table(
    a="\u0430\u0410\u03b1\u0391\u0251\u1d00\u13aa\u2c6d\ua4ee",
    b="\u0432\u0412\u0392\u0299\u13f4\u042c\u044c\u0184\ua4d0",
    c="\u0441\u0421\u03f2\u03f9\u1d04\u13df\u2ca5\u2ca4\ua4da",
    d="\u0501\u1d05\u0257\u13a0\u217e\u0500\ua4d3",
    e="\u0435\u0415\u03b5\u0395\u1d07\u13ac\u0454\u0404\u04bd\u212e\ua4f0",
    f="\u0192\u03dd\ua730\u0493\u0492\ua4dd",
    g="\u0261\u0262\u050d\u13c0\u0581\ua4d6",
    h="\u04bb\u041d\u043d\u0397\u029c\u13bb\u0570\u04ba\ua4e7",
    i="\u0456\u0406\u03b9\u0399\u026a\u0131\u04cf\u04c0\u13a5\u0269\ua4f2",
    j="\u0458\u0408\u1d0a\u03f3\u13ab\ua4d9",
    k="\u043a\u041a\u03ba\u039a\u1d0b\u13e6\ua4d7",
    l="\u029f\u217c\u13de\u026d\ua4e1",
    m="\u043c\u041c\u039c\u1d0d\u13b7\u03fa\ua4df",
    n="\u0274\u03b7\u0578\u039d\u043f\u057c\ua4e0",
    o="\u043e\u041e\u03bf\u039f\u1d0f\u0585\u0555\u03c3\u04e9\u00f8\u00d8\ua4f3",
    p="\u0440\u0420\u03c1\u03a1\u1d18\u13e2\ua4d1",
    q="\u051b\u051a\u0566\u01eb",
    r="\u0433\u0280\u13a1\u0491\u042f\u044f\ua4e3",
    s="\u0455\u0405\ua731\u13da\u0282\ua4e2",
    t="\u0442\u0422\u03c4\u03a4\u1d1b\u13a2\u04ad\ua4d4",
    u="\u1d1c\u03c5\u057d\u0446\u0426\u028b\ua4f4",
    v="\u03bd\u0475\u0474\u1d20\u13d9\u0476\ua4e6",
    w="\u0461\u1d21\u13b3\u0448\u0428\u03c9\u051d\u051c\u026f\ua4ea",
    x="\u0445\u0425\u03c7\u03a7\u04b3\ua4eb",
    y="\u0443\u0423\u04af\u04ae\u03b3\u03a5\u028f\u13a9\ua4ec",
    z="\u1d22\u0396\u13c3\u0290\ua4dc",
)
_UPSIDE_DOWN = _table(
    a="\u0250",
    b="q",
    c="\u0254",
    d="p",
    e="\u01dd",
    f="\u025f",
    g="\u0183\u0253",
    h="\u0265",
    i="\u1d09\u0131",
    j="\u027e",
    k="\u029e",
    l="\u05df\ua781",
    m="\u026f",
    n="u",
    p="d",
    q="b",
    r="\u0279",
    t="\u0287",
    u="n",
    v="\u028c",
    w="\u028d",
    y="\u028e",
)
_FLIPPED = re.compile(f"[{''.join(chr(code) for code in _UPSIDE_DOWN if code > 0x7F)}]")
for _first in (0x1F130, 0x1F150, 0x1F170, 0x1F1E6):
    _LOOK_ALIKE |= {_first + i: chr(97 + i) for i in range(26)}

_WORD = re.compile(r"\S+")
_LATIN = re.compile(r"[A-Za-z]")


def folded(text: str) -> str:
    """Compatibility forms, without marks and invisible characters; hidden tags are read."""
    return text if text.isascii() else "".join(map(_folded, text))


@lru_cache(maxsize=20_000)
def _folded(char: str) -> str:
    """One character at a time: normalising runs of combining marks takes quadratic time."""
    if char in _TAGS:
        return chr(ord(char) - 0xE0000)
    parts = unicodedata.normalize("NFKD", char)
    return INVISIBLE.sub("", "".join(part for part in parts if not unicodedata.combining(part)))


def look_alikes(text: str) -> Iterator[Span]:
    """Words in which letters of two scripts mix, or that are English once read."""
    if text.isascii():
        return
    spans = []
    found = False
    for word in _WORD.finditer(text):
        read = word[0].translate(_LOOK_ALIKE)
        plain = "".join(filter(str.isalnum, read)).lower()
        if read == word[0] or not plain.isascii():
            continue
        mixed = len(plain) > 1 and _LATIN.search(word[0]) is not None
        if mixed or is_word(plain):
            spans.append(Span(word.start(), word.end(), read, "look_alikes"))
            found = found or mixed or len(plain) > 2
    n_latin = len(_LATIN.findall(text))
    if found and n_latin >= 0.2 * sum(map(str.isalpha, text)):
        yield from spans


def upside_down(text: str) -> Iterator[Span]:
    """Letters turned upside down, which are read from the end."""
    if text.isascii() or len(_FLIPPED.findall(text)) < 4:
        return
    for line in re.finditer(r"[^\n]+", text):
        if len(_FLIPPED.findall(line[0])) >= 4:
            turned = line[0].lower().translate(_UPSIDE_DOWN)[::-1]
            yield Span(line.start(), line.end(), turned, "upside_down")


_BRAILLE_LETTERS = dict(
    zip(
        (
            0x2800 + dots
            for dots in (
                1,
                3,
                9,
                25,
                17,
                11,
                27,
                19,
                10,
                26,
                5,
                7,
                13,
                29,
                21,
                15,
                31,
                23,
                14,
                30,
                37,
                39,
                58,
                45,
                61,
                53,
                0,
            )
        ),
        "abcdefghijklmnopqrstuvwxyz ",
        strict=True,
    )
)
_BRAILLE = re.compile("[\u2800-\u28ff][\u2800-\u28ff\\s]{4,}")


def braille(text: str) -> Iterator[Span]:
    if text.isascii():
        return
    for run in _BRAILLE.finditer(text):
        said = run[0].translate(_BRAILLE_LETTERS)
        if readable(said):
            yield Span(run.start(), run.end(), said, "braille")


_SELECTORS = re.compile("[\ufe00-\ufe0f\U000e0100-\U000e01ef]{6,}")
_OPERATORS = re.compile("[\u2062\u2064]{32,}|[\u200b\u200c]{32,}|[\u200c\u200d]{32,}")


def hidden_bytes(text: str) -> Iterator[Span]:
    """Bytes in runs of variation selectors, or as bits in two invisible characters."""
    if text.isascii():
        return
    for run in _SELECTORS.finditer(text):
        yield from _said(run, bytes(_selector(char) for char in run[0]))
    for run in _OPERATORS.finditer(text):
        zero, one = sorted(set(run[0]) | {"\U0010ffff"})[:2]
        for first, second in ((zero, one), (one, zero)):
            bits = run[0].replace(first, "0").replace(second, "1")
            whole = bits[: len(bits) // 8 * 8]
            yield from _said(run, bytes(int(whole[i : i + 8], 2) for i in range(0, len(whole), 8)))


def _selector(char: str) -> int:
    code = ord(char)
    return code - 0xFE00 if code < 0xE0100 else code - 0xE0100 + 16


def _said(run: re.Match[str], data: bytes) -> Iterator[Span]:
    said = data.decode("utf-8", "replace")
    if readable(said):
        yield Span(run.start(), run.end(), f" {said} ", "hidden_bytes")
