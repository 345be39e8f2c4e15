"""Publish a release: sign its manifest and write the tree any web server can hand out.

    {product}/blobs/ab/{sha256}.bin    payload, written first; .gz where it is packed
    {product}/r/{version}.jws          signed manifest, second
    {product}/{channel}.json           pointer, last: only then does any board look

Each file appears whole or not at all, and the pointer moves only after the release on disk has
passed the device's own code with the public key. A release never changes: publishing the same
thing again just moves the pointer, which is how a rollout is widened or another channel fed.

What lies in the tree already is anybody's word (`tree`). A release that goes on from another takes
its security version, and its order, only from one that the signing key itself has signed, or a key
of a keyring whose root the publisher knows: what the maker's key signs can't be unsigned.
"""

import contextlib
import datetime as dt
import hashlib
import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from joserfc.jwk import RSAKey

from twinslot import base64url, jws, keyset, release, semver
from twinslot.errors import (
    ChecksumError,
    ConfigError,
    OtaError,
    ReleaseError,
    SecurityVersionError,
    VersionError,
)

from . import images, keyrings, payloads, tree
from .files import CHUNK, Progress, quiet, whole_file, write_whole
from .signing import Signer, document, signer_of

TYPE = release.TYPE
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
    ignored: str = ""  # what the channel named before, where nobody vouches for it


def publish(
    image: Path,
    spec: Spec,
    key: RSAKey | Signer,
    site: Path,
    progress: Progress = quiet,
    roots: dict[str, bytes] | None = None,
) -> Published:
    """Check, sign, write and verify a release, then point its channel at it.

    Args:
        image: an ESP application image.
        spec: what to say of it.
        key: private signing key, or whoever signs.
        site: root of the tree; made where there is none.
        roots: of which one must have signed the product's keyring, whose keys then count as the
            signing key does.

    Raises:
        OtaError: refused; nothing that a board looks at has changed.
        OSError: a file can't be read or written.
    """
    _check(spec)
    signer = signer_of(key)
    ring = _keyring(site, spec.product, signer, roots)
    counted = signer.trusted
    if ring and roots:
        counted = counted | keyset.load({"keys": ring.keys}, demo=True)
    firmware = images.load(image)
    product = site / spec.product
    channel = _Channel.read(product, spec.channel, counted)
    path = product / "r" / f"{spec.version}.jws"
    trusted = signer.trusted
    existing = _existing(path, trusted)
    if existing is None:
        _check_inherited(spec, channel)
    manifest = _manifest(spec, firmware, channel)
    if existing is not None:
        manifest = _same_release(path, existing, manifest, spec)
    _check_order(spec, manifest, channel)
    packed: list[payloads.Payload] = []
    if existing is None:
        bases = [_base(text, product, firmware) for text in spec.bases]
        packed = payloads.build(tree.image(firmware.path), bases, progress)
        manifest["images"][0]["payloads"] = [p.entry() for p in packed if p.kept]
    token = _sign(manifest, signer) if existing is None else tree.token(path)
    verify(token, trusted)  # before anything is written
    for payload in packed or [payloads.Payload(tree.image(firmware.path), "identity")]:
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
        offer["keyring"] = ring.version
    write_whole(channel.path, json.dumps(offer).encode() + b"\n")
    return Published(
        release=path.relative_to(site).as_posix(),
        pointer=channel.path.relative_to(site).as_posix(),
        manifest=manifest,
        offer=offer,
        kid=signer.kid,
        new=existing is None,
        packed=tuple(packed),
        ignored=channel.ignored,
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
    image = verify(tree.token(path), trusted).firmware
    for payload in image.payloads:
        blob = tree.payload(product, payload.url)
        digest, size = _hash(blob, progress)
        # Whoever puts a payload in also proves it; here its content address is enough.
        wanted = image.sha256 if payload.encoding == "identity" else blob.name.split(".")[0]
        if (digest, size) != (wanted, payload.size):
            expected = f"{payload.size} bytes {wanted}"
            raise ChecksumError(f"{blob}", f"{size} bytes {digest}", expected)


# ---- what the release says


def _check(spec: Spec) -> None:
    """Refuse names and numbers that no device or no file system takes."""
    tree.check_name("product", spec.product)
    tree.check_name("channel", spec.channel)
    for name in spec.hardware:
        tree.check_name("hardware", name)
    if spec.product in _RESERVED_PRODUCTS:
        raise ConfigError("product", spec.product, "another name: the server's API lives there")
    if not spec.hardware:
        raise ConfigError("hardware", "none", "at least one board name")
    semver.parse(spec.version)
    if spec.rollout is not None and not 0 <= spec.rollout <= 100:
        raise ConfigError("rollout", spec.rollout, "0 to 100 percent")
    if spec.poll is not None and not 1 <= spec.poll <= tree.POLL_MAX_S:
        raise ConfigError("poll", f"{spec.poll} s", f"1 to {tree.POLL_MAX_S} s")


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
    """Find the image that ``--from`` means: a file, or a version published here.

    Who signed that version doesn't matter, a revoked key least of all: a delta is proven, and made
    of nothing but the new image and what the tree itself holds under the name of its digest.
    """
    path, name, digest = Path(text), Path(text).name, None
    if not path.is_file():
        path, name = _published_image(text, product), text
        digest = path.stem
    base = images.load(path)
    if digest not in (None, base.sha256):
        raise ChecksumError(f"--from {text}: {path}", base.sha256, digest)
    if base.build == firmware.build:
        raise ConfigError(f"--from {text}: is the very image to publish")
    if base.chip_id != firmware.chip_id:
        raise ConfigError(f"--from {text}: chip", base.chip, firmware.chip)
    return payloads.Base(name, base.build, tree.image(path))


def _published_image(version: str, product: Path) -> Path:
    """The plain image of an earlier release."""
    manifest = None
    if tree.RELEASE_NAME.fullmatch(f"r/{version}.jws"):
        manifest = _peek(product / "r" / f"{version}.jws")
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
        if payload["encoding"] == "identity" and "patch" not in payload:
            with contextlib.suppress(ReleaseError):
                path = tree.payload(product, payload["url"])
                if path.is_file():
                    return path
    return None


def plain_images(site: Path, product: str, chip_id: int) -> dict[str, str]:
    """Versions, by build, of the releases for a chip whose plain image is in the site.

    Nobody's signature is judged, see :func:`_base`.

    Raises:
        ReleaseError: a file among them is no release.
    """
    found = {}
    for path in sorted((site / product / "r").glob("*.jws")):
        manifest = _peek(path)
        if manifest and _plain_image(manifest, site / product):
            image = manifest["images"][0]
            if image["chip_id"] == chip_id:
                found[image["build"]] = path.stem
    return found


def parts(site: Path, product: str, version: str) -> list[tuple[str, Path]]:
    """The files of a release, for an upload: ``("release", path)``, then ``("file", path)`` each.

    Raises:
        ReleaseError: there is no such release, or it names files that are not of this tree.
    """
    tree.check_name("product", product)
    name = f"r/{version}.jws"
    folder = site / product
    manifest = _peek(folder / name) if tree.RELEASE_NAME.fullmatch(name) else None
    if manifest is None:
        raise ReleaseError(f"version {version} of {product} is not in {site}")
    found = [("release", folder / name)]
    for image in manifest["images"]:
        found += [("file", tree.payload(folder, p["url"])) for p in image["payloads"]]
    return found


def _keyring(
    site: Path, product: str, signer: Signer, roots: dict[str, bytes] | None
) -> keyrings.Ring | None:
    """The product's keyring, None for none. Refuse a key that it does not list."""
    ring = keyrings.read(site, product, roots)
    if ring is not None and signer.kid not in ring.kids:
        raise ConfigError(
            f"key {signer.kid} is not in keyring {ring.version} of {product}: boards would refuse"
            " what it signs; use one that is, or add it with  twinslot keyring"
        )
    return ring


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
    current: dict[str, Any] | None  # manifest of the release it names, if that is vouched for
    ignored: str = ""  # else: which one, and why not

    @classmethod
    def read(cls, product: Path, name: str, trusted: dict[str, bytes]) -> "_Channel":
        """Read a channel's pointer, and the release it names if one of these keys signed it."""
        path = product / f"{name}.json"
        try:
            offer = tree.pointer(path)
        except FileNotFoundError:
            return cls(path, {}, None)
        target = offer["release"]
        said = _peek(product / target)
        if said is None:
            raise ReleaseError(f"{path} names {target}, which is missing")
        try:
            verify(tree.token(product / target), trusted)
            if (said["product"], f"r/{said['version']}.jws") != (product.name, target):
                raise ReleaseError(f"it is {said['version']} of {said['product']}")
        except OtaError as exc:
            seen = f"security version {said.get('security_version', 0)}, on nobody's word: {exc}"
            return cls(path, offer, None, f"{path} names {target} ({seen})")
        return cls(path, offer, said)

    @property
    def floor(self) -> int:
        """The security version that boards of this channel may have confirmed."""
        return self.current.get("security_version", 0) if self.current else 0


def _check_inherited(spec: Spec, channel: _Channel) -> None:
    """Refuse to go on from a release that nobody vouches for, unless told the security version."""
    if channel.ignored and spec.security_version is None:
        raise SecurityVersionError(
            f"{channel.ignored}: say --security-version yourself, or by --roots who has signed the"
            " keyring with that key"
        )


def _existing(path: Path, trusted: dict[str, bytes]) -> dict[str, Any] | None:
    """The manifest of a version that is published already, signed by one of these keys."""
    try:
        verify(tree.token(path), trusted)
    except FileNotFoundError:
        return None
    except OtaError as exc:
        raise type(exc)(f"{path} is there already: {exc}") from exc
    return _peek(path)


def _peek(path: Path) -> dict[str, Any] | None:
    """What a release says, whoever signed it, or None where there is none."""
    try:
        payload = base64url.b64url_decode(tree.token(path).split(b".")[1])
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
    content = tree.image(path)
    digest = hashlib.sha256()
    for at in range(0, len(content), CHUNK):
        digest.update(content[at : at + CHUNK])
        progress("verifying", min(at + CHUNK, len(content)), len(content))
    return digest.hexdigest(), len(content)


def _write_blob(content: bytes, path: Path, progress: Progress) -> None:
    """Write a payload to its content address, unless the same bytes lie there already."""
    with contextlib.suppress(FileNotFoundError, OtaError):
        if tree.image(path) == content:
            return
    with whole_file(path) as target:
        for at in range(0, len(content), CHUNK):
            target.write(content[at : at + CHUNK])
            progress("writing", min(at + CHUNK, len(content)), len(content))
