"""Unpadded base64url of RFC 7515 section 2, in its one canonical spelling. Pure."""

import binascii

_PIECE = 256  # characters; a multiple of 4


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
