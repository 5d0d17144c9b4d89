"""Accounts' risk, its evidence, links between accounts, and known attacks as hashes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "accounts",
        sa.Column("account", sa.String(140), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("reason", sa.String(512), nullable=False),
        sa.Column("changed_at", sa.DateTime(), nullable=False),
        sa.Column("changed_by", sa.String(128), nullable=False),
        sa.Column("updated_at", sa.DateTime(), nullable=False),
        sa.Column("state", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("account", name=op.f("pk_accounts")),
    )
    _evidence()
    op.create_table(
        "known_attacks",
        sa.Column("family", sa.String(24), nullable=False),
        sa.Column("sketch", sa.LargeBinary(), nullable=False),
        sa.Column("n", sa.Float(), nullable=False),
        sa.Column("suspicion", sa.Float(), nullable=False),
        sa.Column("blocked", sa.Integer(), nullable=False),
        sa.Column("last_at", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("family", name=op.f("pk_known_attacks")),
    )
    op.create_table(
        "guard_values",
        sa.Column("name", sa.String(32), nullable=False),
        sa.Column("value", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_guard_values")),
    )


def _evidence() -> None:
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "account_events",
        sa.Column("number", number, autoincrement=True, nullable=False),
        sa.Column("account", sa.String(140), nullable=False),
        sa.Column("time", sa.DateTime(), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("weight", sa.Float(), nullable=False),
        sa.Column("request_id", sa.String(40), nullable=False),
        sa.Column("detector", sa.String(64)),
        sa.Column("score", sa.Float()),
        sa.Column("family", sa.String(24)),
        sa.Column("others", sa.String(4096), nullable=False),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_account_events")),
    )
    op.create_index(op.f("ix_account_events_account"), "account_events", ["account"])
    op.create_table(
        "account_links",
        sa.Column("account", sa.String(140), nullable=False),
        sa.Column("other", sa.String(140), nullable=False),
        sa.Column("family", sa.String(24), nullable=False),
        sa.Column("times", sa.Integer(), nullable=False),
        sa.Column("first_at", sa.DateTime(), nullable=False),
        sa.Column("last_at", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("account", "other", name=op.f("pk_account_links")),
    )


def downgrade() -> None:
    raise NotImplementedError("evidence is never dropped; restore a copy of the database instead")
