"""Words of labels, texts and queries, made alike so that they can be compared.

words_of("The bridges' fog!")      # ["the", "bridge", "'", "fog", "!"]
"""

from __future__ import annotations

import re
from collections.abc import Sequence

WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)?|[^\w\s]|_", re.UNICODE)  # noqa: RUF001
_POSSESSIVE = re.compile(r"['’]s$")  # noqa: RUF001

_LITTLE = frozenset(
    "a an and are as at be by for from in is it like of on or that the to with".split()  # noqa: SIM905
)
_SORTS = frozenset(
    "definition letter mark name phrase sign statement symbol text token word".split()  # noqa: SIM905
)
"""Words of a query that say what sort of thing is looked for rather than which."""

_MARKS = {
    "ampersand": "&",
    "apostrophe": "'’",  # noqa: RUF001
    "asterisk": "*",
    "bracket": "()[]",
    "comma": ",",
    "exclamation": "!",
    "hyphen": "-",
    "newline": "⏎",
    "parenthese": "()",
    "parenthesis": "()",
    "quotation": "\"“”'",
    "semicolon": ";",
    "underscore": "_",
}
_SOMETIMES_MARKS = {
    "brace": "{}",
    "colon": ":",
    "dash": "-–—",  # noqa: RUF001
    "dollar": "$",
    "dot": ".",
    "equal": "=",
    "hash": "#",
    "percent": "%",
    "period": ".",
    "plus": "+",
    "question": "?",
    "quote": "\"“”'",
    "slash": "/",
}
"""Names of marks that mean something else too: the mark alone only in "question mark"."""

_SYNONYMS = {"number": ("digit",), "numeral": ("digit",), "uppercase": ("capital",)}


def words_of(text: str) -> list[str]:
    """Lower-case words without the plural's ending, and marks one by one."""
    return [stem(word) for word in WORD.findall(text.lower())]


def stem(word: str) -> str:
    """Plural and possessive only: "bridges" is "bridge", "glass" stays."""
    word = _POSSESSIVE.sub("", word)
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ches", "shes", "sses", "xes")):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def shares(asked: Sequence[str]) -> dict[str, float]:
    """How much each word of a query counts: little ones little, where there are others."""
    share = {word: 0.15 if word in _LITTLE else 0.4 if word in _SORTS else 1.0 for word in asked}
    return share if max(share.values(), default=1.0) == 1.0 else dict.fromkeys(asked, 1.0)


def meanings(word: str, asked: Sequence[str]) -> dict[str, float]:
    """What to look up for one word of a query, and how much each counts: itself, marks that it
    names, our own words for what it says."""
    marks = _MARKS.get(word, "")
    if word in _SOMETIMES_MARKS and _SORTS.intersection(asked):
        marks = _SOMETIMES_MARKS[word]
    if marks:
        return dict.fromkeys(marks, 1.0)
    also = (*_SOMETIMES_MARKS.get(word, ""), *_SYNONYMS.get(word, ()))
    return {word: 1.0} | dict.fromkeys(also, 0.8)
