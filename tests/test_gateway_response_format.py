"""Answers held to a JSON Schema: the schema's text reaches the engine, within limits."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from asking import CHAT, TEXT, chat, events, refused, text
from fakes import HARD_SCHEMA, Bench
from fortpoint.gateway.response_format import MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH

_SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}


def _format(schema: object) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth - 1):
        schema = {"not": schema}
    return schema


@pytest.mark.parametrize(("path", "ask"), [(CHAT, chat()), (TEXT, text())])
async def test_format_schema_reaches_the_engine_as_text(
    bench: Bench, client: httpx.AsyncClient, path: str, ask: dict[str, Any]
) -> None:
    answer = (await client.post(path, json={**ask, "response_format": _format(_SCHEMA)})).json()

    assert json.loads(bench.engine.requests[0].sampling.json_schema or "") == _SCHEMA
    said = answer["choices"][0]
    assert json.loads(said["message"]["content"] if path == CHAT else said["text"])


async def test_format_json_object_is_a_schema_of_any_object(
    bench: Bench, client: httpx.AsyncClient
) -> None:
    ask = chat(response_format={"type": "json_object"}, stream=True)
    chunks = events(await client.post(CHAT, json=ask))

    assert bench.engine.requests[0].sampling.json_schema == '{"type":"object"}'
    said = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert json.loads(said) == {"name": "Golden Gate"}


async def test_format_text_is_none(bench: Bench, client: httpx.AsyncClient) -> None:
    await client.post(CHAT, json=chat(response_format={"type": "text"}))

    assert bench.engine.requests[0].sampling.json_schema is None


@pytest.mark.parametrize(
    "schema",
    [
        _nested(MAX_SCHEMA_DEPTH + 1),
        {"description": "x" * MAX_SCHEMA_BYTES},
        True,
        [],
        "x",
        None,
    ],
)
async def test_format_schema_beyond_the_limits_is_refused(
    bench: Bench, client: httpx.AsyncClient, schema: object
) -> None:
    response = await client.post(CHAT, json=chat(response_format=_format(schema)))

    param = refused(response, 400, "invalid_request")["param"]
    assert param == "response_format.json_schema.schema"
    assert bench.engine.requests == []


@pytest.mark.parametrize(
    "schema",
    [_nested(MAX_SCHEMA_DEPTH), {"const": "[" * 200 + '\\"]{'}, {"a" * 9000: True}],
)
async def test_format_schema_within_the_limits_is_passed_on(
    bench: Bench, client: httpx.AsyncClient, schema: object
) -> None:
    response = await client.post(CHAT, json=chat(response_format=_format(schema)))

    assert response.status_code == 200
    assert json.loads(bench.engine.requests[0].sampling.json_schema or "") == schema


@pytest.mark.parametrize(
    ("wanted", "param"),
    [
        ({"type": "yaml"}, "response_format.type"),
        ({}, "response_format.type"),
        ({"type": "json_schema"}, "response_format.json_schema"),
        ({"type": "json_schema", "json_schema": {}}, "response_format.json_schema.schema"),
        ("json_object", "response_format"),
    ],
)
async def test_format_that_is_unknown_is_refused_by_name(
    client: httpx.AsyncClient, wanted: object, param: str
) -> None:
    response = await client.post(CHAT, json=chat(response_format=wanted))

    assert refused(response, 400, "invalid_request")["param"] == param


async def test_format_schema_that_the_engine_cannot_follow_is_named(
    bench: Bench, client: httpx.AsyncClient
) -> None:
    ask = chat(response_format=_format({"description": HARD_SCHEMA}), stream=True)
    error = refused(await client.post(CHAT, json=ask), 400, "invalid_request")

    assert error["param"] == "response_format.json_schema.schema"
    assert "cannot be followed" in error["message"]
    assert [entry.code for entry in bench.audit.entries] == ["invalid_request"]
