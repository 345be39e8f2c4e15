"""What each worker has done, for whoever answers a scrape."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.create_table(
        "counters",
        sa.Column("worker", sa.String, primary_key=True),
        sa.Column("started", sa.BigInteger, nullable=False),
        sa.Column("written", sa.BigInteger, nullable=False),
        sa.Column("polls", sa.BigInteger, nullable=False),
        sa.Column("remembered", sa.BigInteger, nullable=False),
        sa.Column("reports", sa.BigInteger, nullable=False),
        sa.Column("bytes_sent", sa.BigInteger, nullable=False),
    )
