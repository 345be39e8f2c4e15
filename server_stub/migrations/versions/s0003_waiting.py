"""What a board has and how it started; boards that wait for their install window."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("devices", sa.Column("staged", sa.String))
    op.add_column("devices", sa.Column("flash", sa.BigInteger))
    op.add_column("devices", sa.Column("free", sa.BigInteger))
    op.add_column("devices", sa.Column("reset_cause", sa.String))
    op.add_column("attempts", sa.Column("waits_until", sa.BigInteger))
