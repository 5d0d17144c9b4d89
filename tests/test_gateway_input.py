"""Bad input: a clear error in OpenAI's form each time, an entry each time, no echo."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest

from fakes import CUSTOMER, MODEL, Bench, in_process

_CHAT = "/v1/chat/completions"
_JSON = {"content-type": "application/json"}


def _ask(**changes: object) -> dict[str, Any]:
    ask = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], **changes}
    return {name: value for name, value in ask.items() if value is not ...}


def _says(content: str) -> bytes:
    head = b'{"model":"smollm2-135m","messages":[{"role":"user","content":"'
    return head + content.encode() + b'"}]}'


def _is_error(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """OpenAI's error form, short and without a trace of our insides."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error", "fortpoint"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] == code
    assert len(response.content) < 1200
    assert "Traceback" not in response.text
    assert ".py" not in response.text
    error: dict[str, Any] = body["error"]
    return error


_BODIES = {
    "empty": b"",
    "not json": b"{",
    "trailing": b"{} x",
    "byte order mark": b"\xef\xbb\xbf" + _says("x"),
    "array": b"[]",
    "null": b"null",
    "raw invalid utf-8": _says("x").replace(b"x", b"\xff\xfe", 1),
    "invalid utf-8 in an unknown field": b'{"z":"\xff",' + _says("x")[1:],
    "lone surrogate": _says("\\ud800 and more text"),
    "lone surrogate at the end": _says("\\ud800"),
    "reversed surrogates": _says("\\udc00\\ud800"),
    "nul escape": _says("a\\u0000b"),
    "raw nul": _says("a\x00b"),
    "deep nesting": b"[" * 200_000,
    "deep nesting in an unknown field": b'{"z":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "nan": b'{"temperature":NaN,' + _says("x")[1:],
    "infinity": b'{"temperature":Infinity,' + _says("x")[1:],
    "huge float": b'{"temperature":1e999,' + _says("x")[1:],
    "huge int": b'{"seed":' + b"9" * 400 + b"," + _says("x")[1:],
    "huger int": b'{"max_tokens":' + b"9" * 5000 + b"," + _says("x")[1:],
    "huge int in an unknown field": b'{"fortpoint":{"n":' + b"9" * 5000 + b"}," + _says("x")[1:],
}


@pytest.mark.parametrize("name", _BODIES)
async def test_body_that_cannot_be_read_gives_a_clear_400(
    bench: Bench, client: httpx.AsyncClient, name: str
) -> None:
    response = await client.post(_CHAT, content=_BODIES[name], headers=_JSON)

    _is_error(response, 400, "invalid_request")
    assert bench.engine.requests == []
    assert [entry.code for entry in bench.audit.entries] == ["invalid_request"]
    msgspec.json.encode(bench.audit.entries[0])


_FIELDS: dict[str, tuple[dict[str, object], str]] = {
    "no model": ({"model": ...}, "model"),
    "model null": ({"model": None}, "model"),
    "no messages": ({"messages": ...}, "messages"),
    "messages empty": ({"messages": []}, "messages"),
    "messages object": ({"messages": {}}, "messages"),
    "message string": ({"messages": ["Hi"]}, "messages[0]"),
    "no content": ({"messages": [{"role": "user"}]}, "messages[0].content"),
    "content null": ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    "content number": ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
    "content image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].type",
    ),
    "role unknown": ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    "role template": ({"messages": [{"role": "template", "content": "x"}]}, "messages[0].role"),
    "n zero": ({"n": 0}, "n"),
    "n above the server's": ({"n": 9}, "n"),
    "n boolean": ({"n": True}, "n"),
    "n string": ({"n": "3"}, "n"),
    "n float": ({"n": 1.5}, "n"),
    "stream string": ({"stream": "yes"}, "stream"),
    "stop of five": ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    "stop empty string": ({"stop": ""}, "stop"),
    "stop number": ({"stop": 1}, "stop"),
    "temperature 2.1": ({"temperature": 2.1}, "temperature"),
    "temperature negative": ({"temperature": -0.1}, "temperature"),
    "top_p 1.1": ({"top_p": 1.1}, "top_p"),
    "max_tokens 0": ({"max_tokens": 0}, "max_tokens"),
    "seed of 65 bits": ({"seed": 2**64}, "seed"),
    "fortpoint list": ({"fortpoint": []}, "fortpoint"),
}


@pytest.mark.parametrize("name", _FIELDS)
async def test_field_that_is_wrong_is_named(
    bench: Bench, client: httpx.AsyncClient, name: str
) -> None:
    changes, param = _FIELDS[name]
    error = _is_error(await client.post(_CHAT, json=_ask(**changes)), 400, "invalid_request")

    assert error["param"] == param
    assert bench.engine.requests == []


@pytest.mark.parametrize(
    "changes",
    [
        {"messages": [{"role": "x" * 5000, "content": "y"}]},
        {"model": "m" * 5000},
        {"stop": ["z" * 5000]},
        {"tool_choice": "t" * 5000},
    ],
)
async def test_error_does_not_echo_the_input(
    client: httpx.AsyncClient, changes: dict[str, object]
) -> None:
    response = await client.post(_CHAT, json=_ask(**changes))

    assert response.status_code in {400, 404}
    assert len(response.content) < 1000


async def test_model_that_is_unknown_gives_404(client: httpx.AsyncClient) -> None:
    error = _is_error(await client.post(_CHAT, json=_ask(model="gpt-9")), 404, "model_not_found")

    assert error["param"] == "model"


async def test_prompt_of_a_million_tokens_is_refused_before_the_engine(
    bench: Bench, client: httpx.AsyncClient
) -> None:
    text = "word " * 700_000
    response = await client.post(_CHAT, json=_ask(messages=[{"role": "user", "content": text}]))

    _is_error(response, 400, "context_length_exceeded")
    assert bench.engine.requests == []


async def test_messages_beyond_the_limit_are_refused(client: httpx.AsyncClient) -> None:
    messages = [{"role": "user", "content": "x"}] * 257
    error = _is_error(
        await client.post(_CHAT, json=_ask(messages=messages)), 400, "invalid_request"
    )

    assert error["param"] == "messages"


@pytest.mark.parametrize(
    ("path", "ask"),
    [
        ("/v1/completions", {"model": MODEL, "prompt": ""}),
        ("/v1/completions", {"model": MODEL, "prompt": []}),
        ("/v1/completions", {"model": MODEL, "prompt": [1, 2, 3]}),
        ("/v1/completions", {"model": MODEL, "prompt": ["x"] * 33}),
        ("/v1/completions", {"model": MODEL, "prompt": "a\x00"}),
        ("/v1/embeddings", {"model": MODEL, "input": ""}),
        ("/v1/embeddings", {"model": MODEL, "input": [[1, 2]]}),
        ("/v1/embeddings", {"model": MODEL, "input": ["x"] * 33}),
        ("/v1/embeddings", {"model": MODEL, "input": "x", "encoding_format": "hex"}),
        ("/v1/moderations", {}),
        ("/v1/moderations", {"input": []}),
        ("/v1/moderations", {"input": [{"type": "image_url", "image_url": {"url": "x"}}]}),
    ],
)
async def test_other_surfaces_refuse_what_they_cannot_read(
    client: httpx.AsyncClient, path: str, ask: dict[str, object]
) -> None:
    _is_error(await client.post(path, json=ask), 400, "invalid_request")


async def test_body_announced_too_large_is_refused_unread(
    bench: Bench, client: httpx.AsyncClient
) -> None:
    read = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        for _ in range(50):
            read += 1
            yield b" " * 1024 * 1024

    headers = {**_JSON, "content-length": str(50 * 1024 * 1024), "expect": "100-continue"}
    response = await client.post(_CHAT, content=body(), headers=headers)

    _is_error(response, 413, "payload_too_large")
    assert read == 0
    assert response.headers["connection"] == "close"
    assert [entry.status for entry in bench.audit.entries] == [413]


@pytest.mark.parametrize("announced", [True, False])
def test_body_of_50_megabytes_gets_its_413_over_a_real_connection(
    bench: Bench, live: str, announced: bool
) -> None:
    def chunks() -> Any:
        for _ in range(50):
            yield b" " * 1024 * 1024

    content: Any = b" " * (50 * 1024 * 1024) if announced else chunks()
    headers = {**_JSON, "authorization": f"Bearer {CUSTOMER}"}
    started = time.monotonic()
    with httpx.Client(base_url=live, timeout=30) as client:
        response = client.post(_CHAT, content=content, headers=headers)
        after = client.post(_CHAT, json=_ask(), headers=headers)

    _is_error(response, 413, "payload_too_large")
    assert after.status_code == 200
    assert time.monotonic() - started < 10
    assert [entry.status for entry in bench.audit.entries] == [413, 200]


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x"]
)
async def test_body_that_is_not_called_json_gives_415(
    client: httpx.AsyncClient, content_type: str
) -> None:
    response = await client.post(_CHAT, content=_says("x"), headers={"content-type": content_type})

    _is_error(response, 415, "unsupported_media_type")


async def test_body_called_json_with_a_charset_is_read(client: httpx.AsyncClient) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}

    assert (await client.post(_CHAT, content=_says("x"), headers=headers)).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", _CHAT, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("TRACE", "/v1/models", 405, "method_not_allowed"),
        ("BREW", "/v1/models", 405, "method_not_allowed"),
        ("POST", "/v1/responses", 404, "not_found"),
        ("GET", "/v1", 404, "not_found"),
        ("GET", "/v1/models/../../etc/passwd", 404, "not_found"),
        ("GET", "/v1/%00", 404, "not_found"),
        ("GET", "/api/anything", 404, "not_found"),
    ],
)
async def test_wrong_path_or_method_is_an_error_in_form_with_an_entry(
    bench: Bench, client: httpx.AsyncClient, method: str, path: str, status: int, code: str
) -> None:
    response = await client.request(method, path)

    _is_error(response, status, code)
    if "passwd" not in path:
        assert [entry.code for entry in bench.audit.entries] == [code]


async def test_path_with_doubled_slashes_is_recorded_like_any_other(
    bench: Bench, client: httpx.AsyncClient
) -> None:
    await client.post("http://gateway//v1//chat/completions", json=_ask())
    await client.post("http://gateway//v1/chat/completions/", json=_ask())

    assert len(bench.audit.entries) == 2
    assert {entry.surface for entry in bench.audit.entries} == {_CHAT}


async def test_head_and_options_answer_without_a_body(
    bench: Bench, client: httpx.AsyncClient
) -> None:
    head = await client.head("/v1/models")
    options = await client.options(_CHAT)

    assert (head.status_code, options.status_code) == (405, 204)
    assert "POST" in options.headers["allow"]
    assert "access-control-allow-origin" not in options.headers
    assert len(bench.audit.entries) == 2


async def test_wrong_path_outside_the_api_is_404_without_an_entry(
    bench: Bench, client: httpx.AsyncClient
) -> None:
    _is_error(await client.get("/favicon.ico"), 404, "not_found")
    assert bench.audit.entries == []


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": f"Basic {CUSTOMER}"},
        {"authorization": CUSTOMER},
        {"authorization": "Bearer sk-fp-wrong"},
        {"authorization": "Bearer \xff\xfe"},
        {"x-api-key": CUSTOMER},
    ],
)
async def test_key_that_is_missing_or_wrong_gives_401_before_the_body_is_read(
    bench: Bench, header: dict[str, str]
) -> None:
    async def body() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    encoded = {name: value.encode("latin-1") for name, value in header.items()}
    async with in_process(bench) as client:
        del client.headers["authorization"]
        response = await client.post(
            _CHAT, content=body(), headers={"expect": "100-continue", **encoded}
        )

    error = _is_error(response, 401, "invalid_api_key")
    assert error["type"] == "authentication_error"
    assert response.headers["www-authenticate"].startswith("Bearer")
    assert [(e.kind, e.code) for e in bench.audit.entries] == [("refusal", "invalid_api_key")]


async def test_two_authorization_headers_are_refused(bench: Bench) -> None:
    async with in_process(bench) as client:
        headers = [("authorization", f"Bearer {CUSTOMER}"), ("authorization", "Bearer x")]
        del client.headers["authorization"]
        response = await client.get("/v1/models", headers=headers)

    _is_error(response, 401, "invalid_api_key")


async def test_every_bad_request_leaves_one_entry(bench: Bench, client: httpx.AsyncClient) -> None:
    for body in _BODIES.values():
        await client.post(_CHAT, content=body, headers=_JSON)

    assert len(bench.audit.entries) == len(_BODIES)
    assert len({entry.request_id for entry in bench.audit.entries}) == len(_BODIES)
    assert "\\ud800" not in json.dumps([msgspec.to_builtins(e) for e in bench.audit.entries])
