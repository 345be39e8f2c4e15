"""Pre-shared tokens: made on first start, kept as hashes, compared in constant time.

Two roles: ``device`` may ask for updates and report, ``operator`` may read the registry. Neither
may do what the other may. The server keeps ``sha256:`` and 64 digits in a file of its own beside
the one that hands the token over, ``device-token.sha256``; only that hash is in memory, so that no
log or traceback can show a token. What is handed over may be taken away; as long as it is there it
is what counts, however old, which is how a token is changed. The configuration may hold a hash in
the token's place, too.
"""

import hashlib
import hmac
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from .files import write_new, write_over

DEVICE_FILE = "device-token"
OPERATOR_FILE = "operator-token"
HASH = ".sha256"  # behind the name of either
DEVICE_ENV = "TWINSLOT_DEVICE_TOKEN"
OPERATOR_ENV = "TWINSLOT_OPERATOR_TOKEN"
_SHAPE = re.compile(r"[A-Za-z0-9._~+/-]{16,256}=*")  # RFC 6750 b64token, and long enough
_HASHED = re.compile(r"sha256:([0-9a-f]{64})")


class TokenError(Exception):
    """A token that can't be used: its message never shows it."""


@dataclass(frozen=True)
class Token:
    """One role's secret, hashed, and where it came from."""

    digest: bytes
    source: str

    @property
    def hashed(self) -> str:
        """What may stand in the token's place, and tells nobody the token."""
        return f"sha256:{self.digest.hex()}"

    def matches(self, presented: str) -> bool:
        """Compare without telling by the time taken how much was right."""
        digest = hashlib.sha256(presented.encode("utf-8", "surrogatepass")).digest()
        return hmac.compare_digest(digest, self.digest)


def load(path: Path, variable: str) -> Token:
    """Take a token from the environment, else as kept beside ``path``, else make one there.

    Raises:
        TokenError: it is empty, short, or holds characters no header can carry.
    """
    if variable in os.environ:
        return checked(os.environ[variable], f"${variable}")
    kept = path.with_name(path.name + HASH)
    if not path.exists() and not kept.exists():
        write_new(path, secrets.token_urlsafe(32).encode() + b"\n", mode=0o600)
    token = stored(path)
    assert token is not None
    line = token.hashed.encode() + b"\n"
    if not kept.exists() or kept.read_bytes() != line:
        write_over(kept, line, mode=0o600)
    for file in (path, kept):
        if os.name == "posix" and file.exists() and file.stat().st_mode & 0o077:
            file.chmod(0o600)
    return token


def stored(path: Path) -> Token | None:
    """The token in a file, or, where that was taken away, what is kept of it.

    Raises:
        TokenError: as :func:`load`.
    """
    for file in (path, path.with_name(path.name + HASH)):
        if file.exists():
            return checked(file.read_text("utf-8", "replace"), str(file))
    return None


def checked(text: str, source: str) -> Token:
    """Raises TokenError."""
    text = text.strip()
    if hashed := _HASHED.fullmatch(text):
        return Token(bytes.fromhex(hashed[1]), source)
    if not _SHAPE.fullmatch(text):
        raise TokenError(
            f"the token in {source} is empty or unusable: expected 16 to 256 characters of"
            " letters, digits and -._~+/ (delete the file and a new one is made)"
        )
    return Token(hashlib.sha256(text.encode()).digest(), source)
