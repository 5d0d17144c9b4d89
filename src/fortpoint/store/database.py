"""The database: connections, transactions and migrations.

    database = Database.in_home(home)
    await database.migrate()
    async with database.begin() as connection:      # one write transaction
        await connection.execute(insert(tables.keys), ...)

What every request does goes a shorter way: ``write`` runs a whole transaction in one thread,
``first`` reads one row without a change of threads.

Whatever goes wrong below (a full disk, a lock, a damaged file, a lost server) becomes one
``StorageError`` whose message names neither SQL nor values.

For SQLite a commit is on disk when ``begin`` returns (WAL, synchronous=FULL), and writers of
one process wait for each other here instead of polling the file's lock. That also keeps two
automatic WAL checkpoints of one process from overlapping, which SQLite 3.7.0 to 3.51.2 may
answer by losing a commit (sqlite.org/wal.html#walresetbug).

Not protected here: whoever may write the file may change it. The file is 0600.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections import namedtuple
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import URL, Connection, Dialect, Select, create_engine, event, make_url
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from fortpoint.errors import StorageError
from fortpoint.store import migration

_BUSY_TIMEOUT_S = 10.0
_READ_TIMEOUT_S = 1.0  # the event loop waits; readers of a WAL wait for nobody but a recovery
_POOL_SIZE = 8

_T = TypeVar("_T")

# Marks the connections whose transaction will write. SQLite must take its lock at BEGIN:
# a transaction that reads first and writes later cannot wait for another writer.
_WRITES = "fortpoint_writes"

_PRAGMAS = (
    "PRAGMA journal_mode = WAL",
    "PRAGMA synchronous = FULL",
    # Copying the WAL back stops writers for several fsyncs: once in 32 MB, not in 4. At 300
    # requests a second the default's stalls were the slowest percentile.
    "PRAGMA wal_autocheckpoint = 8000",
    "PRAGMA foreign_keys = ON",
    # A planted schema must not call functions with side effects.
    "PRAGMA trusted_schema = OFF",
)

_SQLITE_MESSAGES = {
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


class Database:
    """A pool of connections to one database, for one event loop. Opens nothing by itself."""

    def __init__(self, path_or_url: str) -> None:
        url = _url(path_or_url)
        self.is_sqlite = url.get_backend_name() == "sqlite"
        self._engine = _sqlite_engine(url) if self.is_sqlite else _server_engine(url)
        self._writing = self._engine.execution_options(**{_WRITES: True})
        self._writer = asyncio.Lock() if self.is_sqlite else None
        self._direct = _Direct(url) if self.is_sqlite else None

    @classmethod
    def in_home(cls, home: Path) -> Database:
        """The database of ``home``, both made if missing and closed to other users."""
        path = home / "fortpoint.db"
        try:
            home.mkdir(mode=0o700, parents=True, exist_ok=True)
            _make_private(path)
        except OSError as error:
            raise StorageError(f"the database cannot be opened: {error.strerror}") from None
        return cls(str(path))

    async def migrate(self) -> None:
        """Bring the tables to this version, in one transaction. Raises ``StorageError``."""
        async with self.begin() as connection:
            await connection.run_sync(migration.upgrade)

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncConnection]:
        """One write transaction: committed at the end of the block, undone by an error."""
        async with self._writer or nullcontext():
            with _translated():
                async with self._writing.begin() as connection:
                    yield connection

    async def write(self, work: Callable[[Connection], _T]) -> _T:
        """``work`` in one write transaction, as in ``begin``: for SQLite all of it in one thread.

        ``work`` must touch nothing that belongs to the event loop.
        """
        if self._direct is None or self._writer is None:
            async with self.begin() as connection:
                return await connection.run_sync(work)
        async with self._writer:
            with _translated():
                return await self._direct.write(work)

    async def first(self, query: Select[Any], **values: object) -> Any | None:
        """The first row of a query that an index answers, as it is committed now.

        ``values`` are plain ones, its columns are the row's attributes, and ``query`` is one
        that lives as long as the program.

        SQLite is read in the event loop: that takes microseconds, a thread's turn would take
        longer than the query.
        """
        with _translated():
            if self._direct is not None:
                return self._direct.first(query, values)
            async with self._engine.connect() as connection:
                return (await connection.execute(query, values)).first()

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[AsyncConnection]:
        """Read one consistent snapshot. Nothing written in the block is kept."""
        with _translated():
            async with self._engine.connect() as connection:
                yield connection

    async def close(self) -> None:
        """Close every connection."""
        with _translated():
            if self._direct is not None:
                self._direct.close()
            await self._engine.dispose()


class _Direct:
    """SQLite without an asynchronous driver, whose every statement is a change of threads."""

    def __init__(self, url: URL) -> None:
        self.engine = create_engine(
            url.set(drivername="sqlite"),
            hide_parameters=True,
            connect_args={"timeout": _BUSY_TIMEOUT_S},
        )
        event.listen(self.engine, "connect", _prepare_sqlite)
        event.listen(self.engine, "begin", _begin_sqlite)
        self._path = url.database or ""
        self._writing = self.engine.execution_options(**{_WRITES: True})
        self._thread = ThreadPoolExecutor(1, "database")
        self._reader: sqlite3.Connection | None = None
        self._lookups: dict[Select[Any], _Lookup] = {}

    async def write(self, work: Callable[[Connection], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, work)

    def first(self, query: Select[Any], values: dict[str, object]) -> Any | None:
        if self._reader is None:
            self._reader = sqlite3.connect(self._path, timeout=_READ_TIMEOUT_S)
            _prepare_sqlite(self._reader, None)
        if (lookup := self._lookups.get(query)) is None:
            lookup = self._lookups[query] = _Lookup(query, self.engine.dialect)
        return lookup.first(self._reader, values)

    def close(self) -> None:
        self._thread.shutdown()
        self.engine.dispose()
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _run(self, work: Callable[[Connection], _T]) -> _T:
        with self._writing.begin() as connection:
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


def _make_private(path: Path) -> None:
    """A file for its owner only. SQLite alone would make it, and its WAL, by the umask."""
    try:
        # One that exists is never opened: closing any descriptor of the file would drop the
        # locks of this process's own connections (fcntl(2)), and with them the WAL's safety.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        if path.is_file() and path.stat().st_mode & 0o077:
            path.chmod(0o600)


def _url(path_or_url: str) -> URL:
    if "://" in path_or_url:
        return make_url(path_or_url)
    return URL.create("sqlite+aiosqlite", database=path_or_url)


def _server_engine(url: URL) -> AsyncEngine:
    # Values (secrets' hashes, prompts) must not reach a log through an error's text.
    return create_async_engine(url, hide_parameters=True, pool_pre_ping=True)


def _sqlite_engine(url: URL) -> AsyncEngine:
    engine = create_async_engine(
        url,
        hide_parameters=True,
        pool_size=_POOL_SIZE,
        max_overflow=0,
        connect_args={"timeout": _BUSY_TIMEOUT_S},
    )
    event.listen(engine.sync_engine, "do_connect", _try_sqlite)
    event.listen(engine.sync_engine, "connect", _prepare_sqlite)
    event.listen(engine.sync_engine, "begin", _begin_sqlite)
    return engine


def _try_sqlite(_dialect: object, _record: object, arguments: Any, _options: object) -> None:
    # aiosqlite answers a failed open with a thread that outlives it and may report to a loop
    # that is gone. So what cannot be opened fails here first; nothing is read or locked.
    sqlite3.connect(arguments[0]).close()


def _prepare_sqlite(connection: Any, _record: object) -> None:
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


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except SQLAlchemyError as error:
        raise StorageError(_message(error)) from error
    except sqlite3.Error as error:  # raised while a connection is prepared
        raise StorageError(_sqlite_message(error)) from error
    except OSError as error:  # a server that cannot be reached
        raise StorageError("the database cannot be reached") from error


def _message(error: SQLAlchemyError) -> str:
    cause = error.orig if isinstance(error, DBAPIError) else None
    if isinstance(cause, sqlite3.Error):
        return _sqlite_message(cause)
    return "the database failed"


def _sqlite_message(error: sqlite3.Error) -> str:
    # The low byte is the primary code, the rest says where (sqlite.org/rescode.html).
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return _SQLITE_MESSAGES.get(code, "the database failed")
