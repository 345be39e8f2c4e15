"""Read the published tree: which files may be served, and what a channel offers now.

A name outside the four patterns below is not served, whatever lies in the folder:

    {product}/{channel}.json         pointer, mutable
    {product}/keyring.jws            keyring, mutable
    {product}/r/{version}.jws        release, immutable
    {product}/blobs/ab/{sha256}.bin  payload, immutable

Nothing is written here; releases are published by the tool that holds the key.
"""

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from twinslot import base64url, jws, keyring
from twinslot.errors import OtaError, ReleaseError
from twinslot.release import TYPE, Release, parse

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_POINTER = re.compile(rf"{_NAME}/{_NAME}\.json")
_KEYRING = re.compile(rf"{_NAME}/keyring\.jws")
_RELEASE = re.compile(rf"{_NAME}/r/[A-Za-z0-9][A-Za-z0-9.+-]{{0,63}}\.jws")
_BLOB = re.compile(rf"{_NAME}/blobs/([0-9a-f]{{2}})/(\1[0-9a-f]{{62}})\.(?:bin|gz)")
_RELEASE_NAME = re.compile(r"r/[A-Za-z0-9][A-Za-z0-9.+-]{0,63}\.jws")
_PAYLOAD_NAME = re.compile(r"blobs/([0-9a-f]{2})/\1[0-9a-f]{62}\.(?:bin|gz)")

T = TypeVar("T")

SMALL_FILE_BYTES = 65536
"""A pointer or a release is read whole; the device's own limit is 12 KiB."""


class ChannelError(Exception):
    """A channel that offers nothing; ``code`` is one stable word, the message is for the log."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class File:
    """One file that may be served."""

    path: Path
    media_type: str
    immutable: bool
    etag: str  # strong, quoted
    content: bytes | None  # None: large, stream it from ``path``


@dataclass(frozen=True)
class Channel:
    """What a pointer says, with the release it names."""

    release_path: str  # below the site, as in sensor-node/r/1.4.0.jws
    release: Release
    poll: int | None  # seconds
    rollout: dict | None  # {"percent", "seed"}


class Site:
    """A published folder. What was read is remembered as long as no file it came from changed,
    and no longer than its product's keyring holds.

    Args:
        root: the folder ``twinslot publish`` wrote.
        keys: ``{kid: modulus}`` of :func:`twinslot.keyset.load`; None offers releases without
            verifying them, which is safe for the boards (they verify) and blind for the operator.
        roots: keys that sign keyrings; where a product has one, it takes the place of ``keys``.
    """

    def __init__(self, root: Path, keys: dict | None = None, roots: dict | None = None):
        self.root = root.resolve(strict=True)
        self._keys = keys
        self._roots = roots
        self._releases: dict[str, tuple[tuple, Release]] = {}
        self._kept: dict[tuple, tuple[dict[Path, Any], Any]] = {}
        self._ends: dict[str, float] = {}  # when a product's keyring expires

    @staticmethod
    def is_payload(url: str) -> bool:
        """True for the URL of a payload within the tree, relative to its product."""
        return _PAYLOAD_NAME.fullmatch(url) is not None

    @staticmethod
    def is_pointer(name: str) -> bool:
        """True for the URL path of a channel's pointer."""
        return _POINTER.fullmatch(name) is not None

    def peek(self, path: Path) -> Release:
        """What a release in the tree says, verified or not. Raises OtaError."""
        token = read_bounded(path) or b""
        try:
            return parse(base64url.b64url_decode(token.split(b".")[1]))
        except (IndexError, ValueError) as exc:
            raise ReleaseError("release file", str(exc), "a compact JWS") from exc

    def find(self, name: str) -> File | None:
        """Return the file that URL path ``name`` (no leading slash) means, or None."""
        if blob := _BLOB.fullmatch(name):
            path = self._inside(name)
            return path and File(path, "application/octet-stream", True, f'"{blob[2]}"', None)
        if _KEYRING.fullmatch(name):
            return self._small(name, "application/jose", immutable=False)
        if _RELEASE.fullmatch(name):
            return self._small(name, "application/jose", immutable=True)
        if _POINTER.fullmatch(name):
            return self._small(name, "application/json", immutable=False)
        return None

    def _inside(self, name: str) -> Path | None:
        """Resolve ``name``, which has passed a pattern; a symbolic link must not lead out."""
        try:
            path = (self.root / name).resolve(strict=True)
        except OSError:
            return None
        return path if path.is_relative_to(self.root) and path.is_file() else None

    def _small(self, name: str, media_type: str, immutable: bool) -> File | None:
        path = self._inside(name)
        if path is None:
            return None
        content = read_bounded(path)
        if content is None:
            return None
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        return File(path, media_type, immutable, etag, content)

    def stamp(self, product: str, channel: str) -> tuple:
        """Something that changes whenever the channel's pointer or the keyring does."""
        folder = f"{self.root}/{product}"  # not a Path: this is asked for every poll
        return (
            _stamp_of(f"{folder}/{channel}.json"),
            _stamp_of(f"{folder}/keyring.jws"),
            self._holds(product),
        )

    def release(self, name: str) -> Release:
        """Read, verify and check the release at ``name``, a path below the site.

        Raises:
            ChannelError: it must not be offered.
        """
        product = name.partition("/")[0]

        def read() -> tuple[Release, list[Path]]:
            release = self._release(name, self.trusted(product))
            self._check_payloads(product, release)
            return release, self._files(name, release)

        return self._remembered(("release", product, name), read)

    def channel(self, product: str, channel: str) -> Channel:
        """Read a channel's pointer and the release it names.

        Raises:
            ChannelError: there is no such channel, or it must not be offered: the pointer is
                malformed, the keyring is or has expired, the release does not verify, or a
                payload is missing or of another size than the release says.
        """

        def read() -> tuple[Channel, list[Path]]:
            found = self._channel(product, channel)
            pointer = self.root / product / f"{channel}.json"
            return found, [pointer, *self._files(found.release_path, found.release)]

        return self._remembered(("channel", product, channel), read)

    def _channel(self, product: str, channel: str) -> Channel:
        name = f"{product}/{channel}.json"
        file = self.find(name)
        if file is None or file.content is None:
            raise ChannelError("no_channel", f"{name} is not published")
        pointer = _pointer(name, file.content)
        release = self._release(f"{product}/{pointer['release']}", self.trusted(product))
        if release.product != product:
            raise ChannelError("bad_release", f"{name} names a release of {release.product}")
        self._check_payloads(product, release)
        return Channel(
            f"{product}/{pointer['release']}",
            release,
            pointer.get("poll"),
            pointer.get("rollout"),
        )

    def keyring(self, product: str) -> int:
        """Return the version of a product's keyring, 0 where there is none.

        Told to every board that asks, whatever the channel offers; the boards verify it.
        """
        path = self.root / product / "keyring.jws"
        return self._remembered(
            ("keyring", product), lambda: (self._keyring_version(product), [path])
        )

    def _remembered(self, key: tuple, read: Callable[[], tuple[T, list[Path]]]) -> T:
        """What ``read`` found, with the files it depends on; afresh when one of them changes.

        ``key`` is what it is, the product, and which one.
        """
        kept = self._kept.get(key)
        if (
            kept
            and self._holds(key[1])
            and all(_stamp_of(path) == stamp for path, stamp in kept[0].items())
        ):
            return kept[1]
        found, paths = read()
        stamps = {path: _stamp_of(path) for path in paths}
        if read()[0] == found:  # the stamps are of what was read
            self._kept[key] = (stamps, found)
        return found

    def _holds(self, product: str) -> bool:
        """False from the moment that the keyring expires."""
        return time.time() < self._ends.get(product, math.inf)

    def _files(self, name: str, release: Release) -> list[Path]:
        """What an offer of a release depends on."""
        folder = self.root / name.partition("/")[0]
        payloads = (p.url for p in release.firmware.payloads if _PAYLOAD_NAME.fullmatch(p.url))
        return [self.root / name, folder / "keyring.jws", *(folder / url for url in payloads)]

    def _keyring_version(self, product: str) -> int:
        file = self.find(f"{product}/keyring.jws")
        try:
            content = file.content if file else None
            version = json.loads(base64url.b64url_decode((content or b"").split(b".")[1]))[
                "version"
            ]
        except (ValueError, IndexError, KeyError, TypeError, RecursionError):
            return 0
        return version if type(version) is int and 0 < version < 1 << 30 else 0

    def trusted(self, product: str) -> dict | None:
        """The keys that may sign releases of a product; None: not verified here.

        Raises:
            ChannelError: its keyring does not verify, or has expired: boards with a clock then
                refuse whatever its keys have signed.
        """
        file = self.find(f"{product}/keyring.jws") if self._roots else None
        if file is None or file.content is None or self._roots is None:
            self._ends.pop(product, None)
            return self._keys
        try:
            version, expires, keys, _ = keyring.parse(file.content, self._roots, product)
        except OtaError as exc:
            raise ChannelError("bad_keyring", f"{product}/keyring.jws: {exc}") from exc
        self._ends[product] = math.inf if expires is None else expires
        if not self._holds(product):
            raise ChannelError(
                "bad_keyring",
                f"{product}/keyring.jws: keyring {version} has expired: publish its successor"
                " with  twinslot keyring",
            )
        return keys

    def _release(self, name: str, trusted: dict | None) -> Release:
        path = self._inside(name)
        if path is None:
            raise ChannelError("bad_release", f"{name} is missing")
        stat = path.stat()
        stamp = (stat.st_mtime_ns, stat.st_size, trusted and frozenset(trusted))
        known = self._releases.get(name)
        if known and known[0] == stamp:
            return known[1]
        token = read_bounded(path)
        try:
            if token is None:
                raise ReleaseError("release file", f"{stat.st_size} bytes", "a JWS")
            release = parse(_payload(token, trusted))
        except OtaError as exc:
            raise ChannelError("bad_release", f"{name}: {exc}") from exc
        self._releases[name] = (stamp, release)
        return release

    def _check_payloads(self, product: str, release: Release) -> None:
        for payload in release.firmware.payloads:
            if not _PAYLOAD_NAME.fullmatch(payload.url):
                continue  # elsewhere: not ours to check
            path = self._inside(f"{product}/{payload.url}")
            if path is None or path.stat().st_size != payload.size:
                seen = "missing" if path is None else f"{path.stat().st_size} bytes"
                raise ChannelError(
                    "bad_release",
                    f"{release.version}: {payload.url} is {seen}, expected {payload.size} bytes",
                )


def _payload(token: bytes, trusted: dict | None) -> bytes:
    if trusted is not None:
        return jws.verify(token, trusted, TYPE)
    try:
        return base64url.b64url_decode(token.split(b".")[1])
    except (IndexError, ValueError) as exc:
        raise ReleaseError("release file", str(exc), "a compact JWS") from exc


def _stamp_of(path: str | Path) -> tuple[int, ...] | None:
    try:
        stat = os.stat(path)
    except OSError:
        return None
    # The time of the inode's change tells of a rename, too, as when a link takes a file's place.
    return stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino


def read_bounded(path: Path) -> bytes | None:
    """Read a small file whole; None when it is larger than such a file can be."""
    with path.open("rb") as file:
        content = file.read(SMALL_FILE_BYTES + 1)
    return content if len(content) <= SMALL_FILE_BYTES else None


def names_release(pointer: File) -> str | None:
    """The release that a pointer names; None where it is none."""
    try:
        return _pointer(pointer.path.name, pointer.content or b"")["release"]
    except ChannelError:
        return None


def naming(pointer: File, release: str) -> File:
    """A good pointer that names another release instead, for all boards of the channel."""
    said = {**_pointer(pointer.path.name, pointer.content or b""), "release": release}
    said.pop("rollout", None)
    content = json.dumps(said).encode() + b"\n"
    etag = f'"{hashlib.sha256(content).hexdigest()}"'
    return replace(pointer, content=content, etag=etag)


def _pointer(name: str, content: bytes) -> dict:
    try:
        pointer = json.loads(content)
    except ValueError as exc:
        raise ChannelError("bad_pointer", f"{name} is not JSON: {exc}") from exc
    if not isinstance(pointer, dict):
        raise ChannelError("bad_pointer", f"{name} is not an object")
    target = pointer.get("release")
    if not isinstance(target, str) or not _RELEASE_NAME.fullmatch(target):
        raise ChannelError("bad_pointer", f"{name} names release {str(target)[:80]!r}")
    poll = pointer.get("poll")
    if poll is not None and (type(poll) is not int or poll <= 0):
        raise ChannelError("bad_pointer", f"{name} has poll {str(poll)[:80]!r}")
    rollout = pointer.get("rollout")
    if rollout is not None and not _is_rollout(rollout):
        raise ChannelError("bad_pointer", f"{name} has rollout {str(rollout)[:80]!r}")
    return pointer


def _is_rollout(rollout: object) -> bool:
    if not isinstance(rollout, dict) or not isinstance(rollout.get("seed"), str):
        return False
    percent = rollout.get("percent")
    return type(percent) in (int, float) and 0 <= percent <= 100
