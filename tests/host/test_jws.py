"""The JWS verifier against an independent JOSE library and against forgers."""

import base64
import json
import random

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from joserfc import jws as jose
from joserfc.jwk import ECKey, OctKey, RSAKey
from trust import PRINTED

from twinslot import base64url, jws, keyset
from twinslot.errors import ConfigError, SignatureError

KEY = RSAKey.generate_key(3072, private=True)
OTHER = RSAKey.generate_key(2048, private=True)


def jwk(key):
    return dict(key.as_dict(private=False), kid=key.thumbprint())


def sign(payload, key=KEY, alg="PS256", **header):
    header = {"alg": alg, "kid": key.thumbprint(), **header}
    return jose.serialize_compact(header, payload, key, algorithms=[alg]).encode()


KEYS = keyset.load({"keys": [jwk(KEY)]})


def b64(raw):
    return base64.urlsafe_b64encode(raw).rstrip(b"=")


@pytest.mark.parametrize("bits", [2048, 3072, 4096])
def test_signatures_of_another_library_hold(bits):
    key = RSAKey.generate_key(bits, private=True)
    keys = keyset.load({"keys": [jwk(KEY), jwk(key)]})
    rng = random.Random(bits)
    for length in (0, 1, 2, 3, 55, 64, 1000, 6000):
        payload = rng.randbytes(length)
        assert jws.verify(sign(payload, key), keys) == payload


def test_every_flipped_bit_of_a_signature_is_refused():
    token = sign(b'{"a":1}')
    head, _, signature = token.rpartition(b".")
    raw = bytearray(base64.urlsafe_b64decode(signature))
    rng = random.Random(7)
    for _ in range(200):
        i, bit = rng.randrange(len(raw)), 1 << rng.randrange(8)
        raw[i] ^= bit
        with pytest.raises(SignatureError):
            jws.verify(head + b"." + b64(raw), KEYS)
        raw[i] ^= bit


def test_every_changed_character_and_every_truncation_is_refused():
    token = sign(b'{"version":"1.0.0"}')
    rng = random.Random(8)
    for i in range(len(token)):
        with pytest.raises(SignatureError):
            jws.verify(token[:i], KEYS)
    for _ in range(300):
        i = rng.randrange(len(token))
        changed = bytearray(token)
        changed[i] ^= 1 << rng.randrange(7)
        with pytest.raises(SignatureError):
            jws.verify(bytes(changed), KEYS)
    for extra in (b".", b"=", b"A", b"\n", b" ", b"\0"):
        with pytest.raises(SignatureError):
            jws.verify(token + extra, KEYS)


def test_a_key_nobody_trusts_is_refused_and_named():
    with pytest.raises(SignatureError, match="signing key: saw " + OTHER.thumbprint()):
        jws.verify(sign(b"{}", OTHER), KEYS)


def test_F69_a_strangers_signature_under_a_trusted_name_is_refused():
    token = jose.serialize_compact(
        {"alg": "PS256", "kid": KEY.thumbprint()}, b"{}", OTHER, algorithms=["PS256"]
    )
    with pytest.raises(SignatureError):
        jws.verify(token.encode(), KEYS)


def test_the_algorithm_is_bound_and_never_read_from_the_signature():
    claims = b'{"product":"p"}'
    forged = [
        sign(claims, alg="PS384"),
        sign(claims, alg="RS256"),
        b64(json.dumps({"alg": "none", "kid": KEY.thumbprint()}).encode())
        + b"."
        + b64(claims)
        + b".",
        # The old trick: the public modulus as the secret of an HMAC.
        jose.serialize_compact(
            {"alg": "HS256", "kid": KEY.thumbprint()},
            claims,
            OctKey.import_key(KEYS[KEY.thumbprint()]),
            algorithms=["HS256"],
        ).encode(),
    ]
    ec = ECKey.generate_key("P-256", private=True)
    forged.append(
        jose.serialize_compact(
            {"alg": "ES256", "kid": KEY.thumbprint()}, claims, ec, algorithms=["ES256"]
        ).encode()
    )
    for token in forged:
        with pytest.raises(SignatureError, match="algorithm"):
            jws.verify(token, KEYS)


def forge(header_json, payload=b"{}", salt=32, key=KEY):
    """Sign with a header or salt that the JOSE library refuses to make."""
    head = b64(header_json) + b"." + b64(payload)
    signature = key.raw_value.sign(
        head, padding.PSS(padding.MGF1(hashes.SHA256()), salt), hashes.SHA256()
    )
    return head + b"." + b64(signature)


HEADER = {"alg": "PS256", "kid": KEY.thumbprint()}


def test_a_well_formed_hand_made_token_holds():
    assert jws.verify(forge(json.dumps(HEADER).encode()), KEYS) == b"{}"


@pytest.mark.parametrize("salt", [0, 20, 31, 33, 64])
def test_another_salt_length_is_refused(salt):
    with pytest.raises(SignatureError):
        jws.verify(forge(json.dumps(HEADER).encode(), salt=salt), KEYS)


@pytest.mark.parametrize(
    "member",
    [
        {"crit": ["exp"]},
        {"jwk": jwk(OTHER)},
        {"jku": "https://evil.example/keys"},
        {"x5c": ["AAAA"]},
        {"b64": False},
        {"zip": "DEF"},
    ],
    ids=lambda member: next(iter(member)),
)
def test_headers_that_steer_the_verifier_are_refused(member):
    with pytest.raises(SignatureError, match="header"):
        jws.verify(forge(json.dumps({**HEADER, **member}).encode()), KEYS)


@pytest.mark.parametrize(
    "header", [b"", b"[]", b"1", b'"PS256"', b"{", b"\xff", b"[" * 300, b"null"]
)
def test_headers_that_are_no_object_are_refused(header):
    with pytest.raises(SignatureError):
        jws.verify(forge(header), KEYS)


@pytest.mark.parametrize("kid", [None, 1, [], "", "x" * 300])
def test_strange_key_names_are_refused(kid):
    with pytest.raises(SignatureError):
        jws.verify(forge(json.dumps({"alg": "PS256", "kid": kid}).encode()), KEYS)


def test_signature_values_outside_the_modulus_are_refused():
    head = sign(b"{}").rpartition(b".")[0]
    n = int.from_bytes(KEYS[KEY.thumbprint()], "big")
    real = int.from_bytes(base64.urlsafe_b64decode(sign(b"{}").rpartition(b".")[2]), "big")
    for s in (0, 1, n - 1, n, real + n):
        size = 384 if s < 2**3072 else 385
        with pytest.raises(SignatureError):
            jws.verify(head + b"." + b64(s.to_bytes(size, "big")), KEYS)
    with pytest.raises(SignatureError):  # a leading zero more
        jws.verify(head + b"." + b64(real.to_bytes(385, "big")), KEYS)


def test_a_signature_has_one_number_and_not_that_plus_the_modulus():
    n = int.from_bytes(KEYS[KEY.thumbprint()], "big")
    for token in iter(lambda: sign(b"{}"), b""):
        head, _, signature = token.rpartition(b".")
        again = int.from_bytes(base64.urlsafe_b64decode(signature), "big") + n
        if again < 2**3072:  # no byte longer: nothing but the modulus tells them apart
            break
    with pytest.raises(SignatureError):
        jws.verify(head + b"." + b64(again.to_bytes(384, "big")), KEYS)


def test_padded_and_loose_base64_are_refused():
    token = sign(b"{}")  # "e30": two characters carry 8 bits, the last one four loose bits
    head, payload, signature = token.split(b".")
    assert payload == b"e30"
    for spelling in (b"e30=", b"e31", b"e3 0", b"e3+0", b"e30\n"):
        with pytest.raises(SignatureError):
            jws.verify(b".".join((head, spelling, signature)), KEYS)


def test_a_token_over_the_limit_is_refused_before_it_is_decoded():
    with pytest.raises(SignatureError, match="at most"):
        jws.verify(sign(b"x" * 12000), KEYS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kty": "EC"}, "key type"),
        ({"e": "Aw"}, "public exponent"),
        ({"e": "AQ"}, "public exponent"),
        ({"alg": "RS256"}, "algorithm"),
        ({"kid": "something-else"}, "thumbprint"),
        ({"n": b64(b"\xff" * 128).decode(), "kid": None}, "modulus"),
        ({"n": b64(b"\xff" * 1024).decode(), "kid": None}, "modulus"),
        ({"n": b64(b"\xff" * 383 + b"\xfe").decode(), "kid": None}, "odd"),
        ({"n": b64(b"\x00" + b"\xff" * 383).decode(), "kid": None}, "modulus"),
        ({"n": 5}, "exponent"),
        ({"n": "not base64!"}, "modulus"),
        ({"d": "AQAB"}, "private"),
    ],
)
def test_keys_that_are_not_what_we_trust_are_refused(change, message):
    key = {**jwk(KEY), **change}
    if key.get("kid", "") is None:
        del key["kid"]
    with pytest.raises(ConfigError, match=message):
        keyset.load({"keys": [key]})


@pytest.mark.parametrize(
    "jwk_set", [None, [], {}, {"keys": []}, {"keys": {}}, {"keys": [1]}, "keys"]
)
def test_what_is_no_key_set_is_refused(jwk_set):
    with pytest.raises(ConfigError):
        keyset.load(jwk_set)


@pytest.mark.parametrize("demo", [False, True])
@pytest.mark.parametrize("where", PRINTED)
def test_I9_keys_printed_in_standards_are_refused_everywhere(where, demo):
    with pytest.raises(ConfigError, match="sample"):
        keyset.load({"keys": [{"kty": "RSA", "n": PRINTED[where], "e": "AQAB"}]}, demo)


# ---- limits, on both sides of each


@pytest.mark.parametrize(
    ("length", "first", "taken"),
    [
        (255, 0xFF, False),
        (256, 0x80, True),
        (256, 0x81, True),
        (256, 0x7F, False),
        (257, 0x80, True),
        (512, 0x80, True),
        (513, 0x80, False),
    ],
)
def test_a_modulus_has_2048_to_4096_bits_and_its_highest_is_set(length, first, taken):
    n = b64(bytes([first]) + b"\x5a" * (length - 2) + b"\x01").decode()
    key = {"kty": "RSA", "n": n, "e": "AQAB"}
    if taken:
        assert next(iter(keyset.load({"keys": [key]}).values()))[0] == first
    else:
        with pytest.raises(ConfigError, match="modulus"):
            keyset.load({"keys": [key]})


@pytest.mark.parametrize("last", range(0, 256, 15))
def test_a_modulus_is_odd(last):
    n = b64(b"\xc0" + b"\x5a" * 254 + bytes([last])).decode()
    key = {"kty": "RSA", "n": n, "e": "AQAB"}
    if last & 1:
        assert keyset.load({"keys": [key]})
    else:
        with pytest.raises(ConfigError, match="odd"):
            keyset.load({"keys": [key]})


def test_a_header_of_512_characters_is_taken_and_no_longer_one():
    text = json.dumps(HEADER)
    assert jws.verify(forge(text.ljust(384).encode()), KEYS) == b"{}"  # 512 characters of base64
    with pytest.raises(SignatureError, match="at most 512"):
        jws.verify(forge(text.ljust(385).encode()), KEYS)


def test_a_token_of_the_limit_is_taken_and_no_longer_one():
    seen = set()
    for spaces in range(8):
        header = (json.dumps(HEADER) + " " * spaces).encode()
        for length in range(8650, 8800):
            size = len(b64(header)) + len(b64(bytes(length))) + 2 + 512
            if size in (jws.TOKEN_LIMIT, jws.TOKEN_LIMIT + 1):
                token = forge(header, b"x" * length)
                assert len(token) == size
                seen.add(size)
                if size == jws.TOKEN_LIMIT:
                    assert jws.verify(token, KEYS) == b"x" * length
                else:
                    with pytest.raises(SignatureError, match="at most 12288"):
                        jws.verify(token, KEYS)
    assert len(seen) == 2


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_a_token_may_be_any_bytes(kind):
    assert jws.verify(kind(sign(b'{"a":1}')), KEYS) == b'{"a":1}'


@pytest.mark.parametrize("token", [b"", b"a", b"a.b", b"a.b.c.d", b"....", b"."])
def test_what_has_not_three_parts_is_no_compact_jws(token):
    with pytest.raises(SignatureError, match=r"parts, expected header\.payload"):
        jws.verify(token, KEYS)


def test_F74_a_type_that_is_asked_for_must_be_there_and_otherwise_may_be_anything():
    assert jws.verify(sign(b"{}", typ="x"), KEYS) == b"{}"
    assert jws.verify(sign(b"{}", typ="x"), KEYS, "x") == b"{}"
    for header in ({}, {"typ": "y"}, {"typ": ""}, {"typ": "X"}):
        with pytest.raises(SignatureError, match="JWS type"):
            jws.verify(sign(b"{}", **header), KEYS, "x")


@pytest.mark.parametrize("length", [*range(12), 189, 190, 191, 192, 193, 383, 384, 385, 1000])
def test_base64url_is_decoded_in_pieces_as_in_one(length):
    raw = random.Random(length).randbytes(length)
    assert base64url.b64url_decode(b64(raw)) == raw
    assert base64url.b64url_encode(raw) == b64(raw)
    for bad in (b64(raw) + b"=", b64(raw) + b"\n", b"+" + b64(raw), b" " + b64(raw)):
        with pytest.raises(ValueError):
            base64url.b64url_decode(bad)
