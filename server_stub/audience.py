"""Whom a release is for: boards that could run it, that a target means, that no pin holds back."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, func, select

from . import stages, truth
from .devices import labels_of_all
from .schema import attempts, devices, members


def boards(connection: Connection, row: Any) -> list[stages.Board]:
    """The boards a rollout could reach, with their labels."""
    return _suiting(connection, row, row.target)


def reach(
    connection: Connection, release: Any, target: Mapping[str, Any], channel: str | None
) -> int:
    """How many boards a release would move: meant, of its hardware, and on another build.

    Args:
        target: label selector, as of a rollout or a job.
        channel: only boards of it, or None for all.
    """
    other = (func.coalesce(devices.c.current_build, "") != release.build) & free(release)
    if channel is not None:
        other &= devices.c.channel == channel
    if not target.get("label"):  # without labels the database can count
        return connection.execute(
            select(func.count()).where(
                *_could_run(release), devices.c.hardware.in_(release.hardware), other
            )
        ).scalar_one()
    return len(_suiting(connection, release, target, other))


def free(release: Any) -> Any:
    """Not pinned to another version: a pin stands above rollouts and jobs."""
    return devices.c.pin.is_(None) | (devices.c.pin == release.version)


def _could_run(release: Any) -> tuple[Any, ...]:
    return devices.c.product == release.product, devices.c.enrolment == "accepted"


def _suiting(
    connection: Connection, release: Any, target: Mapping[str, Any], *where: Any
) -> list[stages.Board]:
    labels = labels_of_all(connection)
    if took := target.get("took"):
        where = (*where, _took(**took))
    found = connection.execute(
        select(devices.c.device_id, devices.c.hardware).where(*_could_run(release), *where)
    )
    return [
        (device_id, labels.get(device_id, {}))
        for device_id, hardware in found
        if hardware in release.hardware and stages.matches(target, labels.get(device_id, {}))
    ]


def _took(rollout: int, build: str) -> Any:
    """Boards of a rollout that run its build, or are about to."""
    mine = select(members.c.device_id).where(members.c.rollout_id == rollout)
    begun = select(attempts.c.device_id).where(
        attempts.c.build == build, attempts.c.state.in_(truth.OPEN)
    )
    runs = (devices.c.current_build == build) | devices.c.device_id.in_(begun)
    return devices.c.device_id.in_(mine) & runs


def preview(connection: Connection, row: Any) -> list[int]:
    """How many boards each stage holds, if it started now ("this will move N boards")."""
    boards = _suiting(connection, row, row.target, free(row))
    return [
        len(stages.members(boards, row.stages, stage, row.seed))
        for stage in range(len(row.stages))
    ]
