"""Update jobs: one release onto a list of nodes, polled by the boards or by a gateway for them.

The API of the mesh gateways: a node is a board, its parts are pieces of the payload, and a gateway
reports how far each of its nodes is. A node that polls for itself is shown by its attempt.
"""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, Select, func, select, update

from . import attempts as attempt_store
from . import devices, policy, releases, stages, windows
from .problems import Problem
from .schema import attempts, job_nodes, jobs, labels
from .schema import devices as device_table
from .schema import releases as release_table
from .store import bump

PART_BYTES = 1024
_OPEN = ("pending", "in_progress")
_ENDED = ("completed", "failed", "cancelled")


def create(
    connection: Connection,
    release: Any,
    target: Mapping[str, Any],
    force: bool,
    part_bytes: int,
    now: int,
) -> int:
    """Make a job for ``{"nodes": [...]}``, ``{"node_type": ...}``, ``{"label": ...}`` or all.

    Raises:
        Problem: 422 for nodes that are not known or of another product, or none; 409 for a release
            that is blocked.
    """
    if release.blocked is not None:
        raise Problem(409, "blocked", f"release {release.version} is blocked: {release.blocked}")
    nodes = _nodes(connection, release, target)
    job_id = connection.execute(
        jobs.insert()
        .values(
            release_id=release.id,
            target=dict(target),
            force_update=force,
            cancelled=False,
            created=now,
        )
        .returning(jobs.c.id)
    ).scalar_one()
    parts = -(-release.size // part_bytes)
    connection.execute(
        job_nodes.insert(),
        [
            {
                "job_id": job_id,
                "device_id": node,
                "status": "pending",
                "current_part": 0,
                "total_parts": parts,
                "updated": now,
            }
            for node in nodes
        ],
    )
    bump(connection)
    return job_id


def _nodes(connection: Connection, release: Any, target: Mapping[str, Any]) -> list[str]:
    wanted = target.get("nodes")
    if wanted is not None:
        products = dict(
            connection.execute(
                select(device_table.c.device_id, device_table.c.product).where(
                    device_table.c.device_id.in_(wanted), device_table.c.enrolment == "accepted"
                )
            ).all()
        )
        for node in wanted:
            if node not in products:
                raise Problem(422, "no_device", f"not known or not accepted: {node!r}"[:200])
            if products[node] not in (None, release.product):
                why = f"{node} is a {products[node]}, the release is for {release.product}"
                raise Problem(422, "product", why[:200])
        nodes = sorted(products)
    else:
        selector: dict[str, Any] = {"label": list(target.get("label") or [])}
        if target.get("node_type"):
            selector["label"].append(f"node_type={target['node_type']}")
        tags = devices.labels_of_all(connection)
        nodes = [
            device_id
            for device_id in connection.scalars(
                select(device_table.c.device_id)
                .where(
                    device_table.c.enrolment == "accepted",
                    (device_table.c.product == release.product) | device_table.c.product.is_(None),
                )
                .order_by(device_table.c.device_id)
            )
            if stages.matches(selector, tags.get(device_id, {}))
        ]
    if not nodes:
        raise Problem(422, "no_device", "the target holds no device")
    return nodes


def status_of(counts: Mapping[str, int], cancelled: bool) -> str:
    """A job's status by those of its nodes."""
    if cancelled:
        return "cancelled"
    total = sum(counts.values())
    if counts.get("pending", 0) == total:
        return "pending"
    if sum(counts.get(name, 0) for name in _ENDED) < total:
        return "in_progress"
    return next(name for name in ("failed", "completed", "cancelled") if counts.get(name))


def listing(connection: Connection, status: str | None = None) -> list[dict[str, Any]]:
    """All jobs with their counts, newest first."""
    counts = _counts(connection, select(job_nodes))
    found = [
        _public(row, release, counts.get(row.id, {}))
        for row, release in _with_releases(connection)
    ]
    return [job for job in found if status is None or job["status"] == status]


def _with_releases(connection: Connection, *where: Any) -> list[tuple[Any, Any]]:
    """The jobs that fit ``where``, newest first, each with its release."""
    rows = connection.execute(select(jobs).where(*where).order_by(jobs.c.id.desc())).all()
    wanted = select(jobs.c.release_id).where(*where)
    found = connection.execute(select(release_table).where(release_table.c.id.in_(wanted)))
    known = {release.id: release for release in found}
    return [(row, known[row.release_id]) for row in rows]


def _counts(connection: Connection, nodes: Select) -> dict[int, dict[str, int]]:
    """How many of these nodes have each status, by job."""
    columns = job_nodes.c.job_id, job_nodes.c.status
    found: dict[int, dict[str, int]] = {}
    for job_id, name, number in connection.execute(
        nodes.with_only_columns(*columns, func.count()).group_by(*columns)
    ):
        found.setdefault(job_id, {})[name] = number
    return found


def _public(row: Any, release: Any, counts: Mapping[str, int]) -> dict[str, Any]:
    return {
        "id": row.id,
        "firmware_id": release.id,
        "product": release.product,
        "version": release.version,
        "size": release.size,
        "sha256": release.sha256,
        "md5": release.md5,
        "release": "/" + release.path,
        "payloads": ["/" + blob for blob in release.blobs],
        "target": row.target,
        "force_update": row.force_update,
        "status": status_of(counts, row.cancelled),
        "nodes_by_status": dict(counts),
        "created": row.created,
    }


def get(connection: Connection, job_id: int) -> dict[str, Any]:
    """One job with each node.

    Raises:
        Problem: 404.
    """
    row = connection.execute(select(jobs).where(jobs.c.id == job_id)).first()
    if row is None:
        raise Problem(404, "no_update", f"no update {job_id}")
    release = releases.get(connection, row.release_id)
    nodes = connection.execute(
        select(job_nodes, device_table.c.product, device_table.c.enrolment, device_table.c.pin)
        .join(device_table, device_table.c.device_id == job_nodes.c.device_id)
        .where(job_nodes.c.job_id == job_id)
        .order_by(job_nodes.c.device_id)
    ).all()
    counts: dict[str, int] = {}
    for node in nodes:
        counts[node.status] = counts.get(node.status, 0) + 1
    return {
        **_public(row, release, counts),
        "nodes": [
            {
                "node_id": node.device_id,
                "status": node.status,
                "current_part": node.current_part,
                "total_parts": node.total_parts,
                "error_message": node.error_message or _held_up(node, release),
                "updated": node.updated,
            }
            for node in nodes
        ],
    }


def _held_up(node: Any, release: Any) -> str | None:
    """Why a node that waits is offered nothing, where it could wait for ever."""
    if node.status not in _OPEN:
        return None
    if release.blocked is not None:
        return f"the release is blocked ({release.blocked})"
    if node.enrolment != "accepted":
        return "this board waits to be accepted"
    if node.product not in (None, release.product):
        return f"this board is a {node.product}"
    if node.pin not in (None, release.version):
        return f"this board is pinned to {node.pin}"
    return None


def pending(connection: Connection, gateway: str | None, now: int) -> list[dict[str, Any]]:
    """What a gateway has to do: open jobs with the nodes that wait; the counts are of its nodes.

    Nodes with a label ``gateway=ID`` are that gateway's; without a name, all are meant. It gets
    none that would be offered nothing if it asked by itself: not accepted, pinned to another
    version, or outside its windows where the job is not forced.
    """
    nodes = select(job_nodes)
    if gateway is not None:
        nodes = nodes.join(labels, labels.c.device_id == job_nodes.c.device_id).where(
            labels.c.key == "gateway", labels.c.value == gateway
        )
    waiting: dict[int, list[str]] = {}
    for job_id, node in connection.execute(_waiting(nodes)):
        waiting.setdefault(job_id, []).append(node)
    shut = _shut(connection, gateway, waiting, now)
    counts = _counts(connection, nodes.where(job_nodes.c.job_id.in_(list(waiting))))
    found = []
    for row, release in _with_releases(connection, jobs.c.id.in_(list(waiting))):
        free = [node for node in waiting[row.id] if row.force_update or node not in shut]
        if free:
            found.append({**_public(row, release, counts[row.id]), "nodes": free})
    return found[::-1]


def _waiting(nodes: Select) -> Select:
    """Of these nodes of jobs those that may go on, by job and id; windows apart."""
    return (
        nodes.with_only_columns(job_nodes.c.job_id, job_nodes.c.device_id)
        .join(jobs, jobs.c.id == job_nodes.c.job_id)
        .join(release_table, release_table.c.id == jobs.c.release_id)
        .join(device_table, device_table.c.device_id == job_nodes.c.device_id)
        .where(
            job_nodes.c.status.in_(_OPEN),
            release_table.c.blocked.is_(None),
            device_table.c.enrolment == "accepted",
            func.coalesce(device_table.c.product, release_table.c.product)
            == release_table.c.product,
            func.coalesce(device_table.c.pin, release_table.c.version) == release_table.c.version,
        )
        .order_by(job_nodes.c.job_id, job_nodes.c.device_id)
    )


def _shut(
    connection: Connection, gateway: str | None, waiting: Mapping[int, list[str]], now: int
) -> set[str]:
    """Those nodes whose maintenance windows are closed."""
    rules = policy.maintenance(connection)
    if not (rules and waiting):
        return set()
    nodes = set().union(*waiting.values())
    if gateway is None:
        tags = devices.labels_of_all(connection)
    else:
        tags = devices.labels_by_board(connection, nodes)
    return windows.shut(rules, {node: tags.get(node, {}) for node in nodes}, now)


def cancel(connection: Connection, job_id: int, now: int) -> dict[str, Any]:
    """Cancel what has not ended; nodes in the middle of it finish by themselves."""
    job = get(connection, job_id)
    if job["status"] in _ENDED:
        raise Problem(409, "state", f"update {job_id} is {job['status']}")
    connection.execute(update(jobs).where(jobs.c.id == job_id).values(cancelled=True))
    connection.execute(
        update(job_nodes)
        .where(job_nodes.c.job_id == job_id, job_nodes.c.status.in_(("pending", "in_progress")))
        .values(status="cancelled", updated=now)
    )
    attempt_store.cancel(connection, attempts.c.job_id == job_id, now=now)
    bump(connection)
    return get(connection, job_id)


def progress(
    connection: Connection,
    job_id: int,
    report: Mapping[str, Any],
    now: int,
    gateway: str | None = None,
) -> dict[str, Any]:
    """Take a gateway's word of one node. What has ended stays; parts never go back.

    Args:
        job_id, report, now: as the route has them.
        gateway: only its own nodes, those labelled ``gateway=ID``; None is anybody who may.

    Returns:
        The answer; ``was`` is the node's status before.

    Raises:
        Problem: 404, or 409 for a job that was cancelled.
    """
    node_id = report["node_id"]
    if gateway and devices.labels_of(connection, node_id).get("gateway") != gateway:
        raise Problem(404, "no_node", f"{node_id!r} is no node of {gateway}"[:200])
    node = connection.execute(
        select(job_nodes, jobs.c.cancelled, jobs.c.release_id)
        .join(jobs, jobs.c.id == job_nodes.c.job_id)
        .where(job_nodes.c.job_id == job_id, job_nodes.c.device_id == node_id)
    ).first()
    if node is None:
        raise Problem(404, "no_node", f"update {job_id} has no node {node_id!r}"[:200])
    if node.cancelled:
        raise Problem(409, "cancelled", f"update {job_id} is cancelled")
    if node.status in _ENDED:
        return {"ok": True, "status": node.status, "was": node.status}
    total = report.get("total_parts") or node.total_parts
    part = min(max(report["current_part"], node.current_part), total)
    connection.execute(
        update(job_nodes)
        .where(job_nodes.c.job_id == job_id, job_nodes.c.device_id == node_id)
        .values(
            current_part=part,
            total_parts=total,
            status=report["status"],
            error_message=report.get("error_message"),
            updated=now,
        )
    )
    _seen(connection, node, report["status"], now)
    return {"ok": True, "status": report["status"], "was": node.status}


def _seen(connection: Connection, node: Any, status: str, now: int) -> None:
    """Write down what a gateway's word says of the board: nobody else speaks for it."""
    said: dict[str, Any] = {"last_seen": now}
    if status in _ENDED:
        release = releases.get(connection, node.release_id)
        said |= {
            "status": {"completed": "confirmed"}.get(status, status),
            "status_version": release.version,
        }
        if status == "completed":
            said |= {"current_version": release.version, "current_build": release.build}
    devices.change(connection, node, said)
