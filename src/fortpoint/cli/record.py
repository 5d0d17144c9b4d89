"""Administration by command, in the audit log: who at this machine did what.

async with opened(state) as (database, log):
    ...
    await append(log, "cli key revoke", f"key {key_id}")
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from sqlalchemy import Connection

    from fortpoint.audit.entry import Content
    from fortpoint.audit.log import AuditLog
    from fortpoint.store.database import Database
    from fortpoint.store.location import Location


@asynccontextmanager
async def opened(where: Path | Location) -> AsyncIterator[tuple[Database, AuditLog]]:
    """The database and the log of a home, by its ``state`` folder or where they are.

    The log is opened before anything is done: without a record, nothing is changed.
    """
    from fortpoint.audit.log import AuditLog

    location = located(where)
    database = location.open()
    try:
        await database.migrate()
        log = await AuditLog.open(database, location.state)
        try:
            yield database, log
        finally:
            await log.close()
    finally:
        await database.close()


def located(where: Path | Location) -> Location:
    """The location itself, or that of the home whose ``state`` folder this is."""
    from pathlib import Path

    from fortpoint.config import load
    from fortpoint.store.location import locate

    return locate(load(flags=[f"home={where.parent}"])) if isinstance(where, Path) else where


async def append(
    log: AuditLog,
    surface: str,
    detail: str,
    content: Content | None = None,
    also: Callable[[Connection], None] | None = None,
    **more: Any,
) -> None:
    """One entry of a command; ``more`` are further fields of it. Raises ``AuditUnavailable``."""
    from fortpoint.audit.entry import Entry, new_request_id, now

    await log.append(
        Entry(
            time=now(),
            kind="admin",
            request_id=new_request_id("cli"),
            surface=surface,
            user=login(),
            role="operator",
            status=200,
            detail=detail,
            **more,
        ),
        content,
        also,
    )


def login() -> str:
    """The account of this machine that runs the command."""
    import os
    import pwd

    try:
        return f"os:{pwd.getpwuid(os.getuid()).pw_name}"
    except KeyError:
        return f"os:{os.getuid()}"
