"""Models, embeddings, health, metrics, the page, and who may see the engine."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import struct
import subprocess
import sys
from collections.abc import Sequence

import httpx
import pytest

from asking import refused
from fakes import (
    ADAPTER,
    DICTIONARY,
    DIGEST,
    DIRECTION,
    MODEL,
    OPERATOR,
    TOO_LONG,
    Bench,
    in_process,
)
from fortpoint.engine.protocol import Embedded
from fortpoint.errors import TooManyRequests
from fortpoint.gateway.limits import Places
from fortpoint.types import Usage


async def test_models_lists_the_one_that_is_served(client: httpx.AsyncClient) -> None:
    (model,) = (await client.get("/v1/models")).json()["data"]

    assert (model["id"], model["object"], model["digest"]) == (MODEL, "model", DIGEST)
    assert (await client.get(f"/v1/models/{MODEL}")).json() == model


async def test_models_unknown_name_gives_404(client: httpx.AsyncClient) -> None:
    response = await client.get("/v1/models/hf:someone/else")

    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


async def test_embeddings_base64_and_float_agree(bench: Bench, client: httpx.AsyncClient) -> None:
    ask = {"model": MODEL, "input": ["one", "two words"]}
    plain = (await client.post("/v1/embeddings", json=ask)).json()
    packed = (await client.post("/v1/embeddings", json={**ask, "encoding_format": "base64"})).json()

    assert [row["index"] for row in plain["data"]] == [0, 1]
    assert plain["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    raw = base64.b64decode(packed["data"][1]["embedding"])
    assert struct.unpack(f"<{len(raw) // 4}f", raw) == pytest.approx(
        plain["data"][1]["embedding"], abs=1e-6
    )
    assert [entry.surface for entry in bench.audit.entries] == ["/v1/embeddings"] * 2


async def test_embeddings_of_the_models_own_width_are_given_and_of_another_refused(
    bench: Bench, client: httpx.AsyncClient
) -> None:
    ask = {"model": MODEL, "input": "one"}
    own = await client.post("/v1/embeddings", json={**ask, "dimensions": 32})
    other = await client.post("/v1/embeddings", json={**ask, "dimensions": 16})

    assert len(own.json()["data"][0]["embedding"]) == 32
    error = refused(other, 400, "unsupported_parameter")
    assert (error["param"], "32" in error["message"]) == ("dimensions", True)
    assert [entry.status for entry in bench.audit.entries] == [200, 400]


async def test_embeddings_of_a_text_beyond_the_context_name_the_input(
    client: httpx.AsyncClient,
) -> None:
    response = await client.post("/v1/embeddings", json={"model": MODEL, "input": TOO_LONG})

    assert refused(response, 400, "context_length_exceeded")["param"] == "input"


@pytest.mark.parametrize("encoding", ["float", "base64"])
@pytest.mark.parametrize(
    "vectors", [(), ((1.0,), (1.0,)), ((float("nan"),),), ((float("inf"),),), ((1e300,),)]
)
async def test_embeddings_that_are_no_vectors_are_an_engine_error(
    bench: Bench,
    client: httpx.AsyncClient,
    monkeypatch: pytest.MonkeyPatch,
    vectors: tuple[tuple[float, ...], ...],
    encoding: str,
) -> None:
    async def embed(_texts: Sequence[str]) -> Embedded:
        return Embedded("e", Usage(1), vectors)

    monkeypatch.setattr(bench.engine, "embed", embed)
    ask = {"model": MODEL, "input": "one", "encoding_format": encoding}

    refused(await client.post("/v1/embeddings", json=ask), 502, "engine_error")


async def test_engine_state_shows_what_is_loaded(bench: Bench) -> None:
    async with in_process(bench, OPERATOR) as operator:
        shown = (await operator.get("/api/engine")).json()

    assert shown["adapters"] == [ADAPTER]
    assert shown["dictionaries"] == [{"name": DICTIONARY, "layer": 15, "n_features": 4608}]
    assert shown["directions"] == [DIRECTION]
    assert shown["upstreams"] == [{"server": "127.0.0.1:1", "breaker": "open", "failures": 3}]


async def test_engine_state_is_for_operators_only(bench: Bench, client: httpx.AsyncClient) -> None:
    refused = await client.get("/api/engine")
    async with in_process(bench, OPERATOR) as operator:
        shown = await operator.get("/api/engine")

    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")
    assert shown.json()["digest"] == DIGEST
    assert [(e.kind, e.status) for e in bench.audit.entries] == [("refusal", 403), ("admin", 200)]


async def test_health_follows_the_engine(bench: Bench, client: httpx.AsyncClient) -> None:
    ready = await client.get("/health/ready")
    bench.engine.down = True
    starting = await client.get("/health/ready")
    live = await client.get("/health/live")

    assert (ready.status_code, ready.json()["model"]) == (200, MODEL)
    assert (starting.status_code, starting.json()["status"]) == (503, "starting")
    assert live.status_code == 200
    assert bench.audit.entries == []


async def test_metrics_count_requests_and_tokens_without_naming_anyone(
    bench: Bench, client: httpx.AsyncClient
) -> None:
    ask = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
    await client.post("/v1/chat/completions", json=ask)
    await client.get("/v1/secret-path-of-a-client")
    text = (await client.get("/metrics")).text

    line = 'fortpoint_requests_total{code="ok",status="200",surface="/v1/chat/completions"} 1.0'
    assert line in text
    assert 'fortpoint_tokens_total{kind="completion"} 3.0' in text
    assert "fortpoint_time_to_first_token_seconds_count 1.0" in text
    assert "fortpoint_guard_seconds_count 1.0" in text
    assert "fortpoint_requests_in_flight 1.0" in text  # this one
    for name in ("ada", "customerkey1", "secret-path"):
        assert name not in text


async def test_page_shows_what_runs_and_loads_nothing(client: httpx.AsyncClient) -> None:
    response = await client.get("/")

    policy = response.headers["content-security-policy"]
    style = re.search(r"<style>(.*?)</style>", response.text, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert f"'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    for shown in (MODEL, DIGEST, "jailbreak", "seccomp on", "YOUR_KEY", "curl http://gateway/v1"):
        assert shown in response.text
    assert not re.search(r"<script|<link|<img|src=|@import|url\(", response.text)
    assert "sk-fp-" not in response.text


async def test_page_without_an_engine_says_so(bench: Bench, client: httpx.AsyncClient) -> None:
    bench.engine.down = True
    response = await client.get("/")

    assert response.status_code == 200
    assert "starting" in response.text


def test_places_are_counted_for_each_key() -> None:
    places = Places(1)
    with places.take("a"), places.take("b"):
        assert places.taken == 2
        with pytest.raises(TooManyRequests), places.take("a"):
            pass
    assert places.taken == 0


def test_gateway_loads_no_model_library_and_stays_small() -> None:
    code = (
        "import json, psutil, sys, fortpoint.gateway.server, fortpoint.guard.guard;"
        "heavy = {'torch', 'transformers', 'tokenizers', 'gguf', 'llguidance'} & set(sys.modules);"
        "print(json.dumps([sorted(heavy), psutil.Process().memory_info().rss]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)

    heavy, rss_bytes = json.loads(done.stdout)
    assert heavy == []
    assert rss_bytes < 150 * 1024 * 1024
