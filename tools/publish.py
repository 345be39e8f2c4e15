"""Publish a release: sign its manifest and write the tree any web server can hand out.

    {product}/blobs/ab/{sha256}.bin    payload, written first; .gz where it is packed
    {product}/r/{version}.jws          signed manifest, second
    {product}/{channel}.json           pointer, last: only then does any board look

Each file appears whole or not at all, and the pointer moves only after the release on disk has
passed the device's own code with the public key. A release never changes: publishing the same
thing again just moves the pointer, which is how a rollout is widened or another channel fed.
"""

import datetime as dt
import hashlib
import json
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from joserfc.jwk import RSAKey

from twinslot import jws, release, semver
from twinslot.errors import (
    ChecksumError,
    ConfigError,
    OtaError,
    ReleaseError,
    SecurityVersionError,
    VersionError,
)

from . import images, keyrings, payloads
from .files import CHUNK, Progress, quiet, whole_file, write_whole
from .signing import Signer, document, signer_of

TYPE = release.TYPE
POLL_MAX_S = 7 * 86400  # the device's own bound
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_RESERVED_PRODUCTS = ("api",)  # the server's own paths start with it
_DATE = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(frozen=True)
class Spec:
    """What a user says of a release. None: as before in this channel, else the default."""

    product: str
    version: str
    hardware: tuple[str, ...]
    channel: str = "stable"
    security_version: int | None = None
    downgrade: bool = False
    expires: dt.datetime | dt.timedelta | None = None
    notes: str | None = None
    rollout: float | None = None  # percent
    poll: int | None = None  # seconds
    bases: tuple[str, ...] = ()  # to build deltas from: image files, or versions published here


@dataclass(frozen=True)
class Published:
    """What was written, paths relative to the site."""

    release: str
    pointer: str
    manifest: dict[str, Any]
    offer: dict[str, Any]  # the pointer's content
    kid: str
    new: bool  # False: this very release was there already
    packed: tuple[payloads.Payload, ...] = ()  # what was built for a new one, kept or not


def publish(
    image: Path, spec: Spec, key: RSAKey | Signer, site: Path, progress: Progress = quiet
) -> Published:
    """Check, sign, write and verify a release, then point its channel at it.

    Args:
        image: an ESP application image.
        spec: what to say of it.
        key: private signing key, or whoever signs.
        site: root of the tree; made where there is none.

    Raises:
        OtaError: refused; nothing that a board looks at has changed.
        OSError: a file can't be read or written.
    """
    _check(spec)
    signer = signer_of(key)
    ring = _keyring(site, spec.product, signer)
    firmware = images.load(image)
    product = site / spec.product
    channel = _Channel.read(product, spec.channel)
    path = product / "r" / f"{spec.version}.jws"
    manifest = _manifest(spec, firmware, channel)
    existing = _read_release(path)
    if existing is not None:
        manifest = _same_release(path, existing, manifest, spec)
    _check_order(spec, manifest, channel)
    packed: list[payloads.Payload] = []
    if existing is None:
        bases = [_base(text, product, firmware) for text in spec.bases]
        packed = payloads.build(firmware.path.read_bytes(), bases, progress)
        manifest["images"][0]["payloads"] = [p.entry() for p in packed if p.kept]
    token = _sign(manifest, signer) if existing is None else path.read_bytes()
    trusted = signer.trusted
    verify(token, trusted)  # before anything is written
    for payload in packed or [payloads.Payload(firmware.path.read_bytes(), "identity")]:
        if payload.kept:
            _write_blob(payload.content, product / payload.url, progress)
    if existing is None:
        write_whole(path, token, replace=False)
    try:
        verify_tree(product, path, trusted, progress)
    except OtaError:
        if existing is None:
            path.unlink()
        raise
    offer = _offer(spec, channel)
    if ring:
        offer["keyring"] = ring
    write_whole(channel.path, json.dumps(offer).encode() + b"\n")
    return Published(
        release=path.relative_to(site).as_posix(),
        pointer=channel.path.relative_to(site).as_posix(),
        manifest=manifest,
        offer=offer,
        kid=signer.kid,
        new=existing is None,
        packed=tuple(packed),
    )


def verify(token: bytes, trusted: dict[str, bytes]) -> release.Release:
    """Judge a release with the very code that a device judges it with.

    Raises:
        OtaError: a device would refuse it.
    """
    return release.parse(jws.verify(token, trusted, TYPE))


def verify_tree(
    product: Path, path: Path, trusted: dict[str, bytes], progress: Progress = quiet
) -> None:
    """Verify a release as it lies on disk, payloads included.

    Raises:
        OtaError: signature, manifest, size or hash don't hold.
    """
    image = verify(path.read_bytes(), trusted).firmware
    for payload in image.payloads:
        blob = product / payload.url
        digest, size = _hash(blob, progress)
        # Whoever puts a payload in also proves it; here its content address is enough.
        wanted = image.sha256 if payload.encoding == "identity" else blob.name.split(".")[0]
        if (digest, size) != (wanted, payload.size):
            expected = f"{payload.size} bytes {wanted}"
            raise ChecksumError(f"{blob}", f"{size} bytes {digest}", expected)


# ---- what the release says


def _check(spec: Spec) -> None:
    """Refuse names and numbers that no device or no file system takes."""
    for what, name in (
        ("product", spec.product),
        ("channel", spec.channel),
        *(("hardware", name) for name in spec.hardware),
    ):
        if not _NAME.fullmatch(name):
            raise ConfigError(what, repr(name[:80]), "1 to 64 of A-Z a-z 0-9 . _ -, no dot first")
    if spec.product in _RESERVED_PRODUCTS:
        raise ConfigError("product", spec.product, "another name: the server's API lives there")
    if not spec.hardware:
        raise ConfigError("hardware", "none", "at least one board name")
    semver.parse(spec.version)
    if spec.rollout is not None and not 0 <= spec.rollout <= 100:
        raise ConfigError("rollout", spec.rollout, "0 to 100 percent")
    if spec.poll is not None and not 1 <= spec.poll <= POLL_MAX_S:
        raise ConfigError("poll", f"{spec.poll} s", f"1 to {POLL_MAX_S} s")


def _manifest(spec: Spec, firmware: images.Firmware, channel: "_Channel") -> dict[str, Any]:
    now = dt.datetime.now(dt.UTC).replace(microsecond=0)
    expires = now + spec.expires if isinstance(spec.expires, dt.timedelta) else spec.expires
    if expires is not None and expires <= now:
        raise ConfigError("expires", expires.strftime(_DATE), "a date in the future")
    manifest: dict[str, Any] = {
        "schema": release.SCHEMA,
        "product": spec.product,
        "version": spec.version,
        "hardware": list(spec.hardware),
        "security_version": channel.floor
        if spec.security_version is None
        else spec.security_version,
        "downgrade": spec.downgrade,
        "issued": now.strftime(_DATE),
        "notes": spec.notes or "",
        "images": [
            {
                "slot": "firmware",
                "chip_id": firmware.chip_id,
                "size": firmware.size,
                "sha256": firmware.sha256,
                "build": firmware.build,
                "payloads": [],
            }
        ],
    }
    if expires is not None:
        manifest["expires"] = expires.astimezone(dt.UTC).strftime(_DATE)
    return manifest


def _base(text: str, product: Path, firmware: images.Firmware) -> payloads.Base:
    """Find the image that ``--from`` means: a file, or a version published here."""
    path, name = Path(text), Path(text).name
    if not path.is_file():
        path, name = _published_image(text, product), text
    base = images.load(path)
    if base.build == firmware.build:
        raise ConfigError(f"--from {text}: is the very image to publish")
    if base.chip_id != firmware.chip_id:
        raise ConfigError(f"--from {text}: chip", base.chip, firmware.chip)
    return payloads.Base(name, base.build, path.read_bytes())


def _published_image(version: str, product: Path) -> Path:
    """The plain image of an earlier release."""
    manifest = None
    if "/" not in version:
        manifest = _read_release(product / "r" / f"{version}.jws")
    if manifest is None:
        seen = "neither an image file nor a version in this site"
        raise ConfigError(f"--from {version}", seen, "one of the two")
    path = _plain_image(manifest, product)
    if path is None:
        raise ConfigError(f"--from {version}: its plain image is no longer in {product}")
    return path


def _plain_image(manifest: dict[str, Any], product: Path) -> Path | None:
    """Where the plain image of a release lies, or None."""
    for payload in manifest["images"][0]["payloads"]:
        path = product / payload["url"]
        if payload["encoding"] == "identity" and "patch" not in payload and path.is_file():
            return path
    return None


def plain_images(site: Path, product: str, chip_id: int) -> dict[str, str]:
    """Versions, by build, of the releases for a chip whose plain image is in the site.

    Raises:
        ReleaseError: a file among them is no release.
    """
    found = {}
    for path in sorted((site / product / "r").glob("*.jws")):
        manifest = _read_release(path)
        if manifest and _plain_image(manifest, site / product):
            image = manifest["images"][0]
            if image["chip_id"] == chip_id:
                found[image["build"]] = manifest["version"]
    return found


def _keyring(site: Path, product: str, signer: Signer) -> int:
    """Version of the product's keyring, 0 for none. Refuse a key that it does not list."""
    ring = keyrings.read(site, product)
    if ring is None:
        return 0
    if signer.kid not in ring.kids:
        raise ConfigError(
            f"key {signer.kid} is not in keyring {ring.version} of {product}: boards would refuse"
            " what it signs; use one that is, or add it with  twinslot keyring"
        )
    return ring.version


def _sign(manifest: dict[str, Any], signer: Signer) -> bytes:
    payload = json.dumps(manifest, separators=(",", ":")).encode()
    release.parse(payload)  # its refusals are clearer than those of a token that grew too long
    return document(payload, signer, TYPE)


# ---- what is published already


@dataclass(frozen=True)
class _Channel:
    """A channel as it stands, if it does."""

    path: Path
    offer: dict[str, Any]
    current: dict[str, Any] | None  # manifest of the release it names

    @classmethod
    def read(cls, product: Path, name: str) -> "_Channel":
        path = product / f"{name}.json"
        try:
            offer = json.loads(path.read_bytes())
            current = _read_release(product / offer["release"])
        except FileNotFoundError:
            return cls(path, {}, None)
        except (ValueError, TypeError, KeyError) as exc:
            raise ReleaseError(f"{path}: not a channel pointer: {exc!r}") from exc
        if current is None:
            raise ReleaseError(f"{path} names {offer['release']}, which is missing")
        return cls(path, offer, current)

    @property
    def floor(self) -> int:
        """The security version that boards of this channel may have confirmed."""
        return self.current["security_version"] if self.current else 0


def _read_release(path: Path) -> dict[str, Any] | None:
    """The manifest of a published release (whoever signed it), or None where there is none."""
    try:
        payload = jws.b64url_decode(path.read_bytes().split(b".")[1])
        release.parse(payload)
    except FileNotFoundError:
        return None
    except (OtaError, ValueError, IndexError) as exc:
        raise ReleaseError(f"{path}: {exc}") from exc
    return json.loads(payload)


def _same_release(
    path: Path, existing: dict[str, Any], wanted: dict[str, Any], spec: Spec
) -> dict[str, Any]:
    """Return ``existing`` if it is what is wanted; a published version never changes."""
    unsaid = {"issued"}
    if spec.notes is None:
        unsaid.add("notes")
    if spec.security_version is None:
        unsaid.add("security_version")
    if spec.expires is None or _lifetime(existing) == _lifetime(wanted):
        unsaid.add("expires")
    for name in wanted.keys() | existing.keys():
        if name not in unsaid and _content(existing, name) != _content(wanted, name):
            raise VersionError(
                f"{path.stem} of {spec.product} is published already with other {name}: a"
                " published version never changes, so give this one a new version"
            )
    return existing


def _content(manifest: dict[str, Any], name: str) -> Any:
    """A member of a manifest; of images all but their payloads, which may differ."""
    if name != "images":
        return manifest.get(name)
    return [{**image, "payloads": None} for image in manifest[name]]


def _lifetime(manifest: dict[str, Any]) -> int | None:
    if "expires" not in manifest:
        return None
    return release.parse_time(manifest["expires"]) - release.parse_time(manifest["issued"])


def _check_order(spec: Spec, manifest: dict[str, Any], channel: _Channel) -> None:
    """Refuse what boards of this channel would refuse."""
    if channel.current is None:
        return
    before = channel.current["version"]
    order = semver.compare(spec.version, before)
    again = spec.version == before
    if order <= 0 and not again and not spec.downgrade:
        expected = f"newer than {before}, or --downgrade"
        raise VersionError(f"version for channel {spec.channel}", spec.version, expected)
    if manifest["security_version"] < channel.floor:
        raise SecurityVersionError(
            "security version",
            manifest["security_version"],
            f"{channel.floor} or higher: boards of this channel refuse a lower one",
        )


def _offer(spec: Spec, channel: _Channel) -> dict[str, Any]:
    """The pointer's content. A release keeps its seed: a wider rollout only adds boards."""
    target = f"r/{spec.version}.jws"
    offer: dict[str, Any] = {"release": target}
    poll = channel.offer.get("poll") if spec.poll is None else spec.poll
    if poll is not None:
        offer["poll"] = poll
    if spec.rollout is not None:
        before = channel.offer.get("rollout")
        same = channel.offer.get("release") == target and before is not None
        seed = before["seed"] if same and before else secrets.token_urlsafe(9)
        percent = int(spec.rollout) if spec.rollout == int(spec.rollout) else spec.rollout
        offer["rollout"] = {"percent": percent, "seed": seed}
    return offer


# ---- bytes


def _hash(path: Path, progress: Progress) -> tuple[str, int]:
    digest = hashlib.sha256()
    total, done = path.stat().st_size, 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            done += len(chunk)
            progress("verifying", done, total)
    return digest.hexdigest(), done


def _write_blob(content: bytes, path: Path, progress: Progress) -> None:
    """Write a payload to its content address, unless the same bytes lie there already."""
    if path.exists() and path.read_bytes() == content:
        return
    with whole_file(path) as target:
        for at in range(0, len(content), CHUNK):
            target.write(content[at : at + CHUNK])
            progress("writing", min(at + CHUNK, len(content)), len(content))
