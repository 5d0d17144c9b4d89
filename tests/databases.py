"""Both databases, empty, for tests that every store must pass."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import URL, create_engine, make_url, text

from fortpoint.store.postgresql import DRIVER

VARIABLE = "TEST_POSTGRESQL"


@contextmanager
def fresh_database(server: URL) -> Iterator[str]:
    """The address of a new database on the server, removed at the end."""
    name = f"fortpoint_{secrets.token_hex(6)}"
    admin = create_engine(server.set(drivername=DRIVER), isolation_level="AUTOCOMMIT")
    try:
        with admin.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        yield server.set(database=name).render_as_string(hide_password=False)
        with admin.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    finally:
        admin.dispose()


def _server() -> URL:
    address = os.environ.get(VARIABLE, "")
    if not address and os.environ.get("CI"):
        pytest.fail(f"{VARIABLE} is not set: .ci/run starts a server and sets it")
    if not address:
        pytest.skip(f"{VARIABLE} is not set")
    return make_url(address)


@pytest.fixture
def postgresql_address() -> Iterator[str]:
    """An empty database on the server of the tests."""
    with fresh_database(_server()) as address:
        yield address


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def database_address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A new database of each kind: a path, or a server's address."""
    if request.param == "sqlite":
        yield str(tmp_path / "fortpoint.db")
        return
    with fresh_database(_server()) as address:
        yield address
