"""Since when a schedule is one: none of its moments before that has been missed."""

import time

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    column = sa.Column("created", sa.BigInteger, nullable=False, server_default="0")
    op.add_column("schedules", column)
    table = sa.table("schedules", sa.column("created"), sa.column("last_run"))
    now = int(time.time())
    op.execute(table.update().where(table.c.last_run.is_(None)).values(created=now))
