"""Releases: those found in the published tree, and those uploaded, which are put into it.

What ``uploads`` has judged is stored so that nothing is offered that is not whole: files are named
by their content; the signed release is written after them, and the row in the database last.
"""

import contextlib
import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from sqlalchemy import Connection, select, update

from twinslot import release as rules
from twinslot import semver
from twinslot.errors import OtaError

from . import audit
from .files import write_new
from .problems import Problem
from .schema import devices, jobs, releases, rollouts
from .site import ChannelError, Site
from .store import bump, insert

log = logging.getLogger("twinslot.server")

FLAGS = ("pilot_ready", "stable")
GC_AGE_S = 3600
_CHUNK = 1 << 16


def get(connection: Connection, release_id: int) -> Any:
    """Raises Problem 404."""
    row = connection.execute(select(releases).where(releases.c.id == release_id)).first()
    if row is None:
        raise Problem(404, "no_firmware", f"no firmware {release_id}")
    return row


def by_version(connection: Connection, product: str, version: str) -> Any:
    """Raises Problem 404."""
    row = connection.execute(
        select(releases).where(releases.c.product == product, releases.c.version == version)
    ).first()
    if row is None:
        raise Problem(404, "no_firmware", f"no firmware {product} {version}"[:200])
    return row


def listing(connection: Connection, product: str | None = None) -> list[dict[str, Any]]:
    """All releases, newest first."""
    query = select(releases).order_by(releases.c.id.desc())
    if product:
        query = query.where(releases.c.product == product)
    return [public(row) for row in connection.execute(query)]


def public(row: Any) -> dict[str, Any]:
    shown = dict(row._mapping)
    shown["release"] = "/" + shown.pop("path")
    shown["payloads"] = ["/" + path for path in shown.pop("blobs")]
    return shown


# ---- what lies in the tree


def scan(connection: Connection, site: Site) -> int:
    """Register what lies in the tree; return how many were new.

    Only what a channel names was published for boards. Anything else may be the rest of an upload
    that was cut, or that failed: nobody has said yet that boards may have it.
    """
    named = _named(site)
    known = {row.path: row for row in connection.execute(select(releases))}
    new = 0
    for path in sorted(site.root.glob("*/r/*.jws")):
        name = path.relative_to(site.root).as_posix()
        channels = named.get(name, [])
        if name in known:
            note_channels(connection, known[name], channels)
        elif site.find(name) is not None:
            try:
                register(connection, site, name, channels)
                new += 1
            except ChannelError as exc:
                log.warning("release skipped", extra={"fields": {"path": name, "why": str(exc)}})
    return new


def _named(site: Site) -> dict[str, list[str]]:
    """The channels that name a release, by its path below the site."""
    found: dict[str, list[str]] = {}
    for pointer in sorted(site.root.glob("*/*.json")):
        try:
            target = json.loads(pointer.read_bytes())["release"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        found.setdefault(f"{pointer.parent.name}/{target}", []).append(pointer.stem)
    return found


def register(connection: Connection, site: Site, name: str, channels: Sequence[str]) -> None:
    """Make a row of a release in the tree; whoever let a channel name it has held it for stable.

    Raises:
        ChannelError: it doesn't verify.
    """
    release, channel = site.release(name), (*channels, "stable")[0]
    if _insert(connection, site, name, release, channel, channels, None) is not None:
        target = f"{release.product} {release.version}"
        after = {"path": name, "channels": list(channels)}
        audit.note(connection, audit.DISK, "firmware.register", target, None, after)


def note_channels(connection: Connection, row: Any, channels: Iterable[str]) -> None:
    """Note who names a release: there it may stand in for a blocked one from then on."""
    if new := set(channels) - set(row.channels):
        after = {"channels": sorted(new | set(row.channels))}
        change(connection, row.id, after)
        target = f"{row.product} {row.version}"
        before = {"channels": row.channels}
        audit.note(connection, audit.DISK, "firmware.channels", target, before, after)


def _insert(
    connection: Connection,
    site: Site,
    name: str,
    release: rules.Release,
    channel: str,
    channels: Sequence[str],
    notes: str | None,
) -> Any:
    product = name.partition("/")[0]
    image = release.firmware
    blobs = [f"{product}/{payload.url}" for payload in image.payloads]
    plain = next((p for p in image.payloads if p.encoding == "identity"), None)
    row = connection.execute(
        insert(connection, releases)
        .values(
            product=product,
            version=release.version,
            hardware=list(release.hardware),
            channel=channel,
            channels=list(channels),
            chip_id=image.chip_id,
            build=image.build,
            size=image.size,
            sha256=image.sha256,
            md5=_md5(site.root / product / plain.url) if plain else None,
            security_version=release.security_version,
            downgrade=release.downgrade,
            expires=release.expires,
            notes=release.notes if notes is None else notes,
            path=name,
            blobs=blobs,
            pilot_ready=bool(channels),
            stable=bool(channels),
            created=int(time.time()),
        )
        .on_conflict_do_nothing()
        .returning(releases.c.id)
    ).scalar_one_or_none()
    bump(connection)
    return row


def _md5(path: Path) -> str | None:
    """For display next to systems that show one; nothing here trusts it."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(
                file, lambda: hashlib.md5(usedforsecurity=False)
            ).hexdigest()
    except OSError:
        return None


# ---- uploads


def plain_images(connection: Connection, site: Site, release: rules.Release) -> dict[str, Path]:
    """Where the plain images lie that a release's patches are for, by build."""
    builds = {payload.base for payload in release.firmware.payloads if payload.patch is not None}
    rows = connection.execute(
        select(releases).where(
            releases.c.product == release.product, releases.c.build.in_(sorted(builds))
        )
    )
    found = {}
    for row in rows:
        for blob in row.blobs:
            if blob.endswith(f"/{row.sha256}.bin") and (site.root / blob).is_file():
                found[row.build] = site.root / blob
    return found


def hash_of(file: BinaryIO) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


def store_files(
    site: Site, release: rules.Release, token: bytes, files: Mapping[str, BinaryIO]
) -> str:
    """Put an upload into the tree: payloads first, the release last. Returns its path.

    Raises:
        Problem: 409 where this version exists, or existed, with other content.
    """
    product = site.root / release.product
    path = product / "r" / f"{release.version}.jws"
    for known in (path, _removed(path)):
        if known.exists():
            _check_same(known, release, token)
    for url, file in files.items():
        _store(product / url, file)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        with contextlib.suppress(FileExistsError):
            write_new(path, token, 0o644)
    _check_same(path, release, token)  # another upload may have been quicker
    return path.relative_to(site.root).as_posix()


def _removed(path: Path) -> Path:
    """Where a release is kept that was removed: boards and mirrors may remember what it said."""
    return path.with_name(f".{path.name}.removed")


def _check_same(path: Path, release: rules.Release, token: bytes) -> None:
    if path.read_bytes() != token:
        raise Problem(
            409,
            "exists",
            f"{release.product} {release.version} exists, or did: a version never changes",
        )


def _store(path: Path, file: BinaryIO) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        with path.open("rb") as there:
            if hash_of(there) == hash_of(file):
                os.utime(path)  # it is in use again: not for ``collect`` to take
                return
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        file.seek(0)
        with temporary.open("xb") as target:
            while chunk := file.read(_CHUNK):
                target.write(chunk)
            target.flush()
            os.fsync(target.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def add(
    connection: Connection,
    site: Site,
    name: str,
    release: rules.Release,
    channel: str,
    notes: str | None,
) -> tuple[Any, bool]:
    """Make the row of an upload; the same upload again changes nothing.

    Unless it is what was left of one that failed, found in the tree: that one's channel and notes
    are not known.
    """
    new = _insert(connection, site, name, release, channel, (), notes)
    row = by_version(connection, release.product, release.version)
    if new is None and not (row.pilot_ready or row.stable):
        said = {"channel": channel, "notes": row.notes if notes is None else notes}
        row = change(connection, row.id, said)
    return row, new is not None


# ---- flags, promotion, removal


def change(connection: Connection, release_id: int, values: Mapping[str, Any]) -> Any:
    """Set flags, notes, or ``blocked`` (a reason, None unblocks). Blocking stops rollouts too."""
    get(connection, release_id)
    connection.execute(update(releases).where(releases.c.id == release_id).values(**values))
    bump(connection)
    return get(connection, release_id)


def is_newer(connection: Connection, site: Site, row: Any, channel: str) -> bool:
    """True where a channel names an older release, this one, a blocked one, or none to offer."""
    try:
        version = site.channel(row.product, channel).release.version
    except ChannelError:
        return True
    there = select(releases.c.blocked).where(
        releases.c.product == row.product, releases.c.version == version
    )
    is_blocked = connection.execute(there).scalar() is not None
    return is_blocked or semver.compare(row.version, version) >= 0


def promote(connection: Connection, site: Site, row: Any, channel: str) -> dict[str, Any]:
    """Make a channel name a release; returns its pointer as it was."""
    before = _point(site, row, channel)
    channels = sorted({*row.channels, channel})
    change(connection, row.id, {"channel": channel, "channels": channels})
    return before


def _point(site: Site, row: Any, channel: str) -> dict[str, Any]:
    """Write a channel's pointer.

    It goes on telling how often to poll and which keyring is current: ``static`` boards and
    mirrors hear of a revocation by nothing else. The share of a staged release is not kept: what
    is promoted is for every board of the channel.
    """
    path = site.root / row.product / f"{channel}.json"
    before: dict[str, Any] = {}
    try:
        before = json.loads(path.read_bytes())
    except (OSError, ValueError):
        pass
    after: dict[str, Any] = {"release": row.path.partition("/")[2]}
    if type(before.get("poll")) is int:
        after["poll"] = before["poll"]
    if ring := site.keyring(row.product):
        after["keyring"] = ring
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with temporary.open("xb") as file:
        file.write(json.dumps(after).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return before


def remove(connection: Connection, site: Site, release_id: int) -> Any:
    """Remove a release that nothing refers to; its files go with it.

    Raises:
        Problem: 409, naming what still needs it.
    """
    row = get(connection, release_id)
    needed = []
    for pointer in sorted((site.root / row.product).glob("*.json")):
        if row.path.partition("/")[2] in pointer.read_text("utf-8", "replace"):
            needed.append(f"channel {pointer.stem}")
    for table, word in ((rollouts, "rollout"), (jobs, "job")):
        needed += [
            f"{word} {number}"
            for number in connection.scalars(
                select(table.c.id).where(table.c.release_id == release_id)
            )
        ]
    pinned = connection.scalars(
        select(devices.c.device_id)
        .where(devices.c.product == row.product, devices.c.pin == row.version)
        .limit(1)
    ).first()
    if pinned:
        needed.append(f"the pin of {pinned}")
    if needed:
        raise Problem(409, "in_use", f"{row.version} is needed by {', '.join(needed[:5])}")
    connection.execute(releases.delete().where(releases.c.id == release_id))
    path = site.root / row.path
    with contextlib.suppress(FileNotFoundError):
        os.replace(path, _removed(path))
    bump(connection)
    return row


def collect(site: Site, now: float, age_s: float = GC_AGE_S) -> dict[str, int]:
    """Remove payloads that no release in the tree names, and leftovers of broken uploads.

    Only what is older than ``age_s``: an upload writes its payloads first.
    """
    needed: set[Path] = set()
    for path in site.root.glob("*/r/*.jws"):
        try:
            release = site.peek(path)
        except OtaError:
            return {"removed": 0, "bytes": 0}  # rather too much kept than one payload too few
        needed |= {path.parent.parent / p.url for p in release.firmware.payloads}
    removed = size = 0
    for path in site.root.glob("*/blobs/*/*"):
        stat = path.stat()
        if path not in needed and stat.st_mtime < now - age_s:
            path.unlink(missing_ok=True)
            removed, size = removed + 1, size + stat.st_size
    return {"removed": removed, "bytes": size}
