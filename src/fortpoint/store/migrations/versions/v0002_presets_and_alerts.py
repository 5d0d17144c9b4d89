"""Saved steering, which keys have it, alerts, and statistics of what is watched."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "presets",
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("model", sa.String(128), nullable=False),
        sa.Column("steers", sa.LargeBinary(), nullable=False),
        sa.Column("saved_at", sa.DateTime(), nullable=False),
        sa.Column("saved_by", sa.String(128), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_presets")),
    )
    op.create_table(
        "preset_keys",
        sa.Column("key_id", sa.String(12), nullable=False),
        sa.Column("preset", sa.String(64), nullable=False),
        sa.ForeignKeyConstraint(["key_id"], ["keys.key_id"], name=op.f("fk_preset_keys_key_id")),
        sa.ForeignKeyConstraint(["preset"], ["presets.name"], name=op.f("fk_preset_keys_preset")),
        sa.PrimaryKeyConstraint("key_id", "preset", name=op.f("pk_preset_keys")),
    )
    op.create_table(
        "preset_defaults",
        sa.Column("key_id", sa.String(12), nullable=False),
        sa.Column("preset", sa.String(64), nullable=False),
        sa.ForeignKeyConstraint(
            ["key_id"], ["keys.key_id"], name=op.f("fk_preset_defaults_key_id")
        ),
        sa.ForeignKeyConstraint(
            ["preset"], ["presets.name"], name=op.f("fk_preset_defaults_preset")
        ),
        sa.PrimaryKeyConstraint("key_id", name=op.f("pk_preset_defaults")),
    )
    _watching()


def _watching() -> None:
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "alerts",
        sa.Column("number", number, autoincrement=True, nullable=False),
        sa.Column("time", sa.DateTime(), nullable=False),
        sa.Column("request_id", sa.String(40), nullable=False),
        sa.Column("key_id", sa.String(12), nullable=False),
        sa.Column("target", sa.String(128), nullable=False),
        sa.Column("value", sa.Float(), nullable=False),
        sa.Column("threshold", sa.Float(), nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("part", sa.String(8), nullable=False),
        sa.Column("steered", sa.Boolean(), nullable=False),
        sa.Column("action", sa.String(16), nullable=False),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_alerts")),
    )
    op.create_table(
        "feature_stats",
        sa.Column("key_id", sa.String(12), nullable=False),
        sa.Column("target", sa.String(128), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("tokens_over", sa.BigInteger(), nullable=False),
        sa.Column("maximum", sa.Float(), nullable=False),
        sa.Column("last_over_at", sa.DateTime()),
        sa.PrimaryKeyConstraint("key_id", "target", name=op.f("pk_feature_stats")),
    )


def downgrade() -> None:
    raise NotImplementedError("alerts are never dropped; restore a copy of the database instead")
