"""Make the keyring of a product: who may sign its releases from now on.

    {product}/keyring.jws          signed by a root; higher version each time
    {product}/{channel}.json       pointers, each told the new version

The file is written first, then the pointers: a board that is told of it finds it. What the
product's boards would refuse afterwards is reported, not repaired: a release whose key was
revoked has to be published anew, under a new version.
"""

import datetime as dt
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twinslot import jws, keyring, keyset, release
from twinslot.errors import ConfigError, KeyringError, OtaError

from .files import write_whole
from .signing import Signer, document

FILE = "keyring.jws"
DEFAULT_LIFE = dt.timedelta(days=365)
_DATE = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(frozen=True)
class Ring:
    """A keyring as it lies in a site, whoever signed it."""

    version: int
    expires: str | None
    keys: list[dict[str, Any]]
    signed_by: str

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


def read(site: Path, product: str) -> Ring | None:
    """The product's keyring, its signature not judged; None where there is none.

    Raises:
        KeyringError: the file is no keyring.
    """
    path = site / product / FILE
    try:
        token = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        header, payload, _ = token.split(b".")
        obj = json.loads(jws.b64url_decode(payload))
        kid = json.loads(jws.b64url_decode(header))["kid"]
        ring = Ring(obj["version"], obj.get("expires"), obj["keys"], kid)
        keyset.load(obj, demo=True)
    except (ValueError, TypeError, KeyError, OtaError) as exc:
        raise KeyringError(f"{path}: not a keyring: {exc}") from exc
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

    Raises:
        KeyringError: the keyring before does not hold, or the next one would be refused.
        ConfigError: a key is added that is there, or revoked that is not.
    """
    folder = site / product
    known = signer.trusted | (roots or {})
    before = _verified(folder / FILE, known, product)
    listed = before.keys if before else []
    names = before.kids if before else []
    new = [(next(iter(keyset.load({"keys": [jwk]}, demo=True))), jwk) for jwk in add or []]
    for kid, _ in new:
        if kid in names:
            raise ConfigError(f"key {kid} is in keyring {before.version if before else 0} already")
    for kid in revoke or []:
        if kid not in names:
            raise ConfigError("key to be revoked", kid, "one of " + (", ".join(names) or "none"))
    kept = [jwk for kid, jwk in zip(names, listed, strict=True) if kid not in (revoke or [])]
    ring = Ring(
        version=before.version + 1 if before else 1,
        expires=_date(expires),
        keys=kept + [jwk for _, jwk in new],
        signed_by=signer.kid,
    )
    token = document(_members(ring, product), signer, keyring.TYPE)
    keyring.parse(token, known, product, demo=True)  # as a board will
    write_whole(folder / FILE, token)
    refused = _tell_channels(folder, ring)
    return Updated(folder / FILE, ring, [kid for kid, _ in new], list(revoke or []), refused)


def _verified(path: Path, roots: dict[str, bytes], product: str) -> Ring | None:
    ring = read(path.parent.parent, product)
    if ring is not None:
        try:
            keyring.parse(path.read_bytes(), roots, product, demo=True)
        except OtaError as exc:
            raise KeyringError(
                f"{path} is not signed by this root ({exc}); name the root that signed it"
            ) from exc
    return ring


def _date(expires: dt.datetime | dt.timedelta | None) -> str | None:
    if isinstance(expires, dt.timedelta):
        expires = dt.datetime.now(dt.UTC) + expires
    if expires is None:
        return None
    if expires <= dt.datetime.now(dt.UTC):
        raise ConfigError("expires", expires.isoformat(), "a date to come")
    return expires.astimezone(dt.UTC).strftime(_DATE)


def _members(ring: Ring, product: str) -> dict[str, Any]:
    members: dict[str, Any] = {"schema": 1, "product": product, "version": ring.version}
    if ring.expires is not None:
        members["expires"] = ring.expires
    members["keys"] = ring.keys
    return members


def _tell_channels(folder: Path, ring: Ring) -> dict[str, str]:
    """Put the version into every pointer; return the channels whose release is refused now."""
    trusted = keyset.load({"keys": ring.keys}, demo=True)
    refused = {}
    for path in sorted(folder.glob("*.json")):
        try:
            offer = json.loads(path.read_bytes())
            target = offer["release"]
        except (ValueError, TypeError, KeyError):
            continue  # not a pointer
        write_whole(path, json.dumps({**offer, "keyring": ring.version}).encode() + b"\n")
        try:
            release.parse(jws.verify((folder / target).read_bytes(), trusted, release.TYPE))
        except (OtaError, OSError):
            refused[path.stem] = target
    return refused
