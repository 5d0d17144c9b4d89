"""The upstream engine before servers that behave: what is sent, read, counted, cancelled."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from fakes import FakeEngine
from fortpoint.config import Upstream
from fortpoint.engine.client import Engine
from fortpoint.engine.protocol import (
    Condition,
    Done,
    Event,
    Finished,
    Generate,
    Prefilled,
    Sampling,
    Steer,
    Token,
    Watch,
)
from fortpoint.engine.upstream.engine import UpstreamEngine
from fortpoint.engine.upstream.target import load_targets
from fortpoint.errors import EngineBusy, Unsupported
from fortpoint.types import Message, Role, Usage
from mock_upstream import DONE, MockUpstream, Streams, event, finish, says, speaks, token

KEY = "upstream-key-that-no-log-shows"


@asynccontextmanager
async def asking(
    *mocks: MockUpstream, observer: Engine | None = None, **settings: object
) -> AsyncIterator[UpstreamEngine]:
    config = Upstream(
        urls=tuple(mock.url for mock in mocks),
        model="m",
        api_keys=("env:KEY",),
        **{"backoff_s": 0.0, "first_token_timeout_s": 5.0, **settings},
    )
    engine = UpstreamEngine(config, load_targets(config, {"KEY": KEY}), observer)
    try:
        yield engine
    finally:
        await engine.close()


def ask(hold: bool = False, read: bool = False, **sampling: object) -> Generate:
    return Generate(
        "r1",
        Sampling(**{"max_tokens": 8, **sampling}),  # type: ignore[arg-type]
        messages=(Message(Role.USER, "hello"),),
        hold=hold,
        read=read,
    )


async def events(engine: UpstreamEngine, request: Generate) -> list[Event]:
    async with asyncio.timeout(10), await engine.generate(request) as stream:
        return [one async for one in stream]


def text(found: list[Event], choice: int = 0) -> str:
    return "".join(e.text for e in found if isinstance(e, Token) and e.choice == choice)


async def test_upstream_answer_arrives_as_events_in_order() -> None:
    async with MockUpstream(speaks("Gol", "den")) as mock, asking(mock) as engine:
        found = await events(engine, ask())
    assert isinstance(found[0], Prefilled)
    assert text(found) == "Golden"
    assert found[-2:] == [Finished("r1", 0, "stop"), Done("r1", Usage(5, 2))]


async def test_upstream_is_sent_what_was_asked_and_its_key_alone() -> None:
    request = ask(temperature=0.5, top_p=0.9, seed=7, n=1, stop=("END",), presence_penalty=0.5)
    async with MockUpstream(speaks("x")) as mock, asking(mock) as engine:
        await events(engine, request)
    asked = mock.asked[0]
    assert asked.path == "/v1/chat/completions"
    assert asked.headers["authorization"] == f"Bearer {KEY}"
    assert not {"cookie", "referer", "x-request-id"} & set(asked.headers)
    assert asked.body == {
        "model": "m",
        "messages": [{"role": "user", "content": "hello"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 8,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 7,
        "stop": ["END"],
        "presence_penalty": 0.5,
    }


async def test_upstream_raw_prompt_is_asked_as_a_completion() -> None:
    pieces = [event(choices=[{"index": 0, "text": "x"}]), finish(), DONE]
    async with MockUpstream(Streams(pieces)) as mock, asking(mock) as engine:
        found = await events(engine, Generate("r", Sampling(8), prompt="Once", hold=False))
    assert mock.asked[0].path == "/v1/completions"
    assert mock.asked[0].body["prompt"] == "Once"
    assert text(found) == "x"


async def test_upstream_tokens_leave_before_the_answer_ends() -> None:
    slow = Streams([token("a"), token("b"), finish(), DONE], pause_s=0.05)
    async with (
        MockUpstream(slow) as mock,
        asking(mock) as engine,
        await engine.generate(ask()) as stream,
    ):
        first = [await anext(stream), await anext(stream)]
        assert isinstance(first[1], Token)
        assert DONE not in slow.sent


async def test_upstream_choices_are_kept_apart() -> None:
    pieces = [token("a", 0), token("b", 1), finish("stop", 1), token("c", 0), finish("length", 0)]
    async with MockUpstream(Streams([*pieces, DONE])) as mock, asking(mock) as engine:
        found = await events(engine, ask(n=2))
    assert (text(found, 0), text(found, 1)) == ("ac", "b")
    assert Finished("r1", 0, "length") in found


async def test_upstream_events_cut_at_any_byte_are_read_alike() -> None:
    whole = b"".join([token("Gol"), b": a comment\n\n", token("dén"), finish(), DONE])
    for size in (1, 7, 64):
        pieces = [whole[at : at + size] for at in range(0, len(whole), size)]
        async with MockUpstream(Streams(pieces)) as mock, asking(mock) as engine:
            assert text(await events(engine, ask())) == "Goldén"


async def test_upstream_without_counts_gets_an_estimate_that_says_so() -> None:
    pieces = [token("golden gate"), finish(), DONE]
    async with MockUpstream(Streams(pieces)) as mock, asking(mock) as engine:
        done = (await events(engine, ask()))[-1]
    assert done == Done("r1", Usage(6, 3, estimated=True))


@pytest.mark.parametrize("counts", [(2**31 - 1, 1), (1, 1_000_000)])
async def test_upstream_count_that_cannot_be_is_not_charged(counts: tuple[int, int]) -> None:
    told = event(choices=[], usage={"prompt_tokens": counts[0], "completion_tokens": counts[1]})
    pieces = [token("x"), finish(), told, DONE]
    async with MockUpstream(Streams(pieces)) as mock, asking(mock) as engine:
        done = (await events(engine, ask()))[-1]
    assert isinstance(done, Done)
    assert done.usage.estimated is True
    assert done.usage.prompt + done.usage.completion < 20


async def test_upstream_logprobs_are_no_more_than_asked_for() -> None:
    top = [{"token": t, "logprob": -1.0} for t in "abcdef"]
    scored = {"content": [{"token": "x", "logprob": -0.5, "top_logprobs": top}]}
    pieces = [token("x", logprobs=scored), finish(), DONE]
    async with MockUpstream(Streams(pieces)) as mock, asking(mock) as engine:
        asked = next(e for e in await events(engine, ask(logprobs=2)) if isinstance(e, Token))
        unasked = next(e for e in await events(engine, ask()) if isinstance(e, Token))
    assert asked.logprob == -0.5
    assert asked.top == (("a", -1.0), ("b", -1.0))
    assert unasked == Token("r1", 0, "x")


async def test_upstream_connection_is_used_again() -> None:
    async with MockUpstream(speaks("x")) as mock, asking(mock) as engine:
        for _ in range(5):
            await events(engine, ask())
    assert mock.n_connections == 1


@pytest.mark.parametrize(
    "inside",
    [
        {"steer": (Steer("add", "d", 1.0),)},
        {"stop_when": (Condition("d", 1.0),)},
        {"watch": Watch(("d",))},
        {"adapter": "a"},
        {"sampling": Sampling(8, top_k=5)},
    ],
)
async def test_upstream_cannot_do_what_needs_a_model_of_our_own(inside: dict[str, object]) -> None:
    wanted = {"sampling": Sampling(8), "prompt": "x", **inside}
    async with MockUpstream(speaks("x")) as mock, asking(mock) as engine:
        with pytest.raises(Unsupported):
            await engine.generate(Generate("r", **wanted))  # type: ignore[arg-type]
    assert mock.asked == []


async def test_upstream_gets_no_byte_before_proceed() -> None:
    observer = FakeEngine()
    async with (
        MockUpstream(speaks("x")) as mock,
        asking(mock, observer=observer) as engine,
        await engine.generate(ask(hold=True, read=True)) as stream,
    ):
        prefilled = await anext(stream)
        waiting = asyncio.create_task(anext(stream))
        await asyncio.sleep(0.05)
        assert mock.n_connections == 0
        assert not waiting.done()
        await stream.proceed()
        assert isinstance(await waiting, Token)
    assert isinstance(prefilled, Prefilled)
    assert prefilled.reading is not None
    assert prefilled.reading.probes == ("jailbreak",)
    assert observer.scanned == [(Message(Role.USER, "hello"),)]


async def test_upstream_stream_closed_before_proceed_asks_nobody() -> None:
    async with MockUpstream(speaks("x")) as mock, asking(mock) as engine:
        async with await engine.generate(ask(hold=True)) as stream:
            await anext(stream)
        assert (await engine.describe()).running == 0
    assert mock.n_connections == 0


async def test_upstream_stream_closed_early_closes_its_connection() -> None:
    endless = Streams([token("x")], after="hang")
    async with MockUpstream(endless) as mock, asking(mock) as engine:
        async with await engine.generate(ask()) as stream:
            await anext(stream)
            await anext(stream)
            await stream.aclose()
            await stream.aclose()
        async with asyncio.timeout(5):
            await mock.hung_up.wait()
        assert (await engine.describe()).running == 0


async def test_upstream_cancelled_while_waiting_closes_its_connection() -> None:
    async with MockUpstream(Streams([], after="hang")) as mock, asking(mock) as engine:
        task = asyncio.create_task(events(engine, ask()))
        while not mock.asked:
            await asyncio.sleep(0.005)
        task.cancel()
        async with asyncio.timeout(5):
            await mock.hung_up.wait()
        assert (await engine.describe()).upstreams[0].failures == 0


async def test_upstream_places_are_limited() -> None:
    endless = Streams([token("x")], after="hang")
    async with (
        MockUpstream(endless) as mock,
        asking(mock, max_concurrent=1) as engine,
        await engine.generate(ask()) as stream,
    ):
        await anext(stream)
        await anext(stream)
        with pytest.raises(EngineBusy):
            await events(engine, ask())


async def test_upstream_many_at_once_end_alike() -> None:
    async with MockUpstream(speaks("a", "b", "c")) as mock, asking(mock) as engine:
        found = await asyncio.gather(*(events(engine, ask()) for _ in range(50)))
    assert {text(one) for one in found} == {"abc"}


async def test_upstream_end_is_not_waited_for_when_the_connection_stays_open() -> None:
    open_ended = Streams([token("x"), finish(), DONE], after="hang")
    async with MockUpstream(open_ended) as mock, asking(mock) as engine:
        started = time.monotonic()
        assert text(await events(engine, ask())) == "x"
    assert time.monotonic() - started < 2


async def test_upstream_embeddings_come_in_the_order_of_the_texts() -> None:
    body = (
        b'{"data": [{"index": 1, "embedding": [3, 4]}, {"index": 0, "embedding": [1, 2]}],'
        b' "usage": {"prompt_tokens": 4}}'
    )
    head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body)
    async with MockUpstream(says(head + body, close=False)) as mock, asking(mock) as engine:
        found = await engine.embed(["a", "b"])
    assert mock.asked[0].path == "/v1/embeddings"
    assert found.vectors == ((1.0, 2.0), (3.0, 4.0))
    assert found.usage == Usage(4)


async def test_upstream_key_is_never_shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    junk = says(b"HTTP/1.1 500 " + KEY.encode() + b"\r\ncontent-length: 0\r\n\r\n")
    async with MockUpstream(junk) as mock, asking(mock) as engine:
        with pytest.raises(Exception, match="upstream") as failed:
            await events(engine, ask())
        shown = [repr(engine._failover.servers), str(await engine.describe()), caplog.text]
    assert mock.asked[0].headers["authorization"].endswith(KEY)
    assert KEY not in "".join([*shown, str(failed.value), repr(failed.value)])
