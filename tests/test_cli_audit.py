"""``fortpoint audit``: verify, show, checkpoint."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fortpoint.audit.entry import Entry, now
from fortpoint.audit.log import AuditLog
from fortpoint.audit.signing_key import load_public
from fortpoint.cli import audit
from fortpoint.errors import NotFound, VerificationError
from fortpoint.store.database import Database
from fortpoint.types import Role, Score, Usage, Verdict

HOSTILE = "\x1b[2J[red]\u202ebold[/]"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(audit.app, arguments)


def output(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


async def _fill(state: Path, n: int) -> None:
    database = Database.in_home(state)
    await database.migrate()
    log = await AuditLog.open(database, state)
    for number in range(n):
        await log.append(
            Entry(
                time=now(),
                kind="refusal",
                request_id=f"req_{number}",
                surface=HOSTILE,
                user="ada",
                status=400,
                code="content_filter",
                verdict=Verdict(
                    "block", "jailbreak", (Score("jailbreak", 0.99, 0.9, Role.USER, True),)
                ),
                usage=Usage(50, 0),
            )
        )
    await log.close()
    await database.close()


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the database and the log's keys."""
    home = tmp_path / "home"
    monkeypatch.setenv("FORTPOINT_HOME", str(home))
    asyncio.run(_fill(home / "state", 5))
    return home / "state"


def _change(state: Path, index: int) -> None:
    connection = sqlite3.connect(state / "fortpoint.db")
    connection.execute(
        "UPDATE audit_entries SET entry = CAST(replace(CAST(entry AS TEXT), '400', '200') AS BLOB)"
        ' WHERE "index" = ?',
        (index,),
    )
    connection.commit()
    connection.close()


def test_verify_of_an_untouched_log_says_so(state: Path) -> None:
    assert output("verify").startswith("Verified: 5 entries, 1 signed checkpoints\n")
    report = json.loads(output("verify", "--json"))
    assert report["verified"] is True
    assert (report["entries"], report["checkpoints"]) == (5, 1)
    assert len(report["root"]) == 64


def test_verify_of_a_changed_log_names_the_entry(state: Path) -> None:
    _change(state, 3)
    result = run("verify")
    assert isinstance(result.exception, VerificationError)
    assert result.exception.message.startswith("entry 3 (20")
    assert "request id req_3) was changed: its hash does not match" in result.exception.message
    assert result.stdout == ""


def test_verify_json_of_a_changed_log_is_an_object_and_fails(state: Path) -> None:
    _change(state, 3)
    result = run("verify", "--json")
    assert isinstance(result.exception, VerificationError)
    failure = json.loads(result.stdout)
    assert failure["verified"] is False
    assert failure["at"] == "entries[3]"
    assert failure["error"] == result.exception.message


def test_verify_takes_another_home(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORTPOINT_HOME", str(tmp_path / "elsewhere"))
    assert isinstance(run("verify").exception, VerificationError)
    assert output("verify", "--home", str(state.parent)).startswith("Verified: 5")
    assert not (tmp_path / "elsewhere").exists()


def test_verify_with_a_key_of_ones_own(state: Path) -> None:
    key = str(load_public(state))
    (state / "keys" / "audit.pub").unlink()
    assert isinstance(run("verify").exception, VerificationError)
    assert output("verify", "--public-key", key).startswith("Verified: 5")
    other = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
    assert isinstance(run("verify", "--public-key", other).exception, VerificationError)
    assert isinstance(run("verify", "--public-key", "rubbish").exception, VerificationError)


def test_verify_against_a_kept_checkpoint_notices_a_log_put_back(
    state: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "kept.txt"
    kept.write_text(output("checkpoint"))
    older = sqlite3.connect(tmp_path / "older.db")
    newer = sqlite3.connect(state / "fortpoint.db")
    newer.backup(older)
    asyncio.run(_fill(state, 2))
    assert output("verify", "--checkpoint", str(kept)).startswith("Verified: 7")
    kept.write_text(output("checkpoint"))
    older.backup(newer)
    older.close()
    newer.close()
    assert output("verify").startswith("Verified: 5")
    result = run("verify", "--checkpoint", str(kept))
    assert isinstance(result.exception, VerificationError)
    assert "entry 5 is missing" in result.exception.message


@pytest.mark.parametrize("content", [None, b"", b"rubbish\n\nrubbish\n", b"\xff"])
def test_verify_against_an_unreadable_checkpoint_fails(
    state: Path, tmp_path: Path, content: bytes | None
) -> None:
    kept = tmp_path / "kept.txt"
    if content is not None:
        kept.write_bytes(content)
    assert isinstance(run("verify", "--checkpoint", str(kept)).exception, VerificationError)


def test_show_prints_the_newest_without_escape_sequences(state: Path) -> None:
    printed = output("show", "--limit", "2")
    assert "\x1b" not in printed
    assert "\u202e" not in printed
    assert "[red]" in printed
    assert "jailbreak" in printed
    records = json.loads(output("show", "--limit", "2", "--json"))
    assert [record["index"] for record in records] == [3, 4]
    assert records[0]["entry"]["surface"] == HOSTILE
    assert len(records[0]["leaf_hash"]) == 64


def test_show_of_an_entry_that_cannot_be_read_points_to_verify(state: Path) -> None:
    connection = sqlite3.connect(state / "fortpoint.db")
    connection.execute("UPDATE audit_entries SET entry = x'00' WHERE \"index\" = 2")
    connection.commit()
    connection.close()
    result = run("show")
    assert isinstance(result.exception, VerificationError)
    assert "entry 2" in result.exception.message


@pytest.mark.parametrize("limit", ["0", "-1", "x", "100000000"])
def test_show_with_a_bad_limit_is_a_usage_error(state: Path, limit: str) -> None:
    assert run("show", "--limit", limit).exit_code == 2


def test_checkpoint_prints_the_signed_note(state: Path) -> None:
    note = output("checkpoint")
    opened = load_public(state).open_checkpoint(note.encode())
    assert opened.size == 5
    fields = json.loads(output("checkpoint", "--json"))
    assert fields == {
        "origin": opened.origin,
        "size": 5,
        "root": opened.root_hash.hex(),
        "note": note,
    }


def test_empty_log_verifies_shows_nothing_and_has_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORTPOINT_HOME", str(tmp_path))
    asyncio.run(_fill(tmp_path / "state", 0))
    assert output("verify").startswith("Verified: 0 entries")
    assert "no entries" in output("show")
    assert isinstance(run("checkpoint").exception, NotFound)


@pytest.mark.parametrize("command", ["show", "checkpoint"])
def test_home_without_a_log_is_not_found_and_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("FORTPOINT_HOME", str(tmp_path / "nowhere"))
    assert isinstance(run(command).exception, NotFound)
    assert not (tmp_path / "nowhere").exists()
