"""Shows what the log holds: its newest entries and its newest checkpoint.

Nothing is verified here; ``audit.verify`` does that.
"""

from __future__ import annotations

import msgspec
from sqlalchemy import select

from fortpoint.audit.entry import Entry, unseal
from fortpoint.errors import NotFound, VerificationError
from fortpoint.store.database import Database
from fortpoint.store.tables import audit_checkpoints, audit_entries


class Recorded(msgspec.Struct, frozen=True):
    """An entry at its place."""

    index: int
    leaf_hash: str
    entry: Entry


async def recent(database: Database, limit: int) -> tuple[Recorded, ...]:
    """The newest ``limit`` entries, oldest first. Raises ``VerificationError``."""
    query = select(audit_entries).order_by(audit_entries.c.index.desc()).limit(limit)
    async with database.connect() as connection:
        rows = (await connection.execute(query)).all()
    return tuple(_recorded(*row) for row in reversed(rows))


async def newest_checkpoint(database: Database) -> bytes:
    """The newest signed checkpoint, as C2SP text. Raises ``NotFound`` for an empty log."""
    query = select(audit_checkpoints.c.note).order_by(audit_checkpoints.c.size.desc()).limit(1)
    async with database.connect() as connection:
        note: bytes | None = (await connection.execute(query)).scalar_one_or_none()
    if note is None:
        raise NotFound("the log has no entries yet, so there is no checkpoint")
    return note


def _recorded(index: int, leaf_hash: bytes, entry: bytes) -> Recorded:
    try:
        return Recorded(index, leaf_hash.hex(), unseal(entry).entry)
    except (ValueError, AttributeError):
        raise VerificationError(
            f"entry {index} cannot be read; run `fortpoint audit verify`"
        ) from None
