"""Every channel that has named a release, for what may stand in for a blocked one."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    column = sa.Column("channels", sa.JSON, nullable=False, server_default="[]")
    op.add_column("releases", column)
    table = sa.table(
        "releases",
        *(sa.column(name) for name in ("id", "channel", "stable")),
        sa.column("channels", sa.JSON),
    )
    bind = op.get_bind()
    for row in bind.execute(sa.select(table.c.id, table.c.channel).where(table.c.stable)).all():
        change = table.update().where(table.c.id == row.id)
        bind.execute(change.values(channels=[row.channel]))
