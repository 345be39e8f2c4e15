"""The site in an attacker's hands, and the maker's tools with their keys at work on it.

Whoever holds the site can put any file there. He must not make a key sign what he likes, name a
file outside, or hold a tool up for ever.
"""

import http.server
import json
import os
import shutil
import threading

import pytest
from servers import HARDWARE, PRODUCT, firmware, publish_version, signing_key
from test_incidents import HOSTILE
from trust import jwk, key

from twinslot import base64url, jws, keyset, release
from twinslot.errors import KeyringError, OtaError, ReleaseError, SecurityVersionError
from twinslot_server import site as served
from twinslot_tools import (
    fleet_http,
    images,
    inspection,
    keyrings,
    publish,
    push,
    remote,
    signing,
    tree,
)

FLOOR = (1 << 30) - 1  # the highest there is: a board that confirms it takes nothing below again


@pytest.fixture
def site(tmp_path):
    publish_version(tmp_path / "site", "1.0.0", security_version=3)
    return tmp_path / "site"


def write_pointer(site, **members):
    (site / PRODUCT / "stable.json").write_text(json.dumps(members))


def publish_next(site, signer=None, roots=None, **options):
    image = site.parent / "1.1.0.bin"
    image.write_bytes(firmware("1.1.0"))
    members = {"product": PRODUCT, "hardware": (HARDWARE,), "version": "1.1.0", **options}
    spec = publish.Spec(**members)
    return publish.publish(image, spec, signer or signing_key(), site, roots=roots)


def signed_floor(site, trusted):
    """What the maker's key has put its name to."""
    token = (site / PRODUCT / "r" / "1.1.0.jws").read_bytes()
    return release.parse(jws.verify(token, trusted, release.TYPE)).security_version


def plant(site, version="1.0.1", **changes):
    """A release that nobody has signed, in the channel."""
    token = (site / PRODUCT / "r" / "1.0.0.jws").read_bytes()
    manifest = json.loads(base64url.b64url_decode(token.split(b".")[1]))
    manifest |= {"version": version, "security_version": FLOOR, **changes}
    parts = [base64url.b64url_encode(json.dumps(o).encode()) for o in ({"alg": "none"}, manifest)]
    (site / PRODUCT / "r" / f"{version}.jws").write_bytes(b".".join([*parts, b"AAAA"]))
    write_pointer(site, release=f"r/{version}.jws")


TRUSTED = keyset.load({"keys": [signing_key().as_dict(private=False)]})
ROOTS = keyset.load({"keys": [jwk("root")]})


# ---- what a key signs


def test_F97_a_planted_release_does_not_make_the_maker_s_key_raise_the_floor(site):
    """A board that confirms it would never again take an update."""
    plant(site)
    with pytest.raises(SecurityVersionError, match=f"{FLOOR}, on nobody's word.*--security-ver"):
        publish_next(site)
    assert not (site / PRODUCT / "r" / "1.1.0.jws").exists()
    done = publish_next(site, security_version=3)
    assert signed_floor(site, TRUSTED) == 3
    assert "r/1.0.1.jws" in done.ignored, "and it is told"


def test_F76_a_planted_version_does_not_make_the_maker_s_key_sign_a_downgrade(site):
    plant(site, version="99.0.0")
    done = publish_next(site, security_version=3)
    assert not done.manifest["downgrade"]


def test_F81_a_genuine_release_of_another_product_is_no_floor_of_this_one(site):
    publish_version(site, "1.0.1", product="lamp", security_version=FLOOR)
    shutil.copy(site / "lamp/r/1.0.1.jws", site / PRODUCT / "r")
    write_pointer(site, release="r/1.0.1.jws")
    with pytest.raises(SecurityVersionError, match=r"1\.0\.1 of lamp"):
        publish_next(site)
    shutil.copy(site / PRODUCT / "r/1.0.0.jws", site / PRODUCT / "r/2.0.0.jws")
    write_pointer(site, release="r/2.0.0.jws")
    with pytest.raises(SecurityVersionError, match=r"it is 1\.0\.0 of"):
        publish_next(site)


def test_a_floor_is_inherited_from_another_key_of_the_keyring_but_from_no_revoked_one(site):
    root = signing.signer_of(key("root"))
    first = signing_key().as_dict(private=False)
    keyrings.update(site, PRODUCT, root, add=[first, jwk("second")])
    with pytest.raises(SecurityVersionError, match="--roots"):
        publish_next(site, key("second"))
    assert publish_next(site, key("second"), ROOTS).manifest["security_version"] == 3
    (site / PRODUCT / "r" / "1.1.0.jws").unlink()
    write_pointer(site, release="r/1.0.0.jws")
    keyrings.update(site, PRODUCT, root, revoke=[signing_key().kid])
    with pytest.raises(SecurityVersionError, match="signing key"):
        publish_next(site, key("second"), ROOTS)


def test_a_keyring_that_the_root_has_not_signed_lends_no_key_its_word(site):
    root, stranger = (signing.signer_of(key(name)) for name in ("root", "stranger"))
    first = signing_key().as_dict(private=False)
    keyrings.update(site, PRODUCT, stranger, add=[first, jwk("second")])
    with pytest.raises(KeyringError, match="not signed by this root"):
        publish_next(site, key("second"), ROOTS)
    with pytest.raises(KeyringError, match="not signed by this root"):
        keyrings.update(site, PRODUCT, root)


def test_a_planted_version_is_not_taken_for_one_that_was_published(site):
    plant(site, version="1.1.0")
    write_pointer(site, release="r/1.0.0.jws")
    with pytest.raises(OtaError, match=r"1\.1\.0\.jws is there already: JWS algorithm"):
        publish_next(site)


def test_F97_a_board_on_a_cable_does_not_say_what_floor_the_maker_s_key_signs(tmp_path):
    """What is signed for it is good for every board of the product."""
    facts = {"product": PRODUCT, "hardware": HARDWARE, "current_version": "1.0.0", "floor": FLOOR}
    image = tmp_path / "1.1.0.bin"
    image.write_bytes(firmware("1.1.0"))
    with pytest.raises(remote.RemoteError, match=f"--security-version {FLOOR}"):
        push.make_release(image, push.Wish("1.1.0"), facts, signing_key(), tmp_path / "site")
    assert not (tmp_path / "site").exists()
    path = push.make_release(image, push.Wish("1.1.0", 2), facts, signing_key(), tmp_path / "site")
    assert publish.verify(path.read_bytes(), TRUSTED).security_version == 2


# ---- names


def test_tools_and_server_know_the_same_names():
    assert tree.RELEASE_NAME == served._RELEASE_NAME
    assert tree.PAYLOAD_NAME == served._PAYLOAD_NAME


NAMES = [*HOSTILE, "/dev/zero", "r/..", "r/../r/1.0.0.jws", "r/a/b.jws", "r/.jws", None, 5, [], {}]


@pytest.mark.parametrize("name", NAMES, ids=lambda n: repr(n)[:24])
def test_I5_F88_no_name_in_a_pointer_leads_the_tools_to_a_file(site, name):
    root = signing.signer_of(key("root"))
    write_pointer(site, release=name)
    before = (site / PRODUCT / "stable.json").read_bytes()
    with pytest.raises(ReleaseError, match="release"):
        publish_next(site)
    done = keyrings.update(site, PRODUCT, root, add=[signing_key().as_dict(private=False)])
    assert done.refused == {}
    assert (site / PRODUCT / "stable.json").read_bytes() == before


@pytest.mark.parametrize(
    "members",
    [{"poll": 10**9}, {"poll": "1"}, {"poll": True}, {"rollout": 1}, {"rollout": {"percent": 5}}],
    ids=str,
)
def test_a_pointer_s_other_members_are_passed_on_only_in_their_form(site, members):
    write_pointer(site, release="r/1.0.0.jws", **members)
    with pytest.raises(ReleaseError, match=r"stable\.json"):
        publish_next(site)


@pytest.mark.parametrize("where", ["secret.bin", "../../secret.bin", "/etc/passwd", "link"])
def test_I5_F88_a_planted_release_does_not_carry_files_of_the_machine_out(site, where):
    """Neither in an upload, nor over the cable, nor, piece by piece, in a delta."""
    secret = site.parent / "secret.bin"
    secret.write_bytes(firmware("9.9.9"))
    (site / PRODUCT / "secret.bin").write_bytes(firmware("9.9.9"))
    if where == "link":
        where = f"blobs/ab/{'ab' * 32}.bin"
        (site / PRODUCT / "blobs/ab").mkdir()
        (site / PRODUCT / where).symlink_to(secret)
    size = secret.stat().st_size
    manifest = publish_version(site, "1.0.0", security_version=3).manifest
    [image] = manifest["images"]
    image |= {"size": size, "payloads": [{"url": where, "encoding": "identity", "size": size}]}
    plant(site, images=[image])
    with pytest.raises(ReleaseError, match="payload"):
        publish.parts(site, PRODUCT, "1.0.1")
    with pytest.raises(OtaError, match=r"--from 1\.0\.1"):
        publish_next(site, security_version=3, bases=("1.0.1",))
    if where != "secret.bin":  # within its folder a board may ask for anything
        assert push._file(site / PRODUCT, where) is None


def test_a_base_is_the_image_that_its_release_names(site):
    [blob] = (site / PRODUCT / "blobs").rglob("*.bin")
    blob.write_bytes(firmware("0.9.0"))
    with pytest.raises(OtaError, match=r"--from 1\.0\.0"):
        publish_next(site, bases=("1.0.0",))


def test_a_release_s_files_are_found_for_an_upload(site):
    files = publish.parts(site, PRODUCT, "1.0.0")
    assert [kind for kind, _ in files] == ["release", "file"]
    assert all(path.is_file() for _, path in files)
    for version in ("9.9.9", "../r/1.0.0", "x/y"):
        with pytest.raises(ReleaseError, match="is not in"):
            publish.parts(site, PRODUCT, version)


# ---- files without an end


def endless(path, kind):
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "long":
        with path.open("wb") as file:
            file.truncate(1 << 40)  # a hole: it takes no room
    else:
        path.mkdir()


def read_by(site, name):
    """Whatever of the tools reads a file of the site; each must refuse it."""
    root = signing.signer_of(key("root"))
    add = [signing_key().as_dict(private=False)]
    path = site / PRODUCT / name
    yield lambda: inspection.inspect(path)
    yield lambda: images.load(path)
    yield lambda: push._peek(path)
    if name != "r/1.1.0.jws":
        yield lambda: publish_version(site, "1.0.0")
    yield lambda: publish_version(site, "1.1.0")
    if name == "keyring.jws":
        yield lambda: keyrings.update(site, PRODUCT, root, add=add)


@pytest.mark.parametrize("kind", ["pipe", "device", "long", "folder"])
@pytest.mark.parametrize("name", ["stable.json", "keyring.jws", "r/1.0.0.jws", "r/1.1.0.jws"])
def test_I5_no_file_of_a_site_holds_a_tool_up(site, name, kind):
    endless(site / PRODUCT / name, kind)
    for look in read_by(site, name):
        with pytest.raises((OtaError, OSError, ValueError)):
            look()
    if name != "keyring.jws":
        add = [signing_key().as_dict(private=False)]
        keyrings.update(site, PRODUCT, signing.signer_of(key("root")), add=add)


@pytest.mark.parametrize("kind", ["pipe", "device", "long"])
def test_I5_an_endless_payload_is_written_anew(site, kind):
    [blob] = (site / PRODUCT / "blobs").rglob("*.bin")
    endless(blob, kind)
    publish_version(site, "1.0.0")
    assert blob.read_bytes() == firmware("1.0.0")


class Liar(http.server.BaseHTTPRequestHandler):
    """A server that moves the image to a file of its client, or sends without an end."""

    def do_GET(self):
        if self.path.endswith("/1/download"):
            self.send_response(302)
            self.send_header("Location", f"file://{self.server.secret}")
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(bytes(1 << 20))
        except OSError:
            pass

    def log_message(self, *_):
        pass


def test_I5_F88_a_server_s_answer_is_no_path_on_the_operator_s_machine_and_has_an_end(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Liar)
    server.secret = tmp_path / "secret"
    server.secret.write_bytes(b"not the server's")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        api = fleet_http.Api(f"http://127.0.0.1:{server.server_port}", "token")
        with pytest.raises(fleet_http.ApiError, match="moved to 'file:"):
            api.fetch("firmware/1/download")
        with pytest.raises(fleet_http.ApiError, match="more than"):
            api.fetch("firmware/2/download")
    finally:
        server.shutdown()
        server.server_close()
