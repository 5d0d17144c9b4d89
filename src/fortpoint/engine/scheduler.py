"""Which sequences compute which of their tokens in the next step.

1. every sequence that decodes gets its one row;
2. one prompt chunk's worth of rows goes to prompts, oldest first, so that a long prompt
   never stalls others for longer than one chunk;
3. waiting sequences are admitted while there is a place and memory for their prompt.
When memory runs out, the youngest sequence gives up its cache and waits at the front.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from fortpoint.engine.sequence import Job, Sequence


@dataclass(frozen=True)
class Work:
    """Compute the next ``n_rows`` tokens of ``sequence``."""

    sequence: Sequence
    n_rows: int


class Scheduler:
    """Owns the waiting and the running sequences."""

    def __init__(self, max_batch: int, prefill_chunk: int, max_queue: int) -> None:
        self._max_batch = max_batch
        self._prefill_chunk = prefill_chunk
        self._max_queue = max_queue
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def full(self) -> bool:
        """No further request may wait."""
        places = self._max_batch - len(self.running)
        return len(self.waiting) >= self._max_queue + max(places, 0)

    def add(self, sequence: Sequence) -> None:
        """A new sequence, or a fork: one whose cache is filled runs on if there is a place."""
        if sequence.cache.length > 0 and len(self.running) < self._max_batch:
            self.running.append(sequence)
        else:
            sequence.evict()
            self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """The sequence has ended: free its place and memory."""
        sequence.cache.release()
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def of(self, job: Job) -> list[Sequence]:
        return [s for s in (*self.running, *self.waiting) if s.job is job]

    def plan(self) -> list[Work]:
        """The next step; empty when there is nothing to compute."""
        for sequence in list(self.running):
            if sequence.decodes:
                self._make_room(sequence)
        works = [Work(sequence, 1) for sequence in self.running if sequence.decodes]
        rows = self._prefill_chunk
        for sequence in self._prompts():
            works.append(Work(sequence, min(rows, sequence.n_missing)))
            rows -= works[-1].n_rows
            if rows == 0:
                break
        return works

    def _prompts(self) -> Iterator[Sequence]:
        """Running sequences with tokens to catch up on, then those that can be admitted."""
        for sequence in list(self.running):
            if not (sequence.parked or sequence.decodes) and sequence.n_missing > 0:
                yield sequence
        while self.waiting and len(self.running) < self._max_batch:
            sequence = self.waiting[0]
            if not sequence.cache.reserve(len(sequence.tokens)):
                return
            self.waiting.popleft()
            self.running.append(sequence)
            yield sequence

    def _make_room(self, sequence: Sequence) -> None:
        """Room for one more token; the youngest give up their memory for it if need be."""
        while sequence in self.running and not sequence.cache.reserve(len(sequence.tokens)):
            youngest = [s for s in self.running if not s.parked][-1]
            youngest.evict()
            self.running.remove(youngest)
            self.waiting.appendleft(youngest)
