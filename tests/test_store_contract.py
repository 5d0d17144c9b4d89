"""What every database keeps to, SQLite and PostgreSQL alike."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, bindparam, func, insert, select, text

from fortpoint.errors import StorageError
from fortpoint.store import migration
from fortpoint.store.database import Database
from fortpoint.store.rows import add_rows
from fortpoint.store.tables import audit_entries, keys, metadata

COLUMNS = ("index", "leaf_hash", "entry")
COUNT = select(func.count()).select_from(audit_entries)
BY_INDEX = select(audit_entries).where(audit_entries.c.index == bindparam("at"))


def row(index: int) -> dict[str, object]:
    return {"index": index, "leaf_hash": bytes(32), "entry": b"{}"}


@pytest.fixture
async def database(database_address: str) -> AsyncIterator[Database]:
    database = Database(database_address)
    await database.migrate()
    yield database
    await database.close()


async def count(database: Database) -> int:
    return await database.read(lambda connection: connection.execute(COUNT).scalar_one())


async def test_migrations_make_exactly_the_tables_of_the_metadata(database: Database) -> None:
    def differences(connection: Connection) -> object:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return compare_metadata(context, metadata)

    async with database.connect() as connection:
        assert await connection.run_sync(differences) == []


async def test_migrate_by_several_at_once_applies_each_step_once(database_address: str) -> None:
    databases = [Database(database_address) for _ in range(4)]
    await asyncio.gather(*(database.migrate() for database in databases))
    async with databases[0].connect() as connection:
        found = (await connection.execute(text("SELECT version_num FROM alembic_version"))).all()
    assert sorted(version for (version,) in found) == sorted(migration.heads())
    for database in databases:
        await database.close()


async def test_writers_take_turns_and_see_what_the_one_before_committed(
    database: Database, database_address: str
) -> None:
    others = [database, Database(database_address), Database(database_address)]

    def append(connection: Connection) -> None:
        n = connection.execute(COUNT).scalar_one()
        connection.execute(insert(audit_entries), [row(n)])

    await asyncio.gather(*(others[n % 3].write(append) for n in range(60)))
    assert await count(database) == 60
    for other in others[1:]:
        await other.close()


async def test_work_that_fails_undoes_its_transaction(database: Database) -> None:
    def fail(connection: Connection) -> None:
        connection.execute(insert(audit_entries), [row(0)])
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await database.write(fail)
    assert await count(database) == 0


async def test_reader_sees_one_snapshot_while_a_writer_commits(database: Database) -> None:
    async with database.connect() as reader:
        before = (await reader.execute(COUNT)).scalar_one()
        async with database.begin() as writer:
            await writer.execute(insert(audit_entries), [row(0)])
        assert (await reader.execute(COUNT)).scalar_one() == before
    assert await count(database) == 1


async def test_write_on_a_reading_connection_is_not_kept(database: Database) -> None:
    async with database.connect() as connection:
        await connection.execute(insert(audit_entries), [row(0)])
    assert await count(database) == 0


@pytest.mark.parametrize("n", [1, 15, 16, 1000])
async def test_rows_added_are_those_that_were_given(database: Database, n: int) -> None:
    given = [(at, bytes([at % 256]) * 32, b"\x00\xff\n\t\\" + bytes([at % 256])) for at in range(n)]
    await database.write(lambda c: add_rows(c, audit_entries, COLUMNS, given))
    async with database.connect() as connection:
        query = select(audit_entries).order_by(audit_entries.c.index)
        found = [tuple(one) for one in (await connection.execute(query)).all()]
    assert found == given


@pytest.mark.parametrize("n", [2, 40])
async def test_rows_added_twice_are_a_storage_error_and_nothing_is_kept(
    database: Database, n: int
) -> None:
    given = [(0, bytes(32), b"{}")] * n
    with pytest.raises(StorageError):
        await database.write(lambda c: add_rows(c, audit_entries, COLUMNS, given))
    assert await count(database) == 0
    await database.write(lambda c: add_rows(c, audit_entries, COLUMNS, given[:1]))
    assert await count(database) == 1


async def test_first_finds_one_row_by_its_columns_names(database: Database) -> None:
    async with database.begin() as connection:
        await connection.execute(insert(audit_entries), [row(7)])
    found = await database.first(BY_INDEX, at=7)
    assert found is not None
    assert found.entry == b"{}"
    assert await database.first(BY_INDEX, at=8) is None


async def test_moment_comes_back_in_utc(database: Database) -> None:
    moment = datetime(2030, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
    values = {"secret_sha256": bytes(32), "user": "u", "role": "customer", "created_at": moment}
    async with database.begin() as connection:
        await connection.execute(insert(keys).values(key_id="a" * 12, **values))
    async with database.connect() as connection:
        assert (await connection.execute(select(keys.c.created_at))).scalar_one() == moment


async def test_constraint_broken_is_a_storage_error_without_values(database: Database) -> None:
    values = {"secret_sha256": b"secret bytes", "user": "ada", "role": "superuser"}
    with pytest.raises(StorageError) as caught:
        async with database.begin() as connection:
            await connection.execute(
                insert(keys).values(key_id="a" * 12, created_at=datetime.now(UTC), **values)
            )
    assert caught.value.message == "the database failed"
    assert "secret bytes" not in str(caught.value.__cause__)


async def test_scrub_works_beside_a_reader_and_alone(database: Database) -> None:
    async with database.begin() as connection:
        await connection.execute(insert(audit_entries), [row(0)])
    assert await database.scrub(audit_entries)
