"""Things break half-way: nothing unrecorded leaves, nothing is kept, one entry each."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import pytest

from fakes import CUSTOMER, MODEL, OPERATOR, TOO_LONG, Bench, Script, in_process, serving
from fortpoint.config import Config
from fortpoint.gateway.app import create_app

_CHAT = "/v1/chat/completions"
_LONG = tuple(f" word{number}" for number in range(200))

Eventually = Callable[[Callable[[], bool]], None]


def _ask(**more: object) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], **more}


def _events(response: httpx.Response) -> list[str]:
    return [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]


def _with_server(config: Config, **changes: object) -> Config:
    return msgspec.structs.replace(config, server=msgspec.structs.replace(config.server, **changes))


@pytest.mark.parametrize(
    ("script", "status", "code"),
    [
        (Script(die_after=-1), 503, "engine_unavailable"),
        (Script(die_after=1), 503, "engine_unavailable"),
        (Script(fail_after=1), 502, "engine_error"),
        (Script(end_after=1), 502, "engine_error"),
    ],
)
async def test_engine_that_breaks_gives_an_error_without_the_part(
    bench: Bench, client: httpx.AsyncClient, script: Script, status: int, code: str
) -> None:
    bench.engine.script = script
    response = await client.post(_CHAT, json=_ask())

    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert "Golden" not in response.text
    assert [(entry.kind, entry.code) for entry in bench.audit.entries] == [("failure", code)]


async def test_engine_that_is_down_gives_503_with_retry_after(
    bench: Bench, client: httpx.AsyncClient
) -> None:
    bench.engine.down = True
    response = await client.post(_CHAT, json=_ask())

    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert [entry.code for entry in bench.audit.entries] == ["engine_unavailable"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [_CHAT, "/v1/completions", "/v1/embeddings", "/api/score"])
async def test_engine_that_is_busy_gives_503_with_retry_after(
    bench: Bench, path: str, stream: bool
) -> None:
    texts = {"prompt": "x", "input": "x", "messages": [{"role": "user", "content": "Hi"}]}
    ask: dict[str, Any] = {"model": MODEL, **texts, "stream": stream}
    if path == "/api/score":
        ask = {"model": MODEL, "prompt": "x", "continuation": "y"}
    async with in_process(bench, OPERATOR) as client:
        await client.get("/v1/models")
        bench.engine.busy = True
        response = await client.post(path, json=ask)

    assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_busy")
    assert response.headers["retry-after"] == "1"
    assert [entry.code for entry in bench.audit.entries] == [None, "engine_busy"]


async def test_key_with_too_many_requests_gets_429_and_others_go_on(bench: Bench) -> None:
    bench.config = _with_server(bench.config, max_concurrent_per_key=1)
    bench.engine.script.token_s = 0.05
    services = bench.services()
    transport = httpx.ASGITransport(app=create_app(services))

    async def ask(key: str) -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            return await client.post(_CHAT, json=_ask(), headers={"authorization": f"Bearer {key}"})

    answers = await asyncio.gather(ask(CUSTOMER), ask(CUSTOMER), ask(OPERATOR))
    assert sorted(answer.status_code for answer in answers) == [200, 200, 429]
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert refused.headers["retry-after"] == "1"
    assert services.places.taken == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_prompt_beyond_the_context_is_named(
    bench: Bench, client: httpx.AsyncClient, stream: bool
) -> None:
    messages = [{"role": "user", "content": TOO_LONG}]
    response = await client.post(_CHAT, json=_ask(messages=messages, stream=stream))

    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "messages")
    assert error["code"] == "context_length_exceeded"
    assert [entry.code for entry in bench.audit.entries] == ["context_length_exceeded"]


async def test_engine_that_dies_in_a_stream_ends_it_with_an_error_event(
    bench: Bench, client: httpx.AsyncClient
) -> None:
    bench.engine.script = Script(die_after=2)
    response = await client.post(_CHAT, json=_ask(stream=True))

    last = json.loads(_events(response)[-1])
    assert response.status_code == 200
    assert last["error"]["code"] == "engine_unavailable"
    assert last["fortpoint"]["audit"]["index"] == 0
    assert "[DONE]" not in response.text
    (entry,) = bench.audit.entries
    assert (entry.kind, entry.status, entry.code) == ("failure", 503, "engine_unavailable")
    assert entry.usage.completion == 2


async def test_engine_that_dies_before_a_stream_begins_gives_a_plain_error(
    bench: Bench, client: httpx.AsyncClient
) -> None:
    bench.engine.script = Script(die_after=-1)
    response = await client.post(_CHAT, json=_ask(stream=True))

    assert response.status_code == 503
    assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize("hang_after", [-1, 1])
async def test_engine_that_hangs_is_given_up_after_the_time_limit(
    bench: Bench, hang_after: int
) -> None:
    bench.config = _with_server(bench.config, request_timeout_s=0.2)
    bench.engine.script = Script(hang_after=hang_after)
    async with in_process(bench) as client:
        response = await client.post(_CHAT, json=_ask())

    assert (response.status_code, response.json()["error"]["code"]) == (504, "request_timeout")
    assert len(bench.engine.cancelled) == 1
    assert [entry.code for entry in bench.audit.entries] == ["request_timeout"]


async def test_engine_that_hangs_in_a_stream_ends_it_with_an_error_event(bench: Bench) -> None:
    bench.config = _with_server(bench.config, request_timeout_s=0.2)
    bench.engine.script = Script(hang_after=1)
    async with in_process(bench) as client:
        response = await client.post(_CHAT, json=_ask(stream=True))

    assert json.loads(_events(response)[-1])["error"]["code"] == "request_timeout"
    assert len(bench.engine.cancelled) == 1
    assert bench.audit.entries[0].usage.completion == 1


async def test_audit_that_fails_withholds_the_answer(
    bench: Bench, client: httpx.AsyncClient
) -> None:
    bench.audit.fail = 2
    response = await client.post(_CHAT, json=_ask())

    assert response.status_code == 503
    assert response.json()["error"]["code"] == "audit_unavailable"
    assert "Golden" not in response.text
    assert (await client.post(_CHAT, json=_ask())).status_code == 200


async def test_audit_that_fails_once_records_that_the_answer_was_withheld(
    bench: Bench, client: httpx.AsyncClient
) -> None:
    bench.audit.fail = 1
    response = await client.post(_CHAT, json=_ask())

    assert response.json()["error"]["code"] == "audit_unavailable"
    assert [(e.kind, e.code) for e in bench.audit.entries] == [("failure", "audit_unavailable")]


async def test_audit_that_fails_in_a_stream_withholds_the_last_chunk(
    bench: Bench, client: httpx.AsyncClient
) -> None:
    bench.audit.fail = 2
    response = await client.post(_CHAT, json=_ask(stream=True))

    *chunks, last = _events(response)
    assert json.loads(last)["error"]["code"] == "audit_unavailable"
    assert all(json.loads(chunk)["choices"][0]["finish_reason"] is None for chunk in chunks)
    assert "[DONE]" not in response.text


@pytest.mark.parametrize("path", ["/v1/models", "/v1/nothing", "/api/engine"])
async def test_audit_that_fails_withholds_every_recorded_path(
    bench: Bench, client: httpx.AsyncClient, path: str
) -> None:
    bench.audit.fail = 2
    response = await client.get(path)

    assert (response.status_code, response.json()["error"]["code"]) == (503, "audit_unavailable")
    assert MODEL not in response.text


async def test_audit_entry_is_there_before_the_last_byte(bench: Bench) -> None:
    seen: list[tuple[str, int]] = []
    app = create_app(bench.services())

    async def send(message: Any) -> None:
        seen.append((message["type"], len(bench.audit.entries)))

    for stream in (False, True):
        bench.audit.entries.clear()
        seen.clear()
        await app(_scope(), _body(json.dumps(_ask(stream=stream)).encode()), send)
        assert seen[-1] == ("http.response.body", 1)
    assert seen[-3] == ("http.response.body", 0)  # a token left before the entry


async def test_crash_in_a_handler_shows_and_logs_no_text(
    bench: Bench,
    client: httpx.AsyncClient,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def crash(*_: object) -> None:
        raise KeyError("a-secret-in-an-exception")

    monkeypatch.setattr(bench.engine, "generate", crash)
    with caplog.at_level(logging.DEBUG):
        response = await client.post(_CHAT, json=_ask())

    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    assert "a-secret-in-an-exception" not in response.text + caplog.text
    assert "KeyError" in caplog.text
    assert [entry.code for entry in bench.audit.entries] == ["internal_error"]


async def test_log_has_one_line_without_text_key_or_query(
    bench: Bench, client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="fortpoint.gateway"):
        await client.post(_CHAT + "?secret=hunter2", json=_ask(user="hidden-user"))

    (line,) = [record.getMessage() for record in caplog.records if "surface=" in record.msg]
    assert "surface=/v1/chat/completions status=200 code=ok" in line
    for secret in (CUSTOMER, "hunter2", "Golden", "hidden-user"):
        assert secret not in caplog.text


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_leaves_stops_its_generation(
    bench: Bench, live: str, eventually: Eventually, stream: bool
) -> None:
    bench.engine.script = Script(_LONG, token_s=0.02)
    with _raw(live) as connection:
        connection.sendall(_request(_ask(stream=stream)))
        eventually(lambda: bench.engine.n_tokens > 3)

    eventually(lambda: len(bench.engine.cancelled) == 1)
    eventually(lambda: len(bench.audit.entries) == 1)
    n_tokens = bench.engine.n_tokens
    time.sleep(0.1)
    assert bench.engine.n_tokens == n_tokens < len(_LONG)
    entry = bench.audit.entries[0]
    assert (entry.kind, entry.status, entry.code) == ("failure", 499, "client_disconnected")
    assert 3 <= entry.usage.completion <= n_tokens
    assert entry.user == "ada"


def test_client_that_leaves_during_prefill_stops_it(
    bench: Bench, live: str, eventually: Eventually
) -> None:
    bench.engine.script = Script(hang_after=-1)
    with _raw(live) as connection:
        connection.sendall(_request(_ask()))
        eventually(lambda: len(bench.engine.requests) == 1)

    eventually(lambda: len(bench.engine.cancelled) == 1)
    eventually(lambda: [e.code for e in bench.audit.entries] == ["client_disconnected"])


def test_client_that_leaves_during_its_upload_is_recorded(
    bench: Bench, live: str, eventually: Eventually
) -> None:
    with _raw(live) as connection:
        connection.sendall(_request(_ask())[:-10])
        time.sleep(0.05)

    eventually(lambda: [e.code for e in bench.audit.entries] == ["client_disconnected"])
    assert bench.engine.requests == []


def test_client_that_leaves_while_the_entry_is_written_has_one_entry(
    bench: Bench, live: str, eventually: Eventually
) -> None:
    bench.audit.delay_s = 0.2
    with _raw(live) as connection:
        connection.sendall(_request(_ask()))
        eventually(lambda: bench.engine.n_tokens == 3)
        time.sleep(0.05)

    eventually(lambda: len(bench.audit.entries) > 0)
    time.sleep(0.5)
    assert [entry.kind for entry in bench.audit.entries] == ["answer"]


def test_server_that_stops_records_what_it_cut_off(bench: Bench) -> None:
    bench.engine.script = Script(hang_after=1)
    with serving(bench, graceful_s=1) as url, _raw(url) as connection:
        connection.sendall(_request(_ask()))
        while not bench.engine.n_tokens:
            time.sleep(0.01)

    assert [entry.kind for entry in bench.audit.entries] == ["failure"]
    assert len(bench.engine.cancelled) == 1


async def test_requests_beyond_the_keys_places_get_429_and_none_is_lost(bench: Bench) -> None:
    bench.engine.script = Script(token_s=0.05)
    async with in_process(bench) as client:
        responses = await asyncio.gather(
            *(client.post(_CHAT, json=_ask(stream=number % 2 == 0)) for number in range(200))
        )
        refused = [response for response in responses if response.status_code == 429]
        again = await client.post(_CHAT, json=_ask())

    assert len(responses) == 200
    assert len(refused) == 200 - 64
    assert refused[0].json()["error"]["code"] == "rate_limit_exceeded"
    assert refused[0].headers["retry-after"] == "1"
    assert again.status_code == 200
    assert len(bench.audit.entries) == 201
    indices = [
        response.json()["fortpoint"]["audit"]["index"]
        for response in responses
        if response.headers["content-type"] == "application/json"
    ]
    assert len(indices) == len(set(indices))


@pytest.mark.parametrize(
    "script", [Script(), Script(die_after=1), Script(fail_after=-1), Script(end_after=0)]
)
async def test_places_are_given_back_however_a_request_ends(bench: Bench, script: Script) -> None:
    bench.config = _with_server(bench.config, max_concurrent_per_key=1)
    async with in_process(bench) as client:
        for stream in (False, True):
            bench.engine.script = script
            await client.post(_CHAT, json=_ask(stream=stream))
            await client.post(_CHAT, json=_ask(messages=[]))
            bench.audit.fail = 2
            await client.post(_CHAT, json=_ask(stream=stream))
            bench.audit.fail = 0
            bench.engine.script = Script()
            assert (await client.post(_CHAT, json=_ask())).status_code == 200


def _raw(url: str) -> socket.socket:
    address = httpx.URL(url)
    return socket.create_connection((address.host, address.port or 80), timeout=10)


def _request(ask: dict[str, Any]) -> bytes:
    body = json.dumps(ask).encode()
    head = (
        f"POST {_CHAT} HTTP/1.1\r\nhost: gateway\r\nauthorization: Bearer {CUSTOMER}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _scope() -> Any:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": _CHAT,
        "raw_path": _CHAT.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"authorization", f"Bearer {CUSTOMER}".encode())],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }


def _body(body: bytes) -> Any:
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Any:
        for message in messages:
            return message
        await asyncio.Event().wait()

    return receive
