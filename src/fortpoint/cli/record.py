"""Administration by command, in the audit log: who at this machine did what.

async with opened(state) as (database, log):
    ...
    await append(log, "cli key revoke", f"key {key_id}")
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from fortpoint.audit.log import AuditLog
    from fortpoint.store.database import Database


@asynccontextmanager
async def opened(state: Path) -> AsyncIterator[tuple[Database, AuditLog]]:
    """The database and the log of a home's ``state`` folder.

    The log is opened before anything is done: without a record, nothing is changed.
    """
    from fortpoint.audit.log import AuditLog
    from fortpoint.store.database import Database

    database = Database.in_home(state)
    try:
        await database.migrate()
        log = await AuditLog.open(database, state)
        try:
            yield database, log
        finally:
            await log.close()
    finally:
        await database.close()


async def append(log: AuditLog, surface: str, detail: str, **more: Any) -> None:
    """One entry of a command; ``more`` are further fields of it. Raises ``AuditUnavailable``."""
    import secrets

    from fortpoint.audit.entry import Entry, now

    await log.append(
        Entry(
            time=now(),
            kind="admin",
            request_id=f"cli_{secrets.token_hex(12)}",
            surface=surface,
            user=login(),
            role="operator",
            status=200,
            detail=detail,
            **more,
        )
    )


def login() -> str:
    """The account of this machine that runs the command."""
    import os
    import pwd

    try:
        return f"os:{pwd.getpwuid(os.getuid()).pw_name}"
    except KeyError:
        return f"os:{os.getuid()}"
