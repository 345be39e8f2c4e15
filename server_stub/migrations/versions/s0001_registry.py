"""The registry of the first server: devices and their reports."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "devices",
        sa.Column("device_id", sa.String, primary_key=True),
        sa.Column("mac", sa.String),
        sa.Column("product", sa.String),
        sa.Column("channel", sa.String),
        sa.Column("hardware", sa.String),
        sa.Column("chip_id", sa.Integer),
        sa.Column("current_version", sa.String),
        sa.Column("current_build", sa.String),
        sa.Column("agent", sa.String),
        sa.Column("micropython", sa.String),
        sa.Column("labels", sa.JSON, nullable=False),
        sa.Column("status", sa.String),
        sa.Column("status_version", sa.String),
        sa.Column("first_seen", sa.BigInteger, nullable=False),
        sa.Column("last_seen", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "reports",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column(
            "device_id",
            sa.String,
            sa.ForeignKey("devices.device_id", ondelete="CASCADE"),
            nullable=False,
        ),
        sa.Column("attempt", sa.String, nullable=False),
        sa.Column("version", sa.String),
        sa.Column("build", sa.String),
        sa.Column("status", sa.String, nullable=False),
        sa.Column("error", sa.JSON),
        sa.Column("bytes", sa.BigInteger),
        sa.Column("received", sa.BigInteger, nullable=False),
        sa.UniqueConstraint("device_id", "attempt", "status"),
    )
    op.create_index("ix_reports_device_id", "reports", ["device_id"])
