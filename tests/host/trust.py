"""Keys, signatures and an NVS for tests of what a board trusts."""

import functools
import json
from typing import Any

from joserfc import jws as jose
from joserfc.jwk import RSAKey

PRODUCT = "sensor-node"
DATE = "2027-11-20T09:00:00Z"


@functools.cache
def key(name: str, bits: int = 2048) -> RSAKey:
    """A private key; another name is another key."""
    members = RSAKey.generate_key(bits).as_dict(private=True)
    made = RSAKey.import_key(members)
    return RSAKey.import_key({**members, "kid": made.thumbprint()})


def kid(name: str) -> str:
    return key(name).kid or ""


def jwk(name: str, **members: Any) -> dict[str, Any]:
    """The public half of a key, with further members."""
    return {**key(name).as_dict(private=False), **members}


def sign(payload: bytes | dict[str, Any], signer: str = "release", **header: Any) -> bytes:
    """A compact JWS by an independent library; a header of None leaves the member out."""
    if isinstance(payload, dict):
        payload = json.dumps(payload, separators=(",", ":")).encode()
    members = {"alg": "PS256", "kid": kid(signer), **header}
    members = {name: value for name, value in members.items() if value is not None}
    return jose.serialize_compact(members, payload, key(signer), algorithms=["PS256"]).encode()


def keyring(version: Any, /, *names: str, signer: str = "root", **members: Any) -> bytes:
    """A signed keyring with these keys; ``members`` replace what it says, None leaves one out."""
    obj = {
        "schema": 1,
        "product": PRODUCT,
        "version": version,
        "expires": DATE,
        "keys": [jwk(name) for name in names],
        **members,
    }
    obj = {name: value for name, value in obj.items() if value is not None}
    return sign(obj, signer, typ="twinslot-keyring+jws")


class Nvs:
    """``esp32.NVS`` as the journal uses it; ``fail`` makes writing raise."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.numbers: dict[str, int] = {}
        self.fail = False

    def get_blob(self, name: str, buffer: bytearray) -> int:
        if name not in self.blobs:
            raise OSError(-0x1102)
        blob = self.blobs[name]
        if len(blob) > len(buffer):
            raise OSError(-0x110C)
        buffer[: len(blob)] = blob
        return len(blob)

    def set_blob(self, name: str, value: bytes) -> None:
        if self.fail:
            raise OSError(-0x1105)
        self.blobs[name] = bytes(value)

    def get_i32(self, name: str) -> int:
        if name not in self.numbers:
            raise OSError(-0x1102)
        return self.numbers[name]

    def set_i32(self, name: str, value: int) -> None:
        self.numbers[name] = value

    def erase_key(self, name: str) -> None:
        if name not in self.blobs:
            raise OSError(-0x1102)
        del self.blobs[name]

    def commit(self) -> None:
        pass


# Keys whose private half stands in a standard, and so in every JOSE library's tests.
PRINTED = {
    "RFC 7515 A.2": (
        "ofgWCuLjybRlzo0tZWJjNiuSfb4p4fAkd_wWJcyQoTbji9k0l8W26mPddxHmfHQp-Vaw-4qPCJrcS2mJPMEzP1"
        "Pt0Bm4d4QlL-yRT-SFd2lZS-pCgNMsD1W_YpRPEwOWvG6b32690r2jZ47soMZo9wGzjb_7OMg0LOL-bSf63kpa"
        "SHSXndS5z5rexMdbBYUsLA9e-KXBdQOS-UTo7WTBEMa2R2CapHg665xsmtdVMTBQY4uDZlxvb3qCo5ZwKh9kG4"
        "LT6_I5IhlJH7aGhyxXFvUK-DWNmoudF8NAco9_h9iaGNj8q2ethFkMLs91kzk2PAcDTW9gb54h4FRWyuXpoQ"
    ),
    "RFC 7517 A.1": (
        "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc"
        "_BJECPebWKRXjBZCiFV4n3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQ"
        "R0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bF"
        "TWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw"
    ),
    "RFC 7520 3.4": (
        "n4EPtAOCc9AlkeQHPzHStgAbgs7bTZLwUBZdR8_KuKPEHLd4rHVTeT-O-XV2jRojdNhxJWTDvNd7nqQ0VEiZQH"
        "z_AJmSCpMaJMRBSFKrKb2wqVwGU_NsYOYL-QtiWN2lbzcEe6XC0dApr5ydQLrHqkHHig3RBordaZ6Aj-oBHqFE"
        "HYpPe7Tpe-OfVfHd1E6cS6M1FZcD1NNLYD5lFHpPI9bTwJlsde3uhGqC0ZCuEHg8lhzwOHrtIQbS0FVbb9k3-t"
        "VTU4fg_3L_vniUFAKwuCLqKnS2BYwdq_mzSnbLY7h_qixoR7jig3__kRhuaxwUkRz5iaiQkqgc5gHdrNP5zw"
    ),
}
