"""Verify a compact JWS (RFC 7515) with PS256 (RFC 7518 section 3.5). Pure: bytes in, verdict out.

    keys = keyset.load(strict.loads(text))
    payload = jws.verify(token, keys)

One algorithm, no choice: RSA-PSS with SHA-256, MGF1-SHA-256 and a salt of 32 bytes, e = 65537,
moduli of 2048 to 4096 bits. The header may name ``alg``, ``kid`` and ``typ``, nothing else: no
``crit``, no embedded key, no ``none``. Base64url must be canonical and JSON strict, so that one
document has one spelling and one meaning. Nothing of the payload is read before the signature
holds.

Source: RFC 8017 sections 8.1.2, 9.1.2 and B.2.1.
"""

import hashlib

from . import errors
from .base64url import b64url_decode

TOKEN_LIMIT = 12288  # characters of a whole JWS: a manifest of 8 KiB and a 4096-bit signature
_HEADER_LIMIT = 512
_HASH_LEN = 32
_SALT_LEN = 32


def _header(text):
    if len(text) > _HEADER_LIMIT:
        raise errors.SignatureError("JWS header", "%d characters" % len(text), "at most 512")
    from . import strict

    try:
        header = strict.loads(b64url_decode(text))
    except ValueError as exc:
        raise errors.SignatureError("JWS header: %s" % exc)
    if not isinstance(header, dict):
        raise errors.SignatureError("JWS header", type(header).__name__, "an object")
    for name in header:
        if name not in ("alg", "kid", "typ"):
            raise errors.SignatureError("JWS header member", name, "alg, kid and typ only")
    if header.get("alg") != "PS256":
        raise errors.SignatureError("JWS algorithm", header.get("alg"), "PS256")
    return header


def verify(token, keys, typ=None, make_room=None):
    """Return the payload of a compact JWS whose signature holds under one of ``keys``.

    Args:
        token: the compact serialization, bytes.
        keys: ``{kid: modulus bytes}`` from ``keyset.load``.
        typ: what the header's ``typ`` must be, so that no document passes for one of another
            kind (RFC 8725 section 3.11); None: anything.
        make_room: called between the header and the power, which needs most memory.

    Raises:
        SignatureError: anything but a canonical PS256 JWS by one of these keys.

    Allocates about 10 KB of short-lived memory for a 3072-bit key, in pieces of at most the
    payload's size.
    """
    if len(token) > TOKEN_LIMIT:
        raise errors.SignatureError("JWS", "%d bytes" % len(token), "at most %d" % TOKEN_LIMIT)
    token = bytes(token)
    dots = token.count(b".")
    if dots != 2:
        raise errors.SignatureError("JWS", "%d parts" % (dots + 1), "header.payload.signature")
    first, last = token.find(b"."), token.rfind(b".")
    view = memoryview(token)
    header = _header(view[:first])
    if typ is not None and header.get("typ") != typ:
        raise errors.SignatureError("JWS type", str(header.get("typ"))[:48], typ)
    kid = header.get("kid")
    del header
    if make_room:
        make_room()
    modulus = keys.get(kid) if isinstance(kid, str) else None
    if modulus is None:
        raise errors.SignatureError("signing key", str(kid)[:48], "one of %d trusted" % len(keys))
    digest = hashlib.sha256(view[:last]).digest()
    try:
        if not _pss_holds(modulus, view[last + 1 :], digest):
            raise errors.SignatureError(
                "the signature does not belong to this document and key %s" % kid
            )
        return b64url_decode(view[first + 1 : last])
    except ValueError as exc:
        raise errors.SignatureError("JWS: %s" % exc)


def _pss_holds(modulus, signature, digest):
    """EMSA-PSS-VERIFY of RFC 8017 section 9.1.2 for whole-byte moduli, salt of 32 bytes.

    The signature comes as base64url, to be here in one form at a time: pow() is what needs most.
    """
    size = len(modulus)
    s = b64url_decode(signature)
    if len(s) != size:
        return False
    s = int.from_bytes(s, "big")
    n = int.from_bytes(modulus, "big")
    if s >= n:
        return False
    encoded = pow(s, 65537, n).to_bytes(size, "big")
    # emBits is one less than the bits of the modulus: the topmost bit is clear.
    db_len = size - _HASH_LEN - 1
    if encoded[-1] != 0xBC or encoded[0] & 0x80:
        return False
    h = encoded[db_len:-1]
    db = bytearray(encoded[:db_len])
    _unmask(db, h)
    db[0] &= 0x7F
    pad = db_len - _SALT_LEN - 1
    if db[pad] != 1 or any(db[:pad]):
        return False
    return hashlib.sha256(bytes(8) + digest + db[-_SALT_LEN:]).digest() == h


def _unmask(db, seed):
    """XOR ``db`` in place with MGF1-SHA-256 of ``seed`` (RFC 8017 section B.2.1)."""
    pos = 0
    counter = 0
    while pos < len(db):
        for byte in hashlib.sha256(seed + counter.to_bytes(4, "big")).digest():
            if pos == len(db):
                break
            db[pos] ^= byte
            pos += 1
        counter += 1
