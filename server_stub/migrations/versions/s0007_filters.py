"""Named searches for devices, and what boards note of an attempt."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.create_table(
        "filters",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("query", sa.JSON, nullable=False),
    )
    op.add_column("reports", sa.Column("log", sa.String))
