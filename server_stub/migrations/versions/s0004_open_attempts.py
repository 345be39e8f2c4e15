"""The open attempts of a rollout are counted for each offer it makes."""

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.drop_index("ix_attempts_rollout_id", "attempts")
    op.create_index("attempts_rollout", "attempts", ["rollout_id", "state"])
