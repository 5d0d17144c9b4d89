"""The engine's socket over the reference model: who asked gets the events, and nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from engine_bench import Bench, ask, make_folder
from fortpoint import errors
from fortpoint.engine import protocol
from fortpoint.engine.client import EngineClient
from fortpoint.engine.protocol import (
    Cancel,
    Description,
    Done,
    Event,
    Generate,
    Proceed,
    Request,
    ScoreText,
    Token,
    Watch,
)
from fortpoint.engine.runner import Runner
from fortpoint.engine.sequence import Sent
from fortpoint.engine.server import EngineServer
from fortpoint.types import Message, Role


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("server"))


class Served:
    """A bench whose runner has its own thread, behind a socket."""

    def __init__(self, folder: Path, path: Path) -> None:
        self.bench = Bench(folder)
        self.path = path
        self.crashed = asyncio.Event()
        loop = asyncio.get_running_loop()

        def deliver(sent: list[Sent]) -> None:
            loop.call_soon_threadsafe(self.server.deliver, sent)

        bench = self.bench
        self.runner = Runner(
            bench.model,
            bench.tokenizer,
            bench.intake._taps,
            bench.scheduler,
            deliver,
            lambda: loop.call_soon_threadsafe(self.crashed.set),
        )
        self.server = EngineServer(self.runner, bench.intake, self._describe)

    def _describe(self, request_id: str) -> Description:
        running, waiting = self.runner.n_running, self.runner.n_waiting
        numbers = {"max_context": 512, "created": 0, "pid": 0}
        return Description(
            request_id, "tiny", "", "llama", "float32",
            running=running, waiting=waiting, protections={}, **numbers,
        )  # fmt: skip


@pytest.fixture
async def served(folder: Path, tmp_path: Path) -> AsyncIterator[Served]:
    made = Served(folder, tmp_path / "e.sock")
    server = await asyncio.start_unix_server(made.server.handle, made.path)
    made.runner.start()
    yield made
    server.close()
    await made.server.close()
    made.runner.stop()


@pytest.fixture
async def client(served: Served) -> AsyncIterator[EngineClient]:
    made = EngineClient(served.path)
    yield made
    await made.close()


class Wire:
    """A connection that sees every frame."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, served: Served) -> Wire:
        return cls(*await asyncio.open_unix_connection(served.path))

    def send(self, *requests: Request) -> None:
        self._writer.write(b"".join(protocol.encode(request) for request in requests))

    async def event(self) -> Event | None:
        async with asyncio.timeout(10):
            return await protocol.read_event(self._reader)

    async def until(self, kind: type, request_id: str) -> list[Event]:
        events: list[Event] = []
        while not events or not (isinstance(events[-1], kind) and events[-1].id == request_id):
            event = await self.event()
            assert event is not None
            events.append(event)
        return events

    async def close(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()


async def _text(client: EngineClient, request: Generate) -> str:
    async with await client.generate(request) as stream:
        return "".join([event.text async for event in stream if isinstance(event, Token)])


async def test_many_requests_get_their_own_answers(client: EngineClient, folder: Path) -> None:
    requests = [ask(f"r{i}", f"hello {i % 3}", temperature=1.0, seed=i % 3) for i in range(12)]
    texts = await asyncio.gather(*(_text(client, request) for request in requests))
    for i, request in enumerate(requests[:3]):
        bench = Bench(folder)
        bench.submit(request)
        bench.run()
        assert {text for j, text in enumerate(texts) if j % 3 == i} == {bench.text(f"r{i}")}


async def test_events_of_a_step_are_one_write(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[list[type]] = []
    wire = await Wire.open(served)
    connection = served.server._connections
    while not connection:
        await asyncio.sleep(0.01)
    (peer,) = connection
    write = peer.writer.write

    def counted(frames: bytes) -> None:
        kinds, rest = [], frames
        while rest:
            n = 4 + int.from_bytes(rest[:4], "big")
            kinds.append(type(protocol._event_decoder.decode(rest[4:n])))
            rest = rest[n:]
        writes.append(kinds)
        write(frames)

    monkeypatch.setattr(peer.writer, "write", counted)
    wire.send(ask("r", "hello", max_tokens=30, temperature=1.0, seed=1, n=4))
    await wire.until(Done, "r")
    assert [Token] * 4 in writes
    await wire.close()


async def test_cancelled_request_sends_nothing_to_its_successor(served: Served) -> None:
    wire = await Wire.open(served)
    for _ in range(20):
        wire.send(ask("same", "hello", max_tokens=400))
        await wire.until(Token, "same")
        wire.send(Cancel("same"), ask("same", "x", max_tokens=2, logprobs=0))
        events = await wire.until(Done, "same")
        last = [event for event in events if isinstance(event, Token)][-2:]
        assert all(token.logprob is not None for token in last)
        assert isinstance(events[-1], Done)
        assert events[-1].usage.completion == 2
    await wire.close()


async def test_id_in_use_hangs_up_and_frees_its_places(served: Served) -> None:
    wire = await Wire.open(served)
    wire.send(ask("r", "hello", max_tokens=400), ask("r", "hello"))
    while await wire.event() is not None:
        pass
    await wire.close()
    async with asyncio.timeout(10):
        while served.runner.n_running or served.runner.n_waiting:
            await asyncio.sleep(0.01)


async def test_held_request_waits_for_leave(served: Served) -> None:
    wire = await Wire.open(served)
    wire.send(ask("r", "hello", hold=True, max_tokens=3))
    await wire.until(protocol.Prefilled, "r")
    wire.send(Proceed("r"))
    assert len(await wire.until(Done, "r")) == 5
    await wire.close()


async def test_request_that_breaks_the_intake_fails_alone(
    served: Served, client: EngineClient, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    prepare = served.bench.intake.prepare

    def broken(job: Any) -> None:
        if job.request.id == "bad":
            raise KeyError("secret text")
        prepare(job)

    monkeypatch.setattr(served.bench.intake, "prepare", broken)
    with pytest.raises(errors.EngineError, match="failed on this request"):
        await _text(client, ask("bad", "hello"))
    assert await _text(client, ask("good", "hello"))
    assert "secret" not in capfd.readouterr().err


async def test_event_too_large_for_a_frame_ends_its_request(
    served: Served, client: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "MAX_FRAME_BYTES", 20_000)
    watch = Watch(("sae",), top=64)
    with pytest.raises(errors.EngineError, match="too large"):
        await _text(client, ask("big", "x" * 200, max_tokens=400, watch=watch))
    assert await _text(client, ask("small", "x"))
    async with asyncio.timeout(10):
        while served.runner.n_running:
            await asyncio.sleep(0.01)


async def test_scores_come_over_the_socket(client: EngineClient) -> None:
    scored = await client.score(ScoreText("s", " there", prompt="hello"))
    assert "".join(scored.tokens) == " there"
    assert all(logprob < 0 for logprob in scored.logprobs)
    with pytest.raises(errors.InvalidRequest, match="nothing to score"):
        await client.score(ScoreText("t", "", prompt="hello"))


async def test_refusals_keep_their_kind(client: EngineClient) -> None:
    with pytest.raises(errors.InvalidRequest, match="no adapter"):
        await _text(client, ask("a", "hello", adapter="absent"))
    with pytest.raises(errors.InvalidRequest, match="at most 8 answers"):
        await _text(client, ask("n", "hello", n=9))
    with pytest.raises(errors.ContextLengthExceeded):
        await client.scan([Message(Role.USER, "x" * 600)])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_compute_thread_that_dies_says_so(
    served: Served, client: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served.bench.scheduler, "plan", lambda: 1 / 0)
    stream = await client.generate(ask("r", "hello"))
    async with asyncio.timeout(10):
        await served.crashed.wait()
    await stream.aclose()
