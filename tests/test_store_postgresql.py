"""PostgreSQL: what only a server can get wrong. No address or password in any error."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest
from sqlalchemy import make_url, text

from fortpoint.config import Config, Store
from fortpoint.errors import ConfigError, StorageError
from fortpoint.store import postgresql
from fortpoint.store.database import Database
from fortpoint.store.location import locate

needs_server = pytest.mark.postgresql


def config(url: str) -> Config:
    return msgspec.structs.replace(Config(), store=Store(url=url))


@needs_server
async def test_every_connection_is_durable_and_patient(postgresql_address: str) -> None:
    database = Database(postgresql_address)
    async with database.connect() as connection:
        for name, value in {
            "synchronous_commit": "on",
            "lock_timeout": "10s",
            "idle_in_transaction_session_timeout": "30s",
            "transaction_isolation": "repeatable read",
        }.items():
            assert (await connection.execute(text(f"SHOW {name}"))).scalar_one() == value
    await database.close()


@needs_server
async def test_writer_that_waits_too_long_is_a_storage_error(
    postgresql_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(postgresql_address)
    monkeypatch.setattr(
        postgresql, "_OPTIONS", postgresql._OPTIONS.replace("lock_timeout=10000", "lock_timeout=50")
    )
    impatient = Database(postgresql_address)
    async with database.begin():
        with pytest.raises(StorageError, match="locked by another process"):
            await impatient.write(lambda connection: None)
    await impatient.write(lambda connection: None)
    await impatient.close()
    await database.close()


@needs_server
async def test_session_that_the_server_ends_is_an_error_and_the_next_one_works(
    postgresql_address: str,
) -> None:
    database = Database(postgresql_address)
    with pytest.raises(StorageError, match=r"stopping or starting|cannot be reached"):
        await database.write(
            lambda c: c.execute(text("SELECT pg_terminate_backend(pg_backend_pid())")).all()
        )
    await database.write(lambda connection: None)
    await database.close()


@needs_server
@pytest.mark.parametrize(
    "changed", [{"password": "not-this-secret"}, {"database": "no_such_database"}, {"port": 1}]
)
async def test_server_that_refuses_is_a_storage_error_without_secrets(
    postgresql_address: str, changed: dict[str, object]
) -> None:
    database = Database(make_url(postgresql_address).set(**changed))  # type: ignore[arg-type]
    with pytest.raises(StorageError, match="cannot be reached, or refuses") as caught:
        await database.migrate()
    assert "not-this-secret" not in caught.value.message
    await database.close()


@needs_server
async def test_migrate_from_several_processes_at_once_on_a_server(postgresql_address: str) -> None:
    databases = [Database(postgresql_address) for _ in range(6)]
    await asyncio.gather(*(database.migrate() for database in databases))
    await asyncio.gather(*(database.close() for database in databases))


@pytest.mark.parametrize(
    ("address", "mode"),
    [
        ("postgresql://u@db.example/n", "verify-full"),
        ("postgresql://u@10.0.0.7/n", "verify-full"),
        ("postgresql://u@db.example/n?sslmode=require", "require"),
        ("postgresql://u@127.0.0.1/n", None),
        ("postgresql://u@localhost/n", None),
        ("postgresql:///n?host=/run/postgresql", None),
    ],
)
def test_connection_to_another_machine_is_encrypted_and_verified(
    address: str, mode: str | None
) -> None:
    assert postgresql.secured(make_url(address)).query.get("sslmode") == mode


def test_address_that_is_another_database_s_is_refused() -> None:
    with pytest.raises(StorageError, match="SQLite or PostgreSQL"):
        Database("mysql://u@h/n")


# ---- the reference ----


def test_location_without_a_reference_is_the_home(tmp_path: Path) -> None:
    location = locate(msgspec.structs.replace(Config(), home=str(tmp_path)))
    assert (location.url, location.port, location.state) == (None, None, tmp_path / "state")


def test_location_by_variable_and_file_is_read_and_hidden(tmp_path: Path) -> None:
    address = "postgresql://fp:pass-word@db.example/fortpoint"
    (tmp_path / "address").write_text(address + "\n")
    for reference in ("env:FP_DB", f"file:{tmp_path / 'address'}"):
        location = locate(config(reference), {"FP_DB": address})
        assert (location.port, location.is_named) == (5432, True)
        assert "pass-word" not in repr(location)


@pytest.mark.parametrize(
    ("host", "port", "named"),
    [("127.0.0.1:6000", 6000, False), ("[::1]", 5432, False), ("localhost", 5432, True)],
)
def test_location_says_what_the_sandbox_must_leave_open(host: str, port: int, named: bool) -> None:
    location = locate(config("env:FP_DB"), {"FP_DB": f"postgresql://fp:p@{host}/n"})
    assert (location.port, location.is_named) == (port, named)


@pytest.mark.parametrize(
    "reference",
    ["postgresql://fp:pass-word@h/n", "env:FP_NONE", "env:FP_BAD", "env:FP_MY", "file:/nowhere"],
)
def test_reference_that_leads_nowhere_is_refused_without_repeating_it(reference: str) -> None:
    environ = {"FP_BAD": "pass-word", "FP_MY": "mysql://u:pass-word@h/n"}
    with pytest.raises(ConfigError) as caught:
        locate(config(reference), environ)
    assert "pass-word" not in caught.value.message
