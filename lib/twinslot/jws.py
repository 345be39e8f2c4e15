"""Verify a compact JWS (RFC 7515) with PS256 (RFC 7518 section 3.5). Pure: bytes in, verdict out.

    keys = jws.load_keys(strict.loads(text))
    payload = jws.verify(token, keys)

One algorithm, no choice: RSA-PSS with SHA-256, MGF1-SHA-256 and a salt of 32 bytes, e = 65537,
moduli of 2048 to 4096 bits. The header may name ``alg``, ``kid`` and ``typ``, nothing else: no
``crit``, no embedded key, no ``none``. Base64url must be canonical and JSON strict, so that one
document has one spelling and one meaning. Nothing of the payload is read before the signature
holds.

A key made for samples and demonstrations carries ``"demo": true``, and is refused unless asked
for; so are those whose private half stands in an RFC.

Source: RFC 8017 sections 8.1.2, 9.1.2 and B.2.1; RFC 7638 for key names.
"""

import binascii
import hashlib

from .errors import ConfigError, SignatureError

TOKEN_LIMIT = 12288  # characters of a whole JWS: a manifest of 8 KiB and a 4096-bit signature
_HEADER_LIMIT = 512
_HASH_LEN = 32
_SALT_LEN = 32
_PIECE = 256  # characters; a multiple of 4
_PUBLISHED = (  # the RSA keys of RFC 7515 A.2, RFC 7517 A.1 and RFC 7520 3.4
    "IsUn6_e04MaShXFIISMp4kG62LWzMIPy_MvSA5pJgX8",
    "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs",
    "9jg46WB3rR_AHD-EBXdN7cBkH1WOu0tA3M9fm21mqTI",
)


def b64url_decode(text):
    """Decode unpadded base64url ``bytes``; ValueError unless it is the canonical spelling."""
    view = memoryview(text)
    raw = bytearray(len(view) * 3 // 4)
    at = 0
    for start in range(0, len(view), _PIECE):  # in pieces, to be sparing with memory
        piece = bytes(view[start : start + _PIECE])
        part = binascii.a2b_base64(
            piece.replace(b"-", b"+").replace(b"_", b"/") + b"===="[: -len(piece) % 4]
        )
        # Lenient decoders skip strange characters and ignore loose bits: compare the way back.
        if b64url_encode(part) != piece:
            raise ValueError("not canonical base64url")
        raw[at : at + len(part)] = part
        at += len(part)
    return bytes(raw)


def b64url_encode(raw):
    """Encode ``bytes`` as unpadded base64url ``bytes``."""
    text = binascii.b2a_base64(raw).strip().replace(b"+", b"-").replace(b"/", b"_")
    while text[-1:] == b"=":
        text = text[:-1]
    return text


def thumbprint(n, e):
    """Name an RSA key: RFC 7638 thumbprint of its base64url members ``n`` and ``e`` (str)."""
    canonical = '{"e":"%s","kty":"RSA","n":"%s"}' % (e, n)
    return b64url_encode(hashlib.sha256(canonical.encode()).digest()).decode()


def _load_key(jwk, demo):
    if not isinstance(jwk, dict) or jwk.get("kty") != "RSA":
        raise ConfigError("key type", jwk.get("kty") if isinstance(jwk, dict) else jwk, "RSA")
    for member in ("d", "p", "q", "dp", "dq", "qi", "oth"):
        if member in jwk:
            raise ConfigError("a private key is where only its public half belongs")
    n, e = jwk.get("n"), jwk.get("e")
    if not isinstance(n, str) or e != "AQAB":
        raise ConfigError("public exponent", e, "AQAB (65537)")
    if jwk.get("alg", "PS256") != "PS256":
        raise ConfigError("key algorithm", jwk["alg"], "PS256")
    try:
        raw = b64url_decode(n.encode())
    except ValueError as exc:
        raise ConfigError("key modulus: %s" % exc)
    if not 256 <= len(raw) <= 512 or raw[0] < 0x80 or not raw[-1] & 1:
        raise ConfigError("key modulus", "%d bytes" % len(raw), "an odd one of 2048 to 4096 bits")
    kid = thumbprint(n, e)
    if jwk.get("kid", kid) != kid:
        raise ConfigError("kid", jwk["kid"], "the RFC 7638 thumbprint " + kid)
    if kid in _PUBLISHED or (jwk.get("demo", False) is not False and not demo):
        raise ConfigError("key %s is a sample, for demonstrations only" % kid)
    return kid, raw


def load_keys(jwk_set, demo=False):
    """Turn a JWK set (dict, ``{"keys": [...]}``) into ``{kid: modulus bytes}``.

    Args:
        demo: take keys that are marked as samples.

    Raises:
        ConfigError: no key, a key that is not RSA of 2048 to 4096 bits with e = 65537, a private
            key, a ``kid`` that is not the key's thumbprint, a key twice, or a sample.
    """
    keys = jwk_set.get("keys") if isinstance(jwk_set, dict) else None
    if not isinstance(keys, list) or not keys:
        raise ConfigError("key set", type(keys).__name__, 'a JWK set: {"keys": [...]}')
    found = {}
    for jwk in keys:
        kid, modulus = _load_key(jwk, demo)
        if kid in found:
            # One key that counts as two has broken other systems (python-tuf, go-tuf).
            raise ConfigError("key %s twice" % kid)
        found[kid] = modulus
    return found


def _header(text):
    if len(text) > _HEADER_LIMIT:
        raise SignatureError("JWS header", "%d characters" % len(text), "at most 512")
    from . import strict

    try:
        header = strict.loads(b64url_decode(text))
    except ValueError as exc:
        raise SignatureError("JWS header: %s" % exc)
    if not isinstance(header, dict):
        raise SignatureError("JWS header", type(header).__name__, "an object")
    for name in header:
        if name not in ("alg", "kid", "typ"):
            raise SignatureError("JWS header member", name, "alg, kid and typ only")
    if header.get("alg") != "PS256":
        raise SignatureError("JWS algorithm", header.get("alg"), "PS256")
    return header


def verify(token, keys, typ=None):
    """Return the payload of a compact JWS whose signature holds under one of ``keys``.

    Args:
        token: the compact serialization, bytes.
        keys: ``{kid: modulus bytes}`` from :func:`load_keys`.
        typ: what the header's ``typ`` must be, so that no document passes for one of another
            kind (RFC 8725 section 3.11); None: anything.

    Raises:
        SignatureError: anything but a canonical PS256 JWS by one of these keys.

    Allocates about 10 KB of short-lived memory for a 3072-bit key, in pieces of at most the
    payload's size.
    """
    if len(token) > TOKEN_LIMIT:
        raise SignatureError("JWS", "%d bytes" % len(token), "at most %d" % TOKEN_LIMIT)
    token = bytes(token)
    dots = token.count(b".")
    if dots != 2:
        raise SignatureError("JWS", "%d parts" % (dots + 1), "header.payload.signature")
    first, last = token.find(b"."), token.rfind(b".")
    view = memoryview(token)
    header = _header(view[:first])
    if typ is not None and header.get("typ") != typ:
        raise SignatureError("JWS type", str(header.get("typ"))[:48], typ)
    kid = header.get("kid")
    modulus = keys.get(kid) if isinstance(kid, str) else None
    if modulus is None:
        raise SignatureError("signing key", str(kid)[:48], "one of %d trusted" % len(keys))
    digest = hashlib.sha256(view[:last]).digest()
    try:
        if not _pss_holds(modulus, b64url_decode(view[last + 1 :]), digest):
            raise SignatureError("the signature does not belong to this document and key %s" % kid)
        return b64url_decode(view[first + 1 : last])
    except ValueError as exc:
        raise SignatureError("JWS: %s" % exc)


def _pss_holds(modulus, signature, digest):
    """EMSA-PSS-VERIFY of RFC 8017 section 9.1.2 for whole-byte moduli, salt of 32 bytes."""
    size = len(modulus)
    n = int.from_bytes(modulus, "big")
    s = int.from_bytes(signature, "big")
    if len(signature) != size or s >= n:
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
