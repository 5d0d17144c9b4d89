"""The threads that compute one pass together.

One of them is the caller's. The others sleep between passes: nothing spins while there is
nothing to do. The work itself holds no interpreter lock.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any


class Team:
    """``n_threads`` threads, the caller's included."""

    def __init__(self, n_threads: int) -> None:
        self.n_threads = n_threads
        self._orders: list[queue.SimpleQueue[Callable[[int], Any] | None]] = []
        self._results: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._threads = []
        for number in range(1, n_threads):
            orders: queue.SimpleQueue[Callable[[int], Any] | None] = queue.SimpleQueue()
            thread = threading.Thread(
                target=self._obey, args=(number, orders), name=f"compute-{number}", daemon=True
            )
            thread.start()
            self._orders.append(orders)
            self._threads.append(thread)

    def run(self, work: Callable[[int], Any], n_threads: int) -> None:
        """``work(number)`` in so many threads at once; returns when all are done.

        ``work`` must not raise in some threads only while others wait for them.
        """
        others = self._orders[: n_threads - 1]
        for orders in others:
            orders.put(work)
        try:
            work(0)
        finally:
            failures = [self._results.get() for _ in others]
        for failure in failures:
            if failure is not None:
                raise failure

    def close(self) -> None:
        for orders in self._orders:
            orders.put(None)
        for thread in self._threads:
            thread.join()
        self._orders.clear()

    def _obey(self, number: int, orders: queue.SimpleQueue[Callable[[int], Any] | None]) -> None:
        while (work := orders.get()) is not None:
            try:
                work(number)
                self._results.put(None)
            except BaseException as failure:  # noqa: BLE001 - raised again by ``run``
                self._results.put(failure)
