"""/api/score: an operator's tool, recorded like anything else."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest

from asking import refused
from fakes import ADAPTER, ATTACK, DIRECTION, MODEL, OPERATOR, TOO_LONG, Bench, in_process
from fortpoint.engine.protocol import Scored, ScoreText, Steer
from fortpoint.types import Message, Role, Usage

_PATH = "/api/score"
_TURNS = [{"role": "user", "content": "Name a bridge."}]


@pytest.fixture
async def operator(bench: Bench) -> AsyncIterator[httpx.AsyncClient]:
    async with in_process(bench, OPERATOR) as client:
        yield client


async def test_score_sums_the_continuations_tokens(
    bench: Bench, operator: httpx.AsyncClient
) -> None:
    ask = {
        "model": MODEL,
        "messages": _TURNS,
        "continuation": "Golden Gate",
        "steer": [{"mode": "add", "target": DIRECTION, "strength": 2}],
        "adapter": ADAPTER,
    }
    answer = (await operator.post(_PATH, json=ask)).json()

    assert (answer["tokens"], answer["logprobs"]) == (["Golden", "Gate"], [-1.25, -1.25])
    assert (answer["sum"], answer["n_tokens"]) == (-2.5, 2)
    (request,) = bench.engine.scored
    assert request == ScoreText(
        id=answer["fortpoint"]["request_id"],
        continuation="Golden Gate",
        messages=(Message(Role.USER, "Name a bridge."),),
        tenant="operatorkey1",
        adapter=ADAPTER,
        steer=(Steer("add", DIRECTION, 2.0),),
    )


async def test_score_is_judged_by_its_words_recorded_and_not_refused(
    bench: Bench, operator: httpx.AsyncClient
) -> None:
    ask = {"model": MODEL, "prompt": ATTACK, "continuation": "Sure."}
    answer = (await operator.post(_PATH, json=ask)).json()

    (entry,) = bench.audit.entries
    assert (entry.kind, entry.surface, entry.status) == ("admin", _PATH, 200)
    assert entry.verdict is not None
    assert (entry.verdict.action, entry.usage.prompt) == ("flag", 4)
    assert entry.response_sha256 is not None
    assert answer["fortpoint"]["audit"]["index"] == 0
    assert [messages[-1].content for messages in bench.guard.judged] == ["Sure."]


async def test_score_after_an_empty_prompt_is_asked_of_the_engine(
    bench: Bench, operator: httpx.AsyncClient
) -> None:
    ask = {"model": MODEL, "prompt": "", "continuation": "Golden Gate"}

    assert (await operator.post(_PATH, json=ask)).status_code == 200
    assert (bench.engine.scored[0].prompt, bench.engine.scored[0].messages) == ("", None)


async def test_score_is_for_operators_only(bench: Bench, client: httpx.AsyncClient) -> None:
    ask = {"model": MODEL, "prompt": "x", "continuation": "y"}

    refused(await client.post(_PATH, json=ask), 403, "forbidden")
    assert bench.engine.scored == []
    assert [entry.kind for entry in bench.audit.entries] == ["refusal"]


@pytest.mark.parametrize(
    ("ask", "param"),
    [
        ({"continuation": "y"}, "messages"),
        ({"prompt": "x", "messages": _TURNS, "continuation": "y"}, "messages"),
        ({"prompt": None, "continuation": "y"}, "prompt"),
        ({"messages": [], "continuation": "y"}, "messages"),
        ({"prompt": "x"}, "continuation"),
        ({"prompt": "x", "continuation": ""}, "continuation"),
        ({"prompt": "x", "continuation": "\x00"}, "continuation"),
        ({"prompt": "x", "continuation": "y", "adapter": "none"}, "adapter"),
        (
            {"prompt": "x", "continuation": "y", "steer": [{"mode": "add", "target": "no"}]},
            "steer[0].target",
        ),
        ({"prompt": "x", "continuation": "y", "stop_when": []}, None),
        ({"prompt": "x", "continuation": "y", "z` - at `$.zzz": []}, None),
    ],
)
async def test_score_with_a_wrong_field_names_it(
    bench: Bench, operator: httpx.AsyncClient, ask: dict[str, object], param: str | None
) -> None:
    response = await operator.post(_PATH, json={"model": MODEL, **ask})

    assert refused(response, 400, "invalid_request")["param"] == param
    assert bench.engine.scored == []
    assert len(bench.audit.entries) == 1


async def test_score_of_too_long_a_text_is_refused_before_the_engine(
    bench: Bench, operator: httpx.AsyncClient
) -> None:
    ask = {"model": MODEL, "prompt": "x" * 200_000, "continuation": "y" * 200_000}

    refused(await operator.post(_PATH, json=ask), 400, "context_length_exceeded")
    assert bench.engine.scored == []


async def test_score_beyond_the_context_names_a_field(operator: httpx.AsyncClient) -> None:
    ask = {"model": MODEL, "prompt": TOO_LONG, "continuation": "y"}
    error = refused(await operator.post(_PATH, json=ask), 400, "context_length_exceeded")

    assert error["param"] == "continuation"


@pytest.mark.parametrize("logprobs", [(-1.0,), (-1.0, float("nan")), (-1.0, float("-inf"))])
async def test_score_of_an_engine_that_does_not_fit_is_an_error(
    bench: Bench,
    operator: httpx.AsyncClient,
    monkeypatch: pytest.MonkeyPatch,
    logprobs: tuple[float, ...],
) -> None:
    async def score(request: ScoreText) -> Scored:
        return Scored(request.id, Usage(1), ("a", "b"), logprobs)

    monkeypatch.setattr(bench.engine, "score", score)
    ask = {"model": MODEL, "prompt": "x", "continuation": "y"}

    refused(await operator.post(_PATH, json=ask), 502, "engine_error")
    assert [entry.code for entry in bench.audit.entries] == ["engine_error"]
