"""What is forgotten with time. The registry, releases and the audit log are kept for good.

Reports are bounded per board and downloads in number as they are written (``limits``); here goes
what is older than ``keep_days``.
"""

from sqlalchemy import Connection, or_, select

from . import stages
from .schema import attempts, deliveries, downloads, rollouts


def forget(connection: Connection, before: int) -> dict[str, int]:
    """Drop what ended before a moment; return how many lines of each table.

    Attempts of a rollout that is not over stay, since its progress is counted from them.

    Args:
        before: seconds.
    """
    open_rollouts = select(rollouts.c.id).where(rollouts.c.state.in_((*stages.ACTIVE, "paused")))
    over = or_(attempts.c.rollout_id.is_(None), attempts.c.rollout_id.not_in(open_rollouts))
    statements = {
        "attempts": attempts.delete().where(attempts.c.ended < before, over),
        "downloads": downloads.delete().where(downloads.c.at < before),
        "deliveries": deliveries.delete().where(
            deliveries.c.state != "waiting", deliveries.c.due < before
        ),
    }
    return {name: connection.execute(work).rowcount for name, work in statements.items()}
