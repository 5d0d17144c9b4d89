"""What the gateway relies on of any engine, tried on each: fake, upstream, embedded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

import tiny_model
from fakes import FakeEngine
from fortpoint.engine.client import Engine, EngineClient
from fortpoint.engine.protocol import (
    Description,
    Done,
    Event,
    Finished,
    Generate,
    Prefilled,
    Sampling,
    Token,
)
from fortpoint.types import Message, Role
from mock_upstream import DONE, MockUpstream, Streams, event, finish, token
from test_engine_process import ready, spawn
from test_upstream import asking

MOST_TOKENS = 3
MESSAGES = (Message(Role.SYSTEM, "Be brief."), Message(Role.USER, "hello"))


@asynccontextmanager
async def _fake(_: Path) -> AsyncIterator[Engine]:
    yield FakeEngine()


@asynccontextmanager
async def _upstream(_: Path) -> AsyncIterator[Engine]:
    observer = FakeEngine()

    async def answer(asked, writer) -> None:
        n, most = asked.body.get("n", 1), asked.body["max_tokens"]
        texts = [token("x", index) for _ in range(most) for index in range(n)]
        told = event(choices=[], usage={"prompt_tokens": 9, "completion_tokens": most * n})
        ends = [finish("length", index) for index in range(n)]
        await Streams([*texts, *ends, told, DONE], pause_s=0.005)(asked, writer)

    async with MockUpstream(answer) as mock, asking(mock, observer=observer) as engine:
        yield engine


@asynccontextmanager
async def _embedded(folder: Path) -> AsyncIterator[Engine]:
    process = await asyncio.to_thread(spawn, folder, tiny_model.make(folder / "tiny"))
    client = EngineClient(folder / "e.sock")
    try:
        await ready(client)
        yield client
    finally:
        await client.close()
        process.kill()
        process.communicate()


@pytest.fixture(
    params=[_fake, _upstream, pytest.param(_embedded, marks=pytest.mark.model)],
    ids=["fake", "upstream", "embedded"],
)
async def engine(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Engine]:
    opened: Callable[[Path], AbstractAsyncContextManager[Engine]] = request.param
    async with opened(tmp_path) as engine:
        yield engine


def _ask(name: str = "r", *, hold: bool = False, n: int = 1, most: int = MOST_TOKENS) -> Generate:
    return Generate(name, Sampling(most, 0.0, n=n), messages=MESSAGES, hold=hold)


async def _events(engine: Engine, request: Generate) -> list[Event]:
    async with asyncio.timeout(30), await engine.generate(request) as stream:
        return [one async for one in stream]


@pytest.mark.parametrize("n", [1, 3])
async def test_engine_answer_has_one_beginning_one_end_and_each_choice_s_own(
    engine: Engine, n: int
) -> None:
    found = await _events(engine, _ask(n=n))
    kinds = [type(one) for one in found]
    assert kinds[0] is Prefilled
    assert kinds[-1] is Done
    assert set(kinds[1:-1]) <= {Token, Finished}
    assert sorted(e.choice for e in found if isinstance(e, Finished)) == list(range(n))
    for choice in range(n):
        own = [e for e in found if isinstance(e, Token | Finished) and e.choice == choice]
        assert isinstance(own[-1], Finished)
        assert own[-1].reason in {"stop", "length"}
    assert {one.id for one in found} == {"r"}  # type: ignore[union-attr]


async def test_engine_counts_what_it_sent(engine: Engine) -> None:
    found = await _events(engine, _ask(n=2))
    done, prefilled = found[-1], found[0]
    assert isinstance(done, Done)
    assert isinstance(prefilled, Prefilled)
    assert prefilled.n_prompt_tokens > 0
    assert done.usage.prompt > 0
    assert done.usage.completion == sum(isinstance(one, Token) for one in found) > 0


async def test_engine_holds_until_it_may_proceed(engine: Engine) -> None:
    async with await engine.generate(_ask(hold=True)) as stream:
        assert isinstance(await anext(stream), Prefilled)
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        await stream.proceed()
        async with asyncio.timeout(10):
            assert isinstance(await waiting, Token)


async def test_engine_reads_the_prompt_where_asked(engine: Engine) -> None:
    async with await engine.generate(_ask(hold=True)) as stream:
        first = await anext(stream)
    assert isinstance(first, Prefilled)
    assert first.reading is not None


async def test_engine_stream_may_be_closed_at_any_time_and_twice(engine: Engine) -> None:
    for n_read in (0, 1, 2):
        stream = await engine.generate(_ask(f"r{n_read}", most=200))
        for _ in range(n_read):
            await anext(stream)
        await stream.aclose()
        await stream.aclose()
    async with asyncio.timeout(10):
        while (await engine.describe()).running:
            await asyncio.sleep(0.01)
    assert isinstance((await _events(engine, _ask("after")))[-1], Done)


async def test_engine_answers_many_at_once(engine: Engine) -> None:
    answers = await asyncio.gather(*(_events(engine, _ask(f"r{i}")) for i in range(8)))
    assert all(isinstance(found[-1], Done) for found in answers)


async def test_engine_scans_a_conversation_with_all_its_tokens(engine: Engine) -> None:
    scanned = await engine.scan(MESSAGES)
    assert scanned.usage.prompt == scanned.reading.n_tokens > 0


async def test_engine_describes_itself(engine: Engine) -> None:
    found = await engine.describe()
    assert isinstance(found, Description)
    assert found.model
    assert found.digest
    assert found.running == 0


async def test_engine_that_was_closed_is_closed_again_without_harm(engine: Engine) -> None:
    await engine.describe()
    await engine.close()
    await engine.close()
