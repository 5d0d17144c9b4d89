"""The OpenAPI document is true: schemathesis asks the gateway everything it allows and forbids."""

from __future__ import annotations

import json
from typing import Any

import hypothesis
import msgspec
import pytest
import schemathesis
from hypothesis import HealthCheck

from fakes import OPERATOR, Bench
from fortpoint.config import Config, Extraction
from fortpoint.gateway.app import create_app

_MANY = {"max_n": 64, "max_inputs": 1000, "max_messages": 1000, "request_timeout_s": 5.0}


def _bench() -> Bench:
    """Limits that a schema cannot say are set beyond what is generated, permissions given."""
    server = msgspec.structs.replace(Config().server, **_MANY)
    return Bench(Config(server=server, extraction=Extraction(logprobs=True)))


schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(_bench().services()))


@schema.hook
def map_body(context: schemathesis.HookContext, body: Any) -> Any:
    """What JSON Schema cannot say: that 3.0 is no integer, and how two fields go together."""
    if isinstance(body, dict):
        inside = body.get("fortpoint")
        watch = inside.get("watch") if isinstance(inside, dict) else None
        if isinstance(watch, dict) and isinstance(watch.get("top"), int):
            watch["top"] = min(watch["top"], 16)
    return _whole(body)


def _whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _whole(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


@schema.parametrize()
@hypothesis.settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)
def test_gateway_keeps_to_its_document(case: schemathesis.Case) -> None:
    case.call_and_validate(headers={"Authorization": f"Bearer {OPERATOR}"})


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    raw: dict[str, Any] = schema.raw_schema
    return raw


def test_document_names_every_route_of_the_application(document: dict[str, Any]) -> None:
    routes = {route.path for route in create_app(_bench().services()).routes}
    documented = {
        path.replace("{model}", "{model:path}")
        .replace("{preset}", "{preset:str}")
        .replace("{request_id}", "{request_id:str}")
        for path in document["paths"]
    }

    assert routes - {"/openapi.json"} == documented


def test_document_asks_for_a_key_except_where_it_is_public(document: dict[str, Any]) -> None:
    public = {
        path
        for path, methods in document["paths"].items()
        for operation in methods.values()
        if operation.get("security") == []
    }

    assert document["security"] == [{"key": []}]
    assert public == {"/", "/metrics", "/health/live", "/health/ready"}


def test_document_gives_every_error_the_same_form(document: dict[str, Any]) -> None:
    for path, methods in document["paths"].items():
        for operation in methods.values():
            for status, response in operation["responses"].items():
                if int(status) >= 400 and not path.startswith("/health"):
                    assert "#/components/schemas/ErrorBody" in json.dumps(response)
