"""Signing keys: RSA, as JWK (RFC 7517), named by their RFC 7638 thumbprint.

A private key is one file, readable by its owner only; beside it lies the public JWK set, which is
what a device gets. Only the tools ever read a private key.
"""

import json
import os
from pathlib import Path

from joserfc.errors import JoseError
from joserfc.jwk import RSAKey

from twinslot import jws
from twinslot.errors import ConfigError, OtaError

from .files import write_whole

DEFAULT_BITS = 3072
_BITS = (2048, 3072, 4096)  # what the device verifies; see lib/twinslot/jws.py


def public_path(private: Path) -> Path:
    """``release.key`` has its public half in ``release.pub.json``."""
    stem = private.name.removesuffix(".key")
    return private.with_name(stem + ".pub.json")


def generate(path: Path, bits: int = DEFAULT_BITS) -> str:
    """Make a key pair: ``path`` (private, 0600) and :func:`public_path`; return the key's name.

    Raises:
        ConfigError: a size no device takes, or one of the files is there already.
    """
    if bits not in _BITS:
        raise ConfigError("key size", f"{bits} bits", "2048, 3072 or 4096")
    public = public_path(path)
    for existing in (path, public):
        if existing.exists():
            raise ConfigError(f"{existing} is there already: a key is never overwritten")
    key = _named(RSAKey.generate_key(bits))
    private_text = json.dumps(key.as_dict(private=True), indent=1) + "\n"
    write_whole(path, private_text.encode(), mode=0o600, replace=False)
    write_whole(public, public_set(key).encode(), mode=0o644, replace=False)
    return key.kid or ""


def public_set(key: RSAKey) -> str:
    """The JWK set of one key's public half, as JSON text."""
    return json.dumps({"keys": [key.as_dict(private=False)]}, indent=1) + "\n"


def load_private(path: Path) -> RSAKey:
    """Read a private key, JWK or PEM.

    Raises:
        ConfigError: not a private RSA key that devices can verify, or readable by others.
        OSError: no such file.
    """
    content = path.read_bytes()
    if os.name == "posix" and path.stat().st_mode & 0o077:
        raise ConfigError(f"{path} is readable by others: run  chmod 600 {path}")
    try:
        key = _named(RSAKey.import_key(json.loads(content) if _is_json(content) else content))
    except (ValueError, TypeError, KeyError, JoseError) as exc:
        # The text of the exception may quote the file: never show it.
        raise ConfigError(f"{path}: not an RSA private key (JWK or PEM)") from exc
    if not key.is_private:
        raise ConfigError(f"{path} is a public key: signing needs the private one")
    try:
        jws.load_keys(json.loads(public_set(key)))
    except OtaError as exc:
        raise ConfigError(f"{path}: devices would refuse this key: {exc}") from exc
    return key


def load_public(path: Path) -> dict[str, bytes]:
    """Read a public JWK set as the device does: ``{kid: modulus}``.

    Raises:
        ConfigError: not a JWK set, or one a device would refuse.
        OSError: no such file.
    """
    try:
        content = json.loads(path.read_bytes())
    except ValueError as exc:
        raise ConfigError(f"{path}: not a JWK set: {exc}") from exc
    try:
        return jws.load_keys(content)
    except OtaError as exc:
        raise ConfigError(f"{path}: {exc}") from exc


def _is_json(content: bytes) -> bool:
    return content.lstrip()[:1] == b"{"


def _named(key: RSAKey) -> RSAKey:
    """The same key with its thumbprint as ``kid``, whatever it was called before."""
    members = key.as_dict(private=key.is_private)
    return RSAKey.import_key({**members, "kid": key.thumbprint()})
