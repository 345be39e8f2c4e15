"""Update jobs: one release onto a list of nodes, polled by the boards or by a gateway for them.

The API of the mesh gateways: a node is a board, its parts are pieces of the payload, and a gateway
reports how far each of its nodes is. A node that polls for itself is shown by its attempt.
"""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, func, select, update

from . import attempts as attempt_store
from . import devices, releases, stages
from .problems import Problem
from .schema import attempts, job_nodes, jobs
from .schema import devices as device_table
from .store import bump

PART_BYTES = 1024
STATUSES = ("pending", "in_progress", "completed", "failed", "cancelled")
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
        Problem: 422 for nodes that are not known, or none.
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
        known = set(
            connection.scalars(
                select(device_table.c.device_id).where(
                    device_table.c.device_id.in_(wanted), device_table.c.enrolment == "accepted"
                )
            )
        )
        missing = [node for node in wanted if node not in known]
        if missing:
            raise Problem(422, "no_device", f"not known or not accepted: {missing[0]!r}"[:200])
        nodes = sorted(known)
    else:
        selector: dict[str, Any] = {"label": list(target.get("label") or [])}
        if target.get("node_type"):
            selector["label"].append(f"node_type={target['node_type']}")
        labels = devices.labels_of_all(connection)
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
            if stages.matches(selector, labels.get(device_id, {}))
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
    return "failed" if counts.get("failed") else "completed"


def listing(connection: Connection, status: str | None = None) -> list[dict[str, Any]]:
    """All jobs with their counts, newest first."""
    counts: dict[int, dict[str, int]] = {}
    for job_id, name, number in connection.execute(
        select(job_nodes.c.job_id, job_nodes.c.status, func.count()).group_by(
            job_nodes.c.job_id, job_nodes.c.status
        )
    ):
        counts.setdefault(job_id, {})[name] = number
    found = [
        _public(connection, row, counts.get(row.id, {}))
        for row in connection.execute(select(jobs).order_by(jobs.c.id.desc()))
    ]
    return [job for job in found if status is None or job["status"] == status]


def _public(connection: Connection, row: Any, counts: Mapping[str, int]) -> dict[str, Any]:
    release = releases.get(connection, row.release_id)
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
    nodes = connection.execute(
        select(job_nodes).where(job_nodes.c.job_id == job_id).order_by(job_nodes.c.device_id)
    ).all()
    counts: dict[str, int] = {}
    for node in nodes:
        counts[node.status] = counts.get(node.status, 0) + 1
    return {
        **_public(connection, row, counts),
        "nodes": [
            {
                "node_id": node.device_id,
                "status": node.status,
                "current_part": node.current_part,
                "total_parts": node.total_parts,
                "error_message": node.error_message,
                "updated": node.updated,
            }
            for node in nodes
        ],
    }


def pending(connection: Connection, gateway: str | None) -> list[dict[str, Any]]:
    """What a gateway has to do: open jobs with the nodes that wait.

    Nodes with a label ``gateway=ID`` are that gateway's; without a name, all are meant.
    """
    labels = devices.labels_of_all(connection) if gateway else {}
    found = []
    for job in reversed(listing(connection)):
        if job["status"] not in ("pending", "in_progress"):
            continue
        if releases.get(connection, job["firmware_id"]).blocked is not None:
            continue
        nodes = [
            node["node_id"]
            for node in get(connection, job["id"])["nodes"]
            if node["status"] in ("pending", "in_progress")
            and (gateway is None or labels.get(node["node_id"], {}).get("gateway") == gateway)
        ]
        if nodes:
            found.append({**job, "nodes": nodes})
    return found


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
