"""Sums up the engine's per-token probe logits into evidence about one message.

A short message is the mean over its tokens. A long one is the maximum of rolling means, so
that an attack in a long harmless text is not averaged away (arXiv 2601.11516). The template's
last token, where the answer begins, sums up the whole prompt and is read apart.

The tokens' own logits come from the engine; nothing here touches the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fortpoint.errors import GuardFailed
from fortpoint.types import Reading, Role, Segment

WINDOW_TOKENS = 64

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Readout:
    """A reading, unpacked and checked: ``logits`` is [n_tokens, n_probes]."""

    probes: Mapping[str, int]
    logits: Float32
    segments: tuple[Segment, ...]

    @classmethod
    def unpack(cls, reading: Reading) -> Readout:
        """Raises ``GuardFailed`` for values that are not finite or do not fit together."""
        n_bytes = 4 * reading.n_tokens * len(reading.probes)
        if reading.n_tokens < 0 or len(reading.logits) != n_bytes:
            raise GuardFailed("a reading does not have the size it states")
        flat = np.frombuffer(reading.logits, dtype="<f4")
        if not np.isfinite(flat).all():
            raise GuardFailed("a reading holds values that are not finite")
        at = 0
        for segment in reading.segments:
            if segment.start != at or segment.end < segment.start:
                raise GuardFailed("a reading's segments do not follow one another")
            at = segment.end
        if at != reading.n_tokens:
            raise GuardFailed("a reading's segments do not cover its tokens")
        probes = {name: column for column, name in enumerate(reading.probes)}
        return cls(probes, flat.reshape(reading.n_tokens, len(reading.probes)), reading.segments)

    def tokens_of(self, message: int) -> Float32:
        """[n, n_probes] of the message's tokens, without the sequence's first token.

        The first token of a sequence carries an activation of its own, whatever it says.
        """
        parts = [
            self.logits[s.start or min(1, s.end - 1) : s.end]
            for s in self.segments
            if s.message == message and s.role is not Role.TEMPLATE and s.end > s.start
        ]
        return np.concatenate(parts) if parts else self.logits[:0]

    def tail_of(self, message: int) -> Float32 | None:
        """[1, n_probes] of the template's last token, which ends the prompt after ``message``.

        None when the message is not the last one or no template follows it.
        """
        if len(self.segments) < 2:
            return None
        before, last = self.segments[-2:]
        if last.role is not Role.TEMPLATE or before.message != message or last.end == last.start:
            return None
        return self.logits[last.end - 1 : last.end]


def aggregate(logits: Float32) -> Float32:
    """[n_tokens, n] -> [n]: the mean, or over long texts the maximum of rolling means."""
    n_tokens = len(logits)
    if n_tokens <= WINDOW_TOKENS:
        return np.asarray(logits.mean(axis=0), dtype=np.float32)
    sums = np.zeros((n_tokens + 1, logits.shape[1]))
    np.cumsum(logits, axis=0, out=sums[1:])
    means = (sums[WINDOW_TOKENS:] - sums[:-WINDOW_TOKENS]) / WINDOW_TOKENS
    return np.asarray(means.max(axis=0), dtype=np.float32)
