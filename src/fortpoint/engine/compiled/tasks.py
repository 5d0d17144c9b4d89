"""How threads share a phase's tasks, and wait for each other between phases.

Tasks are taken from one counter, so a thread that loses its core to a neighbour holds up no
more than the task in its hands. Who waits spins shortly, then gives way.
"""

from __future__ import annotations

from typing import Any

from fortpoint.engine.compiled.table import Table
from fortpoint.engine.compiled.vector import fetch, fetch_add, give_way, jit, number, pause, put

SYNC = 64
"""int64 numbers of a table that threads meet at; each that is used has a cache line."""

_ARRIVED, _ROUND, _NEXT = 0, 64, 128  # bytes
_SPINS = 2000


@jit()
def meet(t: Any) -> None:
    """Wait until all threads are here; the counter of tasks then starts again."""
    sync, n_threads = number(t, Table.SYNC), number(t, Table.N_THREADS)
    if n_threads == 1:
        put(sync + _NEXT, 0)
        return
    now = fetch(sync + _ROUND)
    if fetch_add(sync + _ARRIVED, 1) == n_threads - 1:
        put(sync + _ARRIVED, 0)
        put(sync + _NEXT, 0)
        fetch_add(sync + _ROUND, 1)
        return
    spins = 0
    while fetch(sync + _ROUND) == now:
        pause()
        spins += 1
        if spins > _SPINS:
            give_way()


@jit()
def take(t: Any, n: Any) -> Any:
    """The number of the first of the next ``n`` tasks."""
    return fetch_add(number(t, Table.SYNC) + _NEXT, n)


@jit()
def share(t: Any, n_tasks: Any) -> Any:
    """How many tasks to take at once: few enough that threads end together."""
    return max(1, n_tasks // (number(t, Table.N_THREADS) * 6))
