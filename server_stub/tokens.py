"""Pre-shared tokens: made on first start, kept in 0600 files, compared in constant time.

Two roles: ``device`` may ask for updates and report, ``operator`` may read the registry. Neither
may do what the other may. Only a hash stays in memory, so that no log or traceback can show one.
A file, or the configuration, may hold that hash in the token's place: ``sha256:`` and 64 digits.
"""

import hashlib
import hmac
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from .files import write_new

DEVICE_FILE = "device-token"
OPERATOR_FILE = "operator-token"
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
        digest = hashlib.sha256(presented.encode("utf-8", "surrogateescape")).digest()
        return hmac.compare_digest(digest, self.digest)


def load(path: Path, variable: str) -> Token:
    """Take a token from the environment, else from ``path``, else make one there.

    Raises:
        TokenError: it is empty, short, or holds characters no header can carry.
    """
    if variable in os.environ:
        return checked(os.environ[variable], f"${variable}")
    if not path.exists():
        write_new(path, secrets.token_urlsafe(32).encode() + b"\n", mode=0o600)
    if os.name == "posix" and path.stat().st_mode & 0o077:
        path.chmod(0o600)
    return checked(path.read_text("utf-8", "replace"), str(path))


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
