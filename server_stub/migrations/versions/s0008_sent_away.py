"""Polls that were told to ask again, the database being busy."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    column = sa.Column("sent_away", sa.BigInteger, nullable=False, server_default="0")
    op.add_column("counters", column)
