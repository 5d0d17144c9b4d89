"""The gateway's side of the engine's socket.

One connection carries all requests of a gateway process. When the engine dies, every open
stream raises ``EngineUnavailable``; the next call connects anew, so a restarted engine is
found without anybody's help.

    client = EngineClient(home / "run" / "engine.sock")
    async with await client.generate(request) as stream:
        async for event in stream: ...
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, TypeVar

from fortpoint import errors
from fortpoint.engine import protocol
from fortpoint.engine.protocol import (
    Cancel,
    Describe,
    Description,
    Embed,
    Embedded,
    Event,
    Failed,
    Generate,
    Proceed,
    Request,
    Scan,
    Scanned,
    Scored,
    ScoreText,
)
from fortpoint.types import Message

_T = TypeVar("_T", Scanned, Embedded, Scored, Description)

_CONNECT_TIMEOUT_S = 2.0
_DESCRIBE_TIMEOUT_S = 10.0

_BY_CODE: Mapping[str, type[errors.FortPointError]] = {
    cls.code: cls
    for cls in (
        errors.InvalidRequest,
        errors.ContextLengthExceeded,
        errors.Unsupported,
        errors.EngineError,
        errors.SteeringDiverged,
        errors.EngineUnavailable,
        errors.EngineBusy,
    )
}


class Stream(Protocol):
    """The events of one generation, in order; ends after ``Done``."""

    def __aiter__(self) -> Self: ...

    async def __anext__(self) -> Event: ...

    async def proceed(self) -> None:
        """Let the decode begin (after ``Prefilled`` of a request with ``hold``)."""

    async def drop(self, choice: int) -> None:
        """Stop computing one answer of several; what still comes of it is to be ignored."""

    async def aclose(self) -> None:
        """Cancel the generation if it has not ended. Safe to call twice."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class Engine(Protocol):
    """What the gateway needs of an engine, whatever runs behind it."""

    async def generate(self, request: Generate) -> Stream: ...

    async def scan(self, messages: Sequence[Message]) -> Scanned: ...

    async def embed(self, texts: Sequence[str]) -> Embedded: ...

    async def score(self, request: ScoreText) -> Scored: ...

    async def describe(self) -> Description: ...

    async def close(self) -> None: ...


class _SocketStream:
    def __init__(self, connection: _Connection, request_id: str) -> None:
        self._connection = connection
        self._id = request_id
        self._events = connection.subscribe(request_id)
        self._ended = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        if self._ended:
            raise StopAsyncIteration
        event = await self._events.get()
        if event is None or isinstance(event, Failed):
            self._end()
            raise _error_of(event)
        if isinstance(event, protocol.LAST):
            self._end()
        return event

    async def proceed(self) -> None:
        await self._connection.send(Proceed(self._id))

    async def drop(self, choice: int) -> None:
        if not self._ended:
            self._connection.cancel(self._id, choice)

    async def aclose(self) -> None:
        if self._ended:
            return
        self._end()
        self._connection.cancel(self._id)

    def _end(self) -> None:
        self._ended = True
        self._connection.unsubscribe(self._id)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()


class _Connection:
    """One open socket: writes frames, hands each event to its stream's queue."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._queues: dict[str, asyncio.Queue[Event | None]] = {}
        self.closed = False
        self._reading = asyncio.create_task(self._read(reader), name="engine-events")

    def subscribe(self, request_id: str) -> asyncio.Queue[Event | None]:
        if request_id in self._queues:
            raise errors.EngineError("this request id is in use")
        self._queues[request_id] = asyncio.Queue()
        return self._queues[request_id]

    def unsubscribe(self, request_id: str) -> None:
        self._queues.pop(request_id, None)

    async def send(self, request: Request) -> None:
        frame = protocol.encode(request)
        if self.closed:
            raise _error_of(None)
        try:
            self._writer.write(frame)
            await self._writer.drain()
        except ConnectionError:
            raise _error_of(None) from None

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        """Tell the engine without waiting; a dead one has stopped already."""
        if not self.closed:
            self._writer.write(protocol.encode(Cancel(request_id, choice)))

    async def close(self) -> None:
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while (event := await protocol.read_event(reader)) is not None:
                if queue := self._queues.get(event.id):
                    queue.put_nowait(event)
        except errors.EngineError:
            pass  # a peer that breaks the protocol is as good as gone
        finally:
            self.closed = True
            self._writer.close()
            for queue in self._queues.values():
                queue.put_nowait(None)


class EngineClient:
    """An ``Engine`` behind a Unix socket."""

    def __init__(self, socket_path: Path) -> None:
        self._path = socket_path
        self._connection: _Connection | None = None
        self._connecting = asyncio.Lock()
        self._ids = itertools.count()

    async def generate(self, request: Generate) -> Stream:
        return await self._open(request)

    async def scan(self, messages: Sequence[Message]) -> Scanned:
        event = await self._ask(Scan(self._next_id(), tuple(messages)))
        return _expect(event, Scanned)

    async def embed(self, texts: Sequence[str]) -> Embedded:
        event = await self._ask(Embed(self._next_id(), tuple(texts)))
        return _expect(event, Embedded)

    async def score(self, request: ScoreText) -> Scored:
        return _expect(await self._ask(request), Scored)

    async def describe(self) -> Description:
        try:
            async with asyncio.timeout(_DESCRIBE_TIMEOUT_S):
                return _expect(await self._ask(Describe(self._next_id())), Description)
        except TimeoutError:
            raise errors.EngineUnavailable("the engine does not answer; try again soon") from None

    async def close(self) -> None:
        if self._connection is not None:
            await self._connection.close()
            self._connection = None

    async def _ask(self, request: Request) -> Event:
        async with await self._open(request) as stream:
            return await anext(stream)

    async def _open(self, request: Request) -> _SocketStream:
        connection = await self._connect()
        stream = _SocketStream(connection, request.id)
        try:
            await connection.send(request)
        except BaseException:
            # The frame may be out already; nobody will read the answer.
            connection.unsubscribe(request.id)
            connection.cancel(request.id)
            raise
        return stream

    async def _connect(self) -> _Connection:
        async with self._connecting:
            if self._connection is not None and not self._connection.closed:
                return self._connection
            try:
                async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                    reader, writer = await asyncio.open_unix_connection(self._path)
            except (OSError, TimeoutError):
                raise _error_of(None) from None
            self._connection = _Connection(reader, writer)
            return self._connection

    def _next_id(self) -> str:
        return f"c{next(self._ids)}"


def _expect(event: Event, kind: type[_T]) -> _T:
    if not isinstance(event, kind):
        raise errors.EngineError("the engine answered out of turn")
    return event


def _error_of(event: Failed | None) -> errors.FortPointError:
    """The exception that a failure, or the engine's death (None), becomes."""
    if event is None:
        return errors.EngineUnavailable(
            "the engine is not running; it restarts by itself, try again soon"
        )
    return _BY_CODE.get(event.code, errors.EngineError)(event.message)
