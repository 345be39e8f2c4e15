"""Look at the signature sector that ESP-IDF's Secure Boot v2 appends to an image.

    image, padded with 0xFF to a multiple of 4096
    signature sector: up to 3 blocks of 1216 bytes, the rest 0xFF

    off  size  block
    0    1     magic 0xE7
    1    1     2: RSA-3072 PSS, 3: ECDSA
    4    32    SHA-256 of image and padding
    36   776   RSA: modulus 384, exponent 4, two precomputed numbers 384 + 4, little-endian
    812  384   RSA: signature, little-endian
    1196 4     CRC-32 of what stands before
    1200 16    zeros

The bootloader verifies it against key digests in eFuses; nothing here can. Twinslot neither makes
nor changes it: it is part of the image's bytes, which the release signs as they are.

Source: ESP-IDF docs/en/security/secure-boot-v2.rst; esptool's espsecure.
"""

import binascii
import hashlib
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa, utils

from twinslot.errors import ImageError

SECTOR = 4096
_BLOCK = 1216
_MAGIC = 0xE7
_SCHEMES = {2: "RSA-3072 PSS", 3: "ECDSA"}


@dataclass(frozen=True)
class Signature:
    """One signature block.

    scheme: "RSA-3072 PSS" or "ECDSA".
    key_digest: what eFuses hold of the public key, hex ("" for ECDSA, whose block isn't read).
    holds: True, False, or None where this module can't judge (ECDSA).
    """

    scheme: str
    key_digest: str
    holds: bool | None


def sector_of(data: bytes, length: int) -> bytes | None:
    """The signature sector behind an image of ``length`` bytes, None where there is none."""
    start = -(-length // SECTOR) * SECTOR
    if len(data) != start + SECTOR or data[start] != _MAGIC:
        return None
    return data[start:]


def read(data: bytes, length: int) -> list[Signature] | None:
    """Read the signatures behind an image.

    Args:
        data: the whole file.
        length: bytes of the image in it, appended digest included.

    Returns:
        its signatures, or None where it has no signature sector.

    Raises:
        ImageError: the sector is damaged, or belongs to another image.
    """
    sector = sector_of(data, length)
    if sector is None:
        return None
    digest = hashlib.sha256(data[:-SECTOR]).digest()
    found = []
    for at in range(0, 3 * _BLOCK, _BLOCK):
        block = sector[at : at + _BLOCK]
        if block[0] != _MAGIC:
            break
        found.append(_signature(block, digest))
    if sector[len(found) * _BLOCK :].strip(b"\xff"):
        raise ImageError("Secure Boot signature sector: bytes behind its last block")
    return found


def _signature(block: bytes, digest: bytes) -> Signature:
    if binascii.crc32(block[:1196]).to_bytes(4, "little") != block[1196:1200]:
        raise ImageError("Secure Boot signature block: its CRC does not hold")
    if block[4:36] != digest:
        raise ImageError("Secure Boot signature block", "that of another image", digest.hex())
    scheme = _SCHEMES.get(block[1])
    if scheme is None:
        raise ImageError("Secure Boot signature block version", block[1], "2 or 3")
    if block[1] != 2:
        return Signature(scheme, "", None)
    modulus = int.from_bytes(block[36:420], "little")
    exponent = int.from_bytes(block[420:424], "little")
    try:
        public = rsa.RSAPublicNumbers(exponent, modulus).public_key()
        public.verify(
            block[812:1196][::-1],
            digest,
            padding.PSS(padding.MGF1(hashes.SHA256()), 32),
            utils.Prehashed(hashes.SHA256()),
        )
        holds = True
    except (InvalidSignature, ValueError):
        holds = False
    return Signature(scheme, hashlib.sha256(block[36:812]).hexdigest(), holds)
