"""Which upstream is asked, and which next: in order, each behind its breaker, a few times.

Round after round through the servers that their breakers admit, with a random pause between
rounds that grows, until one answers, ``max_attempts`` are spent or the time is over.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from fortpoint.config import Upstream
from fortpoint.engine.protocol import UpstreamState
from fortpoint.engine.upstream.breaker import Breaker
from fortpoint.engine.upstream.http import Fault
from fortpoint.engine.upstream.target import Target
from fortpoint.errors import EngineError, EngineUnavailable

_logger = logging.getLogger("fortpoint.engine.upstream")

_T = TypeVar("_T")


@dataclass(frozen=True)
class Server:
    """One upstream and what is known of its health."""

    target: Target
    breaker: Breaker

    def state(self) -> UpstreamState:
        return UpstreamState(self.target.name, self.breaker.state, self.breaker.failures)

    def failed(self, fault: Fault) -> None:
        """Note an attempt that came to nothing, or an answer that broke."""
        _logger.warning("upstream=%s fault=%s", self.target.name, fault.error.message)
        if fault.wait_s is not None:
            self.breaker.told_to_wait(fault.wait_s)
        elif fault.counts:
            self.breaker.failed()
        else:
            self.breaker.undecided()


class Failover:
    """The upstreams of one process."""

    def __init__(self, config: Upstream, targets: Sequence[Target]) -> None:
        self._config = config
        self.servers = tuple(
            Server(target, Breaker(config.breaker_failures, config.breaker_pause_s))
            for target in targets
        )

    async def first(self, attempt: Callable[[Server], Awaitable[_T]], limit: float) -> _T:
        """The first ``attempt`` that does not raise ``Fault``. Raises the last one's error.

        None begins after ``limit``, in the loop's time: a server that is given no time to
        answer has not failed.
        """
        loop = asyncio.get_running_loop()
        last: Fault | None = None
        spent = 0
        for round_number in range(self._config.max_attempts):
            admitted = False
            if loop.time() >= limit:
                break
            for server in self.servers:
                if spent == self._config.max_attempts or not server.breaker.admit():
                    continue
                if not admitted and round_number:
                    await self._pause(server, round_number)
                if loop.time() >= limit:
                    server.breaker.undecided()
                    break
                admitted = True
                spent += 1
                try:
                    return await self._one(server, attempt)
                except Fault as fault:
                    if not fault.elsewhere:
                        raise fault.error from None
                    last = fault
            if not admitted:
                break
        raise (
            last.error
            if last
            else EngineUnavailable("no upstream server can be asked now; try again soon")
        )

    async def _one(self, server: Server, attempt: Callable[[Server], Awaitable[_T]]) -> _T:
        try:
            result = await attempt(server)
        except Fault as fault:
            server.failed(fault)
            raise
        except EngineError as error:  # what it sent could not be believed
            unbelieved = Fault(error)
            server.failed(unbelieved)
            raise unbelieved from None
        except BaseException:
            server.breaker.undecided()
            raise
        server.breaker.began()
        return result

    async def _pause(self, server: Server, round_number: int) -> None:
        longest_s = self._config.backoff_s * 2 ** (round_number - 1)
        try:
            await asyncio.sleep(longest_s * secrets.randbelow(1000) / 1000)
        except BaseException:
            server.breaker.undecided()
            raise
