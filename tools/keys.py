"""Signing keys: RSA, named by their RFC 7638 thumbprint.

A private key is one file, readable by its owner only: PKCS#8 encrypted with a passphrase (PBES2:
PBKDF2-HMAC-SHA-256, AES-256-CBC; OpenSSL reads and writes it), or a JWK (RFC 7517) where somebody
chose to have none. Beside it lies the public half, which is what a device gets: a JWK set, or for
a root key the key file that makes boards wait for its keyring. Only the tools ever read a private
key.
"""

import base64
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from joserfc.errors import JoseError
from joserfc.jwk import RSAKey

from twinslot import keyring, keyset
from twinslot.errors import ConfigError, OtaError

from .files import write_whole

DEFAULT_BITS = 3072
_BITS = (2048, 3072, 4096)  # what the device verifies; see lib/twinslot/jws.py
_ROUNDS = 600_000  # of PBKDF2-HMAC-SHA-256: OWASP's figure of 2023; starts with a byte below 0x80

# Object identifiers in DER.
_PBES2 = bytes.fromhex("06092a864886f70d01050d")
_PBKDF2 = bytes.fromhex("06092a864886f70d01050c")
_HMAC_SHA256 = bytes.fromhex("300c06082a864886f70d02090500")  # with its NULL parameters
_AES_256_CBC = bytes.fromhex("060960864801650304012a")

Passphrase = Callable[[], bytes]
"""Called when a passphrase turns out to be needed."""


def public_path(private: Path) -> Path:
    """``release.key`` has its public half in ``release.pub.json``."""
    stem = private.name.removesuffix(".key")
    return private.with_name(stem + ".pub.json")


def generate(
    path: Path,
    bits: int = DEFAULT_BITS,
    *,
    passphrase: Passphrase | None = None,
    root: bool = False,
    demo: bool = False,
) -> str:
    """Make a key pair: ``path`` (private, 0600) and :func:`public_path`; return the key's name.

    Args:
        path: the private key's file.
        bits: 2048, 3072 or 4096.
        passphrase: asked for the one that encrypts the file; None leaves it readable to whoever
            gets hold of it.
        root: a key that signs keyrings instead of releases.
        demo: a sample key, refused by every board that is not a demo board.

    Raises:
        ConfigError: a size no device takes, an empty passphrase, or one of the files is there
            already.
    """
    if bits not in _BITS:
        raise ConfigError("key size", f"{bits} bits", "2048, 3072 or 4096")
    if demo and passphrase is not None:
        raise ConfigError("a sample key is no secret: it takes no passphrase")
    public = public_path(path)
    for existing in (path, public):
        if existing.exists():
            raise ConfigError(f"{existing} is there already: a key is never overwritten")
    secret = passphrase() if passphrase else None
    key = _named(RSAKey.generate_key(bits), demo)
    if secret is None:
        content = (json.dumps(key.as_dict(private=True), indent=1) + "\n").encode()
    else:
        content = _encrypted(key, secret)
    write_whole(path, content, mode=0o600, replace=False)
    write_whole(public, public_set(key, root).encode(), mode=0o644, replace=False)
    return key.kid or ""


def _encrypted(key: RSAKey, passphrase: bytes) -> bytes:
    """PKCS#8, encrypted: as ``openssl pkcs8 -topk8 -v2 aes-256-cbc -iter 600000`` writes it.

    By hand, because `cryptography` offers no other cost than 2048 rounds for this format.
    Source: RFC 5958 section 3, RFC 8018 sections 6.2 and A.4.
    """
    if not passphrase:
        raise ConfigError("an empty passphrase protects nothing")
    plain = key.raw_value.private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    salt, iv = os.urandom(16), os.urandom(16)
    secret = hashlib.pbkdf2_hmac("sha256", passphrase, salt, _ROUNDS)
    pad = 16 - len(plain) % 16
    cipher = Cipher(algorithms.AES(secret), modes.CBC(iv)).encryptor()
    data = cipher.update(plain + bytes([pad]) * pad) + cipher.finalize()
    rounds = _ROUNDS.to_bytes(4, "big").lstrip(b"\0")
    derivation = _der(0x30, _PBKDF2, _der(0x30, _der(4, salt), _der(2, rounds), _HMAC_SHA256))
    encryption = _der(0x30, _AES_256_CBC, _der(4, iv))
    scheme = _der(0x30, _PBES2, _der(0x30, derivation, encryption))
    text = base64.encodebytes(_der(0x30, scheme, _der(4, data))).decode().replace("\n", "")
    lines = [text[i : i + 64] for i in range(0, len(text), 64)]
    name = "ENCRYPTED PRIVATE KEY"
    return "\n".join([f"-----BEGIN {name}-----", *lines, f"-----END {name}-----", ""]).encode()


def _der(tag: int, *parts: bytes) -> bytes:
    content = b"".join(parts)
    size = len(content)
    length = size.to_bytes((size.bit_length() + 7) // 8 or 1, "big")
    head = bytes([size]) if size < 0x80 else bytes([0x80 | len(length)]) + length
    return bytes([tag]) + head + content


def public_set(key: RSAKey, root: bool = False) -> str:
    """The public half of one key as JSON text, ready to be a board's key file."""
    member = "root" if root else "keys"
    return json.dumps({member: [public_jwk(key)]}, indent=1) + "\n"


def public_jwk(key: RSAKey) -> dict[str, Any]:
    """The public half as a JWK, with its mark if it is a sample."""
    return dict(key.as_dict(private=False))


def load_private(path: Path, passphrase: Passphrase | None = None) -> RSAKey:
    """Read a private key: PKCS#8 (encrypted or not), PKCS#1 or JWK.

    Args:
        path: the file.
        passphrase: asked only if the file is encrypted.

    Raises:
        ConfigError: not a private RSA key that devices can verify, readable by others, or the
            passphrase is wrong or missing.
        OSError: no such file.
    """
    content = path.read_bytes()
    if os.name == "posix" and path.stat().st_mode & 0o077:
        raise ConfigError(f"{path} is readable by others: run  chmod 600 {path}")
    try:
        key = _named(_import(path, content, passphrase))
    except (ValueError, TypeError, KeyError, JoseError) as exc:
        # The text of the exception may quote the file: never show it.
        raise ConfigError(f"{path}: not an RSA private key (JWK or PEM)") from exc
    if not key.is_private:
        raise ConfigError(f"{path} is a public key: signing needs the private one")
    try:
        keyset.load({"keys": [public_jwk(key)]}, demo=True)
    except OtaError as exc:
        raise ConfigError(f"{path}: devices would refuse this key: {exc}") from exc
    return key


def _import(path: Path, content: bytes, passphrase: Passphrase | None) -> RSAKey:
    if _is_json(content):
        return RSAKey.import_key(json.loads(content))
    if b"ENCRYPTED" not in content:
        return RSAKey.import_key(content)
    if passphrase is None:
        raise ConfigError(f"{path} is encrypted: it needs its passphrase")
    secret = passphrase()
    try:
        plain = serialization.load_pem_private_key(content, secret)
    except (ValueError, TypeError):  # the latter for an empty one
        raise ConfigError(f"{path}: wrong passphrase, or the file is damaged") from None
    return RSAKey.import_key(
        plain.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )


def load_trusted(path: Path, demo: bool = True) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Read a board's key file as the device does: ``(roots, keys)``, each ``{kid: modulus}``.

    Raises:
        ConfigError: not a key file, or one a device would refuse.
        OSError: no such file.
    """
    try:
        return keyring.load(path.read_bytes(), demo)
    except OtaError as exc:
        raise ConfigError(f"{path}: not a JWK set: {exc}") from exc


def load_public(path: Path) -> dict[str, bytes]:
    """Read a public JWK set as the device does: ``{kid: modulus}``.

    Raises:
        ConfigError: not a JWK set, one a device would refuse, or one of a root.
        OSError: no such file.
    """
    keys = load_trusted(path)[1]
    if not keys:
        raise ConfigError(f"{path} holds a root key only: it signs keyrings, no releases")
    return keys


def load_jwks(path: Path) -> list[dict[str, Any]]:
    """The public keys of a file as JWK, roots and others alike, checked as a device does.

    Raises:
        ConfigError, OSError: as :func:`load_trusted`.
    """
    load_trusted(path)
    content = json.loads(path.read_bytes())
    return [*content.get("root", []), *content.get("keys", [])]


def _is_json(content: bytes) -> bool:
    return content.lstrip()[:1] == b"{"


def _named(key: RSAKey, demo: bool = False) -> RSAKey:
    """The same key with its thumbprint as ``kid``, whatever it was called before."""
    members: dict[str, Any] = {**key.as_dict(private=key.is_private), "kid": key.thumbprint()}
    if demo:
        members["demo"] = True
    return RSAKey.import_key(members)
