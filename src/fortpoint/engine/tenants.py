"""Who waits, and whose turn it is: fair shares of the machine between tenants.

Each tenant has a queue of its own, and a count of the tokens computed for it: a prompt's when it
is admitted (what it adopted costs nothing), an answer's one by one. The tenant with the smallest
count is next ("Fairness in Serving Large Language Models", OSDI 2024, arXiv 2401.00588, with one
price for all tokens). Tokens rather than requests, because long requests would otherwise buy
more of the machine than short ones. A tenant that comes (back) starts from the smallest count of
those who are there: having been away earns no credit. A place that is taken is not taken back
for fairness' sake; one in a full room is, from whoever fills it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator

from fortpoint.engine.sequence import Sequence


class WaitingRoom:
    """Waiting sequences, first come first served within a tenant."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[Sequence]] = {}
        self._computed: Counter[str] = Counter()
        self._present: Counter[str] = Counter()  # sequences, waiting or running
        self._n_waiting = 0

    def __len__(self) -> int:
        return self._n_waiting

    def __iter__(self) -> Iterator[Sequence]:
        for queue in self._queues.values():
            yield from queue

    def arrive(self, tenant: str) -> None:
        """One more sequence of ``tenant`` is here, waiting or running."""
        if not self._present[tenant]:
            others = [self._computed[other] for other in self._present if self._present[other]]
            self._computed[tenant] = max(self._computed[tenant], min(others, default=0))
        self._present[tenant] += 1

    def leave(self, tenant: str) -> None:
        """It has ended. When all have, nobody owes anybody anything."""
        self._present[tenant] -= 1
        if not any(self._present.values()):
            self._present.clear()
            self._computed.clear()

    def charge(self, tenant: str, n_tokens: int) -> None:
        self._computed[tenant] += n_tokens

    def queue(self, sequence: Sequence, *, first: bool = False) -> None:
        """At the end of its tenant's queue, or at the front."""
        queue = self._queues.setdefault(sequence.job.tenant, deque())
        if first:
            queue.appendleft(sequence)
        else:
            queue.append(sequence)
        self._n_waiting += 1

    def take(self, sequence: Sequence) -> bool:
        """Remove it from its queue; False when it is not there."""
        queue = self._queues.get(sequence.job.tenant, ())
        if not queue or sequence not in queue:
            return False
        queue.remove(sequence)
        self._n_waiting -= 1
        if not queue:
            del self._queues[sequence.job.tenant]
        return True

    def crowding(self, tenant: str) -> Sequence | None:
        """Who should leave a full room for ``tenant``: the last one of the longest queue.

        None where ``tenant`` itself has as many waiting, or those have begun already.
        """
        longest = max(self._queues.values(), key=len, default=())
        if len(longest) <= len(self._queues.get(tenant, ())) + 1:
            return None
        return next((last for last in reversed(longest) if not last.charged), None)

    def in_turn(self) -> list[Sequence]:
        """The first of each tenant's queue, whose turn it is first."""
        heads = [queue[0] for queue in self._queues.values()]
        return sorted(heads, key=lambda head: (self._computed[head.job.tenant], head.age))
