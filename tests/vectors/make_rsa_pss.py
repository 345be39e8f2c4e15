"""Write rsa_pss_sha256.json: signatures that hold, and the ways in which they may not.

    python tests/vectors/make_rsa_pss.py

Kinds of damage after Project Wycheproof's RSASSA-PSS vectors and RFC 8017 section 9.1.2. Run once;
the private keys are thrown away, so that nobody can come to use them.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import rsa

from twinslot import base64url, keyset

HERE = Path(__file__).parent
EIGHT = bytes(8)
SALT = bytes(range(1, 33))
# DigestInfo of SHA-256, RFC 8017 section 9.2.
DIGEST_INFO = bytes.fromhex("3031300d060960864801650304020105000420")


def sha(data: bytes, name: str = "sha256") -> bytes:
    return hashlib.new(name, data).digest()


def mgf(seed: bytes, size: int, name="sha256", first=0, order="big") -> bytes:
    out, counter = b"", first
    while len(out) < size:
        out += sha(seed + counter.to_bytes(4, order), name)
        counter += 1
    return out[:size]


class Key:
    def __init__(self, bits: int):
        self.bits, self.size = bits, bits // 8
        numbers = rsa.generate_private_key(65537, bits).private_numbers()
        self.n, self.d = numbers.public_numbers.n, numbers.d
        modulus = self.n.to_bytes(self.size, "big")
        self.jwk = {"kty": "RSA", "n": base64url.b64url_encode(modulus).decode(), "e": "AQAB"}
        self.kid = keyset.thumbprint(self.jwk["n"], "AQAB")

    def message(self, payload: bytes) -> bytes:
        header = json.dumps({"alg": "PS256", "kid": self.kid}, separators=(",", ":")).encode()
        return base64url.b64url_encode(header) + b"." + base64url.b64url_encode(payload)

    def raw(self, encoded: bytes | int) -> int:
        """The private key's operation, whatever it is applied to."""
        if isinstance(encoded, bytes):
            encoded = int.from_bytes(encoded, "big")
        assert 0 <= encoded < self.n
        return pow(encoded, self.d, self.n)

    def octets(self, s: int) -> bytes:
        return s.to_bytes(max(self.size, (s.bit_length() + 7) // 8), "big")

    def encode(
        self,
        message: bytes,
        salt: bytes = SALT,
        *,
        digest: bytes | None = None,
        lead: bytes = EIGHT,
        swapped: bool = False,
        hashed: str = "sha256",
        padding: bytes | None = None,
        separator: int = 1,
        trailer: bytes = b"\xbc",
        flip_h: int | None = None,
        top: int | None = None,
        masked: bool = True,
        **mask,
    ) -> bytes:
        """EMSA-PSS-ENCODE, each step of which can go wrong."""
        digest = sha(message, hashed) if digest is None else digest
        parts = lead + (salt + digest if swapped else digest + salt)
        h = sha(parts, hashed)
        if flip_h is not None:
            h = bytes(b ^ (1 if i == flip_h % len(h) else 0) for i, b in enumerate(h))
        length = self.size - len(h) - len(trailer)
        pad = bytes(length - len(salt) - 1) if padding is None else padding
        db = pad + bytes([separator]) + salt
        assert len(db) == length
        stream = mgf(h, length, **mask) if masked else bytes(length)
        out = bytearray(a ^ b for a, b in zip(db, stream, strict=True))
        out[0] &= 0x7F
        if top is not None:
            out[0] |= top
        return bytes(out) + h + trailer


def padded(key: Key, where: int, value: int = 1) -> bytes:
    pad = bytearray(key.size - 32 - 32 - 2)
    pad[where] = value
    return bytes(pad)


def good(key: Key) -> Iterator[tuple[str, bytes, bytes]]:
    for comment, payload in {
        "empty payload": b"",
        "one byte": b"a",
        "JSON": b'{"product":"sensor-node"}',
        "all bytes": bytes(range(256)),
        "a kilobyte": b"\xa5" * 1024,
    }.items():
        message = key.message(payload)
        yield comment, message, key.octets(key.raw(key.encode(message, os.urandom(32))))
    message = key.message(b"{}")
    for comment, salt in {"salt of zeros": bytes(32), "salt of ones": b"\xff" * 32}.items():
        yield comment, message, key.octets(key.raw(key.encode(message, salt)))
    for number in range(200_000):  # a hash that begins or ends strangely
        message = key.message(b"%d" % number)
        if sha(message)[:2] == b"\0\0":
            yield "hash begins with zeros", message, key.octets(key.raw(key.encode(message)))
            break
    for number in range(2000):  # a signature with a leading zero byte keeps it
        message = key.message(b"s%d" % number)
        signature = key.octets(key.raw(key.encode(message)))
        if signature[0] == 0:
            yield "signature begins with zero", message, signature
            break


def encodings(key: Key, message: bytes) -> dict[str, bytes]:
    pad = key.size - 66
    longest = bytes(i & 0xFF for i in range(key.size - 34))
    cases = {
        **{f"salt of {n} bytes": key.encode(message, bytes(range(n))) for n in (0, 1, 20, 31)},
        **{f"salt of {n} bytes": key.encode(message, bytes(range(n))) for n in (33, 48, 64)},
        "salt as long as can be": key.encode(message, longest),
        "trailer bd": key.encode(message, trailer=b"\xbd"),
        "trailer 00": key.encode(message, trailer=b"\x00"),
        "trailer ff": key.encode(message, trailer=b"\xff"),
        "trailer 33cc": key.encode(message, trailer=b"\x33\xcc"),
        "no trailer": key.encode(message, trailer=b""),
        "separator 00": key.encode(message, separator=0),
        "separator 02": key.encode(message, separator=2),
        "separator 81": key.encode(message, separator=0x81),
        "separator ff": key.encode(message, separator=0xFF),
        "separator missing, salt 33": key.encode(message, b"\0" + SALT, separator=0),
        "first padding byte not zero": key.encode(message, padding=padded(key, 0)),
        "second padding byte not zero": key.encode(message, padding=padded(key, 1)),
        "middle padding byte not zero": key.encode(message, padding=padded(key, pad // 2, 0x80)),
        "last padding byte not zero": key.encode(message, padding=padded(key, -1)),
        "padding of ff": key.encode(message, padding=b"\x7f" + b"\xff" * (pad - 1)),
        "separator early": key.encode(message, padding=padded(key, pad // 3)),
        "first bit of H flipped": key.encode(message, flip_h=0),
        "last bit of H flipped": key.encode(message, flip_h=-1),
        "middle bit of H flipped": key.encode(message, flip_h=16),
        "hash of another message": key.encode(message, digest=sha(message + b"x")),
        "hash of zeros": key.encode(message, digest=bytes(32)),
        "hash empty": key.encode(message, digest=b""),
        "hash of the payload only": key.encode(message, digest=sha(message.split(b".")[1])),
        "hash hashed twice": key.encode(message, digest=sha(sha(message))),
        "M' without its zeros": key.encode(message, lead=b""),
        "M' with seven zeros": key.encode(message, lead=bytes(7)),
        "M' with ones": key.encode(message, lead=b"\1" * 8),
        "M' with salt first": key.encode(message, swapped=True),
        "mask by SHA-1": key.encode(message, name="sha1"),
        "mask by SHA-512": key.encode(message, name="sha512"),
        "mask counts from 1": key.encode(message, first=1),
        "mask counts little-endian": key.encode(message, order="little"),
        "no mask": key.encode(message, masked=False),
        "hash by SHA-1": key.encode(message, hashed="sha1", name="sha1"),
        "hash by SHA-384": key.encode(message, hashed="sha384", name="sha384"),
        "hash by SHA-512": key.encode(message, hashed="sha512", name="sha512"),
        "hash by SHA3-256": key.encode(message, hashed="sha3_256", name="sha3_256"),
        "PKCS #1 v1.5": b"\0\1" + b"\xff" * (key.size - 54) + b"\0" + DIGEST_INFO + sha(message),
        "the bare hash": sha(message).rjust(key.size, b"\0"),
        "the hash at the top": b"\0" + sha(message) + bytes(key.size - 33),
        "EM of zeros": bytes(key.size),
        "EM of ones": b"\x00" + b"\xff" * (key.size - 1),
        "EM shifted by a byte": b"\0" + key.encode(message)[:-1],
    }
    topped = int.from_bytes(key.encode(message, top=0x80), "big")
    number = 0
    while topped >= key.n:  # the top bit may be set only in a number below n
        number += 1
        topped = int.from_bytes(key.encode(message, number.to_bytes(32, "big"), top=0x80), "big")
    cases["top bit set"] = topped.to_bytes(key.size, "big")
    return cases


def bad(key: Key) -> Iterator[tuple[str, bytes, bytes]]:
    message = key.message(b'{"version":"1.0.0"}')
    for comment, encoded in encodings(key, message).items():
        yield comment, message, key.octets(key.raw(encoded))
    s = key.raw(key.encode(message))
    signature = key.octets(s)
    for comment, value in {
        "s is 0": 0,
        "s is 1": 1,
        "s is 2": 2,
        "s is n - 1": key.n - 1,
        "s is n": key.n,
        "s is n + 1": key.n + 1,
        "s + n": s + key.n,
        "n - s": key.n - s,
        "s squared": s * s % key.n,
        "s + 1": s + 1,
        "s encoded, not signed": int.from_bytes(key.encode(message), "big"),
        "all ones": (1 << key.bits) - 1,
    }.items():
        yield comment, message, key.octets(value)
    yield from (
        ("empty signature", message, b""),
        ("one zero byte", message, b"\0"),
        ("leading zero", message, b"\0" + signature),
        ("trailing zero", message, signature + b"\0"),
        ("first byte missing", message, signature[1:]),
        ("last byte missing", message, signature[:-1]),
        ("half", message, signature[: key.size // 2]),
        ("twice", message, signature * 2),
        ("backwards", message, signature[::-1]),
        ("words swapped", message, signature[key.size // 2 :] + signature[: key.size // 2]),
        ("of another message", key.message(b'{"version":"1.0.1"}'), signature),
        ("as text", message, signature.hex().encode()),
    )


def main() -> None:
    groups = []
    for bits in (2048, 3072, 4096):
        key = Key(bits)
        tests = [
            {
                "comment": comment,
                "message": message.decode(),
                "signature": base64url.b64url_encode(signature).decode(),
                "valid": valid,
            }
            for valid, cases in ((True, good(key)), (False, bad(key)))
            for comment, message, signature in cases
        ]
        groups.append({"bits": bits, "key": key.jwk, "tests": tests})
    text = json.dumps({"algorithm": "PS256", "groups": groups}, indent=0)
    (HERE / "rsa_pss_sha256.json").write_text(text + "\n")
    print(sum(len(g["tests"]) for g in groups), "vectors")


if __name__ == "__main__":
    main()
