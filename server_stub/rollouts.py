"""Rollouts in the database: made, changed, started, paused, and who is in (rules: ``stages``).

Membership is frozen when a stage starts: changing a label never updates a board by surprise. A
newcomer joins a running rollout only where its policy says ``include_new``.
"""

import dataclasses
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import Connection, bindparam, func, select, update

from . import attempts as tries
from . import audience, events, stages, tally, truth
from .problems import Problem
from .schema import attempts, devices, members, releases, rollouts
from .store import bump, insert

ACTIONS = {
    "start": ("draft",),
    "pause": stages.ACTIVE,
    "resume": ("paused",),
    "abort": ("draft", *stages.ACTIVE, "paused"),
    "expand": stages.ACTIVE,
}


_GET = (
    select(
        rollouts,
        releases.c.product,
        releases.c.version,
        releases.c.channel,
        releases.c.build,
        releases.c.path,
        releases.c.hardware,
    )
    .join(releases, releases.c.id == rollouts.c.release_id)
    .where(rollouts.c.id == bindparam("rollout"))
)
# Without the key: who writes what only refers to a rollout need not wait.
_LOCK = _GET.with_for_update(of=rollouts, key_share=True)
# Always in the same order, so that two workers do not wait for each other. SQLite has one writer.
_HOLD = (
    select(rollouts.c.id)
    .where(
        rollouts.c.state.in_(stages.ACTIVE),
        rollouts.c.id.in_(
            select(members.c.rollout_id).where(
                members.c.device_id.in_(bindparam("boards", expanding=True))
            )
        ),
    )
    .order_by(rollouts.c.id)
    .with_for_update(key_share=True)
)
_MINE = select(members.c.rollout_id).where(members.c.device_id == bindparam("board"))
_IN_FLIGHT = (
    select(func.count())
    .select_from(attempts)
    .join(devices, devices.c.device_id == attempts.c.device_id)
    .where(
        attempts.c.rollout_id == bindparam("rollout"),
        attempts.c.state.in_(truth.OPEN),
        devices.c.enrolment == "accepted",
    )
)
_NEWEST = (
    select(attempts)
    .where(
        attempts.c.rollout_id == bindparam("rollout"), attempts.c.device_id == bindparam("board")
    )
    .order_by(attempts.c.id.desc())
    .limit(1)
)


def get(connection: Connection, rollout_id: int, lock: bool = False) -> Any:
    """One rollout with its release.

    Raises:
        Problem: 404.
    """
    row = connection.execute(_LOCK if lock else _GET, {"rollout": rollout_id}).first()
    if row is None:
        raise Problem(404, "no_rollout", f"no rollout {rollout_id}")
    return row


def hold(connection: Connection, device_ids: Iterable[str]) -> None:
    """Let no other worker book anything of the running rollouts of these boards, until the end."""
    if connection.dialect.name != "sqlite":
        connection.execute(_HOLD, {"boards": list(device_ids)})


def create(connection: Connection, wanted: Mapping[str, Any], release: Any, now: int) -> int:
    """Make a draft.

    Raises:
        ValueError: stages or policy that can't be.
    """
    stages.check_stages(wanted["stages"])
    policy = stages.Policy(**wanted["policy"])
    if release.blocked is not None:
        raise Problem(409, "blocked", f"release {release.version} is blocked: {release.blocked}")
    return connection.execute(
        rollouts.insert()
        .values(
            name=wanted["name"],
            release_id=release.id,
            state="draft",
            stage=0,
            gate_open=False,
            policy=dataclasses.asdict(policy),
            stages=[dict(stage) for stage in wanted["stages"]],
            target=dict(wanted["target"]),
            seed=wanted.get("seed") or secrets.token_urlsafe(9),
            starts_at=wanted.get("starts_at"),
            why="not started",
            created=now,
            updated=now,
        )
        .returning(rollouts.c.id)
    ).scalar_one()


def promotes(row: Any) -> str | None:
    """The channel that will point to the release when this rollout is complete, or None.

    A rollout to some of the boards moves no channel: that would bring it to all others at once.
    """
    to_all = stages.goes_to_all(row.target, row.stages)
    return row.channel if stages.policy_of(row).promote and to_all else None


def act(connection: Connection, rollout_id: int, action: str, why: str, now: int) -> Any:
    """Start, pause, resume, abort, or open the gate to the next stage.

    Raises:
        Problem: 404, or 409 where the state doesn't allow it.
    """
    row = get(connection, rollout_id, lock=True)
    if row.state not in ACTIONS[action]:
        raise Problem(409, "state", f"rollout {rollout_id} is {row.state}: can't {action}")
    if action == "start":
        release = connection.execute(select(releases).where(releases.c.id == row.release_id)).one()
        if release.blocked is not None:
            raise Problem(409, "blocked", f"release {release.version} is blocked")
        if not (release.pilot_ready or release.stable):
            raise Problem(409, "not_ready", f"release {release.version} is not pilot_ready")
        if not any(audience.preview(connection, row)):
            raise Problem(409, "nobody", f"rollout {row.name!r} is for no board that is known")
        enter(connection, row, 0, now)
    elif action == "expand":
        set_(connection, row, now, gate_open=True, why=why)
    elif action == "resume":
        _check_resume(connection, row, now)
        set_(
            connection,
            row,
            now,
            state=row.resume_state,
            resume_state=None,
            passed_at=None,  # a pause is no time of baking
            why=why,
        )
    else:
        state = {"pause": "paused", "abort": "aborted"}[action]
        stop(connection, row, state, why, now)
    row = get(connection, rollout_id)
    tell(connection, row, now)
    return row


def pause_blocked(connection: Connection, release: Any, now: int) -> dict[str, list[int]]:
    """Pause the rollouts of a release, if it is blocked; return what is to be noted of it."""
    active = connection.scalars(
        select(rollouts.c.id).where(
            rollouts.c.release_id == release.id, rollouts.c.state.in_(stages.ACTIVE)
        )
    ).all()
    if release.blocked is None or not active:
        return {}
    why = f"release {release.version} is blocked: {release.blocked}"
    for rollout_id in active:
        act(connection, rollout_id, "pause", why, now)
    return {"paused rollouts": list(active)}


def tell(connection: Connection, row: Any, now: int) -> None:
    """Tell the world outside where a rollout stands now."""
    about = {"rollout": row.id, "why": row.why}
    events.emit(connection, f"rollout.{row.state}", about, now)


def _check_resume(connection: Connection, row: Any, now: int) -> None:
    """Refuse what the next look at it would pause again."""
    release = connection.execute(select(releases).where(releases.c.id == row.release_id)).one()
    if release.blocked is not None:
        raise Problem(409, "blocked", f"release {release.version} is blocked: {release.blocked}")
    verdict = stages.judge(tally.progress(connection, row, now), stages.policy_of(row), now)
    if verdict.action == "pause":
        raise Problem(
            409,
            "policy",
            f"{verdict.why}: it would pause again at once. Change its policy first, or abort it",
        )


def change_policy(
    connection: Connection, rollout_id: int, wanted: Mapping[str, Any], now: int
) -> None:
    """Change how careful a rollout is; what is not in ``wanted`` stays.

    Raises:
        Problem: 404, or 409 where it has ended.
        ValueError: a policy that can't be.
    """
    row = _changeable(connection, rollout_id)
    policy = stages.Policy(**{**row.policy, **wanted})
    set_(connection, row, now, policy=dataclasses.asdict(policy))


def _changeable(connection: Connection, rollout_id: int) -> Any:
    row = get(connection, rollout_id, lock=True)
    if row.state not in ("draft", *stages.ACTIVE, "paused"):
        raise Problem(409, "state", f"rollout {rollout_id} is {row.state}: can't change it")
    return row


def retarget(connection: Connection, rollout_id: int, target: Mapping[str, Any], now: int) -> None:
    """Change whom a rollout is for: boards of its stages so far join; none that is in leaves.

    Raises:
        Problem: 404, or 409 where it has ended.
        ValueError: not a label selector.
    """
    for text in target.get("label", ()):
        if not all(text.partition("=")):
            raise ValueError(f"label {text!r}: expected key=value")
    row = _changeable(connection, rollout_id)
    kept = {name: row.target[name] for name in row.target if name == "took"}
    set_(connection, row, now, target={**kept, **target}, passed_at=None)
    if row.state != "draft":
        _join(connection, get(connection, rollout_id), row.stage)


def _join(connection: Connection, row: Any, stage: int) -> None:
    """Freeze who belongs to the stages up to ``stage``."""
    chosen = stages.members(audience.boards(connection, row), row.stages, stage, row.seed)
    known = set(
        connection.scalars(select(members.c.device_id).where(members.c.rollout_id == row.id))
    )
    add(connection, row.id, sorted(chosen - known), stage)


def enter(connection: Connection, row: Any, stage: int, now: int) -> None:
    _join(connection, row, stage)
    set_(
        connection,
        row,
        now,
        state="pilot" if stage == 0 else "expand",
        stage=stage,
        stage_started=now,
        passed_at=None,
        gate_open=False,
        why=f"stage {stage + 1} of {len(row.stages)} started",
    )


def add(connection: Connection, rollout_id: int, ids: list[str], stage: int) -> None:
    if ids:
        connection.execute(
            insert(connection, members).on_conflict_do_nothing(),
            [{"rollout_id": rollout_id, "device_id": i, "stage": stage} for i in ids],
        )


def leave(connection: Connection, rollout_id: int, device_id: str) -> None:
    """Take out a board that would refuse the release: no stage waits for it."""
    connection.execute(
        members.delete().where(
            members.c.rollout_id == rollout_id, members.c.device_id == device_id
        )
    )


def stop(connection: Connection, row: Any, state: str, why: str, now: int) -> None:
    """Withdraw what is offered and not begun; boards in flight finish."""
    tries.cancel(connection, attempts.c.rollout_id == row.id, now=now)
    resume = row.state if state == "paused" else None
    set_(connection, row, now, state=state, resume_state=resume, why=why)


def set_(connection: Connection, row: Any, now: int, **values: Any) -> None:
    connection.execute(
        update(rollouts).where(rollouts.c.id == row.id).values(updated=now, **values)
    )
    bump(connection)


def in_flight(connection: Connection, rollout_id: int) -> int:
    """Open attempts of a rollout; what may no longer update takes no place."""
    return connection.execute(_IN_FLIGHT, {"rollout": rollout_id}).scalar_one()


def of_board(connection: Connection, device_id: str) -> set[int]:
    """The rollouts a board is a member of, ended ones too."""
    return set(connection.scalars(_MINE, {"board": device_id}))


def after_bad_report(connection: Connection, rollout_id: int, now: int) -> str | None:
    """Pause at once when a report tips the balance; return why."""
    row = get(connection, rollout_id, lock=True)
    if row.state not in stages.ACTIVE:
        return None
    verdict = stages.judge(tally.progress(connection, row, now), stages.policy_of(row), now)
    if verdict.action != "pause":
        return None
    stop(connection, row, "paused", verdict.why, now)
    return verdict.why


def numbers(connection: Connection, limit: int, before: int | None) -> list[int]:
    """The newest rollouts, or those before one."""
    query = select(rollouts.c.id).order_by(rollouts.c.id.desc()).limit(limit)
    if before is not None:
        query = query.where(rollouts.c.id < before)
    return list(connection.scalars(query))


def newest_attempt(connection: Connection, rollout_id: int, device_id: str) -> Any:
    """A board's newest attempt of a rollout, or None."""
    return connection.execute(_NEWEST, {"rollout": rollout_id, "board": device_id}).first()
