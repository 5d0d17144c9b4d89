"""How tokens are chosen: every field reaches the engine, and nonsense is refused by name."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from asking import CHAT, TEXT, chat, refused, text
from fakes import Bench
from fortpoint.engine.protocol import Sampling

_JSON = {"content-type": "application/json"}
_ASKS = {CHAT: chat, TEXT: text}


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_sampling_every_field_reaches_the_engine(
    bench: Bench, client: httpx.AsyncClient, path: str
) -> None:
    ask = _ASKS[path](
        temperature=0.5,
        top_p=0.9,
        presence_penalty=-2,
        frequency_penalty=2,
        stop=["\n", "END"],
        seed=-7,
        n=2,
        max_tokens=9,
        fortpoint={"top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1},
    )
    response = await client.post(path, json=ask)

    assert response.status_code == 200
    assert bench.engine.requests[0].sampling == Sampling(
        max_tokens=9,
        temperature=0.5,
        top_p=0.9,
        seed=-7,
        n=2,
        stop=("\n", "END"),
        top_k=40,
        min_p=0.05,
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        repetition_penalty=1.1,
    )


async def test_sampling_without_a_field_is_the_engines_default(
    bench: Bench, client: httpx.AsyncClient
) -> None:
    await client.post(CHAT, json=chat())

    assert bench.engine.requests[0].sampling == Sampling(max_tokens=512)


async def test_sampling_fields_of_vllm_at_the_top_count_and_ours_win(
    bench: Bench, client: httpx.AsyncClient
) -> None:
    await client.post(CHAT, json=chat(top_k=-1, min_p=0.1, repetition_penalty=1.2))
    await client.post(CHAT, json=chat(top_k=5, min_p=0.1, fortpoint={"top_k": 0}))

    first, second = (request.sampling for request in bench.engine.requests)
    assert (first.top_k, first.min_p, first.repetition_penalty) == (0, 0.1, 1.2)
    assert (second.top_k, second.min_p) == (0, 0.1)


_WRONG: list[tuple[str, object]] = [
    ("temperature", -0.1),
    ("temperature", 1e9),
    ("top_p", 1.01),
    ("top_p", -1),
    ("top_k", -2),
    ("top_k", 1e9),
    ("top_k", 1.5),
    ("min_p", 1.1),
    ("min_p", -0.1),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -1e9),
    ("repetition_penalty", 0),
    ("repetition_penalty", -1),
    ("repetition_penalty", 1e9),
    ("repetition_penalty", "high"),
    ("seed", 1e40),
    ("max_tokens", -1),
    ("n", 1_000_000),
]


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(("field", "value"), _WRONG)
async def test_sampling_out_of_range_is_refused_by_name(
    bench: Bench, client: httpx.AsyncClient, path: str, field: str, value: object
) -> None:
    response = await client.post(path, json=_ASKS[path](**{field: value}))

    assert refused(response, 400, "invalid_request")["param"] == field
    assert bench.engine.requests == []
    assert [entry.code for entry in bench.audit.entries] == ["invalid_request"]


@pytest.mark.parametrize("field", ["top_k", "min_p", "repetition_penalty"])
async def test_sampling_under_our_field_is_refused_by_its_path(
    client: httpx.AsyncClient, field: str
) -> None:
    response = await client.post(CHAT, json=chat(fortpoint={field: -3}))

    assert refused(response, 400, "invalid_request")["param"] == f"fortpoint.{field}"


@pytest.mark.parametrize("value", [b"NaN", b"Infinity", b"-Infinity", b"1e999"])
@pytest.mark.parametrize(
    ("field", "param"), [("temperature", "temperature"), ("min_p", "min_p"), ("z", None)]
)
async def test_sampling_with_what_is_no_number_is_refused_by_name(
    client: httpx.AsyncClient, field: str, param: str | None, value: bytes
) -> None:
    body = b'{"%s": %s, "model": "m", "messages": []}' % (field.encode(), value)
    error = refused(await client.post(CHAT, content=body, headers=_JSON), 400, "invalid_request")

    if param is not None or value != b"1e999":
        assert error["param"] == param


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_logit_bias_is_refused_and_with_logprobs_too(
    bench: Bench, client: httpx.AsyncClient, path: str
) -> None:
    more: dict[str, Any] = {"logit_bias": {"1": 5}, "logprobs": True if path == CHAT else 1}
    error = refused(await client.post(path, json=_ASKS[path](**more)), 400, "unsupported_parameter")

    assert error["param"] == "logit_bias"
    assert bench.engine.requests == []


async def test_tenant_is_the_key_that_asks(bench: Bench, client: httpx.AsyncClient) -> None:
    await client.post(CHAT, json=chat())

    assert bench.engine.requests[0].tenant == "customerkey1"
