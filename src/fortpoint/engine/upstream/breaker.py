"""A circuit breaker: leaves a server alone that failed several times, then tries it once.

    closed     every request is admitted; ``failures`` in a row open it
    open       none is, until the pause is over (or what a 429 asked for has passed)
    half-open  one request is admitted; its first token closes the breaker, its failure
               opens it again

One customer's requests may open it for all, if they make the server fail: errors that blame
the request (400, 413, 422) do not count for that reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

State = Literal["closed", "open", "half_open"]


class Breaker:
    """Of one upstream. Every ``admit`` that was True is followed by one of the other calls."""

    def __init__(
        self, failures: int, pause_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._most = failures
        self._pause_s = pause_s
        self._clock = clock
        self._failures = 0
        self._open_until: float | None = None
        self._probing = False

    @property
    def state(self) -> State:
        if self._open_until is None:
            return "closed"
        return "open" if self._clock() < self._open_until else "half_open"

    @property
    def failures(self) -> int:
        """In a row."""
        return self._failures

    def admit(self) -> bool:
        """Whether a request may be sent now."""
        state = self.state
        if state == "open" or (state == "half_open" and self._probing):
            return False
        self._probing = state == "half_open"
        return True

    def began(self) -> None:
        """An answer has begun: the server is there. A pause that others earned it stays."""
        if self.state != "open":
            self._open_until, self._probing = None, False

    def succeeded(self) -> None:
        """An answer came whole."""
        self._failures = 0

    def failed(self) -> None:
        self._failures += 1
        if self._probing or self._failures >= self._most:
            self._open(self._pause_s)
        self._probing = False

    def told_to_wait(self, seconds: float) -> None:
        """The server asked to be left alone for a while; that is no failure."""
        self._open(seconds)
        self._probing = False

    def undecided(self) -> None:
        """The request ended before it showed anything."""
        self._probing = False

    def _open(self, seconds: float) -> None:
        self._open_until = max(self._open_until or 0.0, self._clock() + seconds)
