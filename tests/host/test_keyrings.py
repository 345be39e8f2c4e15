"""Keys, keyrings and signers on the host: encrypted at rest, signed elsewhere, never in argv."""

import datetime as dt
import json
import os
import pty
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from joserfc.jwk import KeySet
from servers import HARDWARE, PRODUCT, firmware
from trust import PRINTED, jwk, key, kid, sign

from twinslot import jws, keyset, release
from twinslot import keyring as rings
from twinslot.errors import ConfigError, KeyringError, SignatureError
from twinslot_tools import keyrings, keys, publish, signing

TWINSLOT = [sys.executable, "-m", "twinslot_tools.cli"]
ROOT = {kid("root"): keyset.load({"keys": [jwk("root")]})[kid("root")]}


def run(*arguments, code=0, secret=None, cwd=None):
    words = [str(a) for a in arguments]
    if secret is not None:
        words += ["--passphrase-fd", "0"]
    done = subprocess.run(
        [*TWINSLOT, *words],
        input=None if secret is None else secret + "\n",
        stdin=subprocess.DEVNULL if secret is None else None,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=cwd,
        start_new_session=True,  # no terminal to ask at
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"},
    )
    assert done.returncode == code, done
    return done


def store(folder: Path, name: str, root=False) -> Path:
    path = folder / f"{name}.key"
    path.write_text(json.dumps(key(name).as_dict(private=True)))
    path.chmod(0o600)
    keys.public_path(path).write_text(keys.public_set(key(name), root))
    return path


@pytest.fixture
def site(tmp_path):
    return tmp_path / "site"


def release_into(site, version, signer, **spec):
    image = site.parent / f"{version}.bin"
    image.write_bytes(firmware(version))
    members = {"product": PRODUCT, "hardware": (HARDWARE,), "version": version, **spec}
    return publish.publish(image, publish.Spec(**members), signer, site)


def pointer(site, channel="stable"):
    return json.loads((site / PRODUCT / f"{channel}.json").read_text())


# ---- private keys at rest


def test_a_private_key_is_encrypted_by_a_passphrase_from_a_descriptor(tmp_path):
    path = tmp_path / "release.key"
    run("keygen", path, "--bits", "2048", secret="correct horse")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    content = path.read_text()
    assert content.startswith("-----BEGIN ENCRYPTED PRIVATE KEY-----")
    loaded = keys.load_private(path, lambda: b"correct horse")
    assert list(keys.load_public(keys.public_path(path))) == [loaded.kid]
    for wrong in (b"", b"correct hors", b"correct horse\n"):
        with pytest.raises(ConfigError, match="wrong passphrase"):
            keys.load_private(path, lambda wrong=wrong: wrong)
    with pytest.raises(ConfigError, match="needs its passphrase"):
        keys.load_private(path)


def test_openssl_reads_the_encrypted_key_and_its_slow_derivation(tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("no openssl")
    path = tmp_path / "release.key"
    run("keygen", path, "--bits", "2048", secret="correct horse")
    command = ["openssl", "pkey", "-in", path, "-passin", "stdin", "-noout", "-check"]
    done = subprocess.run(command, input=b"correct horse", capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    parsed = subprocess.run(
        ["openssl", "asn1parse", "-in", path], capture_output=True, text=True, check=True
    ).stdout
    assert "PBKDF2" in parsed and "hmacWithSHA256" in parsed and "aes-256-cbc" in parsed
    assert f"{600_000:X}" in parsed.replace(":0", ":")


def test_without_a_terminal_or_descriptor_nothing_is_made_and_the_way_is_told(tmp_path):
    done = run("keygen", tmp_path / "a.key", code=1)
    assert "--passphrase-fd" in done.stderr and "--no-passphrase" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("typed", ["", "\n"])
def test_an_empty_passphrase_is_refused(tmp_path, typed):
    assert "no passphrase" in run("keygen", tmp_path / "a.key", code=1, secret=typed).stderr
    assert not list(tmp_path.iterdir())


def test_a_person_is_asked_twice_at_the_terminal(tmp_path):
    def at_terminal(answers):
        child, parent = pty.fork()
        if child == 0:
            os.chdir(tmp_path)
            os.execv(TWINSLOT[0], [*TWINSLOT, "keygen", "a.key", "--bits", "2048"])
        said = b""
        for answer in answers:
            while not said.rstrip().endswith(b":"):
                said += os.read(parent, 1000)
            os.write(parent, answer + b"\n")
            said += b"|"
        try:
            while part := os.read(parent, 1000):
                said += part
        except OSError:
            pass
        return said, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    said, code = at_terminal([b"one", b"other"])
    assert code == 1 and b"differ" in said
    assert not list(tmp_path.iterdir())
    said, code = at_terminal([b"same secret", b"same secret"])
    assert code == 0 and b"same secret" not in said, "never echoed"
    assert keys.load_private(tmp_path / "a.key", lambda: b"same secret").is_private


def test_no_option_takes_a_passphrase_or_a_key_from_argv():
    for command in ("keygen", "publish", "keyring", "sign"):
        text = run(command, "--help").stdout
        assert "--passphrase-fd" in text
        assert "--passphrase " not in text.replace("--no-passphrase ", "")


def test_I9_a_sample_key_is_marked_in_both_halves_and_not_hidden(tmp_path):
    path = tmp_path / "sample.key"
    run("keygen", path, "--bits", "2048", "--demo")
    public = json.loads(keys.public_path(path).read_text())
    assert public["keys"][0]["demo"] is True
    with pytest.raises(ConfigError, match="sample"):
        keyset.load(public)
    assert keys.public_jwk(keys.load_private(path))["demo"] is True


# ---- signing elsewhere

SIGNER = """\
import json, sys
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from joserfc.jwk import RSAKey
key = RSAKey.import_key(json.load(open(sys.argv[1])))
pss = padding.PSS(padding.MGF1(hashes.SHA256()), int(sys.argv[2]))
data = sys.stdin.buffer.read()
signature = key.raw_value.sign(data, pss, hashes.SHA256())
"""


def command(folder, name, end="sys.stdout.buffer.write(signature)", salt=32):
    script = folder / "signer.py"
    script.write_text(SIGNER + end)
    return f"{sys.executable} {script} {store(folder, name)} {salt}"


def test_publish_by_a_sign_command_never_sees_the_key(tmp_path, site):
    line = command(tmp_path, "release")
    image = tmp_path / "image.bin"
    image.write_bytes(firmware())
    done = run(
        *("publish", image, "--version", "1.0.0", "--product", PRODUCT, "-H", HARDWARE),
        *("--to", site, "--sign-command", line, "--public", tmp_path / "release.pub.json"),
    )
    token = (site / PRODUCT / "r" / "1.0.0.jws").read_bytes()
    assert f"{PRODUCT} 1.0.0" in done.stdout
    from joserfc import jws as jose

    other = KeySet.import_key_set(json.loads((tmp_path / "release.pub.json").read_text()))
    assert json.loads(jose.deserialize_compact(token, other, algorithms=["PS256"]).payload)


def test_openssl_is_a_sign_command(tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("no openssl")
    path = store(tmp_path, "release")
    (tmp_path / "key.pem").write_bytes(key("release").as_pem(private=True))
    line = (
        "openssl dgst -sha256 -sigopt rsa_padding_mode:pss -sigopt rsa_pss_saltlen:32 -sign "
        f"{tmp_path}/key.pem"
    )
    signer = signing.by_command(line, keys.public_path(path))
    token = signing.document({"a": 1}, signer, "x")
    assert jws.verify(token, signer.trusted, "x") == b'{"a":1}'


@pytest.mark.parametrize(
    "end",
    [
        "import base64; print(base64.b64encode(signature).decode())",
        "import base64; print(base64.urlsafe_b64encode(signature).decode().rstrip('='))",
        "import base64; print(base64.encodebytes(signature).decode())",
    ],
    ids=["base64", "base64url", "lines"],
)
def test_a_sign_command_may_answer_in_base64(tmp_path, end):
    line = command(tmp_path, "release", end)
    signer = signing.by_command(line, tmp_path / "release.pub.json")
    signing.document(b"{}", signer, "x")


@pytest.mark.parametrize(
    ("end", "error"),
    [
        ("", "0 bytes"),
        ("sys.stdout.buffer.write(signature[:-1])", "255 bytes"),
        ("sys.stdout.buffer.write(signature * 2)", "512 bytes"),
        ("sys.stdout.buffer.write(bytes(256))", "does not belong"),
        ("print('error: no card')", "bytes"),
        ("sys.exit(7)", "exit code 7"),
    ],
)
def test_a_sign_command_that_fails_publishes_nothing(tmp_path, site, end, error):
    line = command(tmp_path, "release", end)
    signer = signing.by_command(line, tmp_path / "release.pub.json")
    with pytest.raises((SignatureError, ConfigError), match=error):
        release_into(site, "1.0.0", signer)
    assert not list(site.rglob("*"))


def test_a_sign_command_with_another_salt_or_another_key_is_found_out(tmp_path, site):
    for line in (command(tmp_path, "release", salt=20), command(tmp_path, "stranger")):
        signer = signing.by_command(line, keys.public_path(store(tmp_path, "release")))
        with pytest.raises(SignatureError, match="does not belong"):
            release_into(site, "1.0.0", signer)


@pytest.mark.parametrize("line", ["", "/no/such/program -x"])
def test_a_sign_command_that_is_none_is_named(tmp_path, line):
    store(tmp_path, "release")
    with pytest.raises(ConfigError, match="sign command"):
        signing.by_command(line, tmp_path / "release.pub.json").sign(b"")


# ---- keyrings in a site


def ring_of(site, roots=ROOT):
    token = (site / PRODUCT / "keyring.jws").read_bytes()
    return rings.parse(token, roots, PRODUCT)[:3]


def test_a_keyring_is_made_renewed_extended_and_shortened(site):
    root = signing.signer_of(key("root"))
    keyrings.update(site, PRODUCT, root, add=[jwk("first")])
    version, expires, trusted = ring_of(site)
    assert (version, set(trusted)) == (1, {kid("first")})
    year = dt.datetime.now(dt.UTC) + dt.timedelta(days=365)
    assert abs(expires - year.timestamp()) < 60
    keyrings.update(site, PRODUCT, root, expires=None)
    assert ring_of(site)[:2] == (2, None)
    keyrings.update(site, PRODUCT, root, add=[jwk("second")])
    assert set(ring_of(site)[2]) == {kid("first"), kid("second")}
    done = keyrings.update(site, PRODUCT, root, add=[jwk("third")], revoke=[kid("first")])
    assert ring_of(site)[0] == done.ring.version == 4
    assert set(ring_of(site)[2]) == {kid("second"), kid("third")}


def test_channels_are_told_and_those_that_boards_would_refuse_are_named(site):
    release_into(site, "1.0.0", key("first"))
    release_into(site, "2.0.0", key("second"), channel="beta", rollout=5, poll=60)
    before = pointer(site, "beta")
    root = signing.signer_of(key("root"))
    done = keyrings.update(site, PRODUCT, root, add=[jwk("first"), jwk("second")])
    assert done.refused == {}
    assert pointer(site)["keyring"] == 1
    assert pointer(site, "beta") == {**before, "keyring": 1}
    done = keyrings.update(site, PRODUCT, root, revoke=[kid("first")])
    assert done.refused == {"stable": "r/1.0.0.jws"}
    assert pointer(site)["keyring"] == pointer(site, "beta")["keyring"] == 2


def test_F97_publish_refuses_a_key_that_boards_no_longer_trust(site):
    root = signing.signer_of(key("root"))
    keyrings.update(site, PRODUCT, root, add=[jwk("first"), jwk("second")])
    release_into(site, "1.0.0", key("first"))
    assert pointer(site)["keyring"] == 1
    keyrings.update(site, PRODUCT, root, revoke=[kid("first")])
    with pytest.raises(ConfigError, match="not in keyring 2"):
        release_into(site, "1.1.0", key("first"))
    release_into(site, "1.1.0", key("second"), security_version=0)
    assert pointer(site) == {"release": "r/1.1.0.jws", "keyring": 2}


def test_a_release_of_a_revoked_key_is_not_published_again(site):
    root = signing.signer_of(key("root"))
    keyrings.update(site, PRODUCT, root, add=[jwk("first"), jwk("second")])
    release_into(site, "1.0.0", key("first"))
    keyrings.update(site, PRODUCT, root, revoke=[kid("first")])
    with pytest.raises(SignatureError, match="signing key"):
        release_into(site, "1.0.0", key("second"), channel="beta")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"add": [jwk("first")]}, "already"),
        ({"revoke": ["nobody"]}, "one of"),
        ({"revoke": [kid("second")]}, "one of"),
        ({"revoke": [kid("first")]}, "key set|JWK set"),
        ({"add": [jwk("second"), jwk("second")]}, "twice"),
        ({"add": [jwk("root")]}, "is a root"),
        ({"expires": dt.datetime(2020, 1, 1, tzinfo=dt.UTC)}, "to come"),
        ({"expires": dt.timedelta(0)}, "to come"),
        ({"add": [{"kty": "RSA", "n": PRINTED["RFC 7515 A.2"], "e": "AQAB"}]}, "sample"),
    ],
    ids=lambda v: v if isinstance(v, str) else next(iter(v)),
)
def test_a_keyring_that_boards_would_refuse_is_not_written(site, change, message):
    root = signing.signer_of(key("root"))
    keyrings.update(site, PRODUCT, root, add=[jwk("first")])
    before = (site / PRODUCT / "keyring.jws").read_bytes()
    with pytest.raises((ConfigError, KeyringError), match=message):
        keyrings.update(site, PRODUCT, root, **change)
    assert (site / PRODUCT / "keyring.jws").read_bytes() == before


def test_F98_the_spare_root_goes_on_where_the_first_is_lost(site):
    keyrings.update(site, PRODUCT, signing.signer_of(key("root")), add=[jwk("first")])
    spare = signing.signer_of(key("spare root"))
    with pytest.raises(KeyringError, match="not signed by this root"):
        keyrings.update(site, PRODUCT, spare)
    keyrings.update(site, PRODUCT, spare, roots=ROOT)
    both = ROOT | spare.trusted
    assert ring_of(site, both)[0] == 2


def test_a_damaged_keyring_is_not_built_upon(site):
    root = signing.signer_of(key("root"))
    keyrings.update(site, PRODUCT, root, add=[jwk("first")])
    path = site / PRODUCT / "keyring.jws"
    good = path.read_bytes()
    for bad in (b"", b"x.y.z", good[:-3], good.replace(b".", b"..", 1)):
        path.write_bytes(bad)
        with pytest.raises(KeyringError):
            keyrings.update(site, PRODUCT, root)
        with pytest.raises(KeyringError) if bad != good[:-3] else pytest.raises(ConfigError):
            release_into(site, "1.0.0", key("second"))


# ---- what the root has signed last, against what lies in the site


class Safe:
    """A root with its record, and a site for which it signed keyrings 1 (first), 2 (second)."""

    def __init__(self, site: Path):
        self.site, self.ring = site, site / PRODUCT / "keyring.jws"
        self.record = site.parent / "root.keyrings.json"
        self.sign(add=[jwk("first")])
        self.first = self.ring.read_bytes()
        self.sign(add=[jwk("second")], revoke=[kid("first")])
        self.second = self.ring.read_bytes()

    def sign(self, signer="root", **options):
        root = signing.signer_of(key(signer))
        return keyrings.update(self.site, PRODUCT, root, record=self.record, **options)


@pytest.fixture
def safe(site):
    return Safe(site)


def other_second_keyring():
    members = {"schema": 1, "product": PRODUCT, "version": 2, "keys": [jwk("first")]}
    return signing.document(members, signing.signer_of(key("root")), rings.TYPE)


@pytest.mark.parametrize("found", ["the one before", "another of its number", "none", "rubbish"])
def test_F97_F76_a_keyring_that_the_site_s_holder_has_put_back_is_not_renewed(safe, found):
    """Else its successors list the stolen key alone, under versions that boards have seen."""
    contents = {
        "the one before": safe.first,
        "another of its number": other_second_keyring(),
        "rubbish": b"x.y.z",
    }
    safe.ring.unlink()
    if found in contents:
        safe.ring.write_bytes(contents[found])
    record = safe.record.read_bytes()
    for options in ({}, {"version": 3}, {"add": [jwk("third")]}):
        with pytest.raises(KeyringError, match=r"signed keyring 2 last|not a keyring"):
            safe.sign(**options)
    assert safe.record.read_bytes() == record
    assert safe.ring.exists() == (found in contents), "nothing is written"
    safe.sign(recorded=True)
    version, _, trusted = ring_of(safe.site)
    assert (version, set(trusted)) == (3, {kid("second")})


def test_F97_a_key_that_was_revoked_is_never_listed_again(safe):
    with pytest.raises(KeyringError, match="has been revoked"):
        safe.sign(add=[jwk("first")])
    safe.sign(add=[jwk("third")])
    with pytest.raises(KeyringError, match="has been revoked"):
        safe.sign(add=[jwk("first")])
    assert ring_of(safe.site)[0] == 3


def test_F98_what_a_spare_root_signed_meanwhile_is_gone_on_from_if_that_is_said(safe):
    spare = signing.signer_of(key("spare root"))
    for change in ({"roots": ROOT}, {"add": [jwk("first")]}):
        keyrings.update(safe.site, PRODUCT, spare, **change)
    with pytest.raises(KeyringError, match="--version 5"):
        safe.sign(roots=spare.trusted)
    with pytest.raises(KeyringError, match="has been revoked"):
        safe.sign(roots=spare.trusted, version=5)
    safe.sign(roots=spare.trusted, version=5, revoke=[kid("first")])
    version, _, trusted = ring_of(safe.site)
    assert (version, set(trusted)) == (5, {kid("second")})
    safe.sign()
    assert ring_of(safe.site)[0] == 6


def test_the_record_of_another_root_s_keyring_does_not_make_the_next_one_older(safe):
    spare = signing.signer_of(key("spare root"))
    for _ in range(3):
        keyrings.update(safe.site, PRODUCT, spare, roots=ROOT)
    safe.sign(roots=spare.trusted, recorded=True)
    assert ring_of(safe.site)[0] == 6


def test_a_lost_record_is_begun_anew_with_a_version_that_boards_do_not_have_yet(safe):
    safe.record.unlink()
    safe.ring.write_bytes(safe.first)
    with pytest.raises(ConfigError, match="version of the keyring: saw 1, expected higher than 1"):
        safe.sign(version=1)
    done = safe.sign(version=8, add=[jwk("second")], revoke=[kid("first")])
    assert done.believed and done.believed.version == 1
    assert ring_of(safe.site)[0] == 8
    with pytest.raises(KeyringError, match="has been revoked"):
        safe.sign(add=[jwk("first")])
    assert safe.sign().believed is None
    assert ring_of(safe.site)[0] == 9


def test_the_record_is_there_before_anybody_can_see_what_it_tells_of(tmp_path):
    """The site can't be written: the version is spent all the same."""
    site, record = tmp_path / "site", tmp_path / "root.keyrings.json"
    root = signing.signer_of(key("root"))
    site.mkdir()
    (site / PRODUCT).symlink_to("nowhere")
    with pytest.raises(OSError):
        keyrings.update(site, PRODUCT, root, add=[jwk("first")], record=record)
    (site / PRODUCT).unlink()
    with pytest.raises(KeyringError, match="keyring 1 last"):
        keyrings.update(site, PRODUCT, root, add=[jwk("first")], record=record)
    keyrings.update(site, PRODUCT, root, recorded=True, record=record)
    assert ring_of(site)[0] == 2


def test_products_share_a_record_and_nothing_in_it(safe):
    root = signing.signer_of(key("root"))
    keyrings.update(safe.site, "lamp", root, add=[jwk("first")], record=safe.record)
    safe.sign()
    keyrings.update(safe.site, "lamp", root, record=safe.record)
    assert ring_of(safe.site)[0] == 3
    assert rings.parse((safe.site / "lamp/keyring.jws").read_bytes(), ROOT, "lamp")[0] == 2


@pytest.mark.parametrize("damage", ["", "[]", "{}x", '{"sensor-node": {}}', "forged"])
def test_a_damaged_record_stops_the_root(safe, damage):
    if damage == "forged":
        entry = json.loads(safe.record.read_text())
        entry[PRODUCT]["keyring"] = keyring("stranger").decode()
        damage = json.dumps(entry)
    safe.record.write_text(damage)
    with pytest.raises(KeyringError, match=r"root\.keyrings\.json"):
        safe.sign()


def keyring(signer):
    members = {"schema": 1, "product": PRODUCT, "version": 9, "keys": [jwk("first")]}
    return signing.document(members, signing.signer_of(key(signer)), rings.TYPE)


def test_a_keyring_resets_the_security_floor_once(safe):
    def said():
        return keyrings.read(safe.site, PRODUCT, ROOT).security_floor

    safe.sign(security_floor=0)
    assert said() == 0
    safe.sign()
    assert said() is None, "boards that raise their floor meanwhile keep it"
    for wrong in (-1, 1 << 30):
        with pytest.raises(ConfigError, match="security floor"):
            safe.sign(security_floor=wrong)


# ---- commands


def test_the_record_lies_beside_the_root_and_every_signing_goes_by_it(tmp_path, site):
    root, first = store(tmp_path, "root", root=True), store(tmp_path, "first")
    base = ("keyring", site, "--product", PRODUCT, "--root", root)
    assert "root.keyrings.json" not in run(*base, "--add", keys.public_path(first)).stderr
    ring = site / PRODUCT / "keyring.jws"
    old, record = ring.read_bytes(), tmp_path / "root.keyrings.json"
    second = store(tmp_path, "second")
    run(*base, "--add", keys.public_path(second), "--reset-security-floor", "3")
    assert "resets   the security floor to 3" in run(*base[:4]).stdout
    ring.write_bytes(old)
    assert "--recorded" in run(*base, code=1).stderr
    line = command(tmp_path, "root")
    elsewhere = ("--sign-command", line, "--public", tmp_path / "root.pub.json")
    assert "--recorded" in run(*base[:4], *elsewhere, code=1).stderr
    for version, code in ((2, 1), (3, 0), (3, 1)):
        made = {"schema": 1, "product": PRODUCT, "version": version, "keys": [jwk("second")]}
        (tmp_path / "made.json").write_text(json.dumps(made))
        run("sign", tmp_path / "made.json", "--type", "keyring", "--key", root, code=code)
    assert "keyring 4" in run(*base, "--recorded").stdout
    record.unlink()
    assert f"{record} is new: keyring 4 of the site" in run(*base).stderr


def test_a_keyring_that_is_everybody_s_is_not_signed(tmp_path):
    root = store(tmp_path, "root", root=True)
    made = {"schema": 1, "version": 1, "keys": [jwk("first")]}
    (tmp_path / "made.json").write_text(json.dumps(made))
    done = run("sign", tmp_path / "made.json", "--type", "keyring", "--key", root, code=1)
    assert "product" in done.stderr


def test_a_keyring_is_shown_as_judged_only_if_it_was(tmp_path, site):
    root, other = store(tmp_path, "root", root=True), store(tmp_path, "other", root=True)
    base = ("keyring", site, "--product", PRODUCT)
    run(*base, "--root", root, "--add", keys.public_path(store(tmp_path, "first")))
    assert "--roots judges it" in run(*base).stdout
    assert "--roots" not in run(*base, "--roots", keys.public_path(root)).stdout
    run(*base, "--roots", keys.public_path(other), code=1)


def test_the_command_shows_makes_and_tells(tmp_path, site):
    root, first = store(tmp_path, "root", root=True), store(tmp_path, "first")
    base = ("keyring", site, "--product", PRODUCT)
    assert "has no keyring" in run(*base, code=1).stderr
    made = run(*base, "--root", root, "--add", keys.public_path(first)).stdout
    assert f"{PRODUCT} keyring 1" in made and f"{kid('first')}  (new)" in made
    release_into(site, "1.0.0", key("first"))
    second = store(tmp_path, "second")
    done = run(
        *(*base, "--root", root, "--add", keys.public_path(second)),
        *("--revoke", keys.public_path(first), "--expires", "never"),
    )
    assert f"revoked  {kid('first')}" in done.stdout
    assert "stable" in done.stderr and "new version" in done.stderr
    shown = json.loads(run(*base, "--json").stdout)
    assert shown == {
        "product": PRODUCT,
        "version": 2,
        "expires": None,
        "keys": [kid("second")],
        "signed_by": kid("root"),
        "security_floor": None,
    }


def test_a_change_without_a_root_and_two_signers_are_wrong_usage(tmp_path, site):
    base = ("keyring", site, "--product", PRODUCT)
    run(*base, "--add", store(tmp_path, "first"), code=2)
    run(*base, "--root", store(tmp_path, "root"), "--sign-command", "x", code=2)
    run(*base, "--sign-command", "x", code=2)


def test_sign_and_verify_documents_made_elsewhere(tmp_path, site):
    root, first = store(tmp_path, "root", root=True), store(tmp_path, "first")
    published = release_into(site, "1.0.0", key("first"))
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps(published.manifest))
    token = tmp_path / "made.jws"
    run("sign", manifest, "--key", first, "--out", token)
    assert "holds" in run("verify", token, "--keys", keys.public_path(first)).stdout
    assert (
        "signing key"
        in run(
            *("verify", token, "--keys", keys.public_path(store(tmp_path, "second"))), code=1
        ).stderr
    )
    ring = tmp_path / "ring.json"
    ring.write_text(
        json.dumps({"schema": 1, "product": PRODUCT, "version": 1, "keys": [jwk("first")]})
    )
    signed = tmp_path / "ring.jws"
    run("sign", ring, "--type", "keyring", "--key", root, "--out", signed)
    keyfile = keys.public_path(root)
    assert "keyring" in run("verify", signed, "--keys", keyfile).stdout
    found = run("verify", token, "--keys", keyfile, "--keyring", signed, "--json").stdout
    assert json.loads(found)["kid"] == kid("first")
    # A keyring is no release, and a release no keyring, whoever signed.
    run("sign", ring, "--key", first, code=1)
    run("sign", manifest, "--type", "keyring", "--key", root, code=1)


@pytest.mark.parametrize("content", [b"", b"a.b", b"....", b"e30.e30.e30", b"W10.W10.AA"])
def test_verify_survives_what_is_no_document(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    store(tmp_path, "first")
    run("verify", tmp_path / "x", "--keys", tmp_path / "first.pub.json", code=1)


def test_a_release_is_not_taken_for_a_keyring_by_its_type_alone(tmp_path):
    token = sign({"schema": 1, "version": 1, "keys": [jwk("first")]}, "root", typ=release.TYPE)
    with pytest.raises(SignatureError, match="type"):
        rings.parse(token, ROOT, PRODUCT)
