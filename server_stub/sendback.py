"""Sending everyone back: the rollout of an older release to the boards that took another's."""

from typing import Any

from sqlalchemy import Connection

from . import rollouts
from .problems import Problem


def back(connection: Connection, rollout_id: int, release: Any, now: int) -> int:
    """Make the rollout that sends everyone back: ``release`` to all that took this one's.

    Its target names this rollout and its build: boards that begin to run it later, because they
    were about to, join it then.

    Raises:
        Problem: 409 where boards would refuse it.
    """
    row = rollouts.get(connection, rollout_id)
    if not release.downgrade:
        raise Problem(
            409,
            "no_downgrade",
            f"{release.version} was not signed with --downgrade, so boards on {row.version}"
            " refuse it: publish the old firmware as a new, higher version, or sign it with"
            " --downgrade",
        )
    new = rollouts.create(
        connection,
        {
            "name": f"back from {row.version} to {release.version}",
            "stages": [{"percent": 100}],
            "target": {"took": {"rollout": rollout_id, "build": row.build}},
            "policy": {
                **row.policy,
                "bake_s": 0,
                "gate": False,
                "promote": False,
                "include_new": False,
            },
        },
        release,
        now,
    )
    if row.state in rollouts.ACTIONS["abort"]:
        rollouts.stop(connection, row, "aborted", f"sent back by rollout {new}", now)
        rollouts.tell(connection, rollouts.get(connection, rollout_id), now)
    return new
