"""Secrets in a text that arrives in pieces: what may leave now, and what has to wait.

    scanner = SecretScanner(canaries)
    for piece in stream:
        released = scanner.feed(piece)     # released.text may be sent
    released = scanner.flush()

Of the text so far, everything is released but the end that may be the beginning of a secret,
and the secrets. So one that is cut over any number of pieces is still one, and none of it
leaves before it is decided. The released texts and the spans of the findings, in order, are the
whole text. With ``marks`` a finding's kind stands in the released text where it was.

What waits is limited by the longest secret that the patterns know (about 18,000 characters, in
a private key's block; a few characters in ordinary text).
"""

from __future__ import annotations

import re
from typing import NamedTuple

from fortpoint.guard.rules.canary import Canaries
from fortpoint.guard.rules.finding import Finding, disjoint, mark
from fortpoint.guard.rules.secrets import KINDS, Match, matches

MAX_HELD = max(kind.piece.most for kind in KINDS) + 1
_CONTEXT = 1

_BEGUN = re.compile("|".join(f"(?:{kind.begun})" for kind in KINDS))


class Released(NamedTuple):
    """``text`` may leave; ``findings`` were decided, by position in the whole stream.

    ``start`` is the stream's position of the first character that this call decided on.
    """

    text: str
    findings: tuple[Finding, ...]
    start: int


class SecretScanner:
    """One stream's state: the text that waits, and one character before it."""

    def __init__(self, canaries: Canaries | None = None, *, marks: bool = False) -> None:
        self._canaries = canaries
        self._marks = marks
        self._context = ""
        self._held = ""
        self._position = 0

    @property
    def n_held(self) -> int:
        """How many characters wait."""
        return len(self._held)

    def feed(self, piece: str) -> Released:
        """The next characters of the stream; what they decide is released."""
        return self._release(self._held + piece, final=False)

    def flush(self) -> Released:
        """The stream is over: everything that waits is decided as it stands."""
        return self._release(self._held, final=True)

    def _release(self, pending: str, *, final: bool) -> Released:
        text = self._context + pending
        start = len(self._context)
        findings, cut = self._decide(text, start, final)
        offset = self._position - start
        decided = tuple(
            Finding(f.start + offset, f.end + offset, f.detector, f.kind, f.score) for f in findings
        )
        released = Released(self._safe(text, start, cut, findings), decided, self._position)
        self._position += cut - start
        self._held = text[cut:]
        self._context = text[max(cut - _CONTEXT, 0) : cut]
        return released

    def _decide(self, text: str, start: int, final: bool) -> tuple[tuple[Finding, ...], int]:
        """Findings that nothing can change any more, and where the undecided end begins."""
        found = list(matches(text, start))
        cut = len(text) if final else _undecided(text, start)
        if self._canaries is not None:
            leaked, open_from = self._canaries.scan(text, start)
            found += [Match(one.start, one) for one in disjoint(leaked)]
            if not final:
                cut = min(cut, max(open_from, len(text) - MAX_HELD))
        for match in sorted(found, reverse=True):
            if match.first < cut < match.finding.end:
                cut = match.first
        return disjoint(one.finding for one in found if one.finding.end <= cut), cut

    def _safe(self, text: str, start: int, cut: int, findings: tuple[Finding, ...]) -> str:
        pieces = []
        at = start
        for finding in findings:
            pieces.append(text[at : finding.start])
            if self._marks:
                pieces.append(mark(finding))
            at = finding.end
        return "".join([*pieces, text[at:cut]])


def _undecided(text: str, start: int) -> int:
    """Where the first beginning of a pattern stands that reaches the end of the text."""
    begun = _BEGUN.search(text, max(start, len(text) - MAX_HELD))
    return len(text) if begun is None else begun.start()
