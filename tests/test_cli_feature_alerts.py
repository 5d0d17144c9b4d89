"""``fortpoint features alerts`` and ``stats``: what the database has, and nothing of any text."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from fortpoint.cli import feature_alerts
from fortpoint.gateway.watch_ledger import Alert, FeatureCount, WatchLedger
from fortpoint.store.database import Database
from fortpoint.types import Role

MOMENT = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)

app = typer.Typer()
app.command("alerts")(feature_alerts.alerts)
app.command("stats")(feature_alerts.stats)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FORTPOINT_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "state"


def output(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def alert(number: int) -> Alert:
    return Alert(
        time=MOMENT,
        request_id=f"req_{number}",
        key_id="abcdefgh2345",
        target="golden-gate",
        value=0.9,
        threshold=0.5,
        role=Role.USER,
        part="prompt",
        steered=number == 2,
    )


def count(n: int, over: int, peak: float) -> FeatureCount:
    return FeatureCount(
        key_id="abcdefgh2345",
        target="golden-gate",
        tokens=n,
        tokens_over=over,
        maximum=peak,
        last_over_at=MOMENT if over else None,
    )


def fill(state: Path) -> None:
    async def write() -> None:
        database = Database.in_home(state)
        await database.migrate()
        ledger = WatchLedger(database)
        await ledger.write([alert(1), alert(2)], [count(1000, 3, 0.9)])
        await ledger.write([], [count(500, 0, 0.4)])
        await database.close()

    asyncio.run(write())


def test_alerts_are_shown_newest_first(state: Path) -> None:
    fill(state)
    found = json.loads(output("alerts", "--json"))
    assert [(one["number"], one["request_id"]) for one in found] == [(2, "req_2"), (1, "req_1")]
    assert found[0] == {
        "number": 2,
        "time": "2030-01-02T03:04:05Z",
        "request_id": "req_2",
        "key_id": "abcdefgh2345",
        "target": "golden-gate",
        "value": 0.9,
        "threshold": 0.5,
        "role": "user",
        "part": "prompt",
        "steered": True,
        "action": "alert",
    }
    printed = output("alerts")
    assert "user, prompt, steered" in printed
    assert "2030-01-02 03:04:05" in printed


def test_alerts_go_on_from_a_number(state: Path) -> None:
    fill(state)
    assert [one["number"] for one in json.loads(output("alerts", "--before", "2", "--json"))] == [1]
    assert len(json.loads(output("alerts", "--limit", "1", "--json"))) == 1


def test_statistics_of_two_writes_are_one_row(state: Path) -> None:
    fill(state)
    (row,) = json.loads(output("stats", "--json"))
    assert (row["tokens"], row["tokens_over"], row["maximum"]) == (1500, 3, 0.9)
    assert row["last_over_at"] == "2030-01-02T03:04:05Z"
    assert "1,500" in output("stats")


def test_nothing_watched_says_which_setting_it_is(state: Path) -> None:
    assert "watch.targets" in output("alerts")
    assert "watch.targets" in output("stats")
    assert output("alerts", "--json") == output("stats", "--json") == "[]\n"
