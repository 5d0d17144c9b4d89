"""The log: what an acknowledged append promises, alone, together and across processes."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from sqlalchemy import Connection, delete, func, insert, select, update

from fortpoint.audit import entry as entry_module
from fortpoint.audit.batch import CHECKPOINT_SPAN
from fortpoint.audit.entry import Entry, encode, now, seal, unseal
from fortpoint.audit.log import AuditLog, Receipt
from fortpoint.audit.merkle import leaf_hash
from fortpoint.audit.signing_key import load_public
from fortpoint.audit.verify import Report, verify
from fortpoint.errors import AuditUnavailable, StorageError
from fortpoint.store.database import Database
from fortpoint.store.tables import audit_checkpoints, audit_entries, audit_nodes
from fortpoint.types import Role, Score, Usage, Verdict


def entry(number: int = 0, **changed: object) -> Entry:
    made = Entry(
        time=now(),
        kind="answer",
        request_id=f"req_{number}",
        surface="/v1/chat/completions",
        status=200,
        verdict=Verdict("allow", None, (Score("jailbreak", 0.1, 0.9, Role.USER, False),)),
        usage=Usage(3, 4),
    )
    return msgspec.structs.replace(made, **changed)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
async def database(home: Path) -> AsyncIterator[Database]:
    database = Database.in_home(home)
    await database.migrate()
    yield database
    await database.close()


def verified(home: Path) -> Report:
    return verify(home / "fortpoint.db", load_public(home))


async def test_append_returns_the_place_and_hash_of_what_is_stored(
    database: Database, home: Path
) -> None:
    log = await AuditLog.open(database, home)
    receipts = [await log.append(entry(n)) for n in range(5)]
    await log.close()
    assert [receipt.index for receipt in receipts] == list(range(5))
    async with database.connect() as connection:
        rows = (await connection.execute(select(audit_entries))).all()
    for receipt, row in zip(receipts, rows, strict=True):
        assert row.leaf_hash == leaf_hash(row.entry) == bytes.fromhex(receipt.leaf_hash)
        assert unseal(row.entry).entry.request_id == f"req_{row[0]}"
    assert verified(home).entries == 5


async def test_append_is_visible_to_another_connection_before_it_returns(
    database: Database, home: Path
) -> None:
    log = await AuditLog.open(database, home)
    for number in range(3):
        receipt = await log.append(entry(number))
        assert verified(home).entries == receipt.index + 1
    await log.close()


async def test_appends_together_share_few_checkpoints(database: Database, home: Path) -> None:
    log = await AuditLog.open(database, home)
    receipts = await asyncio.gather(*(log.append(entry(n)) for n in range(500)))
    await log.close()
    assert sorted(receipt.index for receipt in receipts) == list(range(500))
    report = verified(home)
    assert report.entries == 500
    assert report.checkpoints < 50


async def test_appends_from_two_logs_on_one_file_neither_fork_nor_gap(
    database: Database, home: Path
) -> None:
    other_database = Database.in_home(home)
    first = await AuditLog.open(database, home)
    second = await AuditLog.open(other_database, home)

    async def caller(number: int) -> Receipt:
        await asyncio.sleep(number % 7 / 1000)
        return await (first, second)[number % 2].append(entry(number))

    receipts = await asyncio.gather(*(caller(number) for number in range(500)))
    for log in (first, second):
        await log.close()
    await other_database.close()
    assert sorted(receipt.index for receipt in receipts) == list(range(500))
    report = verified(home)
    assert report.entries == 500
    assert report.checkpoints >= 2


async def test_appends_one_by_one_keep_a_checkpoint_for_each_256(
    database: Database, home: Path
) -> None:
    log = await AuditLog.open(database, home)
    for number in range(2 * CHECKPOINT_SPAN + 3):
        await log.append(entry(number))
    await log.close()
    async with database.connect() as connection:
        sizes = (await connection.execute(select(audit_checkpoints.c.size))).scalars().all()
    assert sorted(sizes) == [256, 512, 515]
    assert verified(home).entries == 515


async def test_work_that_belongs_to_an_entry_is_done_with_it_or_not_at_all(
    database: Database, home: Path
) -> None:
    log = await AuditLog.open(database, home)

    def mark(connection: Connection) -> None:
        connection.execute(insert(audit_nodes).values(height=99, number=0, hash=bytes(32)))

    def fail(connection: Connection) -> None:
        mark(connection)
        raise StorageError("it cannot be done")

    with pytest.raises(AuditUnavailable, match="it cannot be done"):
        await log.append(entry(0), also=fail)
    await log.append(entry(1), also=mark)
    await log.close()
    async with database.connect() as connection:
        assert (await connection.execute(select(audit_nodes.c.height))).all() == [(99,)]


async def test_log_opened_again_continues_where_it_was(home: Path) -> None:
    for size in (3, 7):
        database = Database.in_home(home)
        await database.migrate()
        log = await AuditLog.open(database, home)
        while (await log.append(entry())).index < size - 1:
            pass
        await log.close()
        await database.close()
        assert verified(home).entries == size


async def test_caller_cancelled_leaves_its_entry_and_the_log_working(
    database: Database, home: Path
) -> None:
    log = await AuditLog.open(database, home)
    impatient = asyncio.create_task(log.append(entry(1)))
    await asyncio.sleep(0)
    impatient.cancel()
    with pytest.raises(asyncio.CancelledError):
        await impatient
    receipt = await log.append(entry(2))
    await log.close()
    assert verified(home).entries == receipt.index + 1 == 2


async def test_close_writes_what_is_waiting_then_refuses(database: Database, home: Path) -> None:
    log = await AuditLog.open(database, home)
    waiting = [asyncio.create_task(log.append(entry(n))) for n in range(50)]
    await asyncio.sleep(0)
    await log.close()
    await log.close()
    assert len(await asyncio.gather(*waiting)) == 50
    with pytest.raises(AuditUnavailable, match="closed"):
        await log.append(entry())
    assert verified(home).entries == 50


async def test_empty_log_closed_has_no_entries_and_verifies(database: Database, home: Path) -> None:
    log = await AuditLog.open(database, home)
    await log.close()
    assert verified(home).entries == 0


async def test_commit_that_fails_refuses_its_whole_batch_and_the_next_one_works(
    database: Database, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = await AuditLog.open(database, home)
    await log.append(entry(0))
    write = database.write

    def broken(_work: object) -> object:
        raise StorageError("the disk is full")

    monkeypatch.setattr(database, "write", broken)
    outcomes = await asyncio.gather(
        *(log.append(entry(n)) for n in range(9)), return_exceptions=True
    )
    assert {type(outcome) for outcome in outcomes} == {AuditUnavailable}
    assert "the disk is full" in str(outcomes[0])
    monkeypatch.setattr(database, "write", write)
    assert (await log.append(entry(1))).index == 1
    await log.close()
    assert verified(home).entries == 2


async def test_defect_in_the_writer_refuses_the_batch_instead_of_hanging(
    database: Database, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = await AuditLog.open(database, home)
    monkeypatch.setattr("fortpoint.audit.batch._checkpoint", lambda signer, frontier: 1 / 0)
    with pytest.raises(AuditUnavailable):
        await asyncio.wait_for(log.append(entry()), timeout=10)
    monkeypatch.undo()
    assert (await log.append(entry())).index == 0
    await log.close()


@pytest.mark.parametrize(
    "changed",
    [{"detail": "\ud800"}, {"detail": "x" * entry_module.MAX_ENTRY_BYTES}],
    ids=["lone surrogate", "too large"],
)
async def test_entry_that_cannot_be_recorded_fails_alone(
    database: Database, home: Path, changed: dict[str, object]
) -> None:
    log = await AuditLog.open(database, home)
    outcomes = await asyncio.gather(
        log.append(entry(0)), log.append(entry(1, **changed)), log.append(entry(2)),
        return_exceptions=True,
    )  # fmt: skip
    await log.close()
    assert [type(outcome) for outcome in outcomes] == [Receipt, AuditUnavailable, Receipt]
    assert verified(home).entries == 2


@pytest.mark.parametrize(
    "text",
    ["'; DROP TABLE audit_entries; --", '","index":999,"x":"', "a\0b", "\x1b[2J", "😀\u202e"],
)
async def test_entry_with_hostile_text_in_every_field_is_kept_as_text(
    database: Database, home: Path, text: str
) -> None:
    hostile = entry(
        request_id=text, surface=text, key_id=text, user=text, role=text, model=text,
        model_digest=text, code=text, finish_reasons=(text,), request_sha256=text,
        response_sha256=text, detail=text,
    )  # fmt: skip
    log = await AuditLog.open(database, home)
    await log.append(hostile)
    await log.close()
    async with database.connect() as connection:
        stored = (await connection.execute(select(audit_entries.c.entry))).scalar_one()
    assert unseal(stored).entry == hostile
    assert verified(home).entries == 1


def test_entry_bytes_are_sorted_json_with_index_and_a_fresh_nonce() -> None:
    body = encode(entry())
    first, second = seal(body, 17), seal(body, 17)
    assert first != second
    assert leaf_hash(first) != leaf_hash(second)
    decoded = msgspec.json.decode(first)
    assert list(decoded) == sorted(decoded) == ["entry", "index", "nonce", "version"]
    assert list(decoded["entry"]) == sorted(decoded["entry"])
    assert decoded["index"] == 17
    assert len(bytes.fromhex(decoded["nonce"])) == 16
    assert msgspec.json.encode(decoded, order="sorted") == first


def test_now_is_rfc_3339_utc_with_microseconds() -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", now())


async def _damage(database: Database, statement: object) -> None:
    async with database.begin() as connection:
        await connection.execute(statement)  # type: ignore[call-overload]


async def _three_entries(database: Database, home: Path) -> AuditLog:
    log = await AuditLog.open(database, home)
    for number in range(3):
        await log.append(entry(number))
    return log


DAMAGES = {
    "last entry removed": delete(audit_entries).where(audit_entries.c.index == 2),
    "last checkpoint removed": delete(audit_checkpoints).where(audit_checkpoints.c.size == 3),
    "all checkpoints removed": delete(audit_checkpoints),
    "entry added without a checkpoint": audit_entries.insert().values(
        index=3, leaf_hash=bytes(32), entry=b"{}"
    ),
    "checkpoint's root changed": update(audit_checkpoints)
    .where(audit_checkpoints.c.size == 3)
    .values(root_hash=bytes(32)),
}


@pytest.mark.parametrize("name", DAMAGES)
async def test_append_to_a_log_damaged_under_it_is_refused(
    database: Database, home: Path, name: str
) -> None:
    log = await _three_entries(database, home)
    await _damage(database, DAMAGES[name])
    with pytest.raises(AuditUnavailable, match="fortpoint audit verify"):
        await log.append(entry(3))
    await log.close()


async def test_append_after_the_tail_was_cut_with_its_checkpoint_is_refused(
    database: Database, home: Path
) -> None:
    log = await _three_entries(database, home)
    await _damage(database, DAMAGES["last entry removed"])
    await _damage(database, DAMAGES["last checkpoint removed"])
    with pytest.raises(AuditUnavailable, match="fortpoint audit verify"):
        await log.append(entry(3))
    await log.close()


HEAD_DAMAGES = {
    **{name: DAMAGES[name] for name in list(DAMAGES)[:4]},
    "note changed": update(audit_checkpoints).values(note=b"nothing signed\n\nat all\n"),
    "frontier changed": update(audit_checkpoints).values(frontier=bytes(64)),
    "frontier of another length": update(audit_checkpoints).values(frontier=b"x"),
}


@pytest.mark.parametrize("name", HEAD_DAMAGES)
async def test_log_with_a_damaged_head_does_not_open(
    database: Database, home: Path, name: str
) -> None:
    await (await _three_entries(database, home)).close()
    await _damage(database, HEAD_DAMAGES[name])
    with pytest.raises(AuditUnavailable, match="fortpoint audit verify"):
        await AuditLog.open(database, home)


async def test_key_files_closed_to_others_and_matching(database: Database, home: Path) -> None:
    log = await AuditLog.open(database, home)
    await log.close()
    private, public = home / "keys" / "audit.ed25519", home / "keys" / "audit.pub"
    assert private.stat().st_mode & 0o777 == 0o600
    assert load_public(home) == log.verifier_key
    assert public.read_text() == f"{log.verifier_key}\n"
    assert log.verifier_key.name.startswith("fortpoint/")
    public.unlink()
    await (await AuditLog.open(database, home)).close()
    assert load_public(home) == log.verifier_key
    assert sorted(path.name for path in (home / "keys").iterdir()) == ["audit.ed25519", "audit.pub"]


async def test_two_logs_opened_at_once_agree_on_one_new_key(home: Path, database: Database) -> None:
    logs = await asyncio.gather(*(AuditLog.open(database, home) for _ in range(4)))
    assert len({log.verifier_key for log in logs}) == 1
    for log in logs:
        await log.close()


async def test_key_missing_under_a_log_with_entries_is_not_replaced(
    database: Database, home: Path
) -> None:
    await (await _three_entries(database, home)).close()
    (home / "keys" / "audit.ed25519").unlink()
    with pytest.raises(AuditUnavailable, match="missing"):
        await AuditLog.open(database, home)
    assert not (home / "keys" / "audit.ed25519").exists()


async def test_key_readable_by_others_is_refused(database: Database, home: Path) -> None:
    await (await AuditLog.open(database, home)).close()
    (home / "keys" / "audit.ed25519").chmod(0o644)
    with pytest.raises(AuditUnavailable, match="chmod 600"):
        await AuditLog.open(database, home)


@pytest.mark.parametrize("content", [b"", b"rubbish", bytes(32)])
async def test_key_file_unreadable_is_refused(
    database: Database, home: Path, content: bytes
) -> None:
    await (await AuditLog.open(database, home)).close()
    (home / "keys" / "audit.ed25519").write_bytes(content)
    with pytest.raises(AuditUnavailable, match="not an Ed25519 private key"):
        await AuditLog.open(database, home)


async def test_public_key_of_another_log_is_refused(database: Database, home: Path) -> None:
    await (await AuditLog.open(database, home)).close()
    (home / "keys" / "audit.pub").write_text(
        "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW\n"
    )
    with pytest.raises(AuditUnavailable, match="not the public half"):
        await AuditLog.open(database, home)


APPENDER = """
import asyncio, sys
from pathlib import Path
from fortpoint.audit.entry import Entry, now
from fortpoint.audit.log import AuditLog
from fortpoint.store.database import Database

async def main(home):
    database = Database.in_home(home)
    log = await AuditLog.open(database, home)
    async def caller(name):
        number = 0
        while True:
            request_id = f"{name}-{number}"
            receipt = await log.append(Entry(
                time=now(), kind="answer", request_id=request_id, surface="/", status=200))
            print(receipt.index, receipt.leaf_hash, request_id, flush=True)
            number += 1
    await asyncio.gather(*(caller(name) for name in range(20)))

asyncio.run(main(Path(sys.argv[1])))
"""


def _appended_until_killed(home: Path) -> list[list[str]]:
    """What a process had acknowledged (index, leaf hash, request id) when it was killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", APPENDER, str(home)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(150)]
    os.kill(process.pid, signal.SIGKILL)
    lines += process.stdout.readlines()
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    return [line.split() for line in lines if line.endswith("\n")]


async def test_process_killed_while_appending_loses_nothing_acknowledged(
    database: Database, home: Path
) -> None:
    acknowledged = [line for _ in range(3) for line in _appended_until_killed(home)]
    report = verified(home)
    assert len(acknowledged) >= 450
    assert report.entries >= len(acknowledged)
    async with database.connect() as connection:
        rows = (await connection.execute(select(audit_entries))).all()
        newest = (await connection.execute(select(func.max(audit_checkpoints.c.size)))).scalar_one()
    assert newest == report.entries
    stored = {row[0]: row for row in rows}
    for index, leaf, request_id in acknowledged:
        row = stored[int(index)]
        assert row.leaf_hash.hex() == leaf
        assert unseal(row.entry).entry.request_id == request_id
    log = await AuditLog.open(database, home)
    assert (await log.append(entry())).index == report.entries
    await log.close()
