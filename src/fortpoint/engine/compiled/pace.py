"""How many threads compute a pass: as many as pay, by the clock.

Threads that wait for each other after every phase are slowed by a neighbour on one core far
more than by having a core less: the phase lasts until the scheduler lets the slowest go on. And
one row waits for memory, which one thread may draw all of. So small passes are timed, by their
number of rows, with one thread and with all; the faster is used, and the other tried now and
then. The results are the same bits with any number of threads.
"""

from __future__ import annotations

import statistics
from collections import defaultdict, deque

MAX_ROWS = 48
"""Larger passes take all threads: they wait little, and a trial would stall others' tokens."""

_REMEMBERED = 5
_NEAR, _FAR = 64, 256
"""Passes between trials of a number that is up to a fifth slower, and of a slower one."""


class Pace:
    """Chooses between one thread and ``n_threads``."""

    def __init__(self, n_threads: int) -> None:
        self._n_threads = n_threads
        self._seconds: defaultdict[tuple[int, int], deque[float]] = defaultdict(
            lambda: deque(maxlen=_REMEMBERED)
        )
        self._since_trial: defaultdict[int, int] = defaultdict(int)

    def choose(self, n_rows: int) -> int:
        """The number of threads for a pass of so many rows."""
        if self._n_threads == 1 or n_rows > MAX_ROWS:
            return self._n_threads
        size = n_rows.bit_length()
        times = {n: self._typical(size, n) for n in (self._n_threads, 1)}
        for n, seconds in times.items():
            if seconds is None:
                return n
        best, other = sorted(times, key=lambda n: times[n] or 0.0)
        self._since_trial[size] += 1
        near = (times[other] or 0.0) < 1.2 * (times[best] or 0.0)
        if self._since_trial[size] < (_NEAR if near else _FAR):
            return best
        self._since_trial[size] = 0
        return other

    def note(self, n_rows: int, n_threads: int, seconds: float) -> None:
        """A pass of so many rows took this long."""
        if n_rows <= MAX_ROWS:
            self._seconds[n_rows.bit_length(), n_threads].append(seconds / n_rows)

    def _typical(self, size: int, n_threads: int) -> float | None:
        taken = self._seconds[size, n_threads]
        return statistics.median(taken) if taken else None
