"""Nodes for proofs, what may be erased beside the entries, witnesses' cosignatures.

Nodes and request ids of the entries that are there are made here, with code of this step's
own: what it does must not change when the product does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0002"
branch_labels = None
depends_on = None

_ROWS = 4096
_STRIDE = 8


def upgrade() -> None:
    index = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "audit_nodes",
        sa.Column("height", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("number", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("hash", sa.LargeBinary(32), nullable=False),
        sa.PrimaryKeyConstraint("height", "number", name=op.f("pk_audit_nodes")),
    )
    op.create_table(
        "audit_contents",
        sa.Column("index", index, autoincrement=False, nullable=False),
        sa.Column("request_id", sa.LargeBinary(64)),
        sa.Column("salt", sa.LargeBinary(32)),
        sa.Column("request", sa.LargeBinary()),
        sa.Column("response", sa.LargeBinary()),
        sa.PrimaryKeyConstraint("index", name=op.f("pk_audit_contents")),
    )
    op.create_table(
        "audit_cosignatures",
        sa.Column("size", index, autoincrement=False, nullable=False),
        sa.Column("key_id", sa.String(8), nullable=False),
        sa.Column("note", sa.LargeBinary(), nullable=False),
        sa.Column("line", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("size", "key_id", name=op.f("pk_audit_cosignatures")),
    )
    _fill(op.get_bind())
    op.create_index(op.f("ix_audit_contents_request_id"), "audit_contents", ["request_id"])


def _fill(connection: sa.Connection) -> None:
    nodes = sa.table(
        "audit_nodes",
        sa.column("height", sa.Integer()),
        sa.column("number", sa.BigInteger()),
        sa.column("hash", sa.LargeBinary()),
    )
    contents = sa.table(
        "audit_contents",
        sa.column("index", sa.BigInteger()),
        sa.column("request_id", sa.LargeBinary()),
    )
    edge: list[bytes] = []
    size = 0
    for rows in _entries(connection):
        made: list[dict[str, object]] = []
        for _, leaf, _ in rows:
            _grow(edge, size, leaf, made)
            size += 1
        if made:
            connection.execute(sa.insert(nodes), made)
        found = [{"index": row[0], "request_id": _request_id(row[2])} for row in rows]
        connection.execute(sa.insert(contents), found)


def _entries(connection: sa.Connection) -> Iterator[list[tuple[int, bytes, bytes]]]:
    entries = sa.table(
        "audit_entries",
        sa.column("index", sa.BigInteger()),
        sa.column("leaf_hash", sa.LargeBinary()),
        sa.column("entry", sa.LargeBinary()),
    )
    after = -1
    query = sa.select(entries).order_by(entries.c.index).limit(_ROWS)
    while rows := connection.execute(query.where(entries.c.index > after)).all():
        after = rows[-1][0]
        yield [(row[0], bytes(row[1]), bytes(row[2])) for row in rows]


def _grow(edge: list[bytes], size: int, leaf: bytes, made: list[dict[str, object]]) -> None:
    """RFC 9162, 2.1.1: the subtrees that this leaf makes whole, as nodes at each stride."""
    height = 0
    while size >> height & 1:
        leaf = hashlib.sha256(b"\x01" + edge.pop() + leaf).digest()
        height += 1
        if height % _STRIDE == 0:
            made.append({"height": height, "number": size >> height, "hash": leaf})
    edge.append(leaf)


def _request_id(entry: bytes) -> bytes | None:
    """None where the entry cannot be read: `fortpoint audit verify` says what is wrong."""
    try:
        found = str(json.loads(entry)["entry"]["request_id"]).encode()
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if len(found) <= 64 else None


def downgrade() -> None:
    raise NotImplementedError("the record is never dropped; restore a copy of the database instead")
