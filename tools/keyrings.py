"""Make the keyring of a product: who may sign its releases from now on.

    {product}/keyring.jws          signed by a root; higher version each time
    {product}/{channel}.json       pointers, each told the new version

The file is written first, then the pointers: a board that is told of it finds it. What the
product's boards would refuse afterwards is reported, not repaired: a release whose key was
revoked has to be published anew, under a new version.

What lies in the site is gone on from only if it is what the root's own record says it signed last
(`keyring_record`): a signature tells who signed a keyring, not that none came after it.
"""

import datetime as dt
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twinslot import base64url, jws, keyring, keyset, release
from twinslot.errors import ConfigError, KeyringError, OtaError

from . import tree
from .files import write_whole
from .keyring_record import Record
from .signing import Signer, document

FILE = "keyring.jws"
DEFAULT_LIFE = dt.timedelta(days=365)
FLOOR_MAX = (1 << 30) - 1  # a security version's, lib/twinslot/release.py
_DATE = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(frozen=True)
class Ring:
    """A keyring; whether a root has signed it is for :func:`read` to say."""

    version: int
    expires: str | None
    keys: list[dict[str, Any]]
    signed_by: str
    security_floor: int | None = None  # that boards are to set theirs to when they take it
    token: bytes = b""

    @property
    def kids(self) -> list[str]:
        return list(keyset.load({"keys": self.keys}, demo=True))


@dataclass(frozen=True)
class Updated:
    """What was written, and which channels now name a release that boards refuse."""

    path: Path
    ring: Ring
    added: list[str]
    revoked: list[str]
    refused: dict[str, str] = field(default_factory=dict)  # channel: release
    believed: Ring | None = None  # what was found in the site, where no record spoke for it


def read(site: Path, product: str, roots: dict[str, bytes] | None = None) -> Ring | None:
    """The product's keyring in a site; None where there is none.

    Args:
        site: root of the published tree.
        product: whose keyring.
        roots: of which one must have signed it; None: not judged.

    Raises:
        KeyringError: the file is no keyring, or none of theirs.
    """
    tree.check_name("product", product)
    path = site / product / FILE
    try:
        token = tree.token(path)
    except FileNotFoundError:
        return None
    except OtaError as exc:
        raise KeyringError(f"{path}: not a keyring: {exc}") from exc
    return _ring(str(path), token, product, roots)


def _ring(where: str, token: bytes, product: str, roots: dict[str, bytes] | None) -> Ring:
    try:
        header, payload, _ = token.split(b".")
        obj = json.loads(base64url.b64url_decode(payload))
        kid = json.loads(base64url.b64url_decode(header))["kid"]
        members = (obj["version"], obj.get("expires"), obj["keys"], kid)
        ring = Ring(*members, obj.get("security_floor"), token)
        keyset.load(obj, demo=True)
    except (ValueError, TypeError, KeyError, RecursionError, OtaError) as exc:
        raise KeyringError(f"{where}: not a keyring: {exc}") from exc
    if roots is not None:
        try:
            keyring.parse(token, roots, product, demo=True)
        except OtaError as exc:
            raise KeyringError(
                f"{where} is not signed by this root ({exc}); name the root that signed it"
            ) from exc
    return ring


def update(
    site: Path,
    product: str,
    signer: Signer,
    *,
    add: list[dict[str, Any]] | None = None,
    revoke: list[str] | None = None,
    expires: dt.datetime | dt.timedelta | None = DEFAULT_LIFE,
    roots: dict[str, bytes] | None = None,
    record: Path | None = None,
    recorded: bool = False,
    version: int | None = None,
    security_floor: int | None = None,
) -> Updated:
    """Sign the next keyring of a product and tell its channels.

    Args:
        site: root of the published tree; made where there is none.
        product: whose keyring.
        signer: a root.
        add: public keys, as JWK.
        revoke: names of keys that sign no longer.
        expires: a date, or how long from now; None: never.
        roots: further roots that may have signed the keyring before.
        record: file of what the root has signed (`keyring_record`); None: nobody remembers.
        recorded: go on from the keyring of the record, whatever lies in the site.
        version: of the new one; by default the next.
        security_floor: what boards that take it set their security floor to, once.

    Raises:
        KeyringError: the keyring before does not hold or is not the last one that was signed, or
            the next one would be refused.
        ConfigError: a key is added that is there, or revoked that is not; a version or a floor
            that boards would refuse.
    """
    tree.check_name("product", product)
    folder = site / product
    known = signer.trusted | (roots or {})
    kept = Record.load(record, product)
    last = _ring(str(record), kept.token, product, known) if kept.token else None
    here = None if recorded else read(site, product, known)
    before = _before(folder / FILE, here, last, recorded, version)
    listed, names = (before.keys, before.kids) if before else ([], [])
    new = [(next(iter(keyset.load({"keys": [jwk]}, demo=True))), jwk) for jwk in add or []]
    for kid, _ in new:
        if kid in names:
            raise ConfigError(f"key {kid} is in keyring {before.version if before else 0} already")
    for kid in revoke or []:
        if kid not in names:
            raise ConfigError("key to be revoked", kid, "one of " + (", ".join(names) or "none"))
    if security_floor is not None and not 0 <= security_floor <= FLOOR_MAX:
        raise ConfigError("security floor", security_floor, f"0 to {FLOOR_MAX}")
    left = [jwk for kid, jwk in zip(names, listed, strict=True) if kid not in (revoke or [])]
    kept.revoked |= set(revoke or [])
    members = _members(
        product,
        _next_version(before, _unless_broken(site, product, known) if recorded else here, version),
        _date(expires),
        left + [jwk for _, jwk in new],
        security_floor,
    )
    token = sign(members, signer, product, kept, known)
    ring = _ring("the new keyring", token, product, known)
    write_whole(folder / FILE, token)
    refused = _tell_channels(folder, ring)
    added = [kid for kid, _ in new]
    believed = before if last is None else None
    return Updated(folder / FILE, ring, added, list(revoke or []), refused, believed)


def sign(
    members: bytes | dict[str, Any],
    signer: Signer,
    product: str,
    kept: Record,
    roots: dict[str, bytes],
) -> bytes:
    """Sign a keyring that is newer than the last one, and record it.

    Args:
        members: the keyring, or its JSON.
        signer: a root.
        product: of the keyring.
        kept: what the root has signed; gets the new one.
        roots: that may have signed the one before.

    Raises:
        KeyringError: boards would refuse it, it is not newer, or a key in it has been revoked.
    """
    payload = members if isinstance(members, bytes) else json.dumps(members).encode()
    version, kids = _claims(payload)
    last = _ring(str(kept.path), kept.token, product, roots) if kept.token else None
    if last is not None and version <= last.version:
        raise KeyringError(
            "keyring version", version, f"higher than {last.version}, signed last: {kept.path}"
        )
    for kid in kids:
        if kid in kept.revoked:
            raise KeyringError(
                f"key {kid} has been revoked, by {kept.path}: revoke it again, and never add it"
            )
    token = document(members, signer, keyring.TYPE)
    keyring.parse(token, roots, product, demo=True)  # as a board will
    kept.keep(token, {kid for kid in (last.kids if last else []) if kid not in kids})
    return token


def _claims(payload: bytes) -> tuple[int, list[str]]:
    """Version and key ids of a keyring that is about to be signed."""
    try:
        obj = json.loads(payload)
        version = obj["version"]
        if type(version) is not int:
            raise ValueError("version is no whole number")
    except (ValueError, TypeError, KeyError, RecursionError) as exc:
        raise KeyringError(f"not a keyring: {exc!r}") from exc
    return version, list(keyset.load(obj, demo=True))


def _before(
    path: Path, here: Ring | None, last: Ring | None, recorded: bool, version: int | None
) -> Ring | None:
    """The keyring to go on from: the one in the site, if it is the one that was signed last."""
    if recorded and last is None:
        raise ConfigError("this root has no record of a keyring of this product")
    if last is None or (here is not None and here.token == last.token):
        return here
    if recorded:
        return last
    if here is not None and here.version > last.version:
        if version is not None:
            return here
        raise KeyringError(
            f"{path} is keyring {here.version}, and this root has signed {last.version} last: if a"
            f" spare or a copy of it went on, say so with --version {here.version + 1}"
        )
    seen = "there is none" if here is None else f"it is keyring {here.version}"
    if here is not None and here.version == last.version:
        seen = f"it is another keyring {here.version}"
    raise KeyringError(
        f"{path}: {seen}, but this root has signed keyring {last.version} last: that one never got"
        " here, or somebody has exchanged it; --recorded goes on from the one that was signed"
    )


def _unless_broken(site: Path, product: str, roots: dict[str, bytes]) -> Ring | None:
    try:
        return read(site, product, roots)
    except KeyringError:
        return None


def _next_version(before: Ring | None, here: Ring | None, version: int | None) -> int:
    highest = max((ring.version for ring in (before, here) if ring), default=0)
    if version is not None and version <= highest:
        raise ConfigError("version of the keyring", version, f"higher than {highest}")
    return highest + 1 if version is None else version


def _date(expires: dt.datetime | dt.timedelta | None) -> str | None:
    if isinstance(expires, dt.timedelta):
        expires = dt.datetime.now(dt.UTC) + expires
    if expires is None:
        return None
    if expires <= dt.datetime.now(dt.UTC):
        raise ConfigError("expires", expires.isoformat(), "a date to come")
    return expires.astimezone(dt.UTC).strftime(_DATE)


def _members(
    product: str, version: int, expires: str | None, keys: list[dict[str, Any]], floor: int | None
) -> dict[str, Any]:
    members: dict[str, Any] = {"schema": 1, "product": product, "version": version}
    if expires is not None:
        members["expires"] = expires
    if floor is not None:
        members["security_floor"] = floor
    members["keys"] = keys
    return members


def _tell_channels(folder: Path, ring: Ring) -> dict[str, str]:
    """Put the version into every pointer; return the channels whose release is refused now."""
    trusted = keyset.load({"keys": ring.keys}, demo=True)
    refused = {}
    for path in sorted(folder.glob("*.json")):
        try:
            offer = tree.pointer(path)
        except (OtaError, OSError):
            continue  # not a pointer, or none that a board or the server would go by
        write_whole(path, json.dumps({**offer, "keyring": ring.version}).encode() + b"\n")
        target = offer["release"]
        try:
            release.parse(jws.verify(tree.token(folder / target), trusted, release.TYPE))
        except (OtaError, OSError):
            refused[path.stem] = target
    return refused
