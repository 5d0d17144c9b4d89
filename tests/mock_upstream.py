"""An OpenAI-compatible server on 127.0.0.1 that behaves, or does not, as a test scripts it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Asked:
    """One request as it came."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]


Behaviour = Callable[[Asked, asyncio.StreamWriter], Awaitable[None]]


class MockUpstream:
    """Takes its behaviours in turn, one for each request; the last one for all that follow."""

    def __init__(self, *behaviours: Behaviour) -> None:
        self._behaviours = list(behaviours)
        self.url = "http://127.0.0.1:9/v1"  # until it listens
        self.asked: list[Asked] = []
        self.n_connections = 0
        self.hung_up = asyncio.Event()  # a client closed while it was being answered
        self._tasks: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.n_connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while not writer.is_closing() and (asked := await _read(reader)) is not None:
                self.asked.append(asked)
                await self._answer(asked, reader, writer)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _answer(
        self, asked: Asked, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Until the behaviour is over or the client hangs up."""
        behave = self._behaviours.pop(0) if len(self._behaviours) > 1 else self._behaviours[0]
        answering = asyncio.create_task(behave(asked, writer))  # type: ignore[arg-type]
        watching = asyncio.create_task(_closed(reader))
        try:
            await asyncio.wait({answering, watching}, return_when=asyncio.FIRST_COMPLETED)
            if watching.done() or isinstance(answering.exception(), ConnectionError):
                self.hung_up.set()
                writer.close()
        finally:
            answering.cancel()
            watching.cancel()
            await asyncio.gather(answering, watching, return_exceptions=True)


async def _closed(reader: asyncio.StreamReader) -> None:
    """Return when the other side is gone; what it sends meanwhile stays for the next request."""
    while not reader.at_eof() and reader.exception() is None:
        await asyncio.sleep(0.005)


async def _read(reader: asyncio.StreamReader) -> Asked | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.split("\r\n")
    headers = {
        name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
    }
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Asked(first.split(" ")[1], headers, json.loads(body or b"{}"))


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def token(text: str, index: int = 0, **choice: Any) -> bytes:
    return event(choices=[{"index": index, "delta": {"content": text}, **choice}])


def finish(reason: str = "stop", index: int = 0) -> bytes:
    return event(choices=[{"index": index, "delta": {}, "finish_reason": reason}])


def usage(prompt: int, completion: int) -> bytes:
    return event(choices=[], usage={"prompt_tokens": prompt, "completion_tokens": completion})


def head(status: str = "200 OK", **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


STREAM_HEAD = head(content_type="text/event-stream", transfer_encoding="chunked")


@dataclass
class Streams:
    """An answer in chunks, one for each piece, and then ``after``."""

    pieces: Sequence[bytes]
    pause_s: float = 0.0
    after: str = "end"  # or "hang", or "die" (without the body's end)
    sent: list[bytes] = field(default_factory=list)

    async def __call__(self, _: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD)
        for piece in self.pieces:
            await writer.drain()
            await asyncio.sleep(self.pause_s)
            writer.write(chunk(piece))
            self.sent.append(piece)
        if self.after == "end":
            writer.write(b"0\r\n\r\n")
        elif self.after == "hang":
            await writer.drain()
            await asyncio.Event().wait()
        else:
            await writer.drain()
            writer.close()


def speaks(*texts: str, prompt: int = 5) -> Streams:
    """A good answer."""
    pieces = [token(text) for text in texts]
    return Streams([*pieces, finish(), usage(prompt, len(texts)), DONE])


def says(raw: bytes, *, close: bool = True, then_hang: bool = False) -> Behaviour:
    """These bytes as they are."""

    async def behave(_: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(raw)
        await writer.drain()
        if then_hang:
            await asyncio.Event().wait()
        if close:
            writer.close()

    return behave


def refuses(status: str, body: bytes = b"", **headers: str) -> Behaviour:
    return says(head(status, content_length=str(len(body)), **headers) + body, close=False)


async def hangs(_: Asked, __: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()
