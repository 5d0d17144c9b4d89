"""The database: durable settings, migrations, transactions, and errors without SQL."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, insert, select, text
from sqlalchemy.exc import StatementError

from fortpoint.errors import StorageError
from fortpoint.store import migration
from fortpoint.store.database import Database
from fortpoint.store.tables import audit_entries, keys, metadata


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = Database.in_home(tmp_path / "home")
    await database.migrate()
    yield database
    await database.close()


def row(index: int) -> dict[str, object]:
    return {"index": index, "leaf_hash": bytes(32), "entry": b"{}"}


async def count(database: Database) -> int:
    async with database.connect() as connection:
        return len((await connection.execute(select(audit_entries.c.index))).all())


async def test_files_and_folder_closed_to_other_users(database: Database, tmp_path: Path) -> None:
    async with database.begin() as connection:
        await connection.execute(insert(audit_entries), [row(0)])
    home = tmp_path / "home"
    assert home.stat().st_mode & 0o777 == 0o700
    modes = {path.name: path.stat().st_mode & 0o777 for path in home.iterdir()}
    assert modes == dict.fromkeys(modes, 0o600)
    assert {"fortpoint.db", "fortpoint.db-wal"} <= set(modes)


async def test_file_open_to_others_is_closed(tmp_path: Path) -> None:
    (tmp_path / "fortpoint.db").touch(mode=0o666)
    Database.in_home(tmp_path)
    assert (tmp_path / "fortpoint.db").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("pragma", "value"),
    [
        ("journal_mode", "wal"),
        ("synchronous", 2),
        ("foreign_keys", 1),
        ("trusted_schema", 0),
        ("busy_timeout", 10_000),
    ],
)
async def test_every_connection_durable_and_strict(
    database: Database, pragma: str, value: object
) -> None:
    async with database.connect() as first, database.connect() as second:
        for connection in (first, second):
            assert (await connection.execute(text(f"PRAGMA {pragma}"))).scalar_one() == value


async def test_migrations_make_exactly_the_tables_of_the_metadata(database: Database) -> None:
    def differences(connection: Connection) -> object:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return compare_metadata(context, metadata)

    async with database.connect() as connection:
        assert await connection.run_sync(differences) == []


async def test_migrate_twice_changes_nothing(database: Database) -> None:
    async with database.begin() as connection:
        await connection.execute(insert(audit_entries), [row(0)])
    await database.migrate()
    assert await count(database) == 1


async def test_migrate_from_several_processes_at_once_applies_each_step_once(
    tmp_path: Path,
) -> None:
    databases = [Database.in_home(tmp_path) for _ in range(6)]
    await asyncio.gather(*(database.migrate() for database in databases))
    async with databases[0].connect() as connection:
        found = (await connection.execute(text("SELECT version_num FROM alembic_version"))).all()
    assert sorted(version for (version,) in found) == sorted(migration.heads())
    for database in databases:
        await database.close()


async def test_migrate_in_a_folder_with_special_characters_works(tmp_path: Path) -> None:
    database = Database.in_home(tmp_path / "100% ?mode=ro&a#b é")
    await database.migrate()
    assert await count(database) == 0
    await database.close()
    assert (tmp_path / "100% ?mode=ro&a#b é" / "fortpoint.db").stat().st_size > 0


async def test_migrate_of_a_newer_database_is_refused(database: Database) -> None:
    async with database.begin() as connection:
        await connection.execute(text("INSERT INTO alembic_version VALUES ('9999')"))
    with pytest.raises(StorageError, match="newer version"):
        await database.migrate()


async def test_step_that_fails_leaves_no_table_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database.in_home(tmp_path)

    def half(connection: Connection) -> None:
        connection.execute(text("CREATE TABLE half (a INTEGER)"))
        connection.execute(text("not SQL"))

    monkeypatch.setattr(migration, "upgrade", half)
    with pytest.raises(StorageError):
        await database.migrate()
    async with database.connect() as connection:
        tables = (await connection.execute(text("SELECT name FROM sqlite_master"))).all()
    assert tables == []
    await database.close()


async def test_error_in_a_transaction_undoes_it(database: Database) -> None:
    async def failing() -> None:
        async with database.begin() as connection:
            await connection.execute(insert(audit_entries), [row(0)])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await failing()
    assert await count(database) == 0


async def test_writers_together_all_commit(database: Database, tmp_path: Path) -> None:
    other = Database.in_home(tmp_path / "home")

    async def write(number: int) -> None:
        async with (database, other)[number % 2].begin() as connection:
            # Reads first: a deferred transaction would fail here instead of waiting.
            await connection.execute(select(audit_entries.c.index))
            await connection.execute(insert(audit_entries), [row(number)])

    await asyncio.gather(*(write(number) for number in range(60)))
    assert await count(database) == 60
    await other.close()


async def test_reader_sees_one_snapshot_while_a_writer_commits(database: Database) -> None:
    async with database.connect() as reader:
        before = (await reader.execute(select(audit_entries.c.index))).all()
        async with database.begin() as writer:
            await writer.execute(insert(audit_entries), [row(0)])
        assert (await reader.execute(select(audit_entries.c.index))).all() == before
    assert await count(database) == 1


async def test_write_on_a_reading_connection_is_not_kept(database: Database) -> None:
    async with database.connect() as connection:
        await connection.execute(insert(audit_entries), [row(0)])
    assert await count(database) == 0


async def test_readers_beyond_the_pool_wait_their_turn(database: Database) -> None:
    assert await asyncio.gather(*(count(database) for _ in range(100))) == [0] * 100


async def test_locked_database_is_a_storage_error(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fortpoint.store.sqlite.BUSY_TIMEOUT_S", 0.1)
    impatient = Database.in_home(tmp_path / "home")
    async with database.begin():
        with pytest.raises(StorageError, match="locked by another process"):
            async with impatient.begin():
                pass
    await impatient.close()


async def test_damaged_database_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "fortpoint.db").write_bytes(b"not a database at all" * 500)
    database = Database.in_home(tmp_path)
    with pytest.raises(StorageError, match="is not a database"):
        await database.migrate()
    await database.close()


async def test_home_that_is_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be opened"):
        Database.in_home(tmp_path / "file")


async def test_database_path_that_is_a_folder_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "fortpoint.db").mkdir()
    database = Database.in_home(tmp_path)
    with pytest.raises(StorageError, match="cannot be opened"):
        await database.migrate()
    await database.close()


async def test_database_opened_again_keeps_this_process_s_locks(
    database: Database, tmp_path: Path
) -> None:
    # POSIX drops a process's locks on a file when it closes any descriptor of that file.
    async with database.begin() as connection:
        await connection.execute(insert(audit_entries), [row(0)])
        Database.in_home(tmp_path / "home")
        script = (
            "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], timeout=0);"
            "c.execute('BEGIN IMMEDIATE')"
        )
        command = [sys.executable, "-c", script, str(tmp_path / "home" / "fortpoint.db")]
        process = await asyncio.to_thread(
            subprocess.run, command, capture_output=True, check=False, timeout=60
        )
    assert process.returncode == 1
    assert b"database is locked" in process.stderr


async def test_constraint_broken_is_a_storage_error_without_values(database: Database) -> None:
    with pytest.raises(StorageError) as caught:
        async with database.begin() as connection:
            await connection.execute(
                insert(keys).values(
                    key_id="a" * 12,
                    secret_sha256=b"secret bytes",
                    user="ada",
                    role="superuser",
                    created_at=datetime.now(UTC),
                )
            )
    assert caught.value.message == "the database failed"
    assert "secret bytes" not in str(caught.value.__cause__)


async def test_moment_comes_back_in_utc(database: Database) -> None:
    moment = datetime(2030, 1, 2, 3, 4, 5, 678901, tzinfo=timezone(timedelta(hours=-5)))
    values = {"secret_sha256": bytes(32), "user": "u", "role": "customer", "created_at": moment}
    async with database.begin() as connection:
        await connection.execute(insert(keys).values(key_id="a" * 12, **values))
    async with database.connect() as connection:
        back = (await connection.execute(select(keys.c.created_at))).scalar_one()
    assert back == moment
    assert back.tzinfo is UTC


async def test_moment_without_a_zone_is_refused(database: Database) -> None:
    values = {"secret_sha256": bytes(32), "user": "u", "role": "customer"}
    with pytest.raises(StorageError) as caught:
        async with database.begin() as connection:
            await connection.execute(
                insert(keys).values(key_id="a" * 12, created_at=datetime(2030, 1, 1), **values)
            )
    assert isinstance(caught.value.__cause__, StatementError)


async def test_commit_is_in_the_file_when_begin_returns(database: Database, tmp_path: Path) -> None:
    async with database.begin() as connection:
        await connection.execute(insert(audit_entries), [row(7)])
    other = sqlite3.connect(tmp_path / "home" / "fortpoint.db")
    try:
        assert other.execute('SELECT "index" FROM audit_entries').fetchall() == [(7,)]
    finally:
        other.close()
