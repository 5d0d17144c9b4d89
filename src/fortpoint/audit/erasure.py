"""Erasing what a request said, and nothing of the record.

    await log.append(entry, also=lambda connection: erase(connection, request_id))
    await database.scrub(audit_contents)

Prompt, answer and salt lie beside the entry (``audit.entry.Content``). Without the salt, the
entry's hashes are those of 32 random bytes and say nothing of what was asked; every proof and
every checkpoint stays valid.

Not reached: copies made before (backups, replicas, archived write-ahead logs), and what callers
or the operator put into other fields, which an entry keeps for good.
"""

from __future__ import annotations

from sqlalchemy import Connection, select, update

from fortpoint.audit.batch import MAX_REQUEST_ID_BYTES
from fortpoint.errors import NotFound
from fortpoint.store.tables import audit_contents


def erase(connection: Connection, request_id: str) -> None:
    """Set content and salt of every entry of this request to null. Raises ``NotFound``."""
    check_erasable(connection, request_id)
    connection.execute(
        update(audit_contents)
        .where(audit_contents.c.request_id == request_id.encode())
        .values(salt=None, request=None, response=None)
    )


def check_erasable(connection: Connection, request_id: str) -> None:
    """Raise ``NotFound`` where there is nothing to erase."""
    wanted = request_id.encode()
    if len(wanted) > MAX_REQUEST_ID_BYTES:
        raise NotFound("this is not a request's id")
    query = select(audit_contents.c.salt).where(audit_contents.c.request_id == wanted)
    salts = connection.execute(query).scalars().all()
    if not salts:
        raise NotFound("the log has no entry of this request")
    if all(salt is None for salt in salts):
        raise NotFound("what this request said is already erased, or was never kept")
