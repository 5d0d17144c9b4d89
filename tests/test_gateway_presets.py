"""Presets at the gateway: who may use one, what it does to a request, and what is recorded."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from asking import CHAT, TEXT, chat, events, refused, text
from fakes import DICTIONARY, DIRECTION, DIVERGES, MODEL, Bench
from fortpoint.access.presets import Preset
from fortpoint.audit.entry import Inside, PresetUse
from fortpoint.engine.protocol import Condition, Scored, ScoreText, Steer
from fortpoint.errors import AuditUnavailable, SteeringDiverged
from fortpoint.gateway import presets
from kept import Kept, kept

PRESETS = "/api/presets"
SIX = [{"mode": "clamp", "target": DIRECTION, "strength": 6}]
CALM = [
    {
        "mode": "add",
        "target": f"{DICTIONARY}/7",
        "strength": -2,
        "scope": "answer",
        "when": {"feature": DIRECTION, "above": 0.5},
    },
    {"mode": "ablate", "target": DIRECTION},
]
CLAMPED = Steer("clamp", DIRECTION, 6.0)
CALMED = (
    Steer("add", f"{DICTIONARY}/7", -2.0, "answer", Condition(DIRECTION, 0.5)),
    Steer("ablate", DIRECTION),
)


@pytest.fixture
async def gate(tmp_path: Path, bench: Bench) -> AsyncIterator[Kept]:
    async with kept(tmp_path, bench) as made:
        yield made


async def save(gate: Kept, name: str = "golden-gate-6", **more: object) -> dict[str, Any]:
    async with gate.client(gate.operator) as operator:
        ask = {"name": name, "model": MODEL, "steer": SIX, **more}
        response = await operator.post(PRESETS, json=ask)
    assert response.status_code == 200, response.text
    saved: dict[str, Any] = response.json()
    return saved


async def test_customer_uses_a_preset_without_the_right_to_steer(gate: Kept) -> None:
    saved = await save(gate, steer=CALM, keys=[gate.ids["customer"]])
    async with gate.client() as client:
        for path, ask in ((CHAT, chat()), (TEXT, text())):
            asked = {**ask, "fortpoint": {"preset": "golden-gate-6"}}
            assert (await client.post(path, json=asked)).status_code == 200
        own = await client.post(CHAT, json=chat(fortpoint={"steer": SIX}))
    refused(own, 403, "forbidden")
    assert [request.steer for request in gate.bench.engine.requests] == [CALMED, CALMED]
    entry = gate.bench.audit.entries[1]
    assert entry.inside == Inside(presets=(PresetUse("golden-gate-6", saved["sha256"]),))


async def test_default_is_applied_unasked_to_every_request_and_recorded(gate: Kept) -> None:
    saved = await save(gate, default_of=[gate.ids["customer"]])
    async with gate.client() as client:
        await client.post(CHAT, json=chat())
        await client.post(TEXT, json=text(["a", "b"]))
        streamed = await client.post(CHAT, json=chat(stream=True))
        events(streamed)
        named = await client.post(CHAT, json=chat(fortpoint={"preset": "golden-gate-6"}))
    assert named.status_code == 200
    assert [request.steer for request in gate.bench.engine.requests] == [(CLAMPED,)] * 5
    used = Inside(presets=(PresetUse("golden-gate-6", saved["sha256"]),))
    assert [entry.inside for entry in gate.bench.audit.entries[1:]] == [used] * 4
    async with gate.client(gate.operator) as operator:
        await operator.post(CHAT, json=chat())
    assert gate.bench.engine.requests[-1].steer == ()


async def test_default_comes_before_what_is_asked_for_and_both_before_ones_own(
    gate: Kept,
) -> None:
    await save(gate, "calm", steer=CALM)
    await save(gate, default_of=[gate.ids["operator"]])
    own = {"mode": "add", "target": DIRECTION, "strength": 1}
    async with gate.client(gate.operator) as operator:
        ask = chat(fortpoint={"preset": "calm", "steer": [own]})
        assert (await operator.post(CHAT, json=ask)).status_code == 200
    (request,) = gate.bench.engine.requests
    assert request.steer == (CLAMPED, *CALMED, Steer("add", DIRECTION, 1.0))
    inside = gate.bench.audit.entries[-1].inside
    assert isinstance(inside, Inside)
    assert ([use.name for use in inside.presets], inside.steers) == (["golden-gate-6", "calm"], 1)


async def test_default_steers_what_an_operator_scores(gate: Kept) -> None:
    await save(gate, default_of=[gate.ids["operator"]])
    async with gate.client(gate.operator) as operator:
        ask = {"model": MODEL, "prompt": "a", "continuation": "b"}
        assert (await operator.post("/api/score", json=ask)).status_code == 200
    assert gate.bench.engine.scored[-1].steer == (CLAMPED,)


async def test_changed_preset_holds_from_the_next_request_and_the_record_tells_which(
    gate: Kept,
) -> None:
    first = await save(gate, default_of=[gate.ids["customer"]])
    async with gate.client() as client:
        await client.post(CHAT, json=chat())
        second = await save(gate, steer=[{**SIX[0], "strength": 2}])
        await client.post(CHAT, json=chat())
    assert [r.steer[0].strength for r in gate.bench.engine.requests] == [6.0, 2.0]
    told = [e.inside for e in gate.bench.audit.entries if e.surface == CHAT]
    digests = [inside.presets[0].sha256 for inside in told if isinstance(inside, Inside)]
    assert digests == [first["sha256"], second["sha256"]]


async def test_preset_that_the_key_does_not_have_is_refused_without_naming_others(
    gate: Kept,
) -> None:
    await save(gate, "secret-plan")
    await save(gate, keys=[gate.ids["customer"]])
    async with gate.client() as client:
        for name in ("secret-plan", "golden-gate-7", "x" * 128):
            response = await client.post(CHAT, json=chat(fortpoint={"preset": name}))
            error = refused(response, 400, "invalid_request")
            assert error["param"] == "fortpoint.preset"
            assert "golden-gate-6" in error["message"]
            assert "secret" not in error["message"]
    assert gate.bench.engine.requests == []


async def test_operator_may_use_any_preset(gate: Kept) -> None:
    await save(gate)
    async with gate.client(gate.operator) as operator:
        good = await operator.post(CHAT, json=chat(fortpoint={"preset": "golden-gate-6"}))
        bad = await operator.post(CHAT, json=chat(fortpoint={"preset": "golden"}))
    assert good.status_code == 200
    assert "'golden-gate-6'" in refused(bad, 400, "invalid_request")["message"]


@pytest.mark.parametrize(
    ("model", "steers"),
    [
        (MODEL, b'[{"mode":"add","target":"gone","strength":1}]'),
        (MODEL, b'[{"mode":"add","target":"l15/4608","strength":1}]'),
        (
            MODEL,
            b'[{"mode":"add","target":"l15/1","strength":1,"when":{"feature":"x/1","above":1}}]',
        ),
        ("another-model", json.dumps(SIX).encode()),
        (MODEL, b"[]"),
        (MODEL, b"not json"),
        (MODEL, b'[{"mode":"melt","target":"golden-gate"}]'),
    ],
)
@pytest.mark.parametrize("always", [True, False])
async def test_preset_that_cannot_be_applied_refuses_the_request_and_keeps_its_content(
    gate: Kept, model: str, steers: bytes, always: bool
) -> None:
    old = presets.made("old", model, [], "grace")
    await gate.book.save(Preset("old", model, steers, old.saved_at, "grace"))
    await gate.book.assign("old", gate.ids["customer"], always=always)
    ask = chat() if always else chat(fortpoint={"preset": "old"})
    async with gate.client() as client, gate.client(gate.operator) as operator:
        error = refused(await client.post(CHAT, json=ask), 503, "preset_unavailable")
        streamed = await client.post(CHAT, json={**ask, "stream": True})
        refused(streamed, 503, "preset_unavailable")
        told = await operator.post(CHAT, json=chat(fortpoint={"preset": "old"}))
    assert "preset old" in error["message"]
    assert not any(word in error["message"] for word in ("gone", "4608", "another-model", "melt"))
    assert "(" in refused(told, 503, "preset_unavailable")["message"]
    assert gate.bench.engine.requests == []
    assert {entry.code for entry in gate.bench.audit.entries} == {"preset_unavailable"}


async def test_presets_and_own_steers_together_are_limited(gate: Kept) -> None:
    await save(gate, steer=SIX * 16, default_of=[gate.ids["operator"]])
    async with gate.client(gate.operator) as operator:
        response = await operator.post(CHAT, json=chat(fortpoint={"steer": SIX}))
        assert (await operator.post(CHAT, json=chat())).status_code == 200
    assert refused(response, 400, "invalid_request")["param"] == "fortpoint.steer"


async def test_steered_prompt_of_a_preset_is_judged_as_it_is_without(gate: Kept) -> None:
    await save(gate, default_of=[gate.ids["customer"]])
    async with gate.client() as client:
        await client.post(CHAT, json=chat())
    assert len(gate.bench.engine.scanned) == 1
    assert len(gate.bench.guard.judged) == 1


async def test_own_wishes_are_counted_in_the_record(gate: Kept) -> None:
    when = {"feature": DIRECTION, "above": 0.5}
    fields = {
        "steer": SIX,
        "stop_when": [when, when],
        "watch": {"dictionaries": [DICTIONARY]},
        "adapter": "pirate",
    }
    async with gate.client(gate.operator) as operator:
        await operator.post(CHAT, json=chat(fortpoint=fields))
        await operator.post(CHAT, json=chat(fortpoint={"top_k": 3}))
    asked, plain = gate.bench.audit.entries
    assert asked.inside == Inside(steers=1, stop_when=2, watch=(DICTIONARY,), adapter="pirate")
    assert not isinstance(plain.inside, Inside)


async def test_saving_is_recorded_with_its_digest_and_listed(gate: Kept) -> None:
    saved = await save(gate, steer=CALM, keys=[gate.ids["customer"]])
    (entry,) = gate.bench.audit.entries
    assert (entry.kind, entry.surface, entry.status) == ("admin", PRESETS, 200)
    assert saved["sha256"] in (entry.detail or "")
    assert gate.ids["customer"] in (entry.detail or "")
    async with gate.client(gate.operator) as operator:
        (card,) = (await operator.get(PRESETS)).json()["data"]
    assert (card["name"], card["sha256"], card["saved_by"]) == (
        "golden-gate-6",
        saved["sha256"],
        "operator",
    )
    assert card["keys"] == [gate.ids["customer"]]
    assert [(one["mode"], one["target"]) for one in card["steer"]] == [
        ("add", f"{DICTIONARY}/7"),
        ("ablate", DIRECTION),
    ]


async def test_removing_is_recorded_and_a_default_is_kept(gate: Kept) -> None:
    await save(gate, default_of=[gate.ids["customer"]])
    async with gate.client(gate.operator) as operator:
        held = await operator.delete(f"{PRESETS}/golden-gate-6")
        assert gate.ids["customer"] in refused(held, 400, "invalid_request")["message"]
        await save(gate, default_of=[])
        assert (await operator.delete(f"{PRESETS}/golden-gate-6")).json()["removed"]
        gone = await operator.delete(f"{PRESETS}/golden-gate-6")
        for name in ("golden-gate-6", "a%20b", "%2e%2e", "x" * 100):
            assert (await operator.delete(f"{PRESETS}/{name}")).status_code == 404
    refused(gone, 404, "not_found")
    removals = [e for e in gate.bench.audit.entries if e.surface == PRESETS + "/{preset}"]
    assert [e.status for e in removals][:3] == [400, 200, 404]
    assert removals[1].detail == "remove preset golden-gate-6"


@pytest.mark.parametrize("method", ["get", "post", "delete"])
async def test_customer_may_not_keep_presets(gate: Kept, method: str) -> None:
    path = f"{PRESETS}/x" if method == "delete" else PRESETS
    async with gate.client() as client:
        more = {"json": {"name": "x", "model": MODEL, "steer": SIX}} if method == "post" else {}
        refused(await client.request(method, path, **more), 403, "forbidden")
    assert await gate.book.list() == ()


_WRONG: list[tuple[dict[str, object], int, str]] = [
    ({"steer": []}, 400, "steer"),
    ({"steer": SIX * 17}, 400, "steer"),
    ({"steer": [{**SIX[0], "strength": 101}]}, 400, "steer[0].strength"),
    ({"steer": [{**SIX[0], "strenght": 1}]}, 400, "steer[0]"),
    ({"steer": [{**SIX[0], "target": "golden"}]}, 400, "steer[0].target"),
    ({"steer": [{**SIX[0], "target": "l15/9999"}]}, 400, "steer[0].target"),
    ({"steer": [{**SIX[0], "target": "a\x00b"}]}, 400, "fortpoint"),
    ({"name": "a b"}, 400, "name"),
    ({"name": ""}, 400, "name"),
    ({"name": "x" * 65}, 400, "name"),
    ({"name": "a\n"}, 400, "name"),
    ({"model": "another"}, 404, "model"),
    ({"keys": ["nope"]}, 400, "keys[0]"),
    ({"unknown": 1}, 400, ""),
]


@pytest.mark.parametrize(("fields", "status", "param"), _WRONG)
async def test_preset_that_is_wrong_is_refused_and_not_saved(
    gate: Kept, fields: dict[str, object], status: int, param: str
) -> None:
    async with gate.client(gate.operator) as operator:
        ask = {"name": "x", "model": MODEL, "steer": SIX, **fields}
        response = await operator.post(PRESETS, json=ask)
    assert response.status_code == status, response.text
    assert (response.json()["error"]["param"] or "").startswith(param)
    assert len(response.content) < 1000
    assert await gate.book.list() == ()


@pytest.mark.parametrize("field", ["keys", "default_of"])
async def test_preset_for_a_key_that_there_is_not_is_not_saved(gate: Kept, field: str) -> None:
    async with gate.client(gate.operator) as operator:
        ask = {"name": "x", "model": MODEL, "steer": SIX, field: ["a" * 12]}
        refused(await operator.post(PRESETS, json=ask), 404, "not_found")
    assert await gate.book.list() == ()


async def test_preset_that_breaks_the_model_at_once_is_not_saved(
    gate: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def score(request: ScoreText) -> Scored:
        if any(steer.strength == DIVERGES for steer in request.steer):
            raise SteeringDiverged("out of bounds")
        raise AssertionError("another strength was tried")

    monkeypatch.setattr(gate.bench.engine, "score", score)
    async with gate.client(gate.operator) as operator:
        ask = {"name": "x", "model": MODEL, "steer": [{**SIX[0], "strength": DIVERGES}]}
        response = await operator.post(PRESETS, json=ask)
    assert "less strength" in refused(response, 400, "invalid_request")["message"]
    assert await gate.book.list() == ()


async def test_preset_that_cannot_be_recorded_is_not_kept(
    gate: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await save(gate)

    async def full(entry: object, content: object) -> None:
        raise AuditUnavailable("the disk is full")

    monkeypatch.setattr(gate.bench.audit, "append", full)
    async with gate.client(gate.operator) as operator:
        ask = {"name": "golden-gate-6", "model": MODEL, "steer": CALM}
        refused(await operator.post(PRESETS, json=ask), 503, "audit_unavailable")
        refused(await operator.delete(f"{PRESETS}/golden-gate-6"), 503, "audit_unavailable")
    (one,) = await gate.book.list()
    assert one.preset.sha256 == before["sha256"]
