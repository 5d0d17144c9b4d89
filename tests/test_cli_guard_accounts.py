"""``fortpoint guard accounts``: decisions of operators, in the record or undone."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fortpoint.audit import history
from fortpoint.cli.guard import app
from fortpoint.errors import AuditUnavailable, InvalidRequest, NotFound
from fortpoint.guard.account import Account, AccountPolicy, Event
from fortpoint.guard.account_ledger import AccountLedger, Change
from fortpoint.store.database import Database

_KEY = "key:aaaaaaaaaaaa"


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with one suspended account that has evidence."""
    monkeypatch.setenv("FORTPOINT_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "120")
    asyncio.run(_prepare(tmp_path / "state"))
    return tmp_path / "state"


async def _prepare(state: Path) -> None:
    database = Database.in_home(state)
    await database.migrate()
    event = Event(
        time=time.time(),
        kind="blocked",
        weight=13.0,
        request_id="req_1",
        detector="jailbreak",
        score=0.99,
        family="fam_1",
    )
    change = Change(Account(), (event,), 0, "suspended", "risk 13.00")
    await AccountLedger(database).add({_KEY: change}, (), {}, AccountPolicy())
    await database.close()


async def _entries(state: Path) -> list[str | None]:
    database = Database.in_home(state)
    try:
        return [found.entry.detail for found in await history.recent(database, 10)]
    finally:
        await database.close()


def _run(*arguments: str) -> Any:
    result = CliRunner().invoke(app, ["accounts", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


def test_list_shows_status_and_risk(state):
    (card,) = json.loads(_run("list", "--json"))
    assert (card["account"], card["status"]) == (_KEY, "suspended")
    assert card["risk"] == pytest.approx(13.0, abs=0.1)
    assert "suspended" in _run("list")


def test_show_has_the_evidence_and_no_content(state):
    found = json.loads(_run("show", _KEY, "--json"))
    (event,) = found["events"]
    assert (event["request_id"], event["family"], event["kind"]) == ("req_1", "fam_1", "blocked")
    assert "blocked" in _run("show", _KEY)


def test_reinstate_starts_without_risk_and_is_in_the_record(state):
    _run("reinstate", _KEY, "--reason", "appeal accepted")
    (card,) = json.loads(_run("list", "--json"))
    assert (card["status"], card["risk"]) == ("active", 0.0)
    assert asyncio.run(_entries(state)) == [f"reinstate {_KEY}: active, because appeal accepted"]


def test_suspend_an_account_that_was_never_seen(state):
    _run("suspend", "user:eve", "--json")
    cards = json.loads(_run("list", "--json"))
    assert {card["account"]: card["status"] for card in cards}["user:eve"] == "suspended"


def test_clear_of_a_suspension_says_what_to_do(state):
    with pytest.raises(InvalidRequest, match="reinstate"):
        _run("clear", _KEY)


@pytest.mark.parametrize("verb", ["clear", "reinstate", "show"])
def test_account_that_there_is_not_is_not_found(state, verb):
    with pytest.raises(NotFound):
        _run(verb, "user:nobody")


def test_decision_that_cannot_be_recorded_is_undone(state, monkeypatch):
    async def fails(*_arguments, **_more):
        raise AuditUnavailable("the record could not be written")

    monkeypatch.setattr("fortpoint.cli.record.append", fails)
    with pytest.raises(AuditUnavailable):
        _run("reinstate", _KEY)
    (card,) = json.loads(_run("list", "--json"))
    assert card["status"] == "suspended"


def test_list_of_a_home_without_risk_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("FORTPOINT_HOME", str(tmp_path))
    assert _run("list") == "No account has a risk.\n"
