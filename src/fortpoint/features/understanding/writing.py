"""Text of a model on a person's screen: nothing of it may act, and spaces show."""

from __future__ import annotations

_SIGNS = {"\n": "⏎", "\t": "⇥", "\r": "␍"}


def visible(text: str) -> str:
    """On one line, without control characters: those of a terminal among them."""
    return "".join(_SIGNS.get(c, c if c.isprintable() else "·") for c in text)


def quoted(token: str) -> str:
    """A token bare where it is a word with the space before it, else in quotes."""
    inner = token.strip()
    if inner.isalnum() and token == " " + inner:
        return inner
    return f"'{visible(token)}'"
