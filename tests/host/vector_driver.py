"""Run by MicroPython: judge each vector of a file with the device's verifier; print its verdict.

micropython vector_driver.py LIB VECTORS
"""

import binascii
import hashlib
import json
import sys

sys.path.insert(0, sys.argv[1])

from twinslot import base64url, jws, keyset
from twinslot.errors import SignatureError


def judge_tokens(group):
    """JWS, and the JWK that they should hold under."""
    keys = keyset.load({"keys": [group["key"]]})
    for test in group["tests"]:
        try:
            jws.verify((test["message"] + "." + test["signature"]).encode(), keys)
            yield True
        except SignatureError:
            yield False


def judge_signatures(group):
    """Messages, signatures and a modulus, in hex, as Wycheproof has them."""
    modulus = binascii.unhexlify(group["modulus"][-group["keySize"] // 4 :])
    for test in group["tests"]:
        signature = base64url.b64url_encode(binascii.unhexlify(test["sig"]))
        digest = hashlib.sha256(binascii.unhexlify(test["msg"])).digest()
        yield jws._pss_holds(modulus, signature, digest)


with open(sys.argv[2]) as f:
    groups = json.load(f)["groups"]
verdicts = []
for group in groups:
    verdicts.extend((judge_tokens if "key" in group else judge_signatures)(group))
print(json.dumps(verdicts))
