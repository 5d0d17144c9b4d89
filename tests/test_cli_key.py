"""``fortpoint key``: what it prints, what it records, and what happens when it cannot record."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

import pytest
from typer.testing import CliRunner, Result

from fortpoint.access.keys import KeyRing, Principal
from fortpoint.audit.history import Recorded, recent
from fortpoint.audit.log import AuditLog
from fortpoint.audit.signing_key import load_public
from fortpoint.audit.verify import verify
from fortpoint.cli import key
from fortpoint.errors import AuditUnavailable, InvalidRequest, NotFound, Unauthenticated
from fortpoint.store.database import Database

T = TypeVar("T")


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the database and the log's keys, in a home that is not there yet."""
    monkeypatch.setenv("FORTPOINT_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "state"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(key.app, arguments)


def output(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def ask(state: Path, question: Callable[[Database], Awaitable[T]]) -> T:
    async def asked() -> T:
        database = Database.in_home(state)
        try:
            return await question(database)
        finally:
            await database.close()

    return asyncio.run(asked())


def authenticate(state: Path, token: str) -> Principal:
    return ask(state, lambda database: KeyRing(database).authenticate(token))


def recorded(state: Path) -> tuple[Recorded, ...]:
    return ask(state, lambda database: recent(database, 100))


def make(*extra: str) -> dict[str, str]:
    made: dict[str, str] = json.loads(
        output("create", "--user", "ada", "--role", "customer", "--json", *extra)
    )
    return made


def test_create_shows_a_key_that_works_and_records_it(state: Path) -> None:
    printed = output("create", "--user", "ada", "--role", "operator")
    token = next(word for word in printed.split() if word.startswith("sk-fp-"))
    principal = authenticate(state, token)
    assert (principal.user, principal.role) == ("ada", "operator")
    (record,) = recorded(state)
    assert (record.entry.kind, record.entry.surface) == ("admin", "cli key create")
    assert record.entry.user is not None
    assert record.entry.user.startswith("os:")
    assert principal.key_id in (record.entry.detail or "")
    assert token[20:] not in repr(record)
    assert verify(state / "fortpoint.db", load_public(state)).entries == 1


def test_create_json_is_one_object(state: Path) -> None:
    made = make()
    assert set(made) == {"key_id", "key", "user", "role", "expires_at"}
    assert authenticate(state, made["key"]).key_id == made["key_id"]


@pytest.mark.parametrize(
    ("expires", "expected"),
    [
        ("12h", timedelta(hours=12)),
        ("30d", timedelta(days=30)),
        ("8w", timedelta(weeks=8)),
    ],
)
def test_create_with_a_duration_expires_then(
    state: Path, expires: str, expected: timedelta
) -> None:
    moment = datetime.fromisoformat(make("--expires", expires)["expires_at"])
    assert abs(moment - datetime.now(UTC) - expected) < timedelta(minutes=2)


@pytest.mark.parametrize(
    ("expires", "expected"),
    [
        ("2099-12-31", datetime(2099, 12, 31, tzinfo=UTC)),
        ("2099-12-31T10:00", datetime(2099, 12, 31, 10, tzinfo=UTC)),
        ("2099-12-31T10:00+02:00", datetime(2099, 12, 31, 8, tzinfo=UTC)),
    ],
)
def test_create_with_a_date_expires_then(state: Path, expires: str, expected: datetime) -> None:
    assert datetime.fromisoformat(make("--expires", expires)["expires_at"]) == expected


@pytest.mark.parametrize(
    "expires", ["", "soon", "0d", "-1d", "30", "30x", "2001-01-01", "٣d", "2099-13-01", "999999d"]
)
def test_create_with_a_bad_expiry_makes_nothing(state: Path, expires: str) -> None:
    result = run("create", "--user", "ada", "--role", "customer", "--expires", expires)
    assert isinstance(result.exception, InvalidRequest)
    assert json.loads(output("list", "--json")) == []


@pytest.mark.parametrize("user", ["", "a\nb", "a\x1b[2Jb", "x" * 129])
def test_create_with_a_bad_user_makes_and_records_nothing(state: Path, user: str) -> None:
    make()
    result = run("create", "--user", user, "--role", "customer")
    assert isinstance(result.exception, InvalidRequest)
    assert len(recorded(state)) == 1
    assert len(json.loads(output("list", "--json"))) == 1


def test_create_with_an_unknown_role_is_a_usage_error(state: Path) -> None:
    result = run("create", "--user", "ada", "--role", "admin")
    assert result.exit_code == 2
    assert not state.parent.exists()


def test_create_that_cannot_be_recorded_shows_no_secret_and_leaves_no_live_key(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(self: AuditLog, *_: object) -> None:
        raise AuditUnavailable("the record could not be written: the disk is full")

    monkeypatch.setattr(AuditLog, "append", refuse)
    result = run("create", "--user", "ada", "--role", "operator")
    assert isinstance(result.exception, AuditUnavailable)
    assert "sk-fp-" not in result.output
    (listed,) = json.loads(output("list", "--json"))
    assert listed["revoked_at"] is not None


def test_create_without_the_logs_key_makes_nothing(state: Path) -> None:
    make()
    (state / "keys" / "audit.ed25519").unlink()
    result = run("create", "--user", "eve", "--role", "operator")
    assert isinstance(result.exception, AuditUnavailable)
    assert [listed["user"] for listed in json.loads(output("list", "--json"))] == ["ada"]


def test_list_shows_state_and_no_secret(state: Path) -> None:
    first, second = make(), make("--expires", "30d")
    output("revoke", first["key_id"])
    for printed in (output("list"), output("list", "--json")):
        assert first["key_id"] in printed
        assert second["key_id"] in printed
        assert "revoked" in printed
        assert "sk-fp-" not in printed
        assert "sha256" not in printed
    listed = json.loads(output("list", "--json"))
    assert set(listed[0]) == {
        "key_id", "user", "role", "created_at", "expires_at", "revoked_at",
    }  # fmt: skip


def test_list_prints_a_user_that_looks_like_markup_as_it_is(state: Path) -> None:
    output("create", "--user", "[red]a[/]", "--role", "customer")
    assert "[red]a[/]" in output("list")


def test_list_without_keys_says_how_to_make_one(state: Path) -> None:
    assert "fortpoint key create" in output("list")
    assert output("list", "--json") == "[]\n"


def test_revoke_refuses_the_key_at_once_and_records_it(state: Path) -> None:
    made = make()
    assert output("revoke", made["key_id"]) == f"Revoked {made['key_id']}.\n"
    with pytest.raises(Unauthenticated):
        authenticate(state, made["key"])
    assert [record.entry.surface for record in recorded(state)] == [
        "cli key create",
        "cli key revoke",
    ]
    assert json.loads(output("revoke", made["key_id"], "--json")) == {
        "key_id": made["key_id"],
        "revoked": True,
    }


@pytest.mark.parametrize("key_id", ["nope", "a" * 12, "' OR 1=1 --"])
def test_revoke_of_an_unknown_key_is_not_found_and_not_recorded(state: Path, key_id: str) -> None:
    make()
    assert isinstance(run("revoke", key_id).exception, NotFound)
    assert len(recorded(state)) == 1
