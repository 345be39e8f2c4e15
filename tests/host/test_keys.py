"""Signing keys: made once, kept private, named alike by every JOSE library."""

import json
import os
import stat

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from joserfc.jwk import RSAKey

from twinslot import keyset
from twinslot.errors import ConfigError
from twinslot_tools import keys

PEM = (
    serialization.Encoding.PEM,
    serialization.PrivateFormat.PKCS8,
    serialization.NoEncryption(),
)


def test_keygen_makes_a_private_file_and_the_set_a_device_takes(tmp_path):
    path = tmp_path / "release.key"
    kid = keys.generate(path, 2048)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    public = json.loads((tmp_path / "release.pub.json").read_text())
    assert list(keyset.load(public)) == [kid]
    assert RSAKey.import_key(public["keys"][0]).thumbprint() == kid
    assert set(public["keys"][0]) == {"kty", "n", "e", "kid"}


def test_default_key_has_3072_bits(tmp_path):
    keys.generate(tmp_path / "k.key")
    assert len(next(iter(keys.load_public(tmp_path / "k.pub.json").values()))) * 8 == 3072


@pytest.mark.parametrize("existing", ["release.key", "release.pub.json"])
def test_a_key_is_never_overwritten(tmp_path, existing):
    (tmp_path / existing).write_text("precious")
    with pytest.raises(ConfigError, match="is there already"):
        keys.generate(tmp_path / "release.key", 2048)
    assert [p.name for p in tmp_path.iterdir()] == [existing]
    assert (tmp_path / existing).read_text() == "precious"


@pytest.mark.parametrize("bits", [0, 1024, 2047, 3000, 8192])
def test_a_size_no_device_takes_is_refused(tmp_path, bits):
    with pytest.raises(ConfigError, match="2048, 3072 or 4096"):
        keys.generate(tmp_path / "release.key", bits)
    assert not list(tmp_path.iterdir())


def test_a_pem_key_signs_under_its_thumbprint(tmp_path):
    path = tmp_path / "release.pem"
    path.write_bytes(rsa.generate_private_key(65537, 2048).private_bytes(*PEM))
    path.chmod(0o600)
    key = keys.load_private(path)
    assert key.kid == key.thumbprint()


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_a_private_key_that_others_can_read_is_refused_with_the_remedy(tmp_path):
    path = tmp_path / "release.key"
    keys.generate(path, 2048)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        keys.load_private(path)


def _private(tmp_path, content):
    path = tmp_path / "bad.key"
    path.write_bytes(content)
    path.chmod(0o600)
    return path


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        b"{}",
        b'{"kty":"RSA"}',
        b"[1]",
        b'{"kty":"oct","k":"c2VjcmV0c2VjcmV0"}',
        b"-----BEGIN PRIVATE KEY-----\nc2VjcmV0c2VjcmV0\n-----END PRIVATE KEY-----\n",
        ec.generate_private_key(ec.SECP256R1()).private_bytes(*PEM),
    ],
)
def test_what_is_no_rsa_private_key_is_refused_without_being_quoted(tmp_path, content):
    with pytest.raises(ConfigError) as caught:
        keys.load_private(_private(tmp_path, content))
    assert "not an RSA private key" in str(caught.value)
    assert "c2VjcmV0" not in str(caught.value)


def test_a_public_key_cannot_sign(tmp_path):
    keys.generate(tmp_path / "release.key", 2048)
    one = json.loads((tmp_path / "release.pub.json").read_text())["keys"][0]
    with pytest.raises(ConfigError, match="public key"):
        keys.load_private(_private(tmp_path, json.dumps(one).encode()))


@pytest.mark.parametrize(("exponent", "bits"), [(3, 2048), (65537, 1024)])
@pytest.mark.filterwarnings("ignore")  # libraries warn of such keys too
def test_a_key_that_devices_refuse_is_refused_when_signing(tmp_path, exponent, bits):
    weak = rsa.generate_private_key(exponent, bits).private_bytes(*PEM)
    with pytest.raises(ConfigError):
        keys.load_private(_private(tmp_path, weak))


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"keys":[]}', b'{"keys":[{"kty":"EC"}]}', b"\xff"]
)
def test_what_is_no_public_key_set_is_refused(tmp_path, content):
    path = tmp_path / "k.pub.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"k\.pub\.json"):
        keys.load_public(path)


def test_a_private_key_is_no_device_key(tmp_path):
    path = tmp_path / "release.key"
    keys.generate(path, 2048)
    content = json.loads(path.read_text())
    (tmp_path / "leak.json").write_text(json.dumps({"keys": [content]}))
    with pytest.raises(ConfigError, match="private key"):
        keys.load_public(tmp_path / "leak.json")
