"""Many rows into one table, as fast as the database takes them.

add_rows(connection, audit_entries, columns, rows)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from sqlalchemy import Connection, Insert, Table, insert

from fortpoint.errors import StorageError
from fortpoint.store import postgresql

_COPY_FROM = 16  # rows; below, the two turns more that a COPY takes cost more than they save


def add_rows(
    connection: Connection, table: Table, columns: tuple[str, ...], rows: Sequence[tuple[Any, ...]]
) -> None:
    """Insert them in the transaction of ``connection``; values are in the order of ``columns``.

    Values are as the driver takes them: numbers, texts, bytes, None.

    Raises ``StorageError``, or SQLAlchemy's errors, which ``Database`` turns into it.
    """
    if connection.dialect.name == "postgresql" and len(rows) >= _COPY_FROM:
        _copy(connection, table, columns, rows)
        return
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql(_sqlite_insert(table, columns), list(rows))
        return
    named = [dict(zip(columns, row, strict=True)) for row in rows]
    connection.execute(_insert(table), named)


@cache
def _sqlite_insert(table: Table, columns: tuple[str, ...]) -> str:
    # As the driver takes them: values that are given need no preparation, row by row.
    names = ", ".join(f'"{column}"' for column in columns)
    marks = ", ".join("?" for _ in columns)
    return f'INSERT INTO "{table.name}" ({names}) VALUES ({marks})'  # noqa: S608 - names of ours


@cache
def _insert(table: Table) -> Insert:
    # One object for each table: SQLAlchemy then compiles it once.
    return insert(table)


def _copy(
    connection: Connection, table: Table, columns: tuple[str, ...], rows: Sequence[tuple[Any, ...]]
) -> None:
    quote = connection.dialect.identifier_preparer.quote
    names = ", ".join(quote(column) for column in columns)
    driver: Any = connection.connection.driver_connection
    copying = f"COPY {quote(table.name)} ({names}) FROM STDIN"
    try:
        with driver.cursor() as cursor, cursor.copy(copying) as copy:
            for row in rows:
                copy.write_row(row)
    except connection.dialect.loaded_dbapi.Error as error:
        connection.invalidate(error)
        raise StorageError(postgresql.message(error)) from error
