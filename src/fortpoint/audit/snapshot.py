"""Reads a log out of a database without being able to change it.

    with snapshot_of(path_or_url) as log:
        for row in log.entries(): ...

One read transaction, so that entries and checkpoints belong together although a gateway is
appending; row by row, so that memory stays flat however long the log is.

What is read here is judged in ``audit.verify``; nothing here is trusted, not even that a
column has the type it was declared with.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol
from urllib.parse import quote

from sqlalchemy import URL, ColumnElement, case, func, select
from sqlalchemy.exc import DBAPIError

from fortpoint.audit.checkpoint import MAX_NOTE_BYTES
from fortpoint.audit.entry import MAX_ENTRY_BYTES
from fortpoint.audit.merkle import HASH_BYTES
from fortpoint.errors import VerificationError
from fortpoint.store.postgresql import message as server_message
from fortpoint.store.postgresql import server_engine
from fortpoint.store.tables import audit_checkpoints, audit_entries, audit_nodes

_ROWS = 2000
_BUSY_TIMEOUT_S = 10.0
_MAX_FRONTIER_BYTES = 64 * HASH_BYTES

# Sizes are bounded before a value is read: a planted gigabyte must not fill the memory.
# CAST, because a value of another type, or text that is not UTF-8, must not end the walk.
_ENTRIES = (
    'SELECT "index", CAST(substr(leaf_hash, 1, 64) AS BLOB),'
    " CASE WHEN length(entry) <= ? THEN CAST(entry AS BLOB) END"
    ' FROM audit_entries ORDER BY "index"'
)
# In the order in which a growing tree completes them.
_NODES = (
    "SELECT height, number, CAST(substr(hash, 1, 64) AS BLOB) FROM audit_nodes"
    " ORDER BY (number + 1) << height, height"
)
_CHECKPOINTS = (
    "SELECT size, CAST(substr(root_hash, 1, 64) AS BLOB),"
    " CASE WHEN length(note) <= ? THEN CAST(note AS BLOB) END,"
    " CASE WHEN length(frontier) <= ? THEN CAST(frontier AS BLOB) END"
    " FROM audit_checkpoints ORDER BY size"
)


class Unreadable(VerificationError):
    """The file could not be read on; ``message`` says why."""


@dataclass(frozen=True, slots=True)
class EntryRow:
    index: object
    leaf_hash: object
    entry: bytes | None


@dataclass(frozen=True, slots=True)
class CheckpointRow:
    size: object
    root_hash: object
    note: bytes | None
    frontier: bytes | None


@dataclass(frozen=True, slots=True)
class NodeRow:
    height: object
    number: object
    hash: object


class Snapshot(Protocol):
    """A log at one moment, as it is stored. Every walk raises ``Unreadable`` at damage."""

    def __enter__(self) -> Snapshot: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def newest_size(self) -> int:
        """How many entries the log claims; a hint for progress, not a finding."""

    def entries(self) -> Iterator[EntryRow]:
        """In the order of the index."""

    def checkpoints(self) -> Iterator[CheckpointRow]:
        """In the order of size."""

    def nodes(self) -> Iterator[NodeRow]:
        """In the order in which a growing tree completes them."""


def snapshot_of(where: Path | URL) -> Snapshot:
    """Of an SQLite file, or of the database server at an address. Raises ``Unreadable``."""
    return FileSnapshot(where) if isinstance(where, Path) else ServerSnapshot(where)


class FileSnapshot:
    """The log in the SQLite file ``path`` at one moment. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise Unreadable(f"there is no log at {path}")
        with _readable():
            self._connection = _open(path)

    def __enter__(self) -> FileSnapshot:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._connection.close()

    def newest_size(self) -> int:
        try:
            row = self._connection.execute("SELECT max(size) FROM audit_checkpoints").fetchone()
        except sqlite3.Error:
            return 0  # the walk will say where the damage is
        return row[0] if isinstance(row[0], int) else 0

    def entries(self) -> Iterator[EntryRow]:
        with _readable():
            for row in self._connection.execute(_ENTRIES, (MAX_ENTRY_BYTES,)):
                yield EntryRow(*row)

    def checkpoints(self) -> Iterator[CheckpointRow]:
        limits = (MAX_NOTE_BYTES, _MAX_FRONTIER_BYTES)
        with _readable():
            for row in self._connection.execute(_CHECKPOINTS, limits):
                yield CheckpointRow(*row)

    def nodes(self) -> Iterator[NodeRow]:
        with _readable():
            for row in self._connection.execute(_NODES):
                yield NodeRow(*row)


class ServerSnapshot:
    """The log on a database server, read through cursors that hold a part of it at a time."""

    def __init__(self, url: URL) -> None:
        self._engine = server_engine(url)
        with _readable():
            self._connection = self._engine.connect().execution_options(
                isolation_level="REPEATABLE READ",
                postgresql_readonly=True,
                stream_results=True,
                max_row_buffer=_ROWS,
            )

    def __enter__(self) -> ServerSnapshot:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._connection.close()
        self._engine.dispose()

    def newest_size(self) -> int:
        with _readable():
            return self._connection.execute(_NEWEST_SIZE).scalar_one() or 0

    def entries(self) -> Iterator[EntryRow]:
        with _readable():
            for row in self._connection.execute(_SERVER_ENTRIES):
                yield EntryRow(*row)

    def checkpoints(self) -> Iterator[CheckpointRow]:
        with _readable():
            for row in self._connection.execute(_SERVER_CHECKPOINTS):
                yield CheckpointRow(*row)

    def nodes(self) -> Iterator[NodeRow]:
        with _readable():
            for row in self._connection.execute(_SERVER_NODES):
                yield NodeRow(*row)


def _bounded(column: ColumnElement[Any], limit: int) -> ColumnElement[Any]:
    return case((func.octet_length(column) <= limit, column))


_NEWEST_SIZE = select(func.max(audit_checkpoints.c.size))
_SERVER_ENTRIES = select(
    audit_entries.c.index,
    audit_entries.c.leaf_hash,
    _bounded(audit_entries.c.entry, MAX_ENTRY_BYTES),
).order_by(audit_entries.c.index)
_SERVER_CHECKPOINTS = select(
    audit_checkpoints.c.size,
    audit_checkpoints.c.root_hash,
    _bounded(audit_checkpoints.c.note, MAX_NOTE_BYTES),
    _bounded(audit_checkpoints.c.frontier, _MAX_FRONTIER_BYTES),
).order_by(audit_checkpoints.c.size)
_SERVER_NODES = select(audit_nodes).order_by(
    (audit_nodes.c.number + 1).bitwise_lshift(audit_nodes.c.height), audit_nodes.c.height
)


def _open(path: Path) -> sqlite3.Connection:
    try:
        return _connect(path, "mode=ro")
    except sqlite3.OperationalError:
        # A WAL database in a folder that may not be written (an auditor's read-only copy) can
        # only be read as immutable. That ignores the WAL, so it must be empty or absent.
        wal = path.with_name(path.name + "-wal")
        if wal.exists() and wal.stat().st_size > 0:
            raise
        return _connect(path, "mode=ro&immutable=1")


def _connect(path: Path, query: str) -> sqlite3.Connection:
    uri = f"file:{quote(str(path.absolute()))}?{query}"
    connection = sqlite3.connect(uri, uri=True, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
    try:
        connection.execute("PRAGMA query_only = ON")
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.execute("PRAGMA cell_size_check = ON")
        connection.execute("BEGIN")
        # The transaction's snapshot is taken by its first read.
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.Error:
        connection.close()
        raise
    return connection


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise Unreadable(f"the database file cannot be read: {error}") from None
    except DBAPIError as error:
        raise Unreadable(f"the log cannot be read: {server_message(error.orig)}") from None
