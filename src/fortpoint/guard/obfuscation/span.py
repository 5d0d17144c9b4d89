"""A part of a text that was written in a code, and what it says."""

from __future__ import annotations

from typing import NamedTuple


class Span(NamedTuple):
    """Characters ``start`` to ``end`` of a text say ``text`` in the code ``kind``."""

    start: int
    end: int
    text: str
    kind: str
