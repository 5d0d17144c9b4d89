"""The engine's socket: frames in, jobs to the runner, events out.

A connection owns what it asked for: when it closes, or breaks the protocol, or stops
reading its events, all of its jobs are cancelled and nobody else notices.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from fortpoint.engine import protocol
from fortpoint.engine.chat import ChatTokenizer, Prompt
from fortpoint.engine.protocol import (
    Cancel,
    Describe,
    Description,
    Embed,
    Event,
    Failed,
    Generate,
    Proceed,
    Scan,
    ScoreText,
)
from fortpoint.engine.runner import Runner
from fortpoint.engine.sequence import Job
from fortpoint.errors import (
    ContextLengthExceeded,
    EngineError,
    FortPointError,
    InvalidRequest,
)

_MAX_UNREAD_BYTES = 8 * 1024 * 1024


class EngineServer:
    """Serves connections. ``describe`` fills in the answer to ``Describe``."""

    def __init__(
        self,
        runner: Runner,
        tokenizer: ChatTokenizer,
        max_context: int,
        describe: Callable[[str], Description],
    ) -> None:
        self._runner = runner
        self._tokenizer = tokenizer
        self._max_context = max_context
        self._describe = describe
        self._connections: dict[asyncio.StreamWriter, asyncio.Task[None] | None] = {}

    async def close(self) -> None:
        """Hang up on everybody and wait until their jobs are cancelled."""
        for writer in self._connections:
            writer.close()
        tasks = [task for task in self._connections.values() if task is not None]
        await asyncio.gather(*tasks, return_exceptions=True)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until it ends."""
        self._connections[writer] = asyncio.current_task()
        jobs: dict[str, Job] = {}
        tasks: set[asyncio.Task[None]] = set()
        loop = asyncio.get_running_loop()

        def write(event: Event) -> None:
            if isinstance(event, protocol.LAST):
                jobs.pop(event.id, None)
            if writer.is_closing():
                return
            writer.write(protocol.encode(event))
            if writer.transport.get_write_buffer_size() > _MAX_UNREAD_BYTES:
                writer.transport.abort()

        def emit(event: Event) -> None:  # called from the compute thread
            loop.call_soon_threadsafe(write, event)

        try:
            while (request := await protocol.read_request(reader)) is not None:
                if isinstance(request, Generate | Scan | Embed):
                    if request.id in jobs:
                        raise EngineError("this request id is in use")
                    jobs[request.id] = Job(request, (), emit)
                    task = asyncio.create_task(self._submit(jobs[request.id], write))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                else:
                    self._obey(request, jobs, write)
        except EngineError:
            pass  # not our protocol: hang up
        finally:
            for job in jobs.values():
                self._runner.cancel(job)
            writer.close()
            del self._connections[writer]

    def _obey(
        self,
        request: Describe | Cancel | Proceed | ScoreText,
        jobs: dict[str, Job],
        write: Callable[[Event], None],
    ) -> None:
        match request:
            case Describe():
                write(self._describe(request.id))
            case ScoreText():
                write(Failed(request.id, "unsupported", "scoring is not there yet"))
            case Cancel():
                if job := jobs.pop(request.id, None):
                    self._runner.cancel(job)
            case Proceed():
                if job := jobs.get(request.id):
                    self._runner.proceed(job)

    async def _submit(self, job: Job, write: Callable[[Event], None]) -> None:
        """Make tokens in a thread (a long text must not hold up the rest), then queue."""
        try:
            job.prompts = await asyncio.to_thread(self._prompts, job.request)
        except FortPointError as error:
            write(Failed(job.request.id, error.code, error.message))
            return
        self._runner.submit(job)

    def _prompts(self, request: Generate | Scan | Embed) -> tuple[Prompt, ...]:
        match request:
            case Embed(texts=texts):
                prompts = tuple(self._tokenizer.text(text) for text in texts)
            case Generate(prompt=str(text)):
                prompts = (self._tokenizer.text(text),)
            case Generate(messages=messages) | Scan(messages=messages):
                prompts = (self._tokenizer.chat(messages or ()),)
        answer_tokens = 1 if isinstance(request, Generate) else 0
        for prompt in prompts:
            if not prompt.tokens:
                raise InvalidRequest("a text has no tokens; send at least one character")
            if len(prompt.tokens) + answer_tokens > self._max_context:
                raise ContextLengthExceeded(
                    f"this model's context holds {self._max_context} tokens, "
                    f"the prompt has {len(prompt.tokens)}; shorten it"
                )
        if not prompts:
            raise InvalidRequest("there is no text to read")
        return prompts
