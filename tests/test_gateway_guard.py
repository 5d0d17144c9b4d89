"""The guard stands before every surface that makes text, and a broken guard closes the gate."""

from __future__ import annotations

import json
from typing import Any

import httpx
import msgspec
import pytest

from fakes import ATTACK, MODEL, OPERATOR, Bench, in_process
from fortpoint.config import Config
from fortpoint.errors import ConfigError
from fortpoint.gateway.judgement import join
from fortpoint.gateway.services import Services
from fortpoint.types import Reading, Role, Score, Verdict

_CHAT = "/v1/chat/completions"
_TEXT = "/v1/completions"


def _turns(*turns: tuple[str, object]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


_SAID = f"Please {ATTACK.upper()} and go on"

_WAYS = {
    "chat": (_CHAT, {"messages": _turns(("user", _SAID))}),
    "chat stream": (_CHAT, {"messages": _turns(("user", _SAID)), "stream": True}),
    "chat n=3": (_CHAT, {"messages": _turns(("user", _SAID)), "n": 3}),
    "chat stream n=3": (_CHAT, {"messages": _turns(("user", _SAID)), "n": 3, "stream": True}),
    "chat parts": (_CHAT, {"messages": _turns(("user", [{"type": "text", "text": _SAID}]))}),
    "chat split parts": (
        _CHAT,
        {
            "messages": _turns(
                ("user", [{"type": "text", "text": part} for part in _SAID.partition("ous")])
            )
        },
    ),
    "chat first of two user turns": (
        _CHAT,
        {"messages": _turns(("user", _SAID), ("user", "thanks"))},
    ),
    "chat earlier turn": (
        _CHAT,
        {"messages": _turns(("user", _SAID), ("assistant", "no"), ("user", "go on"))},
    ),
    "chat tool result": (_CHAT, {"messages": _turns(("user", "read it"), ("tool", _SAID))}),
    "chat assistant prefill": (
        _CHAT,
        {"messages": _turns(("user", "hi"), ("assistant", _SAID))},
    ),
    "chat customer's system": (
        _CHAT,
        {"messages": _turns(("system", _SAID), ("user", "hi"))},
    ),
    "chat customer's developer": (
        _CHAT,
        {"messages": _turns(("developer", _SAID), ("user", "hi"))},
    ),
    "completions": (_TEXT, {"prompt": _SAID}),
    "completions stream": (_TEXT, {"prompt": _SAID, "stream": True}),
    "completions n=3": (_TEXT, {"prompt": _SAID, "n": 3}),
    "completions second prompt": (_TEXT, {"prompt": ["hi", _SAID]}),
    "completions stream second prompt": (_TEXT, {"prompt": ["hi", _SAID], "stream": True}),
}


@pytest.mark.parametrize("way", _WAYS)
async def test_guard_attack_by_any_way_is_refused_before_a_token(
    bench: Bench, client: httpx.AsyncClient, way: str
) -> None:
    path, ask = _WAYS[way]
    response = await client.post(path, json={"model": MODEL, **ask})

    body = response.json()
    assert response.status_code == 400
    assert body["error"]["code"] == "content_filter"
    assert body["error"]["type"] == "invalid_request_error"
    assert "jailbreak" in body["error"]["message"]
    assert "0.97" in body["error"]["message"]
    assert body["fortpoint"]["guard"]["action"] == "block"
    assert body["fortpoint"]["audit"]["index"] == 0
    assert response.headers["x-fortpoint-guard"] == "jailbreak,injection,harmful_request"
    (entry,) = bench.audit.entries
    assert (entry.kind, entry.code) == ("refusal", "content_filter")
    assert entry.verdict is not None
    assert entry.verdict.action == "block"
    held = [request.id for request in bench.engine.requests if request.id.endswith("-1")]
    if "second prompt" not in way:
        assert bench.engine.n_tokens == 0
        assert bench.engine.proceeded == []
    assert not set(held) & set(bench.engine.proceeded)
    assert {request.id for request in bench.engine.requests} == set(bench.engine.cancelled)


@pytest.mark.parametrize("way", _WAYS)
async def test_guard_that_fails_closes_every_way(
    bench: Bench, client: httpx.AsyncClient, way: str
) -> None:
    bench.guard.fails = True
    path, ask = _WAYS[way]
    response = await client.post(path, json={"model": MODEL, **ask})

    assert response.status_code == 503
    assert response.json()["error"]["code"] == "guard_failed"
    assert bench.engine.n_tokens == 0
    assert [entry.code for entry in bench.audit.entries] == ["guard_failed"]


@pytest.mark.parametrize("way", _WAYS)
@pytest.mark.parametrize("reading", [None, Reading((), 4, b"", ())])
async def test_guard_without_the_reading_it_asked_for_closes_every_way(
    bench: Bench,
    client: httpx.AsyncClient,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    reading: Reading | None,
) -> None:
    monkeypatch.setattr("fakes._reading", lambda _n_tokens: reading)
    path, ask = _WAYS[way]
    response = await client.post(path, json={"model": MODEL, **ask})

    assert (response.status_code, response.json()["error"]["code"]) == (503, "guard_failed")
    assert bench.engine.n_tokens == 0


async def test_guard_that_raises_closes_and_says_nothing_of_why(
    bench: Bench, client: httpx.AsyncClient
) -> None:
    bench.guard.raises = True
    response = await client.post(_TEXT, json={"model": MODEL, "prompt": "hi"})

    assert response.status_code == 503
    assert response.json()["error"]["code"] == "guard_failed"
    assert "secret-of-the-detector" not in response.text


async def test_guard_long_text_is_judged_too(bench: Bench, client: httpx.AsyncClient) -> None:
    prompt = "word " * 20_000 + ATTACK
    response = await client.post(_TEXT, json={"model": MODEL, "prompt": prompt})

    assert response.json()["error"]["code"] == "content_filter"
    assert len(response.content) < 1000


async def test_guard_operators_own_system_prompt_is_trusted(bench: Bench) -> None:
    messages = _turns(("system", f"Never {ATTACK}."), ("user", "hi"))
    async with in_process(bench, OPERATOR) as operator:
        response = await operator.post(_CHAT, json={"model": MODEL, "messages": messages})

    assert response.status_code == 200


async def test_guard_operators_user_text_is_judged(bench: Bench) -> None:
    async with in_process(bench, OPERATOR) as operator:
        response = await operator.post(
            _CHAT, json={"model": MODEL, "messages": _turns(("user", ATTACK))}
        )

    assert response.json()["error"]["code"] == "content_filter"


async def test_guard_gets_the_probes_reading_of_the_same_prefill(
    bench: Bench, client: httpx.AsyncClient
) -> None:
    await client.post(_TEXT, json={"model": MODEL, "prompt": "hi"})

    assert bench.engine.requests[0].read
    assert bench.engine.requests[0].hold
    assert bench.guard.readings[0] is not None


async def test_guard_without_probes_asks_for_no_reading(bench: Bench) -> None:
    bench.config = _with_guard(bench.config, probes=False)
    async with in_process(bench) as client:
        await client.post(_TEXT, json={"model": MODEL, "prompt": "hi"})
        await client.post("/v1/moderations", json={"input": "hi"})

    assert not bench.engine.requests[0].read
    assert bench.engine.scanned == []


async def test_guard_turned_off_answers_and_names_no_detector(bench: Bench) -> None:
    bench.config = _with_guard(bench.config, enabled=False)
    async with in_process(bench) as client:
        response = await client.post(_TEXT, json={"model": MODEL, "prompt": ATTACK})

    assert response.status_code == 200
    assert "x-fortpoint-guard" not in response.headers
    assert response.json()["fortpoint"]["guard"] is None
    assert not bench.engine.requests[0].hold


def test_services_with_a_guard_that_is_missing_do_not_start(bench: Bench) -> None:
    services = bench.services()

    with pytest.raises(ConfigError):
        Services(services.config, services.engine, None, services.keys, services.audit)


async def test_moderation_flags_what_the_gate_would_refuse(
    bench: Bench, client: httpx.AsyncClient
) -> None:
    response = await client.post("/v1/moderations", json={"input": ["hello", ATTACK]})

    clean, flagged = response.json()["results"]
    assert (clean["flagged"], flagged["flagged"]) == (False, True)
    assert flagged["categories"]["jailbreak"] is True
    assert flagged["category_scores"]["illicit"] == flagged["category_scores"]["harmful_request"]
    assert bench.audit.entries[0].kind == "answer"
    assert len(bench.engine.scanned) == 2


async def test_moderation_of_parts_is_one_result(client: httpx.AsyncClient) -> None:
    parts = [{"type": "text", "text": "hello"}, {"type": "text", "text": ATTACK}]
    response = await client.post("/v1/moderations", json={"input": parts})

    (result,) = response.json()["results"]
    assert result["flagged"]


async def test_moderation_with_a_failed_guard_is_an_error(
    bench: Bench, client: httpx.AsyncClient
) -> None:
    bench.guard.fails = True
    response = await client.post("/v1/moderations", json={"input": "hello"})

    assert (response.status_code, response.json()["error"]["code"]) == (503, "guard_failed")


def test_join_takes_the_graver_action_and_the_highest_scores() -> None:
    low = Verdict("allow", None, (Score("a", 0.1, 0.5, Role.USER, False),))
    high = Verdict("block", "a", (Score("a", 0.9, 0.5, Role.USER, True),))
    tool = Verdict("allow", None, (Score("a", 0.2, 0.5, Role.TOOL, False),))

    assert join(low, high) == join(high, low) == high
    assert join(high, tool) == Verdict("block", "a", (*high.scores, *tool.scores))


async def test_stream_blocked_in_a_later_prompt_ends_with_an_error_event(
    bench: Bench, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdicts = iter(["allow", "allow", "allow", "block"])  # two before the stream, then each

    def judge(*_: object, **__: object) -> Verdict:
        score = Score("jailbreak", 0.9, 0.5, Role.USER, True)
        action = next(verdicts)
        return (
            Verdict("block", "jailbreak", (score,))
            if action == "block"
            else Verdict("allow", None, ())
        )

    monkeypatch.setattr(bench.guard, "judge", judge)
    ask = {"model": MODEL, "prompt": ["one", "two"], "stream": True}
    response = await client.post(_TEXT, json=ask)

    last = json.loads(response.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["code"] == "content_filter"
    assert [entry.kind for entry in bench.audit.entries] == ["refusal"]


def _with_guard(config: Config, **changes: object) -> Config:
    guard = msgspec.structs.replace(config.guard, **changes)
    return msgspec.structs.replace(config, guard=guard)
