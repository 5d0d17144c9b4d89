"""Which sequences compute which of their tokens in the next step.

1. every sequence that decodes gets its one row;
2. waiting sequences are admitted, in their tenants' turn (``tenants.py``), while there is a
   place, memory for their prompt, and rows of this step for it;
3. one prompt chunk's worth of rows, or a quarter of it while answers go on, goes to prompts, in
   equal parts to the tenants that have some, oldest first within a tenant: a long prompt never
   stalls others for longer than that, and never keeps another tenant's prompt waiting.

When memory runs out, the youngest sequence gives up its cache and waits at the front of its
tenant's queue. Those that are parked have been promised their place and keep it.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from fortpoint.engine.sequence import SCORED_ROWS, Job, Sequence, total
from fortpoint.engine.tenants import WaitingRoom
from fortpoint.errors import EngineError

_SHARE = 4
"""While answers go on, prompts get this part of a chunk."""


class Work(NamedTuple):
    """Compute the next ``n_rows`` tokens of ``sequence``."""

    sequence: Sequence
    n_rows: int


class Scheduler:
    """Owns the waiting and the running sequences. ``max_context`` is the model's."""

    def __init__(
        self, max_batch: int, prefill_chunk: int, max_queue: int, max_context: int
    ) -> None:
        self.max_batch = max_batch
        self._prefill_chunk = prefill_chunk
        self._max_queue = max_queue
        self._max_context = max_context
        self.waiting = WaitingRoom()
        self.running: list[Sequence] = []

    @property
    def full(self) -> bool:
        """No further request may wait."""
        places = self.max_batch - len(self.running)
        return len(self.waiting) >= self._max_queue + max(places, 0)

    def add(self, sequence: Sequence) -> None:
        """A new sequence, or a fork: one whose cache is filled runs on if there is a place."""
        self.waiting.arrive(sequence.job.tenant)
        if sequence.cache.length > 0 and len(self.running) < self.max_batch:
            self.running.append(sequence)
        else:
            sequence.evict()
            self.waiting.queue(sequence)

    def remove(self, sequence: Sequence) -> None:
        """The sequence has ended: free its place and memory."""
        sequence.cache.release()
        if sequence in self.running:
            self.running.remove(sequence)
        elif not self.waiting.take(sequence):
            return
        self.waiting.leave(sequence.job.tenant)

    def of(self, job: Job) -> list[Sequence]:
        return [s for s in (*self.running, *self.waiting) if s.job is job]

    def plan(self) -> list[Work]:
        """The next step; empty when there is nothing to compute."""
        decoding = [s for s in self.running if s.decodes]
        gave_way = [self._make_room(sequence) for sequence in decoding]
        if any(gave_way):
            decoding = [s for s in self.running if s.decodes]
        # Who is admitted while others give way would be the next to do so.
        if len(self.waiting) and (not any(gave_way) or not decoding):
            self._admit()
            # What was adopted may have left nothing but the newest token.
            decoding = [s for s in self.running if s.decodes]
        for sequence in decoding:
            self.waiting.charge(sequence.job.tenant, 1)
        works = [Work(sequence, 1) for sequence in decoding]
        if len(decoding) == len(self.running):
            return works
        rows = max(self._prefill_chunk // _SHARE, 1) if decoding else self._prefill_chunk
        return works + self._share_out([s for s in self.running if s.reads_prompt], rows)

    def _make_room(self, sequence: Sequence) -> bool:
        """Room for one more token; True when the youngest had to give way for it."""
        gave_way = False
        while sequence in self.running and not sequence.cache.reserve(len(sequence.tokens)):
            self._give_way(max((s for s in self.running if not s.parked), key=lambda s: s.age))
            gave_way = True
        return gave_way

    def _give_way(self, sequence: Sequence) -> None:
        sequence.evict()
        self.running.remove(sequence)
        self.waiting.queue(sequence, first=True)

    def _admit(self) -> None:
        prompts = [s for s in self.running if s.reads_prompt]
        rows = self._prefill_chunk - total(prompts)
        while len(self.running) < self.max_batch:
            head = self._next(prompts, rows)
            if head is None or not self._begin(head):
                return
            rows -= head.n_missing
            prompts.append(head)

    def _next(self, prompts: list[Sequence], rows: int) -> Sequence | None:
        """Whose turn it is, given those that are reading their prompts.

        Where their missing tokens fill this step (``rows`` is not positive), only tenants
        without one of them are asked. Who begins as one of them does waits to adopt it, for
        which it loses nothing: within a tenant, the older is read first.
        """
        reading = {sequence.job.tenant for sequence in prompts}
        for head in self.waiting.in_turn():
            asked = rows > 0 or head.job.tenant not in reading
            if asked and not any(head.awaits(sequence) for sequence in prompts):
                return head
        return None

    def _begin(self, sequence: Sequence) -> bool:
        """Give it memory and a place; False when there is no memory."""
        sequence.adopt()
        if not self._has_room(sequence):
            sequence.evict()
            if self.running:
                return False
            if not self._has_room(sequence):  # alone, and waiting would never end
                sequence.job.fail(EngineError("the engine has no memory for this request"))
                for same in self.of(sequence.job):
                    self.remove(same)
                return True
        self._take_place(sequence)
        return True

    def _has_room(self, sequence: Sequence) -> bool:
        return sequence.cache.reserve(min(sequence.n_wanted, self._max_context))

    def _take_place(self, sequence: Sequence) -> None:
        self.waiting.take(sequence)
        self.running.append(sequence)
        if not sequence.charged:  # to be computed again is not its tenant's fault
            sequence.charged = True
            self.waiting.charge(sequence.job.tenant, sequence.n_missing)

    @staticmethod
    def _share_out(prompts: list[Sequence], rows: int) -> list[Work]:
        """So many rows, in equal parts to tenants; what one does not need the others get."""
        shares = _Shares(prompts)
        while rows > 0 and shares.queues:
            part = max(rows // len(shares.queues), 1)
            for tenant in list(shares.queues)[:rows]:
                rows -= shares.give(tenant, part)
        return [Work(sequence, n_rows) for sequence, n_rows in shares.given.items()]


class _Shares:
    """How many of a step's rows each prompt was given."""

    def __init__(self, prompts: list[Sequence]) -> None:
        self.given: dict[Sequence, int] = {}
        self.queues: dict[str, deque[Sequence]] = {}
        self._scored = SCORED_ROWS
        for sequence in sorted(prompts, key=lambda s: s.age):
            self.queues.setdefault(sequence.job.tenant, deque()).append(sequence)

    def give(self, tenant: str, rows: int) -> int:
        """Up to ``rows`` to the tenant's oldest prompts; returns how many they could use."""
        queue, left = self.queues[tenant], rows
        while queue and left > 0:
            sequence = queue[0]
            n_rows = min(left, self._most(sequence))
            if n_rows > 0:
                self.given[sequence] = self.given.get(sequence, 0) + n_rows
                left -= n_rows
                self._scored -= n_rows if sequence.scores else 0
            if self._most(sequence) == 0:
                queue.popleft()
        if not queue:
            del self.queues[tenant]
        return rows - left

    def _most(self, sequence: Sequence) -> int:
        """Rows that it could use beyond those given; what is scored in a step has a limit."""
        more = sequence.n_next - self.given.get(sequence, 0)
        return min(more, self._scored) if sequence.scores else more
