"""The engine's socket: frames in, jobs to the runner, events out.

A connection owns what it asked for: when it closes, or breaks the protocol, or stops
reading its events, all of its jobs are cancelled and nobody else notices. All events of a step
that go to one connection are one write.
"""

from __future__ import annotations

import asyncio
import sys
from collections import defaultdict
from collections.abc import Callable, Coroutine
from collections.abc import Sequence as Many

from fortpoint.engine import protocol
from fortpoint.engine.intake import Intake
from fortpoint.engine.protocol import (
    Cancel,
    Describe,
    Description,
    Embed,
    Event,
    Failed,
    Generate,
    Proceed,
    Request,
    Scan,
    ScoreText,
)
from fortpoint.engine.runner import Runner
from fortpoint.engine.sequence import Job, Sent
from fortpoint.errors import EngineError, FortPointError

_MAX_UNREAD_BYTES = 8 * 1024 * 1024


class EngineServer:
    """Serves connections. ``describe`` fills in the answer to ``Describe``."""

    def __init__(
        self, runner: Runner, intake: Intake, describe: Callable[[str], Description]
    ) -> None:
        self._runner = runner
        self._intake = intake
        self._describe = describe
        self._connections: dict[_Connection, asyncio.Task[None] | None] = {}
        self._owners: dict[Job, _Connection] = {}

    async def close(self) -> None:
        """Hang up on everybody and wait until their jobs are cancelled."""
        for connection in self._connections:
            connection.writer.close()
        tasks = [task for task in self._connections.values() if task is not None]
        await asyncio.gather(*tasks, return_exceptions=True)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until it ends."""
        connection = _Connection(writer)
        self._connections[connection] = asyncio.current_task()
        try:
            while (request := await protocol.read_request(reader)) is not None:
                self._obey(request, connection)
        except EngineError:
            pass  # not our protocol: hang up
        finally:
            for job in list(connection.jobs.values()):
                self._forget(job)
                self._runner.cancel(job)
            writer.close()
            del self._connections[connection]

    def deliver(self, sent: Many[Sent]) -> None:
        """Write a step's events; those of requests that are cancelled or gone are dropped."""
        frames: defaultdict[_Connection, list[bytes]] = defaultdict(list)
        for job, event in sent:
            owner = self._owners.get(job)
            if owner is None:
                continue
            if isinstance(event, protocol.LAST):
                self._forget(job)
            frames[owner].append(self._frame(job, event))
        for connection, ready in frames.items():
            connection.write(b"".join(ready))

    def _frame(self, job: Job, event: Event) -> bytes:
        """The event; in place of one too large for a frame (a huge reading), the job's end."""
        try:
            return protocol.encode(event)
        except EngineError as error:
            self._forget(job)
            self._runner.cancel(job)
            return protocol.encode(Failed(event.id, error.code, error.message))

    def _obey(self, request: Request, connection: _Connection) -> None:
        match request:
            case Generate() | Scan() | Embed() | ScoreText():
                if request.id in connection.jobs:
                    raise EngineError("this request id is in use")
                job = Job(request)
                connection.jobs[request.id] = job
                self._owners[job] = connection
                connection.begin(self._submit(job))
            case Describe():
                connection.write(protocol.encode(self._describe(request.id)))
            case Cancel():
                if asked := connection.jobs.get(request.id):
                    self._cancel(asked, request.choice)
            case Proceed():
                if asked := connection.jobs.get(request.id):
                    self._runner.proceed(asked)

    def _cancel(self, job: Job, choice: int | None) -> None:
        if choice is None:
            self._forget(job)
            self._runner.cancel(job)
        else:
            self._runner.drop(job, choice)

    async def _submit(self, job: Job) -> None:
        """Prepare in a thread (a long text must not hold up the rest), then queue."""
        try:
            await asyncio.to_thread(self._intake.prepare, job)
        except FortPointError as error:
            self._refuse(job, error)
        except Exception as error:  # noqa: BLE001 - the edge: the request fails, closed
            print(f"engine: a request failed: {type(error).__name__}", file=sys.stderr, flush=True)
            self._refuse(job, EngineError("the engine failed on this request"))
        else:
            self._runner.submit(job)

    def _refuse(self, job: Job, error: FortPointError) -> None:
        self.deliver([Sent(job, Failed(job.request.id, error.code, error.message))])

    def _forget(self, job: Job) -> None:
        if owner := self._owners.pop(job, None):
            owner.jobs.pop(job.request.id, None)


class _Connection:
    """One peer: what it asked for and has not got, and its socket."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.jobs: dict[str, Job] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, submission: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(submission)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def write(self, frames: bytes) -> None:
        if self.writer.is_closing():
            return
        self.writer.write(frames)
        if self.writer.transport.get_write_buffer_size() > _MAX_UNREAD_BYTES:
            self.writer.transport.abort()
