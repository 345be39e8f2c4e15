"""The verifier against vectors: what holds, what does not, and what two libraries make of it.

rsa_pss_sha256.json are JWS of our own making, wycheproof_rsa_pss.json what others have published.
"""

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from joserfc.jwk import RSAKey
from trust import jwk, key, kid, sign

import twinslot
from twinslot import base64url, jws, keyset
from twinslot.errors import SignatureError

VECTORS = Path(__file__).parents[1] / "vectors" / "rsa_pss_sha256.json"
GROUPS = json.loads(VECTORS.read_text())["groups"]
TESTS = [(group, test) for group in GROUPS for test in group["tests"]]
PUBLISHED = VECTORS.with_name("wycheproof_rsa_pss.json")
WYCHEPROOF = json.loads(PUBLISHED.read_text())["groups"]
MICROPYTHON = Path(sys.executable).with_name("micropython")
PSS = padding.PSS(padding.MGF1(hashes.SHA256()), 32)


def holds(token: bytes, keys: dict) -> bool:
    try:
        jws.verify(token, keys)
    except SignatureError:
        return False
    return True


def test_there_are_vectors_of_each_kind():
    comments = {test["comment"] for _, test in TESTS}
    assert [group["bits"] for group in GROUPS] == [2048, 3072, 4096] and len(TESTS) >= 200
    assert {
        "s is 0",
        "s is 1",
        "s is n - 1",
        "s is n",
        "salt of 20 bytes",
        "trailer bd",
    } <= comments
    assert sum(test["valid"] for _, test in TESTS) >= 21


@pytest.mark.parametrize(
    ("group", "test"), TESTS, ids=lambda v: str(v.get("bits") or v.get("comment"))
)
def test_F73_vector(group, test):
    keys = keyset.load({"keys": [group["key"]]})
    token = f"{test['message']}.{test['signature']}".encode()
    assert holds(token, keys) is test["valid"]
    # And what an independent library says of the same signature.
    public = RSAKey.import_key(group["key"]).raw_value
    signature = base64url.b64url_decode(test["signature"].encode())
    try:
        public.verify(signature, test["message"].encode(), PSS, hashes.SHA256())
        verdict = True
    except InvalidSignature:
        verdict = False
    assert verdict is test["valid"]


@pytest.mark.parametrize("group", WYCHEPROOF, ids=lambda group: str(group["keySize"]))
def test_F73_published_vectors_by_Wycheproof(group):
    """Signatures of plain messages: what a JWS adds around them is left out."""
    modulus = bytes.fromhex(group["modulus"]).lstrip(b"\0")
    assert len(modulus) * 8 == group["keySize"]
    for test in group["tests"]:
        signature = base64url.b64url_encode(bytes.fromhex(test["sig"]))
        digest = hashlib.sha256(bytes.fromhex(test["msg"])).digest()
        assert jws._pss_holds(modulus, signature, digest) is (test["result"] == "valid"), test
    results = [test["result"] for test in group["tests"]]
    assert min(results.count("valid"), results.count("invalid")) > 10


def on_micropython(vectors: Path) -> list[bool]:
    lib = Path(twinslot.__path__[0]).parent
    driver = Path(__file__).with_name("vector_driver.py")
    done = subprocess.run(
        [MICROPYTHON, driver, lib, vectors], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return json.loads(done.stdout)


def test_F90_micropython_judges_every_vector_alike():
    assert on_micropython(VECTORS) == [test["valid"] for _, test in TESTS]


def test_F73_F90_micropython_judges_published_vectors_as_they_say():
    tests = [test for group in WYCHEPROOF for test in group["tests"]]
    assert on_micropython(PUBLISHED) == [test["result"] == "valid" for test in tests]


def test_thousands_of_random_messages_agree_with_another_library():
    rng = random.Random(2026)
    names = ("first", "second", "third")
    keys = keyset.load({"keys": [jwk(name) for name in names]})
    for number in range(3000):
        payload = rng.randbytes(rng.choice((0, 1, 2, 31, 32, 33, 55, 56, 64, 100, 700)))
        name = names[number % 3]
        token = sign(payload, name)
        assert jws.verify(token, keys) == payload
        # The same signature under another key, and another payload under the signature.
        if number % 10 == 0:
            others = {k: v for k, v in keys.items() if k != kid(name)}
            assert not holds(token, others)
            head, body, tail = token.split(b".")
            swapped = base64url.b64url_encode(payload + b"\0")
            assert not holds(b".".join((head, swapped, tail)), keys)
            assert holds(b".".join((head, body, tail)), keys)


def test_signatures_of_a_pss_library_with_automatic_salt_are_refused():
    """The commonest slip of signers: the longest salt instead of 32 bytes."""
    message = sign(b"{}").rpartition(b".")[0]
    salt = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.MAX_LENGTH)
    signature = key("release").raw_value.sign(message, salt, hashes.SHA256())
    keys = keyset.load({"keys": [jwk("release")]})
    assert not holds(message + b"." + base64url.b64url_encode(signature), keys)


# RFC 7515 appendices A.2 and A.5, RFC 7520 sections 4.1 and 4.2: genuine, by algorithms that are
# not taken here. They must fall on the algorithm, before any arithmetic.
RFC7515_A2 = (
    b"eyJhbGciOiJSUzI1NiJ9"
    b".eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cn"
    b"VlfQ"
    b".cC4hiUPoj9Eetdgtv3hF80EGrhuB__dzERat0XF9g2VtQgr9PJbu3XOiZj5RZmh7AAuHIm4Bh-0Qc_lF5YKt_O8W2F"
    b"p5jujGbds9uJdbF9CUAr7t1dnZcAcQjbKBYNX4BAynRFdiuB--f_nZLgrnbyTyWzO75vRK5h6xBArLIARNPvkSjtQBMH"
    b"lb1L07Qe7K0GarZRmB_eSN9383LcOLn6_dO--xi12jzDwusC-eOkHWEsqtFZESc6BfI7noOPqvhJ1phCnvWh6IeYI2w9"
    b"QOYEUipUTI8np6LbgGY9Fs98rqVt5AXLIhWkWywlVmtVrBp0igcN_IoypGlUPQGe77Rw"
)
RFC7515_A5 = (
    b"eyJhbGciOiJub25lIn0"
    b".eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cn"
    b"VlfQ"
    b"."
)


RFC7520_PAYLOAD = (
    b".SXTigJlzIGEgZGFuZ2Vyb3VzIGJ1c2luZXNzLCBGcm9kbywgZ29pbmcgb3V0IHlvdXIgZG9vci4gWW91IHN0ZXAgb250"
    b"byB0aGUgcm9hZCwgYW5kIGlmIHlvdSBkb24ndCBrZWVwIHlvdXIgZmVldCwgdGhlcmXigJlzIG5vIGtub3dpbmcgd2hl"
    b"cmUgeW91IG1pZ2h0IGJlIHN3ZXB0IG9mZiB0by4"
)
RFC7520_41 = (
    b"eyJhbGciOiJSUzI1NiIsImtpZCI6ImJpbGJvLmJhZ2dpbnNAaG9iYml0b24uZXhhbXBsZSJ9"
    + RFC7520_PAYLOAD
    + b".MRjdkly7_-oTPTS3AXP41iQIGKa80A0ZmTuV5MEaHoxnW2e5CZ5NlKtainoFmKZopdHM1O2U4mwzJdQx996ivp83"
    b"xuglII7PNDi84wnB-BDkoBwA78185hX-Es4JIwmDLJK3lfWRa-XtL0RnltuYv746iYTh_qHRD68BNt1uSNCrUCTJDt5a"
    b"AE6x8wW1Kt9eRo4QPocSadnHXFxnt8Is9UzpERV0ePPQdLuW3IS_de3xyIrDaLGdjluPxUAhb6L2aXic1U12podGU0KL"
    b"UQSE_oI-ZnmKJ3F4uOZDnd6QZWJushZ41Axf_fcIe8u9ipH84ogoree7vjbU5y18kDquDg"
)
RFC7520_42 = (
    b"eyJhbGciOiJQUzM4NCIsImtpZCI6ImJpbGJvLmJhZ2dpbnNAaG9iYml0b24uZXhhbXBsZSJ9"
    + RFC7520_PAYLOAD
    + b".cu22eBqkYDKgIlTpzDXGvaFfz6WGoz7fUDcfT0kkOy42miAh2qyBzk1xEsnk2IpN6-tPid6VrklHkqsGqDqHCdP6"
    b"O8TTB5dDDItllVo6_1OLPpcbUrhiUSMxbbXUvdvWXzg-UD8biiReQFlfz28zGWVsdiNAUf8ZnyPEgVFn442ZdNqiVJRm"
    b"BqrYRXe8P_ijQ7p8Vdz0TTrxUeT3lm8d9shnr2lfJT8ImUjvAA2Xez2Mlp8cBE5awDzT0qI0n6uiP1aCN_2_jLAeQTlq"
    b"RHtfa64QQSUmFAAjVKPbByi7xho0uTOcbH510a6GYmJUAfmWjwZ6oD4ifKo8DYM-X72Eaw"
)
EXAMPLES = {"RS256": RFC7515_A2, "none": RFC7515_A5, "4.1": RFC7520_41, "PS384": RFC7520_42}


@pytest.mark.parametrize("example", EXAMPLES)
def test_F74_the_examples_of_RFC_7515_and_7520_fall_on_their_algorithm(example):
    with pytest.raises(SignatureError, match="algorithm"):
        jws.verify(EXAMPLES[example], keyset.load({"keys": [jwk("release")]}))
