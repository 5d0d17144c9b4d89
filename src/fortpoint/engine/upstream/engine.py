"""An ``Engine`` whose answers come from OpenAI-compatible servers.

    engine = UpstreamEngine(config.upstream, load_targets(config.upstream), observer)
    async with await engine.generate(request) as stream:
        async for event in stream: ...

1. Ask the observer (a model of our own in its own process, where the guard has probes) to
   read the prompt; its reading goes out as ``Prefilled``.
2. Wait for ``proceed``. Until then not a byte has left for an upstream.
3. Ask the upstreams in order until one sends its first token; from then on the answer is
   that server's, and if it breaks, this request fails.

Not protected here: what the upstream does with the prompt, and whether the model behind it is
the one it says. Steering, features, adapters and scores need a model of our own.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from types import TracebackType
from typing import Self

from fortpoint.config import Upstream
from fortpoint.engine.client import Engine
from fortpoint.engine.protocol import (
    Description,
    Done,
    Embedded,
    Event,
    Finished,
    Generate,
    Prefilled,
    Scanned,
    Scored,
    ScoreText,
    Token,
)
from fortpoint.engine.upstream import embeddings, wire
from fortpoint.engine.upstream.events import EventReader
from fortpoint.engine.upstream.failover import Failover, Server
from fortpoint.engine.upstream.http import Fault, Http, Reply
from fortpoint.engine.upstream.target import Target
from fortpoint.errors import EngineBusy, EngineError, Unsupported
from fortpoint.types import Message, Role

MAX_EVENT_BYTES = 1024 * 1024


class UpstreamEngine:
    """Lives in the gateway's process; one for each event loop. ``close`` ends its connections."""

    def __init__(
        self,
        config: Upstream,
        targets: Sequence[Target],
        observer: Engine | None = None,
        protections: Mapping[str, bool] | None = None,
    ) -> None:
        self._config = config
        self._observer = observer
        self._protections = dict(protections or {})
        self._http = Http(config, tls=any(target.tls for target in targets))
        self._failover = Failover(config, targets)
        self._running = 0
        self._created = int(time.time())

    async def generate(self, request: Generate) -> _Stream:
        """Raises ``Unsupported`` for what only a model of our own can do, ``EngineBusy``."""
        wire.check_served(request, self._config)
        return _Stream(self._events, request)

    async def scan(self, messages: Sequence[Message]) -> Scanned:
        """The observer's reading. Raises ``Unsupported`` where there is none."""
        if self._observer is None:
            raise Unsupported("no model of this server's own reads along")
        return await self._observer.scan(messages)

    async def embed(self, texts: Sequence[str]) -> Embedded:
        self._take_place()
        try:
            body = embeddings.ask(texts, self._config)
            limit = asyncio.get_running_loop().time() + self._config.total_timeout_s
            return await self._failover.first(
                lambda server: self._embed(server, body, texts, limit), limit
            )
        finally:
            self._running -= 1

    async def score(self, request: ScoreText) -> Scored:
        """Raises ``Unsupported``: upstream servers do not give a text's log-likelihood."""
        raise Unsupported("a text is scored by a model of our own only")

    async def describe(self) -> Description:
        """Without asking the upstreams. Raises ``EngineUnavailable`` while the observer is down."""
        waiting = 0
        if self._observer is not None:
            waiting = (await self._observer.describe()).waiting
        return Description(
            id="upstream",
            model=self._config.model,
            digest="unknown (upstream)",
            architecture="upstream",
            dtype="unknown",
            max_context=0,
            created=self._created,
            pid=os.getpid(),
            running=self._running,
            waiting=waiting,
            protections=self._protections,
            upstreams=tuple(server.state() for server in self._failover.servers),
        )

    async def close(self) -> None:
        await self._http.close()
        if self._observer is not None:
            await self._observer.close()

    async def _events(self, request: Generate, go: asyncio.Event) -> AsyncGenerator[Event, None]:
        prefilled = await self._read(request)
        yield prefilled
        await go.wait()
        self._take_place()
        try:
            limit = asyncio.get_running_loop().time() + self._config.total_timeout_s
            answer = await self._begin(request, limit)
            try:
                async with aclosing(self._rest(answer, limit)) as rest:
                    async for event in rest:
                        yield event
                yield Done(request.id, answer.decoder.usage(prefilled.n_prompt_tokens))
            finally:
                answer.reply.close()
        finally:
            self._running -= 1

    async def _read(self, request: Generate) -> Prefilled:
        """By the observer; without one there is no reading, and the count is an estimate."""
        if self._observer is None or not request.read:
            count = wire.estimate(request.messages, request.prompt)
            return Prefilled(request.id, count, None)
        messages = request.messages or (Message(Role.USER, request.prompt or ""),)
        scanned = await self._observer.scan(messages)
        return Prefilled(request.id, scanned.usage.prompt, scanned.reading)

    async def _begin(self, request: Generate, limit: float) -> _Answer:
        """An answer whose first token (or end) is there."""
        body, path = wire.ask(request, self._config), wire.path_of(request)

        async def attempt(server: Server) -> _Answer:
            deadline = self._deadline(limit)
            with _patient(limit):
                reply = await self._http.post(server.target, path, body, deadline)
                answer = _Answer(server, reply, wire.Decoder(request))
                try:
                    await answer.begin(deadline)
                except BaseException:
                    reply.close()
                    raise
            return answer

        return await self._failover.first(attempt, limit)

    async def _rest(self, answer: _Answer, limit: float) -> AsyncGenerator[Token | Finished, None]:
        """The answer from its first token to its end; what breaks it is raised."""
        loop, idle_s = asyncio.get_running_loop(), self._config.idle_timeout_s
        try:
            while True:
                for event in answer.take():
                    yield event
                if answer.decoder.is_done:
                    break
                with _patient(limit):
                    await answer.more(min(limit, loop.time() + idle_s))
        except Fault as fault:
            answer.server.failed(fault)
            raise fault.error from None
        except EngineError as error:
            answer.server.failed(Fault(error))
            raise
        await answer.reply.finish()
        answer.server.breaker.succeeded()

    async def _embed(
        self, server: Server, body: bytes, texts: Sequence[str], limit: float
    ) -> Embedded:
        deadline = self._deadline(limit)
        with _patient(limit):
            reply = await self._http.post(server.target, "/embeddings", body, deadline)
            try:
                embedded = embeddings.read(await reply.read_all(deadline), texts)
            finally:
                reply.close()
        server.breaker.succeeded()
        return embedded

    def _deadline(self, limit: float) -> float:
        """When an attempt that begins now must have shown something."""
        now = asyncio.get_running_loop().time()
        return min(limit, now + self._config.first_token_timeout_s)

    def _take_place(self) -> None:
        if self._running >= self._config.max_concurrent:
            raise EngineBusy("all places at the upstream servers are taken; try again soon")
        self._running += 1


@contextmanager
def _patient(limit: float) -> Iterator[None]:
    """A server that only ran out of the caller's whole time is not blamed for it: long answers
    would otherwise close it to everybody."""
    try:
        yield
    except Fault as fault:
        if asyncio.get_running_loop().time() >= limit:
            fault.counts = False
        raise


class _Answer:
    """One server's answer as it arrives."""

    def __init__(self, server: Server, reply: Reply, decoder: wire.Decoder) -> None:
        self.server = server
        self.reply = reply
        self.decoder = decoder
        self._reader = EventReader(MAX_EVENT_BYTES)
        self._ready: list[Token | Finished] = []
        if reply.content_type != "text/event-stream":
            reply.close()
            raise EngineError("an upstream server did not answer with a stream")

    async def begin(self, deadline: float) -> None:
        while not self._ready and not self.decoder.is_done:
            await self.more(deadline)

    async def more(self, deadline: float) -> None:
        """Read once. Raises ``Fault`` and ``EngineError``."""
        piece = await self.reply.read(deadline)
        if not piece:
            raise EngineError("an upstream server ended its answer early")
        for data in self._reader.feed(piece):
            self._ready += self.decoder.feed(data)

    def take(self) -> list[Token | Finished]:
        ready, self._ready = self._ready, []
        return ready


class _Stream:
    """The events of one generation; nothing happens before the first is asked for."""

    def __init__(
        self,
        events: Callable[[Generate, asyncio.Event], AsyncGenerator[Event, None]],
        request: Generate,
    ) -> None:
        self._go = asyncio.Event()
        if not request.hold:
            self._go.set()
        self._events = events(request, self._go)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        return await anext(self._events)

    async def proceed(self) -> None:
        self._go.set()

    async def drop(self, choice: int) -> None:
        """An upstream cannot stop one of several answers: it runs to its end, unread."""

    async def aclose(self) -> None:
        await self._events.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()
