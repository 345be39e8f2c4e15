"""Sign a document: with a key file, or by a program that keeps the key to itself.

    token = document(payload, signer_of(key), release.TYPE)

The program (an HSM's tool, a KMS client, a script over ssh) gets the bytes to be signed on its
stdin and answers with the signature on its stdout, nothing else: RSASSA-PSS with SHA-256, MGF1
with SHA-256 and a salt of 32 bytes, as raw bytes or base64. With OpenSSL that is

    openssl dgst -sha256 -sigopt rsa_padding_mode:pss -sigopt rsa_pss_saltlen:32 -sign key.pem

Whoever signed, the result is verified by the device's own code before it goes anywhere.

Source: RFC 7515 section 3.1 (compact JWS), RFC 7518 section 3.5 (PS256).
"""

import base64
import binascii
import json
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from joserfc.jwk import RSAKey

from twinslot import base64url, jws, keyset
from twinslot.errors import ConfigError, SignatureError

from . import keys

_TIMEOUT_S = 600  # somebody may have to press a button


@dataclass(frozen=True)
class Signer:
    """Whoever can sign: the key's name, its public half ``{kid: modulus}``, and the act."""

    kid: str
    trusted: dict[str, bytes]
    sign: Callable[[bytes], bytes]


def signer_of(key: RSAKey | Signer) -> Signer:
    """Make a signer of a private key."""
    if isinstance(key, Signer):
        return key

    def sign(data: bytes) -> bytes:
        pss = padding.PSS(padding.MGF1(hashes.SHA256()), hashes.SHA256.digest_size)
        return key.raw_value.sign(data, pss, hashes.SHA256())

    trusted = keyset.load({"keys": [keys.public_jwk(key)]}, demo=True)
    return Signer(key.kid or "", trusted, sign)


def by_command(command: str, public: Path) -> Signer:
    """Make a signer of a program.

    Args:
        command: split as a shell does, run without one.
        public: key file with the one key that the program signs with.

    Raises:
        ConfigError: no command, or not exactly one public key.
    """
    words = shlex.split(command)
    if not words:
        raise ConfigError("sign command", "nothing", "a program")
    roots, trusted = keys.load_trusted(public)
    trusted = roots | trusted
    if len(trusted) != 1:
        raise ConfigError(f"{public}", f"{len(trusted)} keys", "the one that the program uses")
    [(kid, modulus)] = trusted.items()

    def sign(data: bytes) -> bytes:
        try:
            done = subprocess.run(
                words, input=data, stdout=subprocess.PIPE, timeout=_TIMEOUT_S, check=False
            )
        except OSError as exc:
            raise ConfigError(f"sign command {words[0]}: {exc.strerror}") from exc
        except subprocess.TimeoutExpired:
            raise ConfigError(f"sign command {words[0]}: no answer in {_TIMEOUT_S} s") from None
        if done.returncode:
            raise ConfigError(f"sign command {words[0]} failed with exit code {done.returncode}")
        return _signature(done.stdout, len(modulus))

    return Signer(kid, trusted, sign)


def _signature(answer: bytes, size: int) -> bytes:
    if len(answer) == size:
        return answer
    text = b"".join(answer.split()).replace(b"-", b"+").replace(b"_", b"/").rstrip(b"=")
    try:
        raw = base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except binascii.Error:
        raw = b""
    if len(raw) != size:
        raise SignatureError("answer of the sign command", f"{len(answer)} bytes", f"{size}")
    return raw


def document(payload: bytes | dict, signer: Signer, typ: str) -> bytes:
    """Return a compact JWS around ``payload``.

    Args:
        payload: bytes, or what becomes JSON.
        signer: who signs.
        typ: the header's ``typ``.

    Raises:
        SignatureError: what the signer made does not verify, or the document is too long.
        ConfigError: the sign command failed.
    """
    if isinstance(payload, dict):
        payload = json.dumps(payload, separators=(",", ":")).encode()
    header = json.dumps({"alg": "PS256", "kid": signer.kid, "typ": typ}, separators=(",", ":"))
    signed = base64url.b64url_encode(header.encode()) + b"." + base64url.b64url_encode(payload)
    token = signed + b"." + base64url.b64url_encode(signer.sign(signed))
    jws.verify(token, signer.trusted, typ)
    return token
