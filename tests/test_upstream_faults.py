"""The upstream engine before servers that hang, lie, die, babble or refuse.

Each is a clear error for that request alone, and nothing of what the server wrote is in it.
"""

from __future__ import annotations

import asyncio
import gzip
import time

import pytest

from fakes import FakeEngine
from fortpoint import errors
from fortpoint.engine.protocol import Token
from fortpoint.engine.upstream import http
from mock_upstream import (
    DONE,
    STREAM_HEAD,
    Behaviour,
    MockUpstream,
    Streams,
    chunk,
    event,
    finish,
    hangs,
    head,
    refuses,
    says,
    speaks,
    token,
)
from test_upstream import ask, asking, events, text

SECRET = "what-the-server-wrote"
ONCE = {"max_attempts": 1}


def _streams(*pieces: bytes) -> Streams:
    return Streams(pieces)


def _says_in_a_stream(raw: bytes) -> Behaviour:
    return says(head(content_type="text/event-stream", content_length=str(len(raw))) + raw)


GARBAGE: dict[str, Behaviour] = {
    "no http": says(b"SSH-2.0-" + SECRET.encode() + b"\r\n\r\n"),
    "nothing": says(b""),
    "half a head": says(b"HTTP/1.1 200 OK\r\ncontent-ty"),
    "html": refuses("200 OK", b"<html>", content_type="text/html"),
    "json": refuses("200 OK", b"{}", content_type="application/json"),
    "no event stream": _streams(SECRET.encode() + b"\n\n"),
    "no json": _streams(b"data: " + SECRET.encode() + b"\n\n"),
    "json of another form": _streams(event(choices={"index": SECRET})),
    "deep json": _streams(b'data: {"choices": ' + b"[" * 100_000 + b"\n\n"),
    "bad utf-8": _streams(b'data: {"choices":[{"delta":{"content":"\xff\xfe"}}]}\n\n'),
    "lone surrogate": _streams(b'data: {"choices":[{"delta":{"content":"\\ud800"}}]}\n\n'),
    "huge number": _streams(event(choices=[], usage={"prompt_tokens": 10**30})),
    "choice not asked for": _streams(token(SECRET, index=7), finish(index=7), DONE),
    "unknown finish reason": _streams(token("x"), finish(SECRET), DONE),
    "text after the finish": _streams(token("x"), finish(), token(SECRET), DONE),
    "done without a finish": _streams(token("x"), DONE),
    "error in the stream": _streams(token("x"), event(error={"message": SECRET})),
    "data after done": _streams(token("x"), finish(), DONE + token(SECRET)),
    "oversized event": _streams(*[b"data: " + b"x" * 65536 for _ in range(20)]),
    "line without end": _streams(*[b"x" * 65536 for _ in range(20)]),
    "compressed": says(
        head(content_type="text/event-stream", content_encoding="gzip")
        + gzip.compress(token("x") + finish() + DONE)
    ),
    "bad chunk": says(STREAM_HEAD + b"zz\r\nwhat\r\n"),
    "chunk that is cut": says(STREAM_HEAD + chunk(token("x")) + b"ff\r\nda"),
    "shorter than announced": says(
        head(content_type="text/event-stream", content_length="9999") + token("x")
    ),
    "length that is no number": says(
        head(content_type="text/event-stream", content_length="many") + token("x")
    ),
    "length below the answer": says(
        head(content_type="text/event-stream", content_length="20") + token("x") + finish() + DONE
    ),
    "two lengths": says(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nx"),
    "long header": says(b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000 + b"\r\n\r\n"),
    "switching protocols": says(b"HTTP/1.1 101 Switching\r\nupgrade: x\r\n\r\n", close=False),
}


@pytest.mark.parametrize("name", GARBAGE)
async def test_upstream_garbage_is_one_request_s_error(name: str) -> None:
    async with MockUpstream(GARBAGE[name], speaks("fine")) as mock, asking(mock, **ONCE) as engine:
        with pytest.raises(errors.EngineError, match="upstream") as failed:
            await events(engine, ask())
        assert SECRET not in str(failed.value)
        assert text(await events(engine, ask())) == "fine"
        assert (await engine.describe()).running == 0


async def test_upstream_endless_headers_are_given_up() -> None:
    async def babble(_: object, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n")
        for number in range(1_000_000):
            writer.write(b"x-%d: %b\r\n" % (number, b"y" * 1000))
            await writer.drain()

    async with MockUpstream(babble) as mock, asking(mock, first_token_timeout_s=1.0) as engine:
        with pytest.raises(errors.EngineError):
            await events(engine, ask())


async def test_upstream_answer_without_end_is_cut_at_its_limit() -> None:
    endless = Streams([token("x" * 500)] * 100, after="hang")
    settings = {"max_answer_bytes": 4096, **ONCE}
    async with MockUpstream(endless) as mock, asking(mock, **settings) as engine:
        with pytest.raises(errors.EngineError, match="too large"):
            await events(engine, ask())
        # A caller can provoke this, so it is not held against the server.
        assert (await engine.describe()).upstreams[0].failures == 0


async def test_upstream_bytes_after_the_answer_never_become_the_next_one() -> None:
    raw = token("first") + finish() + DONE
    good = head(content_type="text/event-stream", content_length=str(len(raw))) + raw
    planted = good.replace(b"first", b"false")

    async def plants(_: object, writer: asyncio.StreamWriter) -> None:
        writer.write(good)
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.write(planted)

    async with MockUpstream(plants, speaks("second")) as mock, asking(mock) as engine:
        assert text(await events(engine, ask())) == "first"
        await asyncio.sleep(0.1)
        assert text(await events(engine, ask())) == "second"


async def test_upstream_redirect_is_not_followed() -> None:
    async with (
        MockUpstream(speaks("elsewhere")) as other,
        MockUpstream(refuses("307 Temporary Redirect", location=other.url)) as mock,
        asking(mock, **ONCE) as engine,
    ):
        with pytest.raises(errors.EngineError, match="not followed"):
            await events(engine, ask())
        assert other.asked == []


@pytest.mark.parametrize(
    ("behaviour", "settings"),
    [
        (hangs, {"first_token_timeout_s": 0.2}),
        (Streams([], after="hang"), {"first_token_timeout_s": 0.2}),
        (Streams([event(choices=[])] * 100, pause_s=0.05), {"first_token_timeout_s": 0.2}),
        (Streams([token("x")], after="hang"), {"idle_timeout_s": 0.2}),
        (Streams([token("x")] * 1000, pause_s=0.01), {"total_timeout_s": 0.3}),
        (says(head("500 Oops", content_length="9") + b"x", then_hang=True), {}),
        (says(head("400 Bad", content_length="9") + b"x", then_hang=True), {}),
    ],
    ids=["no head", "no token", "no text", "idle", "total", "hung 500", "hung 400"],
)
async def test_upstream_that_is_slow_is_given_up(
    behaviour: Behaviour, settings: dict[str, float]
) -> None:
    limits = {"first_token_timeout_s": 0.5, **ONCE, **settings}
    async with MockUpstream(behaviour) as mock, asking(mock, **limits) as engine:
        started = time.monotonic()
        with pytest.raises(errors.FortPointError, match="upstream"):
            await events(engine, ask())
        assert time.monotonic() - started < 3
        async with asyncio.timeout(5):
            await mock.hung_up.wait()


async def test_upstream_that_is_not_there_is_unavailable() -> None:
    async with MockUpstream(hangs) as mock:
        pass
    async with asking(mock, **ONCE) as engine:
        with pytest.raises(errors.EngineUnavailable, match="cannot be reached"):
            await events(engine, ask())


async def test_upstream_connection_that_never_opens_is_given_up() -> None:
    async with asking(MockUpstream(hangs), connect_timeout_s=0.3, **ONCE) as engine:

        async def never(*_: object, **__: object) -> object:
            return await asyncio.Event().wait()

        engine._http._session.connector._wrap_create_connection = never  # type: ignore[union-attr]
        started = time.monotonic()
        with pytest.raises(errors.EngineError, match="upstream"):
            await events(engine, ask())
    assert time.monotonic() - started < 3


@pytest.mark.parametrize(
    ("status", "error"),
    [
        ("400 Bad Request", errors.InvalidRequest),
        ("413 Too Large", errors.InvalidRequest),
        ("422 Unprocessable", errors.InvalidRequest),
        ("401 Unauthorized", errors.EngineError),
        ("404 Not Found", errors.EngineError),
        ("418 Teapot", errors.EngineError),
        ("429 Too Many", errors.EngineBusy),
        ("500 Oops", errors.EngineUnavailable),
        ("503 Away", errors.EngineUnavailable),
        ("204 No Content", errors.EngineError),
    ],
)
async def test_upstream_refusal_says_what_to_do_and_nothing_of_its_text(
    status: str, error: type[errors.FortPointError]
) -> None:
    body = b'{"error": {"message": "%b", "code": "%b"}}' % ((SECRET.encode(),) * 2)
    async with (
        MockUpstream(refuses(status, b"" if status[:3] == "204" else body)) as mock,
        asking(mock, **ONCE) as engine,
    ):
        with pytest.raises(errors.FortPointError) as failed:
            await events(engine, ask())
    assert type(failed.value) is error
    assert SECRET not in str(failed.value)


async def test_upstream_context_that_is_exceeded_keeps_its_meaning() -> None:
    body = b'{"error": {"code": "context_length_exceeded"}}'
    async with MockUpstream(refuses("400 Bad", body)) as mock, asking(mock) as engine:
        with pytest.raises(errors.ContextLengthExceeded):
            await events(engine, ask())
    assert len(mock.asked) == 1


async def test_upstream_failure_is_tried_again_until_the_attempts_are_spent() -> None:
    bad = refuses("500 Oops")
    async with MockUpstream(bad, bad, speaks("x")) as mock, asking(mock) as engine:
        assert text(await events(engine, ask())) == "x"
    assert len(mock.asked) == 3
    async with MockUpstream(bad) as mock, asking(mock, max_attempts=4) as engine:
        with pytest.raises(errors.EngineUnavailable):
            await events(engine, ask())
    assert len(mock.asked) == 4


async def test_upstream_bad_request_is_not_tried_again() -> None:
    async with (
        MockUpstream(refuses("400 Bad")) as mock,
        MockUpstream(speaks("x")) as other,
        asking(mock, other) as engine,
    ):
        with pytest.raises(errors.InvalidRequest):
            await events(engine, ask())
    assert (len(mock.asked), other.asked) == (1, [])


@pytest.mark.parametrize("behaviour", [refuses("500 Oops"), hangs, says(b"junk\r\n\r\n")])
async def test_upstream_that_fails_hands_over_to_the_next(behaviour: Behaviour) -> None:
    async with (
        MockUpstream(behaviour) as first,
        MockUpstream(speaks("second")) as second,
        asking(first, second, first_token_timeout_s=0.3) as engine,
    ):
        assert text(await events(engine, ask())) == "second"


async def test_upstream_that_dies_after_its_first_token_is_not_replaced() -> None:
    async with (
        MockUpstream(Streams([token("a")], after="die")) as first,
        MockUpstream(speaks("b")) as second,
        asking(first, second) as engine,
        await engine.generate(ask()) as stream,
    ):
        await anext(stream)
        assert await anext(stream) == Token("r1", 0, "a")
        with pytest.raises(errors.EngineError):
            await anext(stream)
    assert second.asked == []


async def test_upstream_breaker_leaves_a_failing_server_alone_and_tries_it_later() -> None:
    settings = {"breaker_failures": 2, "breaker_pause_s": 0.3, **ONCE}
    bad = refuses("500 Oops")
    async with MockUpstream(bad, bad, speaks("x")) as mock, asking(mock, **settings) as engine:
        for _ in range(5):
            with pytest.raises(errors.EngineUnavailable):
                await events(engine, ask())
        assert len(mock.asked) == 2
        assert (await engine.describe()).upstreams[0].breaker == "open"
        await asyncio.sleep(0.35)
        assert text(await events(engine, ask())) == "x"
        assert (await engine.describe()).upstreams[0].breaker == "closed"


async def test_upstream_that_asks_for_time_gets_it() -> None:
    busy = refuses("429 Too Many", retry_after="1")
    async with (
        MockUpstream(busy, speaks("first")) as first,
        MockUpstream(speaks("second")) as second,
        asking(first, second) as engine,
    ):
        assert [text(await events(engine, ask())) for _ in range(3)] == ["second"] * 3
        assert len(first.asked) == 1
        assert (await engine.describe()).upstreams[0].failures == 0
        await asyncio.sleep(1.05)
        assert text(await events(engine, ask())) == "first"


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("3", 3.0), ("0", 0.0), ("999999999", 60.0), ("", 1.0), ("-5", 1.0), ("²", 1.0), ("soon", 1)],
)
def test_retry_after_is_a_bounded_number_of_seconds(value: str, seconds: float) -> None:
    assert http._retry_after_s(value) == seconds


async def test_upstream_without_time_left_is_not_blamed() -> None:
    settings = {"total_timeout_s": 0.3, "first_token_timeout_s": 5.0, "breaker_failures": 1}
    async with (
        MockUpstream(hangs) as first,
        MockUpstream(speaks("x")) as second,
        asking(first, second, **settings) as engine,
    ):
        with pytest.raises(errors.EngineError, match="too long"):
            await events(engine, ask())
        assert second.asked == []
        assert {state.breaker for state in (await engine.describe()).upstreams} == {"closed"}


@pytest.mark.parametrize(
    "body",
    [
        b'{"data": []}',
        b'{"data": [{"index": 0, "embedding": [1]}]}',
        b'{"data": [{"index": 0, "embedding": [1]}, {"index": 0, "embedding": [1]}]}',
        b'{"data": [{"index": 0, "embedding": [1]}, {"index": 1, "embedding": [1, 2]}]}',
        b'{"data": [{"index": 0, "embedding": [1e999]}, {"index": 1, "embedding": [1]}]}',
        b'{"data": [{"index": 0, "embedding": "AAAA"}, {"index": 1, "embedding": [1]}]}',
        b"what-the-server-wrote",
    ],
)
async def test_upstream_vectors_that_do_not_fit_are_refused(body: bytes) -> None:
    async with MockUpstream(refuses("200 OK", body)) as mock, asking(mock, **ONCE) as engine:
        with pytest.raises(errors.EngineError, match="upstream") as failed:
            await engine.embed(["a", "b"])
    assert SECRET not in str(failed.value)


async def test_upstream_observer_that_is_down_stops_the_request() -> None:
    observer = FakeEngine()
    observer.down = True
    async with MockUpstream(speaks("x")) as mock, asking(mock, observer=observer) as engine:
        with pytest.raises(errors.EngineUnavailable):
            await events(engine, ask(hold=True, read=True))
        with pytest.raises(errors.EngineUnavailable):
            await engine.describe()
    assert mock.n_connections == 0
