"""The database: connections, transactions and migrations.

    database = Database.in_home(home)               # SQLite
    database = Database("postgresql://...")         # one server for several gateways
    await database.migrate()
    async with database.begin() as connection:      # one write transaction
        await connection.execute(insert(tables.keys), ...)

What every request does goes a shorter way: ``write`` and ``read`` run a whole transaction in
one thread, ``first`` reads one row; on SQLite without a change of threads.

On both, a commit is on disk when ``begin`` or ``write`` returns, and write transactions take
turns: nobody else writes between what one reads and what it writes (``store.sqlite``,
``store.postgresql``). Whatever goes wrong below (a full disk, a lock, a damaged file, a lost
server) becomes one ``StorageError`` whose message names neither SQL nor values.

Not protected here: whoever may write the file may change it. The file is 0600.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import URL, Connection, Select, Table, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from fortpoint.errors import StorageError
from fortpoint.store import migration, postgresql, sqlite
from fortpoint.store.postgresql import Server

_T = TypeVar("_T")


class Database:
    """A pool of connections to one database, for one event loop. Opens nothing by itself."""

    def __init__(self, path_or_url: str | URL) -> None:
        url = _url(path_or_url)
        self.is_sqlite = url.get_backend_name() == "sqlite"
        self._short: sqlite.Direct | Server
        if self.is_sqlite:
            self._short = sqlite.Direct(url)
            self._writer: asyncio.Lock | None = asyncio.Lock()
            self._reading = sqlite.asynchronous(url)
            self._writing = self._reading.execution_options(**{sqlite.WRITES: True})
        else:
            self._short = _server(url)
            self._writer = None
            self._reading = self._short.reading
            self._writing = self._short.asynchronous

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
            if not self.is_sqlite:
                await connection.run_sync(postgresql.check_durable)
            await connection.run_sync(migration.upgrade)

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncConnection]:
        """One write transaction: committed at the end of the block, undone by an error."""
        async with self._writer or nullcontext():
            with _translated():
                async with self._writing.begin() as connection:
                    if not self.is_sqlite:
                        await connection.run_sync(postgresql.take_turn)
                    yield connection

    async def write(self, work: Callable[[Connection], _T]) -> _T:
        """``work`` in one write transaction, as in ``begin``, all of it in one thread.

        ``work`` must touch nothing that belongs to the event loop.
        """
        async with self._writer or nullcontext():
            with _translated():
                return await self._short.write(work)

    async def read(self, work: Callable[[Connection], _T]) -> _T:
        """``work`` over one consistent snapshot, as in ``connect``, all of it in one thread."""
        with _translated():
            return await self._short.read(work)

    async def first(self, query: Select[Any], **values: object) -> Any | None:
        """The first row of a query that an index answers, as it is committed now.

        ``values`` are plain ones, its columns are the row's attributes, and ``query`` is one
        that lives as long as the program.

        SQLite is read in the event loop: that takes microseconds, a thread's turn would take
        longer than the query.
        """
        with _translated():
            if isinstance(self._short, Server):
                return await self._short.first(query, values)
            return self._short.first(query, values)

    async def scrub(self, table: Table) -> bool:
        """Take what was set to null or deleted in ``table`` out of the database's files too.

        False where somebody who reads stands in the way; it then happens later by itself.
        """
        async with self._writer or nullcontext():
            with _translated():
                if isinstance(self._short, Server):
                    await self._short.scrub(table.name)
                    return True
                return await self._short.scrub()

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[AsyncConnection]:
        """Read one consistent snapshot. Nothing written in the block is kept."""
        with _translated():
            async with self._reading.connect() as connection:
                yield connection

    async def close(self) -> None:
        """Close every connection."""
        with _translated():
            if isinstance(self._short, Server):
                await self._short.close()
                return
            self._short.close()
            await self._reading.dispose()


def _make_private(path: Path) -> None:
    """A file for its owner only. SQLite alone would make it, and its WAL, by the umask."""
    try:
        # One that exists is never opened: closing any descriptor of the file would drop the
        # locks of this process's own connections (fcntl(2)), and with them the WAL's safety.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        if path.is_file() and path.stat().st_mode & 0o077:
            path.chmod(0o600)


def _url(path_or_url: str | URL) -> URL:
    if isinstance(path_or_url, URL):
        return path_or_url
    if "://" not in path_or_url:
        return URL.create("sqlite+aiosqlite", database=path_or_url)
    try:
        return make_url(path_or_url)
    except (ArgumentError, ValueError):
        raise StorageError("the database's address is not a URL") from None


def _server(url: URL) -> Server:
    if url.get_backend_name() != "postgresql":
        raise StorageError("the database is SQLite or PostgreSQL: postgresql://user@host/name")
    try:
        return Server(url)
    except ModuleNotFoundError:
        raise StorageError(
            "PostgreSQL needs its driver: pip install 'fortpoint[postgresql]'"
        ) from None


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except SQLAlchemyError as error:
        raise StorageError(_message(error)) from error
    except sqlite3.Error as error:  # raised while a connection is prepared
        raise StorageError(sqlite.message(error)) from error
    except OSError as error:  # a server that cannot be reached
        raise StorageError("the database cannot be reached") from error


def _message(error: SQLAlchemyError) -> str:
    if isinstance(error, DBAPIError):
        if isinstance(error.orig, sqlite3.Error):
            return sqlite.message(error.orig)
        return postgresql.message(error.orig)
    return "the database failed"
