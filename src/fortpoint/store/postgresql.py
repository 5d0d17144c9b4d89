"""PostgreSQL, with psycopg: the same promises as on SQLite, for several gateways on one database.

A commit is on disk when it returns: ``synchronous_commit`` is on for every connection, and a
server that has ``fsync`` off is refused. Writers take turns, as SQLite's do, by one advisory
lock that a write transaction takes first and its end gives back: what is read under it is what
the writer before committed. A process that is stopped in the middle of a transaction gives the
lock back when the server ends its session.

Not protected here: whoever may write the server's files, or is its superuser, may change them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from sqlalchemy import URL, Connection, Engine, Select, create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine

from fortpoint.errors import StorageError

DRIVER = "postgresql+psycopg"

_LOCK = 0x466F7274506F696E  # "FortPoin": one lock for all that writes
_LOCK_TIMEOUT_MS = 10_000
_IDLE_TIMEOUT_MS = 30_000
_CONNECT_TIMEOUT_S = 5
_POOL_SIZE = 8
_READ_THREADS = 2

_T = TypeVar("_T")

_OPTIONS = " ".join(
    f"-c {name}={value}"
    for name, value in {
        "synchronous_commit": "on",
        "lock_timeout": _LOCK_TIMEOUT_MS,
        "idle_in_transaction_session_timeout": _IDLE_TIMEOUT_MS,
        "timezone": "UTC",
    }.items()
)

# By SQLSTATE; a class where no code of its own is here.
_MESSAGES = {
    "53100": "the disk is full",
    "58030": "the disk failed to read or write",
    "55P03": "the database is locked by another process",
    "25006": "the database cannot be written",
    "42501": "the database may not be written by this user",
    "08": "the database cannot be reached, or refuses the user, the password or the name",
    "57": "the database is stopping or starting; try again",
    "XX": "the database is damaged",
}


class Server:
    """The engines of one server. ``write`` and ``read`` run in threads, as for SQLite."""

    def __init__(self, url: URL) -> None:
        self.asynchronous = create_async_engine(
            secured(url), pool_size=_POOL_SIZE, max_overflow=0, **_options()
        )
        self.reading = self.asynchronous.execution_options(isolation_level="REPEATABLE READ")
        self.looking_up = self.asynchronous.execution_options(isolation_level="AUTOCOMMIT")
        self._engine = server_engine(url)
        self._thread = ThreadPoolExecutor(1, "database")
        self._readers = ThreadPoolExecutor(_READ_THREADS, "database reader")

    async def write(self, work: Callable[[Connection], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._write, work)

    async def read(self, work: Callable[[Connection], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._read, work)

    async def first(self, query: Select[Any], values: dict[str, object]) -> Any | None:
        async with self.looking_up.connect() as connection:
            return (await connection.execute(query, values)).first()

    async def scrub(self, table: str) -> None:
        """Free the rows that were replaced in ``table``, a name of ours."""
        async with self.looking_up.connect() as connection:
            await connection.exec_driver_sql(f"VACUUM {table}")

    async def close(self) -> None:
        self._thread.shutdown()
        self._readers.shutdown()
        self._engine.dispose()
        await self.asynchronous.dispose()

    def _write(self, work: Callable[[Connection], _T]) -> _T:
        with self._engine.begin() as connection:
            take_turn(connection)
            return work(connection)

    def _read(self, work: Callable[[Connection], _T]) -> _T:
        with self._engine.connect().execution_options(
            isolation_level="REPEATABLE READ"
        ) as connection:
            return work(connection)


def take_turn(connection: Connection) -> None:
    """Wait for the writer before, as the first statement of a write transaction."""
    connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")


def check_durable(connection: Connection) -> None:
    """Raise ``StorageError`` where a commit of this server is not on disk."""
    if connection.execute(text("SHOW fsync")).scalar_one() != "on":
        raise StorageError(
            "the database server has fsync off: what is acknowledged could be lost; switch it on"
        )


def server_engine(url: URL) -> Engine:
    """For threads: what ``write`` and ``read`` use, and whoever walks a whole log."""
    return create_engine(secured(url), **_options())


def secured(url: URL) -> URL:
    """With our driver, and TLS with a verified certificate to every other machine.

    ``sslmode`` in the address wins; ``sslrootcert`` names another authority than the system's.
    """
    given = dict(url.query)
    host = url.host or str(given.get("host", ""))
    local = host.startswith("/") or host in {"", "localhost", "127.0.0.1", "::1"}
    wanted: dict[str, str] = {"gssencmode": "disable"}
    if not local:
        wanted |= {"sslmode": "verify-full"}
        if given.get("sslmode", "verify-full") == "verify-full":
            wanted |= {"sslrootcert": "system"}
    return url.set(drivername=DRIVER).update_query_dict(
        {name: value for name, value in wanted.items() if name not in given}
    )


def message(error: BaseException | None) -> str:
    """What the driver's error says went wrong, without SQL and values."""
    state = getattr(error, "sqlstate", None) or ""
    if not state and type(error).__name__ == "OperationalError":
        state = "08"  # a connection that was lost or never made has no code
    return _MESSAGES.get(state) or _MESSAGES.get(state[:2]) or "the database failed"


def _options() -> dict[str, Any]:
    return {
        # Values (secrets' hashes, prompts) must not reach a log through an error's text.
        "hide_parameters": True,
        "pool_pre_ping": True,
        "connect_args": {
            "options": _OPTIONS,
            "connect_timeout": _CONNECT_TIMEOUT_S,
            "application_name": "fortpoint",
        },
    }
