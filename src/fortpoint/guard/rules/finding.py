"""What a rule found, and a text without it.

redact("key AKIA...", findings)      # 'key [aws_access_key]'
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Finding:
    """Characters ``start`` (inclusive) to ``end`` (exclusive) of a text, and why they count.

    ``detector`` is what a policy names (``secret``, ``canary``, ``invisible_text``,
    ``encoded_text``, ``script_switch``), ``kind`` what exactly it was. ``score`` is the rule's
    own confidence in 0..1; it is set by hand, not calibrated. A finding never holds the text.
    """

    start: int
    end: int
    detector: str
    kind: str
    score: float


def redact(text: str, findings: Iterable[Finding]) -> str:
    """The text with each finding replaced by its kind in brackets; overlaps become one."""
    pieces = []
    done = 0
    for finding in disjoint(findings):
        pieces.append(text[done : finding.start])
        pieces.append(mark(finding))
        done = finding.end
    return "".join([*pieces, text[done:]])


def mark(finding: Finding) -> str:
    """What stands in a text where a finding was."""
    return f"[{finding.kind}]"


def disjoint(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """In order, those that overlap joined into one that has the surest one's name."""
    joined: list[Finding] = []
    for finding in sorted(findings):
        last = joined[-1] if joined else None
        if last is None or finding.start >= last.end:
            joined.append(finding)
            continue
        surest = max(last, finding, key=lambda one: one.score)
        end = max(last.end, finding.end)
        joined[-1] = Finding(last.start, end, surest.detector, surest.kind, surest.score)
    return tuple(joined)
