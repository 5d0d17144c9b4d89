"""Alerts and statistics of what is watched: seen, and recorded before the answer leaves."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from asking import CHAT, TEXT, chat, events, refused, text
from fakes import ATTACK, DIRECTION, OPERATOR, Bench, in_process
from fortpoint import config
from fortpoint.audit.entry import Inside
from fortpoint.config import Config
from fortpoint.errors import ConfigError, StorageError
from fortpoint.features.watched import watched
from fortpoint.gateway.services import Services
from kept import Kept, WatchedEngine, kept

NAMES = ("golden-gate", "l15/7")
WATCH = config.Watch(targets=("golden-gate:0.8", "l15/7"))


def bench_of(engine: WatchedEngine, **more: Any) -> Bench:
    return Bench(msgspec.structs.replace(Config(), watch=WATCH, **more), engine)


@pytest.fixture
def engine() -> WatchedEngine:
    return WatchedEngine(names=NAMES)


@pytest.fixture
async def gate(tmp_path: Path, engine: WatchedEngine) -> AsyncIterator[Kept]:
    async with kept(tmp_path, bench_of(engine)) as made:
        yield made


async def alerts(gate: Kept, **query: object) -> dict[str, Any]:
    async with gate.client(gate.operator) as operator:
        response = await operator.get("/api/alerts", params=query)
    assert response.status_code == 200, response.text
    page: dict[str, Any] = response.json()
    return page


async def statistics(gate: Kept) -> dict[tuple[str, str], dict[str, Any]]:
    async with gate.client(gate.operator) as operator:
        rows = (await operator.get("/api/features/stats")).json()["data"]
    return {(row["key_id"], row["target"]): row for row in rows}


def bridge(name: str, number: int) -> float:
    """Strong at the fake prompt's sixth token, which is the user's."""
    return 0.9 if (name, number) == ("golden-gate", 5) else 0.1


async def test_watched_prompt_over_its_threshold_alerts_with_who_and_how_much(
    gate: Kept, engine: WatchedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.prompt = bridge
    with caplog.at_level(logging.WARNING, "fortpoint.gateway"):
        async with gate.client() as client:
            answer = await client.post(CHAT, json=chat("Name the secret bridge."))
    assert answer.status_code == 200
    page = await alerts(gate)
    (alert,) = page["data"]
    assert (page["next"], alert["number"], alert["action"]) == (None, 1, "alert")
    assert (alert["target"], alert["role"], alert["part"]) == ("golden-gate", "user", "prompt")
    assert (alert["value"], alert["threshold"]) == (pytest.approx(0.9), 0.8)
    assert (alert["key_id"], alert["steered"]) == (gate.ids["customer"], False)
    assert alert["request_id"] == answer.json()["fortpoint"]["request_id"]
    assert gate.bench.audit.entries[0].inside == Inside(alerts=("golden-gate",))
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("alert ")]
    assert f"request={alert['request_id']}" in line
    assert "target=golden-gate" in line
    assert "bridge" not in line.replace("golden-gate", "")


async def test_watched_answer_alerts_as_the_assistants_whole_and_streamed(
    gate: Kept, engine: WatchedEngine
) -> None:
    engine.answer = lambda name, number: 0.7 if (name, number) == ("l15/7", 2) else 0.0
    async with gate.client() as client:
        await client.post(CHAT, json=chat())
        events(await client.post(CHAT, json=chat(stream=True)))
        events(await client.post(TEXT, json=text(["a", "b"], stream=True)))
    found = (await alerts(gate))["data"]
    assert [(a["target"], a["role"], a["part"]) for a in found] == [
        ("l15/7", "assistant", "answer")
    ] * 3
    assert len({a["request_id"] for a in found}) == 3


async def test_request_alerts_once_for_each_target_and_part_with_its_strongest(
    gate: Kept, engine: WatchedEngine
) -> None:
    engine.prompt = lambda name, number: 0.6 + number / 100
    engine.answer = lambda name, number: 0.9 + number
    async with gate.client() as client:
        await client.post(CHAT, json=chat("a b c d", n=2))
    found = {(a["target"], a["part"]): a["value"] for a in (await alerts(gate))["data"]}
    assert found == {
        ("l15/7", "prompt"): pytest.approx(0.67),
        ("golden-gate", "answer"): pytest.approx(5.9),
        ("l15/7", "answer"): pytest.approx(5.9),
    }


async def test_template_and_the_first_token_raise_no_alert(
    gate: Kept, engine: WatchedEngine
) -> None:
    engine.prompt = lambda name, number: 99.0 if number < 4 else 0.0
    async with gate.client() as client:
        await client.post(CHAT, json=chat())
    assert (await alerts(gate))["data"] == []
    row = (await statistics(gate))[gate.ids["customer"], "golden-gate"]
    assert (row["tokens_over"], row["maximum"], row["last_over_at"]) == (0, 0.0, None)


async def test_reading_equal_to_the_threshold_is_not_over_it(
    gate: Kept, engine: WatchedEngine
) -> None:
    engine.prompt = lambda name, number: 0.5
    async with gate.client() as client:
        await client.post(CHAT, json=chat())
    assert (await alerts(gate))["data"] == []


async def test_refused_attack_alerts_all_the_same(gate: Kept, engine: WatchedEngine) -> None:
    engine.prompt = bridge
    async with gate.client() as client:
        refused(await client.post(CHAT, json=chat(ATTACK)), 400, "content_filter")
        ask = text([ATTACK, "b"], stream=True)
        refused(await client.post(TEXT, json=ask), 400, "content_filter")
    assert len((await alerts(gate))["data"]) == 2
    assert [e.inside for e in gate.bench.audit.entries[:2]] == [Inside(alerts=("golden-gate",))] * 2


async def test_steered_prompt_is_watched_as_it_is_without_steering(
    gate: Kept, engine: WatchedEngine
) -> None:
    engine.prompt = bridge
    steer = [{"mode": "ablate", "target": DIRECTION}]
    async with gate.client(gate.operator) as operator:
        await operator.post(CHAT, json=chat("Name the bridge now.", fortpoint={"steer": steer}))
    assert len(engine.scanned) == 1
    (alert,) = (await alerts(gate))["data"]
    assert (alert["part"], alert["steered"]) == ("prompt", True)
    row = (await statistics(gate))[gate.ids["operator"], "golden-gate"]
    assert row["tokens_over"] == 1


@pytest.mark.parametrize("probes", [True, False])
async def test_watch_works_without_the_guard(
    tmp_path: Path, engine: WatchedEngine, probes: bool
) -> None:
    engine.prompt = bridge
    bench = bench_of(engine, guard=config.Guard(enabled=False, probes=probes))
    async with kept(tmp_path, bench) as gate:
        async with gate.client() as client:
            await client.post(CHAT, json=chat("Name the bridge."))
        async with gate.client(gate.operator) as operator:
            steer = [{"mode": "ablate", "target": DIRECTION}]
            await operator.post(CHAT, json=chat("Name it all.", fortpoint={"steer": steer}))
        assert len((await alerts(gate))["data"]) == 2


async def test_statistics_add_up_for_each_key_over_requests(
    gate: Kept, engine: WatchedEngine
) -> None:
    engine.prompt = bridge
    async with gate.client() as client, gate.client(gate.operator) as operator:
        await client.post(CHAT, json=chat("Name a bridge."))  # 3 prompt, 2 answer tokens
        await client.post(CHAT, json=chat("Name a bridge."))
        await operator.post(CHAT, json=chat("Name it."))
    found = await statistics(gate)
    customer = found[gate.ids["customer"], "golden-gate"]
    assert (customer["tokens"], customer["tokens_over"]) == (10, 2)
    assert customer["maximum"] == pytest.approx(0.9)
    assert customer["last_over_at"] is not None
    assert found[gate.ids["operator"], "golden-gate"]["tokens"] == 4
    assert found[gate.ids["customer"], "l15/7"]["tokens_over"] == 0
    async with gate.client() as client:
        await client.post(CHAT, json=chat("Name a bridge."))
    again = await statistics(gate)
    assert again[gate.ids["customer"], "golden-gate"]["tokens"] == 15


async def test_metrics_name_targets_and_no_keys(gate: Kept, engine: WatchedEngine) -> None:
    engine.prompt = bridge
    async with gate.client() as client:
        await client.post(CHAT, json=chat("Name a bridge."))
        shown = (await client.get("/metrics")).text
    assert 'fortpoint_watched_tokens_total{target="golden-gate"} 5.0' in shown
    assert 'fortpoint_watched_tokens_over_total{target="golden-gate"} 1.0' in shown
    assert 'fortpoint_alerts_total{part="prompt",target="golden-gate"} 1.0' in shown
    assert gate.ids["customer"] not in shown


async def test_alerts_are_paged_newest_first(gate: Kept, engine: WatchedEngine) -> None:
    engine.prompt = bridge
    async with gate.client() as client:
        for _ in range(5):
            await client.post(CHAT, json=chat("Name a bridge."))
    first = await alerts(gate, limit=2)
    second = await alerts(gate, limit=2, before=first["next"])
    last = await alerts(gate, limit=2, before=second["next"])
    pages = [[alert["number"] for alert in page["data"]] for page in (first, second, last)]
    assert pages == [[5, 4], [3, 2], [1]]
    assert last["next"] is None


@pytest.mark.parametrize(
    ("path", "query"),
    [
        ("/api/alerts", "limit=0"),
        ("/api/alerts", "limit=1001"),
        ("/api/alerts", "limit=ten"),
        ("/api/alerts", "limit=1&limit=2"),
        ("/api/alerts", "before=-1"),
        ("/api/alerts", "before=" + "9" * 40),
        ("/api/alerts", "limit=%D9%A1"),
        ("/api/alerts", "key=x"),
        ("/api/features/stats", "key_id=nope"),
        ("/api/features/stats", "offset=1.5"),
        ("/api/features/stats", "limit="),
    ],
)
async def test_query_that_is_wrong_is_refused(gate: Kept, path: str, query: str) -> None:
    async with gate.client(gate.operator) as operator:
        refused(await operator.get(f"{path}?{query}"), 400, "invalid_request")


@pytest.mark.parametrize("path", ["/api/alerts", "/api/features/stats"])
async def test_watch_is_shown_to_operators_only_and_looking_is_recorded(
    gate: Kept, path: str
) -> None:
    async with gate.client() as client, gate.client(gate.operator) as operator:
        refused(await client.get(path), 403, "forbidden")
        assert (await operator.get(path)).status_code == 200
    kinds = [(e.kind, e.surface, e.status) for e in gate.bench.audit.entries]
    assert kinds == [("refusal", path, 403), ("admin", path, 200)]


@pytest.mark.parametrize("stream", [False, True])
async def test_answer_whose_alert_cannot_be_written_is_withheld(
    gate: Kept, engine: WatchedEngine, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    async def full(*_: object) -> None:
        raise StorageError("the disk is full")

    engine.prompt = bridge
    async with gate.client() as client:
        assert gate.services is not None
        monkeypatch.setattr(gate.services.watch.ledger, "write", full)
        response = await client.post(CHAT, json=chat("Name the bridge.", stream=stream))
    assert "audit_unavailable" in response.text
    assert "[DONE]" not in response.text
    assert gate.bench.audit.entries == []


async def test_statistics_that_could_not_be_written_are_kept_for_later(
    gate: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with gate.client() as client:
        assert gate.services is not None
        watch = gate.services.watch
        await client.post(CHAT, json=chat("Name a bridge."))
        with monkeypatch.context() as broken:

            async def full(*_: object) -> None:
                raise StorageError("the disk is full")

            broken.setattr(watch.ledger, "write", full)
            async with gate.client(gate.operator) as operator:
                response = await operator.get("/api/features/stats")
            refused(response, 503, "audit_unavailable")
    assert (await statistics(gate))[gate.ids["customer"], "golden-gate"]["tokens"] == 5


@pytest.mark.parametrize("names", [(), ("golden-gate",), ("l15/7", "golden-gate")])
async def test_engine_that_does_not_read_what_is_watched_answers_nothing(
    gate: Kept, engine: WatchedEngine, names: tuple[str, ...]
) -> None:
    engine.names = names
    async with gate.client() as client:
        refused(await client.post(CHAT, json=chat()), 502, "engine_error")
    assert engine.n_tokens == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
async def test_reading_that_is_no_number_is_an_engine_error(
    gate: Kept, engine: WatchedEngine, value: float
) -> None:
    engine.prompt = lambda name, number: value
    async with gate.client() as client:
        refused(await client.post(CHAT, json=chat()), 502, "engine_error")


async def test_nothing_watched_asks_for_no_reading_and_has_no_alerts(bench: Bench) -> None:
    bench.config = msgspec.structs.replace(bench.config, guard=config.Guard(probes=False))
    async with in_process(bench, OPERATOR) as operator:
        await operator.post(CHAT, json=chat())
        shown = (await operator.get("/api/alerts")).json()
        rows = (await operator.get("/api/features/stats")).json()
    assert bench.engine.requests[-1].read is False
    assert (shown["data"], rows["data"], rows["thresholds"]) == ([], [], {})


def test_watch_without_a_database_is_refused(bench: Bench) -> None:
    watching = msgspec.structs.replace(bench.config, watch=WATCH)
    services = bench.services()
    with pytest.raises(ConfigError, match="database"):
        Services(watching, bench.engine, bench.guard, services.keys, bench.audit)


def test_thresholds_are_each_target_s_own_or_the_common_one() -> None:
    watching = Config(watch=config.Watch(targets=("a:2", "l15/7", "b.c-d:0.25"), threshold=0.6))
    assert watched(watching) == {"a": 2.0, "l15/7": 0.6, "b.c-d": 0.25}


@pytest.mark.parametrize(
    "targets",
    [
        ("a", "a:2"),
        ("a:0",),
        ("a:-1",),
        ("a:nan",),
        ("a:inf",),
        ("a:101",),
        ("a:x",),
        ("a:",),
        ("",),
        ("a b",),
        ("l15/",),
        ("l15/x",),
        ("l15/12345678",),
        ("../x",),
        tuple(f"t{i}" for i in range(65)),
    ],
)
def test_targets_that_cannot_be_watched_are_refused(targets: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"^watch\.targets: "):
        watched(Config(watch=config.Watch(targets=targets)))


def test_upstreams_cannot_be_watched() -> None:
    watching = Config(engine=config.Engine(kind="upstream"), watch=WATCH)
    with pytest.raises(ConfigError, match="embedded"):
        watched(watching)
