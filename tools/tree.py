"""Read a published tree without believing it: whoever holds the site writes what he likes there.

Names that a file of the tree gives have one fixed form each, the same as on the server, and lead
nowhere else by links; no file is read further than its format goes. What a file says is for the
caller to verify.
"""

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from twinslot import jws
from twinslot.errors import ConfigError, FormatError, OtaError, ReleaseError
from twinslot.release import SIZE_LIMIT

POLL_MAX_S = 7 * 86400  # the device's own bound
POINTER_LIMIT = 65536  # bytes, as the server reads one
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
RELEASE_NAME = re.compile(r"r/[A-Za-z0-9][A-Za-z0-9.+-]{0,63}\.jws")
PAYLOAD_NAME = re.compile(r"blobs/([0-9a-f]{2})/\1[0-9a-f]{62}\.(?:bin|gz)")


def check_name(what: str, name: str) -> None:
    """Refuse the name of a product, channel or board that no device or no file system takes."""
    if not NAME.fullmatch(name):
        raise ConfigError(what, repr(name[:80]), "1 to 64 of A-Z a-z 0-9 . _ -, no dot first")


def read(path: Path, limit: int) -> bytes:
    """Return the content of a file.

    Raises:
        FormatError: no regular file (a device has no end, a pipe no beginning), or a longer one.
        OSError: it can't be read.
    """
    # A pipe must not hold the caller up.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise FormatError(f"{path}: no ordinary file")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            content = file.read(limit + 1)
    finally:
        os.close(descriptor)
    if len(content) > limit:
        raise FormatError(f"{path}", f"more than {limit} bytes", f"at most {limit}")
    return content


def token(path: Path) -> bytes:
    """Return a signed document, not verified. Raises as :func:`read`."""
    return read(path, jws.TOKEN_LIMIT)


def payload(product: Path, url: str) -> Path:
    """Where a payload lies in the tree of a product.

    Raises:
        ReleaseError: it is named in another form, or a link leads out of the tree.
    """
    path = product / url
    if not PAYLOAD_NAME.fullmatch(url) or not path.resolve().is_relative_to(product.resolve()):
        raise ReleaseError("payload", repr(url[:80]), "blobs/ab/SHA256.bin or .gz in this tree")
    return path


def image(path: Path) -> bytes:
    """Return an image or another payload. Raises as :func:`read`."""
    return read(path, SIZE_LIMIT)


def pointer(path: Path) -> dict[str, Any]:
    """Return what a channel's pointer says, of which nothing is signed; each member in its form.

    Raises:
        ReleaseError: not a pointer.
        OSError: it can't be read.
    """
    try:
        offer = json.loads(read(path, POINTER_LIMIT))
    except (ValueError, RecursionError, OtaError) as exc:
        raise ReleaseError(f"{path}: not a channel pointer: {exc!r}") from exc
    if not isinstance(offer, dict) or not _is_release_name(offer.get("release")):
        seen = offer.get("release") if isinstance(offer, dict) else offer
        raise ReleaseError(f"{path}: release", repr(seen)[:80], "r/VERSION.jws")
    poll = offer.get("poll", 1)
    if type(poll) is not int or not 1 <= poll <= POLL_MAX_S:
        raise ReleaseError(f"{path}: poll", repr(poll)[:80], f"1 to {POLL_MAX_S} s")
    if "rollout" in offer and not _is_rollout(offer["rollout"]):
        seen = repr(offer["rollout"])[:80]
        raise ReleaseError(f"{path}: rollout", seen, "0 to 100 percent and a seed")
    return offer


def _is_release_name(name: object) -> bool:
    return isinstance(name, str) and RELEASE_NAME.fullmatch(name) is not None


def _is_rollout(rollout: object) -> bool:
    if not isinstance(rollout, dict) or not isinstance(rollout.get("seed"), str):
        return False
    percent = rollout.get("percent")
    return type(percent) in (int, float) and 0 <= percent <= 100
