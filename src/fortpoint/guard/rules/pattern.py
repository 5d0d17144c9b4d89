"""Patterns that know two things of a text: where they match, and where they still could.

A stream may be cut anywhere, also in a secret. So each pattern is built of pieces, and each
piece gives two regular expressions: ``full`` matches it, ``begun`` matches what reaches the
end of the text and is the beginning of it.

    key = sequence(literal("AKIA"), chars("A-Z2-7", 16, 16))
    re.search(key.begun, "my key is AKIAI")     # from the A on, more may come

Every run is possessive (it never gives characters back), and every count has an upper limit,
so that a match costs at most its own length and nothing is tried twice.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """``full`` matches the piece; ``begun`` a beginning of it (perhaps empty) up to the end.

    ``most`` is the largest number of characters that it can have.
    """

    full: str
    begun: str
    most: int


def literal(text: str, *, any_case: bool = False) -> Piece:
    """Exactly this text."""
    begun = ""
    for char in reversed(text):
        begun = f"(?:{re.escape(char)}{begun})?"
    flag = "(?i:{})" if any_case else "(?:{})"
    return Piece(flag.format(re.escape(text)), flag.format(begun) + r"\Z", len(text))


def words(*texts: str) -> Piece:
    """Any of these texts, in any case; the longest that fits."""
    longest_first = sorted(texts, key=len, reverse=True)
    return either(*(literal(text, any_case=True) for text in longest_first))


def chars(members: str, low: int, high: int) -> Piece:
    """``low`` to ``high`` characters of a class, given as between brackets; as many as fit."""
    return Piece(f"[{members}]{{{low},{high}}}+", rf"[{members}]{{0,{high}}}\Z", high)


def sequence(*pieces: Piece) -> Piece:
    """One after the other."""
    begun = pieces[-1].begun
    for piece in reversed(pieces[:-1]):
        begun = f"(?:{piece.begun}|{piece.full}{begun})"
    return Piece("".join(p.full for p in pieces), begun, sum(p.most for p in pieces))


def either(*pieces: Piece) -> Piece:
    """The first that fits."""
    full = "|".join(piece.full for piece in pieces)
    begun = "|".join(piece.begun for piece in pieces)
    return Piece(f"(?:{full})", f"(?:{begun})", max(piece.most for piece in pieces))


def repeated(piece: Piece, low: int, high: int) -> Piece:
    """``low`` to ``high`` of them in a row."""
    begun = f"(?:{piece.full}){{0,{high}}}{piece.begun}"
    return Piece(f"(?:{piece.full}){{{low},{high}}}", begun, high * piece.most)


def maybe(piece: Piece) -> Piece:
    return repeated(piece, 0, 1)
