"""Every table, as SQLAlchemy Core metadata.

The metadata is what the code queries with; the migrations are what makes the tables. A test
compares the two. Names and types work on SQLite and PostgreSQL alike.

``audit_entries`` and ``audit_checkpoints`` are only ever inserted into. Nothing here stops
somebody who can write the file from changing them: the signed Merkle tree shows it.
"""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    DateTime,
    Dialect,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    TypeDecorator,
)


class UtcDateTime(TypeDecorator[datetime]):
    """A moment. Stored as UTC without a zone, so that SQLite and PostgreSQL sort it alike.

    A naive value is refused: it would be read back as a different moment elsewhere.
    """

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a moment without a time zone")
        return value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC)


# Named constraints, so that a later migration can drop one by the same name everywhere.
metadata = MetaData(
    naming_convention={
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite gives an ordered, gap-free walk only to INTEGER PRIMARY KEY, which is 64 bits there.
_Index = BigInteger().with_variant(Integer(), "sqlite")

keys = Table(
    "keys",
    metadata,
    Column("key_id", String(12), primary_key=True),
    Column("secret_sha256", LargeBinary(32), nullable=False),
    Column("user", String(128), nullable=False),
    Column("role", String(16), nullable=False),
    Column("created_at", UtcDateTime(), nullable=False),
    Column("expires_at", UtcDateTime()),
    Column("revoked_at", UtcDateTime()),
    CheckConstraint("role IN ('customer', 'operator')", name="role"),
)

audit_entries = Table(
    "audit_entries",
    metadata,
    Column("index", _Index, primary_key=True, autoincrement=False),
    Column("leaf_hash", LargeBinary(32), nullable=False),
    Column("entry", LargeBinary(), nullable=False),
)

audit_checkpoints = Table(
    "audit_checkpoints",
    metadata,
    Column("size", _Index, primary_key=True, autoincrement=False),
    Column("root_hash", LargeBinary(32), nullable=False),
    Column("frontier", LargeBinary(), nullable=False),
    Column("note", LargeBinary(), nullable=False),
)
