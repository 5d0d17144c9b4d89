"""Text about nothing in particular: what a concept's examples are told apart from.

The sentences, questions, requests and lines of code were written for this package. They are
short, since examples are, and no two are about the same thing.
"""

from __future__ import annotations

from functools import cache
from importlib import resources

import msgspec


@cache
def sentences() -> tuple[str, ...]:
    """Neutral text, in a fixed order."""
    return _packaged("background.json")


@cache
def questions() -> tuple[str, ...]:
    """Neutral questions, to hear how a steered model answers them."""
    return _packaged("questions.json")


def _packaged(name: str) -> tuple[str, ...]:
    file = resources.files("fortpoint.features.concepts").joinpath(name)
    return msgspec.json.decode(file.read_bytes(), type=tuple[str, ...])
