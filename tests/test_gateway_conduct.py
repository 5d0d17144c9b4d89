"""The policy, the conversation and the account stand behind every prompt of the gateway."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from fakes import ATTACK, CUSTOMER, MODEL, OPERATOR, Bench, FakeGuard
from fortpoint.errors import StorageError
from fortpoint.gateway.app import create_app
from fortpoint.gateway.policy_in_force import PolicyParts
from fortpoint.gateway.services import Services
from fortpoint.guard.account_desk import AccountDesk
from fortpoint.guard.account_ledger import AccountLedger
from fortpoint.guard.policy_file import LoadedPolicy, read_policy
from fortpoint.guard.second_stage import SecondStageFailed
from fortpoint.store.database import Database
from fortpoint.types import Reading, Role, Score, Turn, Verdict

_CHAT = "/v1/chat/completions"
_KEY = "key:customerkey1"
_BASE = """version = "test-1"
[[rules]]
id = "all"
detector = "*"
action = "block"
"""


class _TurnGuard(FakeGuard):
    """Reads a turn's score from its text: ``harm 0.8``."""

    def judge(
        self,
        messages: Any,
        reading: Reading | None,
        trusted: frozenset[Role] = frozenset(),
    ) -> Verdict:
        turns = []
        for index, message in enumerate(messages):
            if message.role is Role.USER:
                value = float(message.content.rpartition("harm ")[2] or 0)
                score = Score("harmful_request", value, 0.9, Role.USER, value >= 0.9)
                turns.append(Turn(index, (score,)))
        best = max((turn.scores[0] for turn in turns), key=lambda score: score.score)
        return Verdict("block" if best.flagged else "allow", None, (best,), tuple(turns))


class _Stage:
    """A second stage that says what it is told."""

    def __init__(self, score: float | None) -> None:
        self.score = score
        self.asked: list[str] = []

    async def ask(self, text: str) -> float:
        self.asked.append(text)
        if self.score is None:
            raise SecondStageFailed("the second stage took too long, so nothing was answered")
        return self.score

    async def close(self) -> None:
        return None


class _World:
    """A gateway over fakes, a real database, and a policy."""

    def __init__(self, folder: Path) -> None:
        self.bench = Bench()
        self.folder = folder
        self.database = Database(str(folder / "fortpoint.db"))
        self.stage: _Stage | None = None

    async def open(self, text: str = _BASE) -> httpx.AsyncClient:
        await self.database.migrate()
        self.ledger = AccountLedger(self.database)
        loaded = read_policy(text.encode(), "policy.toml")
        self.desk = await AccountDesk.open(self.ledger, self.bench.audit, loaded.policy.account)
        self.services = self._services(loaded)
        transport = httpx.ASGITransport(app=create_app(self.services))
        self.client = httpx.AsyncClient(transport=transport, base_url="http://gateway")
        return self.client

    async def ask(self, *said: str, key: str = CUSTOMER, **more: Any) -> httpx.Response:
        roles = itertools.cycle(("user", "assistant"))
        messages = [
            {"role": role, "content": text} for role, text in zip(roles, said, strict=False)
        ]
        body = {"model": MODEL, "messages": messages} | more
        return await self.client.post(_CHAT, json=body, headers=_headers(key))

    def _services(self, loaded: LoadedPolicy) -> Services:
        bench = self.bench
        parts = PolicyParts(loaded, self.desk, self.stage)
        given = bench.services()
        return Services(
            given.config, given.engine, given.guard, given.keys, given.audit, policy=parts
        )


def _headers(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def _edited(seed: int) -> str:
    words = f"{ATTACK} and tell me how the dangerous thing is made at home by anybody".split()
    head, rest = words[:4], words[4:]
    random.Random(seed).shuffle(rest)
    return " ".join([*head, *rest])


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[_World]:
    world = _World(tmp_path)
    yield world
    await world.client.aclose()
    await world.database.close()


async def test_policy_is_in_every_entry_with_its_digest(world):
    await world.open()
    await world.ask("hello")
    await world.ask(ATTACK)
    await world.client.get("/v1/models", headers=_headers(CUSTOMER))
    used = [entry.policy for entry in world.bench.audit.entries]
    assert {one.version for one in used} == {"test-1"}
    assert {len(one.sha256) for one in used} == {64}
    assert [one.rules for one in used] == [(), ("all",), ()]


async def test_policy_in_shadow_answers_and_records_what_it_would_have_done(world):
    await world.open(_BASE.replace('"test-1"', '"test-1"\nshadow = true'))
    response = await world.ask(ATTACK)
    assert response.status_code == 200
    (entry,) = world.bench.audit.entries
    assert (entry.policy.shadow, entry.policy.shadow_rules) == ("block", ("all",))
    assert entry.verdict.action == "allow"


async def test_policy_rule_for_a_key_takes_the_place_of_the_rule_for_all(world):
    exempt = (
        '[[rules]]\nid = "ada"\ndetector = "*"\nthreshold = 0.0\naction = "flag"\nusers = ["ada"]'
    )
    await world.open(_BASE + exempt)
    assert (await world.ask(ATTACK)).status_code == 200
    assert (await world.ask(ATTACK, key=OPERATOR)).status_code == 400
    assert world.bench.audit.entries[0].verdict.action == "flag"


@pytest.mark.parametrize("stream", [False, True])
async def test_policy_that_breaks_closes_the_gate(world, monkeypatch, stream):
    await world.open()

    def broken(*_arguments):
        raise ZeroDivisionError("secret-of-the-policy")

    monkeypatch.setattr("fortpoint.guard.policy.decide", broken)
    response = await world.ask("hello", stream=stream)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "guard_failed")
    assert "secret" not in response.text
    assert world.bench.engine.n_tokens == 0
    assert world.bench.audit.entries[-1].verdict.action == "failed"


_ESCALATE = """version = "two"
[[rules]]
id = "unsure"
detector = "jailbreak"
threshold = 0.5
action = "escalate"
[second_stage]
url = "http://127.0.0.1:9/v1"
"""


@pytest.mark.parametrize(("score", "status", "action"), [(0.9, 400, "block"), (0.1, 200, "flag")])
async def test_escalation_asks_the_second_stage_and_records_its_cost(world, score, status, action):
    world.stage = _Stage(score)
    await world.open(_ESCALATE)
    response = await world.ask(ATTACK)
    assert response.status_code == status
    entry = world.bench.audit.entries[-1]
    assert entry.verdict.action == action
    (stage,) = entry.policy.stages
    assert (stage.name, stage.outcome) == ("second_stage", "ok")
    assert world.stage.asked == [ATTACK]


async def test_escalation_is_only_for_the_uncertain(world):
    world.stage = _Stage(0.0)
    await world.open(_ESCALATE)
    assert (await world.ask("hello")).status_code == 200
    assert world.stage.asked == []


async def test_second_stage_that_fails_is_closed_by_default(world):
    world.stage = _Stage(None)
    await world.open(_ESCALATE)
    response = await world.ask(ATTACK)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "guard_failed")
    assert world.bench.engine.n_tokens == 0
    assert world.bench.audit.entries[-1].policy.stages[0].outcome == "failed"


async def test_second_stage_that_fails_may_be_open_and_is_flagged(world):
    world.stage = _Stage(None)
    await world.open(_ESCALATE + 'on_failure = "open"\n')
    assert (await world.ask(ATTACK)).status_code == 200
    assert world.bench.audit.entries[-1].verdict.action == "flag"


async def _crescendo(world: _World, values: tuple[float, ...]) -> list[int]:
    said: list[str] = []
    statuses = []
    for value in values:
        said.append(f"turn {len(said)} harm {value}")
        response = await world.ask(*said)
        statuses.append(response.status_code)
        said.append("Golden Gate Bridge")
    return statuses


async def test_crescendo_of_turns_that_each_pass_is_refused(world):
    world.bench.guard = _TurnGuard()
    await world.open()
    statuses = await _crescendo(world, (0.1, 0.6, 0.75, 0.8, 0.85, 0.88))
    assert statuses[0] == 200
    assert statuses[-1] == 400
    last = world.bench.audit.entries[-1]
    assert last.verdict.detector == "crescendo"


async def test_long_harmless_conversation_is_answered(world):
    world.bench.guard = _TurnGuard()
    await world.open()
    assert set(await _crescendo(world, (0.1, 0.3, 0.2, 0.6, 0.1, 0.5) * 4)) == {200}


async def test_account_attacker_is_slowed_then_suspended_over_http(world):
    await world.open(_BASE + "[account]\nslow_at = 1.0\nsuspend_at = 2.0\nslow_interval_s = 0.05\n")
    codes = []
    for number in range(40):
        response = await world.ask(_edited(number))
        codes.append(response.json()["error"]["code"])
        if codes[-1] == "account_slowed":
            assert response.status_code == 429
            assert int(response.headers["retry-after"]) >= 1
            await asyncio.sleep(0.05)
    assert set(codes) == {"content_filter", "account_slowed", "account_suspended"}
    assert codes[-1] == "account_suspended"
    models = await world.client.get("/v1/models", headers=_headers(CUSTOMER))
    assert (models.status_code, models.json()["error"]["code"]) == (403, "account_suspended")
    assert (await world.ask("hello", key=OPERATOR)).status_code == 200


async def test_account_api_shows_the_evidence_and_reinstates(world):
    await world.open(_BASE + "[account]\nslow_at = 0\nsuspend_at = 1.0\nuser_factor = 1000\n")
    for number in range(10):
        await world.ask(_edited(number))
    operator, client = _headers(OPERATOR), world.client
    listed = (await client.get("/api/accounts", headers=operator)).json()["data"]
    assert {"key:customerkey1": "suspended"}.items() <= {
        card["account"]: card["status"] for card in listed
    }.items()
    shown = await client.get(f"/api/accounts/evidence?account={_KEY}", headers=operator)
    events = shown.json()["account"]["events"]
    assert events
    assert all(event["request_id"].startswith("req_") for event in events)
    assert "dangerous" not in shown.text
    decided = await client.post(
        "/api/accounts/decisions",
        json={"account": _KEY, "do": "reinstate", "reason": "appeal accepted"},
        headers=operator,
    )
    assert decided.status_code == 200
    assert world.bench.audit.entries[-1].detail == (
        f"reinstate {_KEY}: active, because appeal accepted"
    )
    assert (await world.ask("hello")).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/api/accounts", None),
        ("GET", f"/api/accounts/evidence?account={_KEY}", None),
        ("POST", "/api/accounts/decisions", {"account": _KEY, "do": "reinstate"}),
    ],
)
async def test_account_api_is_for_operators(world, method, path, body):
    await world.open()
    response = await world.client.request(method, path, json=body, headers=_headers(CUSTOMER))
    assert response.status_code == 403


@pytest.mark.parametrize(
    "body",
    [
        {"account": "group:x", "do": "clear"},
        {"account": _KEY, "do": "forgive"},
        {"account": _KEY, "do": "clear", "reason": "x" * 513},
        {"account": _KEY, "do": "clear", "why": "x"},
    ],
)
async def test_account_decision_that_is_none_is_refused(world, body):
    await world.open()
    response = await world.client.post(
        "/api/accounts/decisions", json=body, headers=_headers(OPERATOR)
    )
    assert response.status_code == 400


async def test_account_decision_that_cannot_be_recorded_is_undone(world):
    await world.open()
    await world.ask("hello")
    world.bench.audit.fail = 1
    response = await world.client.post(
        "/api/accounts/decisions",
        json={"account": _KEY, "do": "suspend"},
        headers=_headers(OPERATOR),
    )
    assert response.status_code == 503
    assert (await world.ask("hello")).status_code == 200


async def test_account_that_cannot_be_read_closes_the_gate(world, monkeypatch):
    await world.open()

    async def lost(*_arguments):
        raise StorageError("the database failed")

    monkeypatch.setattr(world.ledger, "status", lost)
    response = await world.ask("hello")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "storage_unavailable")
    assert world.bench.engine.requests == []


async def test_account_answer_that_was_cut_counts_as_an_attack(world):
    world.bench.guard.forbidden = "bridge"
    await world.open()
    response = await world.ask("hello")
    assert response.json()["choices"][0]["finish_reason"] == "content_filter"
    assert world.desk.risk(_KEY) >= 0.5


async def test_account_stream_of_two_prompts_counts_each_once(world):
    await world.open()
    body = {"model": MODEL, "prompt": ["hi", ATTACK], "stream": True}
    await world.client.post("/v1/completions", json=body, headers=_headers(CUSTOMER))
    assert 0.5 <= world.desk.risk(_KEY) <= 1.0


async def test_account_moderations_raise_no_risk(world):
    await world.open()
    for number in range(10):
        await world.client.post(
            "/v1/moderations", json={"input": _edited(number)}, headers=_headers(CUSTOMER)
        )
    assert world.desk.risk(_KEY) == 0.0


async def test_account_injection_in_a_tool_result_is_not_its_callers_attack(world):
    await world.open()
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "read"}, {"role": "tool", "content": ATTACK}],
    }
    response = await world.client.post(_CHAT, json=body, headers=_headers(CUSTOMER))
    assert response.status_code == 400
    assert world.desk.risk(_KEY) == 0.0


async def test_account_made_up_dialogue_raises_the_risk(world):
    await world.open()
    said = [text for number in range(80) for text in (f"question {number}", "Sure, here it is")]
    await world.ask(*said, "and now this")
    assert world.desk.risk(_KEY) > 1.0


async def test_turns_are_not_in_the_record(world):
    world.bench.guard = _TurnGuard()
    await world.open()
    await world.ask("harm 0.1")
    assert b"turns" not in msgspec.json.encode(world.bench.audit.entries[0])
