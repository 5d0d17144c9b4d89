"""A second stage that is slow, wrong, too loud or gone has failed; nothing of it is shown."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from fortpoint.guard.policy import SecondStagePolicy
from fortpoint.guard.second_stage import MAX_ANSWER_BYTES, HttpSecondStage, SecondStageFailed

_KEY = "Bearer very-secret-key"

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class _Other:
    """A server that answers as it is told, and remembers what it was asked."""

    def __init__(self) -> None:
        self.answer: Answer = _said({"results": [{"flagged": True, "category_scores": {}}]})
        self.asked: list[tuple[str, dict[str, object], str | None]] = []
        self.url = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(
            (request.path, await request.json(), request.headers.get("authorization"))
        )
        return await self.answer(request)


def _said(body: object, status: int = 200, **headers: str) -> Answer:
    async def answer(_request: web.Request) -> web.StreamResponse:
        return web.Response(body=json.dumps(body).encode(), status=status, headers=headers)

    return answer


@pytest.fixture
async def other() -> AsyncIterator[_Other]:
    other = _Other()
    app = web.Application(client_max_size=2**24)
    app.router.add_post("/{path:.*}", other.handle)
    server = TestServer(app)
    await server.start_server()
    other.url = f"http://127.0.0.1:{server.port}/v1"
    yield other
    await server.close()


async def _ask(other: _Other, text: str = "a text", **settings) -> float:
    stage = HttpSecondStage(SecondStagePolicy(url=other.url, **settings), _KEY)
    try:
        return await stage.ask(text)
    finally:
        await stage.close()


async def test_ask_moderations_takes_the_highest_score_and_the_flag(other):
    assert await _ask(other, model="m") == 1.0
    assert other.asked == [("/v1/moderations", {"input": "a text", "model": "m"}, _KEY)]
    scores = {"a": 0.25, "b": 0.75}
    other.answer = _said({"results": [{"flagged": False, "category_scores": scores}]})
    assert await _ask(other) == 0.75


@pytest.mark.parametrize(
    ("said", "score"), [("unsafe\nS1", 1.0), ("safe", 0.0), (" Safety: Unsafe\nCategories", 1.0)]
)
async def test_ask_guard_model_is_read_by_its_first_word(other, said, score):
    other.answer = _said({"choices": [{"message": {"content": said}}]})
    assert await _ask(other, kind="chat", model="guard") == score
    assert other.asked[0][0] == "/v1/chat/completions"


async def _hangs(_request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(30)
    return web.Response()


async def _floods(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    for _ in range(64):
        await response.write(b" " * (MAX_ANSWER_BYTES // 16))
    return response


async def _trickles(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    for _ in range(100):
        await response.write(b" ")
        await asyncio.sleep(0.05)
    return response


_TROUBLE: dict[str, Answer] = {
    "hangs": _hangs,
    "floods": _floods,
    "trickles": _trickles,
    "error": _said({"error": _KEY}, status=500),
    "redirect": _said({}, status=302, location="/v2/moderations"),
    "not json": _said("<html>"),
    "no result": _said({"results": []}),
    "two results": _said({"results": [{"flagged": False}, {"flagged": True}]}),
    "no number": _said({"results": [{"category_scores": {"a": "high"}}]}),
}


@pytest.mark.parametrize("trouble", _TROUBLE)
async def test_ask_that_gets_no_answer_in_time_and_form_has_failed(other, trouble):
    other.answer = _TROUBLE[trouble]
    with pytest.raises(SecondStageFailed) as failed:
        await _ask(other, timeout_s=0.5)
    assert "secret" not in failed.value.message
    assert "127.0.0.1" not in failed.value.message
    assert len(other.asked) == 1


async def test_ask_guard_model_that_says_neither_has_failed(other):
    other.answer = _said({"choices": [{"message": {"content": "I think it is fine"}}]})
    with pytest.raises(SecondStageFailed):
        await _ask(other, kind="chat")


async def test_ask_nobody_there_has_failed():
    other = _Other()
    other.url = "http://127.0.0.1:9/v1"
    with pytest.raises(SecondStageFailed):
        await _ask(other)


async def test_ask_sends_only_the_end_of_a_long_text(other):
    await _ask(other, "\u00e9" * 100_000 + "end", max_text_bytes=64)
    sent = other.asked[0][1]["input"]
    assert isinstance(sent, str)
    assert len(sent.encode()) <= 64
    assert sent.endswith("end")


async def test_ask_more_at_once_than_allowed_has_failed(other):
    other.answer = _hangs
    stage = HttpSecondStage(SecondStagePolicy(url=other.url, max_concurrent=1, timeout_s=0.5), None)
    first = asyncio.create_task(stage.ask("one"))
    await asyncio.sleep(0.1)
    with pytest.raises(SecondStageFailed, match="busy"):
        await stage.ask("two")
    with pytest.raises(SecondStageFailed, match="too long"):
        await first
    await stage.close()
