"""Signs for tests on a board: keys of nobody's, and PS256 as RFC 8017 section 9.1.1 makes it."""

import hashlib
import json

from twinslot.base64url import b64url_encode
from twinslot.keyset import thumbprint

# Keys made for these tests; no board trusts them. As in RFC 8017 section 3.2: p, q, dP, dQ, qInv.
_KEYS = {
    "root": (
        "fb28e8d6542a0b7d68f5ba9c4a00a0988f2232b7e5417dff0583d812e4db85161f0c7a2b5b321220"
        "fe6674e01940e10344664c6dd81bae3ede20ff76dad08433d47603c17bd6e250a266e18fc7619073"
        "d2a67938544287775b8c289b66a0e820f6189bd019321b49dc2742cf9842fd67fa2ea9ba8938f01f"
        "a5a4825efa7ae2d1",
        "c8a5740b7aab548acacbd571150dd15046c521d28add6b292051a2c73e5e757d2507045d984fab8d"
        "9060acca3070c599dce29c64bc0100e88c354130eff803c09a74ec0895887b6e1ea415b461bb1a6d"
        "22110fa9f39ef4393aba4ec0bb6d90bdc2ac831927ffac64902f9a8fa634208d01201513456195a1"
        "bfd7397fb5917f4f",
        "44965a67555a9a02a86c1a86ddaaa830a13ddc8ddd9c71f4f7a396992a484c62cb1dd42b0cdf7295"
        "f20336bd9007e8aac4be0ef71c420ae67e3092b2f97461f5e97a44f24c88550b621e2850e448df72"
        "d1bec671bc88e28794c784bb535e73a5b4aee9b5fd7b727a4c15a8a81a5388f2211f27189aaaa2e0"
        "7192a84b99a97f51",
        "3c16e8e10334ca55e29416f10dd81c86891b429cd63fa7772299b041315982a01ef5b20601b6626f"
        "3bfce7e2898d4c705ee972e2ec36f4b9b03bc6b14c3c9f8b0ff6d23563eb02e420c30d48ff37d49b"
        "386799a451349a79853004a3cdbdeb6a19222704e2a8bc4d45ad2c01b749c731d353735c591bf77f"
        "0080095548e0311b",
        "c9a04364911353806eeaa72f722f1d75a9bdff7eef1e9bf2c7c5619b8e0f37d6cbee8fb400390e29"
        "45cc43d956c4b9491c076686e5f0a747514d110b22e02b565d53b5766f0e8b9ee62ad83cf9d5d598"
        "f6563bb106e5e205ffa5b622dd8edc2fff1fd69962bd4f322c251fed8ba1fea99f82de4ae8b9518e"
        "65fa7af20389ed8c",
    ),
    "release": (
        "d162fa990fb00f5e08e050a7914e8564a9a2d16f0865dd5df1d2c08fe55952587a8e6367c6825004"
        "648355888331dba70f3071742cede3101d862dc606d41ace8a151ab7c629d766dbfe246f87870d04"
        "f97570d454105c4508995ebe59517c4e632c64783327363dce2ee98d68b782166d42cfb3f90afb40"
        "3c4d348c9451923d",
        "d0272cfb1be661f1191d966f206aeaee5e02079005065a07dc5305f9316013fcc51c3b785bdfe7b8"
        "79bd5b2ca25693e67faaa7faa990a86308a1b6d4e116daf28d56f6c98c56ead3694e78c31367020d"
        "d1a84e75c800cf634d00a311367e62306fcfe4bbd8d0edd2299c3ba0cb1f1a8b857d84d1f14b3efb"
        "3ac08b108203efaf",
        "2a17e2d7186f45779b033553aa83858f8a06c061b8e7798c244c4107ec8c7b606c2ae9d2f7f6448d"
        "cd831593df040beb56c35f5b8298c437fe277656441329dc71a7f27a156d5def40b4a3b084276337"
        "a7cab3470c2b49d15afc322ec417fc8c69a588011e0f78f90dd522809a17a2204e10cb5e9be75841"
        "3e9e2abd4427ede5",
        "c569522cb9522ef364f97db1d911edcbb216c4ab5f489ddc34a5fcd55071a9a32221db7913d16fc7"
        "b295d6c1a718eb5e41184e05da095ad9c9d6ed3a4a5bcdbd1a352f0b09716976a5ba09a8215fa140"
        "0fe64abb43bb18f53993701424158af41b2714ecdefd8f7fb17cfdc44ac02e01c2d1bf45094e6ee5"
        "ffdb9a4846b68afb",
        "c61c7559141431cfef3a0befa2c3e878296a98b1d204d6fc883159c8df097153f92ce70649ba67fd"
        "e113b6634d0a918496207f8fbcfdaeacc5556cd25ad73af4673a4123c2b9d669e3661b2e08626146"
        "11b63a555272f53bb3a4b6690ef3ef1908e559c93997469253ef772fad38b6bc49475947e9b31c13"
        "f0b6934749988638",
    ),
    "second": (
        "fb9e88e8d8ed5b962dd609a9c9dff144545f4d445653d4797c7293dd03971e78f353585b64474645"
        "faf25fc0e3102f6356a99d59cd1655350b10e4cc0bbdc057bc5b316c24025eef573b4b558d237d59"
        "4d3adade3a2458661de5ccb1f0921c62a09a54cfbcbf5c7367406639556039d0065998ed0a1b1219"
        "ab4be1d8aa6936ed",
        "f01e83aead0f0533a84bdb5942adfb6e5a0dd30d76908acb613e00df71336fd45f1b3ea6f142ecf9"
        "be1e26791d7d900c3ea91a119deb23f5d86af4e8f885c317500a9683a4e476025e43cd7cd376d2b1"
        "dbfcdbd928edc4ff595d6c069e476d2d756db669c3bea1c02e9354c09255bedcacf6def7b59df94b"
        "f48e20672f0d4aeb",
        "6a6367c3fc24affad9ba8c2f6c19f1eb5039537437840e6ca77fd2a13a69650b02e7148edfe17b07"
        "0fc9f74e993338b629e8618d9cb77aa388e045bd38a1ac77ec3e2ab16cb04befaad4794fdcf34a86"
        "bdaecae7f77172a70ab125517f446818138bed9c40543104e27d4a3ba7ab9e062509312dd87e05b3"
        "30c84edfcb7ddd29",
        "a144dd4c440f027f5f5913492fef8a1ee37cc573155e9ed959c63aefd727a4c40ddc4e87f121f1e7"
        "0a3955bda280e26e56e75c0ad8f54481a988ac548c15caa1adb06ec69bc89539a1f607dcfe699fb8"
        "b4f76ef0bafc7682c992652b4cc2cc20ebed73c63521a3a15fa6b415623314ad41bdcca2b1e817b7"
        "5bd8d90a741f8961",
        "29c1db16808588996eb1a8fa9b63698a6c58507aba20af94438b5056d3943e9571f0045eb5e7ce5b"
        "480f39e204d691b75dcefbad2629c43a950fc63ac35d60b32d7df066b7a56c25b4a308459a80f60e"
        "d88c87c4f574c382cf9932959f728035520886da11d95770864646a9e06a630420878069974c044e"
        "fe6978b0bff495bc",
    ),
}
_SALT = bytes(range(32))


def _private(name):
    return [int(number, 16) for number in _KEYS[name]]


def jwk(name):
    """The public half of a key."""
    p, q = _private(name)[:2]
    n = b64url_encode((p * q).to_bytes(256, "big")).decode()
    return {"kty": "RSA", "n": n, "e": "AQAB", "alg": "PS256"}


def kid(name):
    return thumbprint(jwk(name)["n"], "AQAB")


def sign(obj, typ, name):
    """Return a compact JWS, bytes, around a document."""
    header = {"alg": "PS256", "kid": kid(name), "typ": typ}
    parts = [b64url_encode(json.dumps(part).encode()) for part in (header, obj)]
    text = b".".join(parts)
    return text + b"." + b64url_encode(_sign(hashlib.sha256(text).digest(), name))


def _sign(digest, name):
    h = hashlib.sha256(bytes(8) + digest + _SALT).digest()
    db = bytearray(256 - 32 - 1 - 33) + b"\1" + _SALT
    mask = b"".join(
        [hashlib.sha256(h + i.to_bytes(4, "big")).digest() for i in range(len(db) // 32 + 1)]
    )
    for i in range(len(db)):
        db[i] ^= mask[i]
    db[0] &= 0x7F
    m = int.from_bytes(bytes(db) + h + b"\xbc", "big")
    p, q, dp, dq, qi = _private(name)
    a, b = pow(m % p, dp, p), pow(m % q, dq, q)
    s = b + q * ((a - b) * qi % p)
    return s.to_bytes(256, "big")
