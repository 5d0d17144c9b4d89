"""SQLite: durable settings, one writer at a time, and the short ways that skip the async driver.

A commit is on disk when it returns (WAL, synchronous=FULL). Writers of one process wait for each
other in ``database`` instead of polling the file's lock. That also keeps two automatic WAL
checkpoints of one process from overlapping, which SQLite 3.7.0 to 3.51.2 may answer by losing a
commit (sqlite.org/wal.html#walresetbug).
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections import namedtuple
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from sqlalchemy import URL, Connection, Dialect, Select, create_engine, event
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

BUSY_TIMEOUT_S = 10.0
_READ_TIMEOUT_S = 1.0  # the event loop waits; readers of a WAL wait for nobody but a recovery
_POOL_SIZE = 8
_READ_THREADS = 2

_T = TypeVar("_T")

# Marks the connections whose transaction will write. SQLite must take its lock at BEGIN:
# a transaction that reads first and writes later cannot wait for another writer.
WRITES = "fortpoint_writes"

_PRAGMAS = (
    "PRAGMA journal_mode = WAL",
    "PRAGMA synchronous = FULL",
    # Copying the WAL back stops writers for several fsyncs: once in 32 MB, not in 4. At 300
    # requests a second the default's stalls were the slowest percentile.
    "PRAGMA wal_autocheckpoint = 8000",
    "PRAGMA foreign_keys = ON",
    # What is erased is overwritten, not only unlinked.
    "PRAGMA secure_delete = ON",
    # A planted schema must not call functions with side effects.
    "PRAGMA trusted_schema = OFF",
)

_MESSAGES = {
    sqlite3.SQLITE_FULL: "the disk is full",
    sqlite3.SQLITE_IOERR: "the disk failed to read or write",
    sqlite3.SQLITE_BUSY: "the database is locked by another process",
    sqlite3.SQLITE_LOCKED: "the database is locked by another process",
    sqlite3.SQLITE_CORRUPT: "the database file is damaged",
    sqlite3.SQLITE_NOTADB: "the database file is not a database",
    sqlite3.SQLITE_READONLY: "the database cannot be written",
    sqlite3.SQLITE_PERM: "the database may not be opened",
    sqlite3.SQLITE_CANTOPEN: "the database cannot be opened",
}


def asynchronous(url: URL) -> AsyncEngine:
    """The engine behind ``begin`` and ``connect``."""
    engine = create_async_engine(
        url,
        hide_parameters=True,
        pool_size=_POOL_SIZE,
        max_overflow=0,
        connect_args={"timeout": BUSY_TIMEOUT_S},
    )
    event.listen(engine.sync_engine, "do_connect", _try_sqlite)
    event.listen(engine.sync_engine, "connect", _prepare)
    event.listen(engine.sync_engine, "begin", _begin)
    return engine


def _try_sqlite(_dialect: object, _record: object, arguments: Any, _options: object) -> None:
    # aiosqlite answers a failed open with a thread that outlives it and may report to a loop
    # that is gone. So what cannot be opened fails here first; nothing is read or locked.
    sqlite3.connect(arguments[0]).close()


def _prepare(connection: Any, _record: object) -> None:
    # Without this, Python's sqlite3 would begin transactions by itself, late and deferred.
    connection.isolation_level = None
    cursor = connection.cursor()
    try:
        for pragma in _PRAGMAS:
            cursor.execute(pragma)
        cursor.close()
    except sqlite3.Error:
        connection.close()  # the pool does not know it yet
        raise


def _begin(connection: Connection) -> None:
    writes = connection.get_execution_options().get(WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def message(error: sqlite3.Error) -> str:
    """What went wrong, without SQL and values."""
    # The low byte is the primary code, the rest says where (sqlite.org/rescode.html).
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return _MESSAGES.get(code, "the database failed")


class Direct:
    """SQLite without an asynchronous driver, whose every statement is a change of threads."""

    def __init__(self, url: URL) -> None:
        self.engine = create_engine(
            url.set(drivername="sqlite"),
            hide_parameters=True,
            connect_args={"timeout": BUSY_TIMEOUT_S},
        )
        event.listen(self.engine, "connect", _prepare)
        event.listen(self.engine, "begin", _begin)
        self._path = url.database or ""
        self._writing = self.engine.execution_options(**{WRITES: True})
        self._thread = ThreadPoolExecutor(1, "database")
        self._readers = ThreadPoolExecutor(_READ_THREADS, "database reader")
        self._reader: sqlite3.Connection | None = None
        self._lookups: dict[Select[Any], _Lookup] = {}

    async def write(self, work: Callable[[Connection], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._write, work)

    async def read(self, work: Callable[[Connection], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._read, work)

    def first(self, query: Select[Any], values: dict[str, object]) -> Any | None:
        if self._reader is None:
            self._reader = sqlite3.connect(self._path, timeout=_READ_TIMEOUT_S)
            _prepare(self._reader, None)
        if (lookup := self._lookups.get(query)) is None:
            lookup = self._lookups[query] = _Lookup(query, self.engine.dialect)
        return lookup.first(self._reader, values)

    async def scrub(self) -> bool:
        """Copy the WAL back and cut it; False where a reader stood in the way."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._scrub)

    def close(self) -> None:
        self._thread.shutdown()
        self._readers.shutdown()
        self.engine.dispose()
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _write(self, work: Callable[[Connection], _T]) -> _T:
        with self._writing.begin() as connection:
            return work(connection)

    def _scrub(self) -> bool:
        connection = self.engine.raw_connection()
        try:
            cursor = connection.cursor()
            busy = cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            return not busy
        finally:
            connection.close()

    def _read(self, work: Callable[[Connection], _T]) -> _T:
        with self.engine.connect() as connection:
            return work(connection)


class _Lookup:
    """A query as SQLite takes it, written once, and how its columns become Python's."""

    def __init__(self, query: Select[Any], dialect: Dialect) -> None:
        columns = query.selected_columns
        compiled = query.compile(dialect=dialect)
        self._sql = compiled.string
        self._names = tuple(compiled.positiontup or ())
        self._row = _row_type(columns.keys())
        self._readers = [
            column.type.dialect_impl(dialect).result_processor(dialect, None) for column in columns
        ]

    def first(self, connection: sqlite3.Connection, values: dict[str, object]) -> Any | None:
        # All rows: a cursor that is not at its end keeps its old snapshot.
        found = connection.execute(self._sql, [values[name] for name in self._names]).fetchall()
        if not found:
            return None
        pairs = zip(self._readers, found[0], strict=True)
        return self._row(*(read(value) if read else value for read, value in pairs))


def _row_type(names: Iterable[str]) -> Callable[..., Any]:
    return namedtuple("Row", names)
