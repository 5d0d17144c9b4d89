"""A fake engine behind a real socket, in a thread: for commands, which have loops of their own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from fakes import FakeEngine
from fortpoint.engine import protocol
from fortpoint.engine.protocol import Describe, Event, Failed, Generate, ScoreText
from fortpoint.errors import FortPointError


@contextmanager
def listening(home: Path, engine: FakeEngine) -> Iterator[FakeEngine]:
    """``engine`` at the place where a home's server has its engine."""
    path = home / "run" / "engine.sock"
    path.parent.mkdir(parents=True, exist_ok=True)
    started, stop = threading.Event(), threading.Event()

    async def serve() -> None:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            tasks: list[asyncio.Task[None]] = []
            while (request := await protocol.read_request(reader)) is not None:
                tasks.append(asyncio.create_task(_answer(engine, request, writer)))
            writer.close()

        server = await asyncio.start_unix_server(handle, path)
        started.set()
        while not stop.is_set():
            await asyncio.sleep(0.01)
        server.close()
        await asyncio.sleep(0.02)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert started.wait(5)
    try:
        yield engine
    finally:
        stop.set()
        thread.join(timeout=5)


async def _answer(
    engine: FakeEngine, request: protocol.Request, writer: asyncio.StreamWriter
) -> None:
    def send(event: Event) -> None:
        writer.write(protocol.encode(event))

    try:
        if isinstance(request, Describe):
            send(msgspec.structs.replace(await engine.describe(), id=request.id))
        elif isinstance(request, ScoreText):
            send(await engine.score(request))
        elif isinstance(request, Generate):
            async for event in await engine.generate(request):
                send(event)
    except FortPointError as error:
        send(Failed(request.id, error.code, error.message))
