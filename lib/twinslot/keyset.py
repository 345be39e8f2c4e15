"""Read the RSA keys that a board trusts out of a JWK set (RFC 7517).

    keys = keyset.load(strict.loads(text))

A key made for samples and demonstrations carries ``"demo": true``, and is refused unless asked
for; so are those whose private half stands in an RFC.

Source: RFC 7518 section 6.3.1; RFC 7638 for key names.
"""

import hashlib

from . import errors
from .base64url import b64url_decode, b64url_encode

_PUBLISHED = (  # the RSA keys of RFC 7515 A.2, RFC 7517 A.1 and RFC 7520 3.4
    "IsUn6_e04MaShXFIISMp4kG62LWzMIPy_MvSA5pJgX8",
    "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs",
    "9jg46WB3rR_AHD-EBXdN7cBkH1WOu0tA3M9fm21mqTI",
)


def thumbprint(n, e):
    """Name an RSA key: RFC 7638 thumbprint of its base64url members ``n`` and ``e`` (str)."""
    canonical = '{"e":"%s","kty":"RSA","n":"%s"}' % (e, n)
    return b64url_encode(hashlib.sha256(canonical.encode()).digest()).decode()


def _key(jwk, demo):
    if not isinstance(jwk, dict) or jwk.get("kty") != "RSA":
        raise errors.ConfigError(
            "key type", jwk.get("kty") if isinstance(jwk, dict) else jwk, "RSA"
        )
    for member in ("d", "p", "q", "dp", "dq", "qi", "oth"):
        if member in jwk:
            raise errors.ConfigError("a private key is where only its public half belongs")
    n, e = jwk.get("n"), jwk.get("e")
    if not isinstance(n, str) or e != "AQAB":
        raise errors.ConfigError("public exponent", e, "AQAB (65537)")
    if jwk.get("alg", "PS256") != "PS256":
        raise errors.ConfigError("key algorithm", jwk["alg"], "PS256")
    try:
        raw = b64url_decode(n.encode())
    except ValueError as exc:
        raise errors.ConfigError("key modulus: %s" % exc)
    if not 256 <= len(raw) <= 512 or raw[0] < 0x80 or not raw[-1] & 1:
        raise errors.ConfigError(
            "key modulus", "%d bytes" % len(raw), "an odd one of 2048 to 4096 bits"
        )
    kid = thumbprint(n, e)
    if jwk.get("kid", kid) != kid:
        raise errors.ConfigError("kid", jwk["kid"], "the RFC 7638 thumbprint " + kid)
    if kid in _PUBLISHED or (jwk.get("demo", False) is not False and not demo):
        raise errors.ConfigError("key %s is a sample, for demonstrations only" % kid)
    return kid, raw


def load(jwk_set, demo=False):
    """Turn a JWK set (dict, ``{"keys": [...]}``) into ``{kid: modulus bytes}``.

    Args:
        demo: take keys that are marked as samples.

    Raises:
        ConfigError: no key, a key that is not RSA of 2048 to 4096 bits with e = 65537, a private
            key, a ``kid`` that is not the key's thumbprint, a key twice, or a sample.
    """
    keys = jwk_set.get("keys") if isinstance(jwk_set, dict) else None
    if not isinstance(keys, list) or not keys:
        raise errors.ConfigError("key set", type(keys).__name__, 'a JWK set: {"keys": [...]}')
    found = {}
    for jwk in keys:
        kid, modulus = _key(jwk, demo)
        if kid in found:
            # One key that counts as two has broken other systems (python-tuf, go-tuf).
            raise errors.ConfigError("key %s twice" % kid)
        found[kid] = modulus
    return found
