"""Every table, as SQLAlchemy Core metadata.

The metadata is what the code queries with; the migrations are what makes the tables. A test
compares the two. Names and types work on SQLite and PostgreSQL alike.

``audit_entries`` is only ever inserted into. Nothing here stops somebody who can write the
file from changing it: the signed Merkle tree shows it. What may be erased of a request, its
content and the salt of the entry's hashes, is apart from it in ``audit_contents``.
"""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
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
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
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

# The roots of perfect subtrees at every eighth level, for proofs (``audit.merkle.Node``).
audit_nodes = Table(
    "audit_nodes",
    metadata,
    Column("height", Integer(), primary_key=True, autoincrement=False),
    Column("number", BigInteger(), primary_key=True, autoincrement=False),
    Column("hash", LargeBinary(32), nullable=False),
)

# Beside an entry: how to find it, and what ``fortpoint audit erase`` sets to null.
audit_contents = Table(
    "audit_contents",
    metadata,
    Column("index", _Index, primary_key=True, autoincrement=False),
    Column("request_id", LargeBinary(64)),
    Column("salt", LargeBinary(32)),
    Column("request", LargeBinary()),
    Column("response", LargeBinary()),
    Index(None, "request_id"),
)

# Checkpoints that witnesses cosigned; ``key_id`` is the witness's, ``line`` its signature line.
audit_cosignatures = Table(
    "audit_cosignatures",
    metadata,
    Column("size", _Index, primary_key=True, autoincrement=False),
    Column("key_id", String(8), primary_key=True),
    Column("note", LargeBinary(), nullable=False),
    Column("line", LargeBinary(), nullable=False),
)

# Saved steering: ``steers`` is JSON, a list of the API's ``steer`` fields.
presets = Table(
    "presets",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("model", String(128), nullable=False),
    Column("steers", LargeBinary(), nullable=False),
    Column("saved_at", UtcDateTime(), nullable=False),
    Column("saved_by", String(128), nullable=False),
)

# Which keys may ask for a preset, and the one that is applied to each request of a key.
preset_keys = Table(
    "preset_keys",
    metadata,
    Column("key_id", String(12), ForeignKey(keys.c.key_id), primary_key=True),
    Column("preset", String(64), ForeignKey(presets.c.name), primary_key=True),
)

preset_defaults = Table(
    "preset_defaults",
    metadata,
    Column("key_id", String(12), ForeignKey(keys.c.key_id), primary_key=True),
    Column("preset", String(64), ForeignKey(presets.c.name), nullable=False),
)

# A watched feature was active above its threshold. ``part`` is prompt or answer, ``role`` who
# wrote the token.
alerts = Table(
    "alerts",
    metadata,
    Column("number", _Index, primary_key=True, autoincrement=True),
    Column("time", UtcDateTime(), nullable=False),
    Column("request_id", String(40), nullable=False),
    Column("key_id", String(12), nullable=False),
    Column("target", String(128), nullable=False),
    Column("value", Float(), nullable=False),
    Column("threshold", Float(), nullable=False),
    Column("role", String(16), nullable=False),
    Column("part", String(8), nullable=False),
    Column("steered", Boolean(), nullable=False),
    Column("action", String(16), nullable=False),
)

feature_stats = Table(
    "feature_stats",
    metadata,
    Column("key_id", String(12), primary_key=True),
    Column("target", String(128), primary_key=True),
    Column("tokens", BigInteger(), nullable=False),
    Column("tokens_over", BigInteger(), nullable=False),
    Column("maximum", Float(), nullable=False),
    Column("last_over_at", UtcDateTime()),
)

# A key (``key:...``) or a user (``user:...``) whose requests raised a risk, or whom an operator
# judged. ``state`` is MessagePack of ``guard.account.Account``; ``generation`` counts operators'
# decisions.
accounts = Table(
    "accounts",
    metadata,
    Column("account", String(140), primary_key=True),
    Column("status", String(16), nullable=False),
    Column("generation", Integer(), nullable=False),
    Column("reason", String(512), nullable=False),
    Column("changed_at", UtcDateTime(), nullable=False),
    Column("changed_by", String(128), nullable=False),
    Column("updated_at", UtcDateTime(), nullable=False),
    Column("state", LargeBinary(), nullable=False),
)

# What raised an account's risk, without any text. ``others`` are the accounts it concerns too.
account_events = Table(
    "account_events",
    metadata,
    Column("number", _Index, primary_key=True, autoincrement=True),
    Column("account", String(140), nullable=False, index=True),
    Column("time", UtcDateTime(), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("weight", Float(), nullable=False),
    Column("request_id", String(40), nullable=False),
    Column("detector", String(64)),
    Column("score", Float()),
    Column("family", String(24)),
    Column("others", String(4096), nullable=False),
)

# Two accounts that attack with nearly the same prompts; ``account`` sorts before ``other``.
account_links = Table(
    "account_links",
    metadata,
    Column("account", String(140), primary_key=True),
    Column("other", String(140), primary_key=True),
    Column("family", String(24), nullable=False),
    Column("times", Integer(), nullable=False),
    Column("first_at", UtcDateTime(), nullable=False),
    Column("last_at", UtcDateTime(), nullable=False),
)

# Prompts that were blocked, as keyed hashes; ``n`` and ``suspicion`` of all that were near them.
known_attacks = Table(
    "known_attacks",
    metadata,
    Column("family", String(24), primary_key=True),
    Column("sketch", LargeBinary(), nullable=False),
    Column("n", Float(), nullable=False),
    Column("suspicion", Float(), nullable=False),
    Column("blocked", Integer(), nullable=False),
    Column("last_at", UtcDateTime(), nullable=False),
)

# The key of the sketches' hashes, and the digest of the policy that was last in force.
guard_values = Table(
    "guard_values",
    metadata,
    Column("name", String(32), primary_key=True),
    Column("value", LargeBinary(), nullable=False),
)
