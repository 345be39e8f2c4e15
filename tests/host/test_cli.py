"""The `twinslot` command as a user meets it: output, exit codes, one-line errors."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import HARDWARE, PRODUCT, Running, firmware, public_keys, serving, signing_key

import twinslot
from twinslot.errors import OtaError
from twinslot_tools import inspection
from twinslot_tools.virtual_esp32.firmware import make_firmware

TWINSLOT = [sys.executable, "-m", "twinslot_tools.cli"]


def run(*arguments: object, code: int = 0, cwd: Path | None = None) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [*TWINSLOT, *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"},
    )
    assert done.returncode == code, done
    return done


def refusal(*arguments: object) -> str:
    """Run a command that must be refused: one line on stderr, nothing on stdout."""
    done = run(*arguments, code=1)
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("twinslot: "), done.stderr
    return lines[0]


@pytest.fixture
def key(tmp_path):
    path = tmp_path / "release.key"
    path.write_text(json.dumps(signing_key().as_dict(private=True)))
    path.chmod(0o600)
    return path


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "firmware.bin"
    path.write_bytes(firmware())
    return path


@pytest.fixture
def publish(tmp_path, key, image):
    site = tmp_path / "site"
    fixed = ["--product", PRODUCT, "-H", HARDWARE, "--key", key, "--to", site]
    return lambda *more: ["publish", image, *fixed, *more]


# ---- the command itself


def test_help_is_quick_because_nothing_heavy_is_loaded():
    program = (
        "import sys, runpy; sys.argv = ['twinslot', '--help']\n"
        "try: runpy.run_module('twinslot_tools.cli', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'esptool', 'cryptography', 'joserfc', 'sqlalchemy', 'fastapi', 'mpremote'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_every_command_says_what_it_does():
    text = run("--help").stdout
    for command in ("keygen", "publish", "inspect", "serve", "board", "demo"):
        assert command in text
        described = run(command, "--help").stdout
        assert "Usage: twinslot " + command in described


def test_version_is_the_packages():
    assert run("--version").stdout.strip() == twinslot.__version__


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["publish"],
        ["publish", "x.bin"],
        ["keygen"],
        ["inspect"],
        ["serve", "x", "--port", "70000"],
        ["inspect", "x", "--nonsense"],
    ],
)
def test_wrong_usage_is_exit_code_2(arguments):
    done = run(*arguments, code=2)
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


# ---- keygen


def test_keygen_names_both_files_and_the_key(tmp_path):
    done = run("keygen", "release.key", "--bits", "2048", "--no-passphrase", cwd=tmp_path)
    assert "release.key" in done.stdout and "release.pub.json" in done.stdout
    found = json.loads(run("inspect", tmp_path / "release.pub.json", "--json").stdout)
    assert found["keys"][0]["kid"] in done.stdout
    assert found["keys"][0]["bits"] == 2048


def test_keygen_json(tmp_path):
    path = tmp_path / "k.key"
    made = json.loads(run("keygen", path, "--bits", "2048", "--no-passphrase", "--json").stdout)
    assert set(made) == {"key", "public", "kid", "bits"}
    assert Path(made["public"]).exists()


def test_keygen_refuses_to_overwrite(key):
    assert "is there already" in refusal("keygen", key, "--no-passphrase")


# ---- publish


def test_publish_tells_what_went_where(publish):
    text = run(*publish("--version", "1.0.0")).stdout
    for part in (f"{PRODUCT} 1.0.0", HARDWARE, "r/1.0.0.jws", "stable.json", "100 %"):
        assert part in text
    assert "unchanged" in run(*publish("--version", "1.0.0", "--rollout", "5")).stdout


def test_publish_json_is_all_of_stdout(publish, tmp_path):
    options = ["--rollout", "12.5", "--poll", "60", "--expires", "30d", "--security-version", "2"]
    done = run(*publish("--version", "1.0.0", "--channel", "beta", *options, "--json"))
    told = json.loads(done.stdout)
    assert done.stderr == ""
    assert told["channel"] == "beta" and told["new"] is True
    assert told["offer"]["poll"] == 60 and told["offer"]["rollout"]["percent"] == 12.5
    assert told["security_version"] == 2 and told["expires"]
    assert (tmp_path / "site" / told["release"]).exists()
    assert json.loads((tmp_path / "site" / told["pointer"]).read_text()) == told["offer"]


@pytest.mark.parametrize(
    "when", ["2099-01-01", "2099-01-01T00:00:00Z", "2099-01-01T01:00:00+01:00"]
)
def test_publish_takes_dates(publish, when):
    told = json.loads(run(*publish("--version", "1.0.0", "--expires", when, "--json")).stdout)
    assert told["expires"] == "2099-01-01T00:00:00Z"


def test_publish_refuses_in_one_line(publish, image, key, tmp_path):
    run(*publish("--version", "1.0.0"))
    assert "newer than 1.0.0" in refusal(*publish("--version", "0.9.0"))
    assert "version" in refusal(*publish("--version", "one"))
    assert "future" in refusal(*publish("--version", "1.1.0", "--expires", "2020-01-01"))
    image.write_bytes(b"not firmware [bold]at all[/bold]" * 20)
    assert "magic" in refusal(*publish("--version", "1.1.0"))
    image.unlink()
    assert "No such file" in refusal(*publish("--version", "1.1.0"))
    key.write_text("{}")
    image.write_bytes(firmware())
    assert "not an RSA private key" in refusal(*publish("--version", "1.1.0"))


@pytest.mark.parametrize(
    "options", [["--expires", "soon"], ["--expires", "1y"], ["--rollout", "many"], ["--poll", "x"]]
)
def test_publish_explains_wrong_options(publish, options):
    done = run(*publish("--version", "1.0.0", *options), code=2)
    assert options[0] in done.stderr


# ---- inspect


def inspect(path: Path, *more: object, code: int = 0) -> dict:
    return json.loads(run("inspect", path, *more, "--json", code=code).stdout)


def test_inspect_an_image(image):
    found = inspect(image)
    assert (found["kind"], found["ok"], found["chip"]) == ("image", True, "esp32")
    assert found["build"] == firmware()[-32:].hex()
    assert found["length"] == found["size"] == len(firmware())
    assert found["app"]["project"] == PRODUCT
    assert found["tree"] is None
    assert found["segment_table"][0]["address"] == "0x3f400020"


def test_inspect_shows_the_python_tree_of_a_virtual_firmware(tmp_path):
    tree = tmp_path / "tree"
    (tree / "pkg" / "deep").mkdir(parents=True)
    for name in ("main.py", "pkg/__init__.py", "pkg/deep/data.json"):
        (tree / name).write_text("x = 1\n" * 60)
    path = tmp_path / "fw.bin"
    path.write_bytes(make_firmware(tree, chip="esp32s3", version="1.0.0", project="p"))
    files = inspect(path)["tree"]["files"]
    assert files == ["main.mpy", "pkg/__init__.mpy", "pkg/deep/data.json"]


def test_inspect_says_what_is_wrong_with_an_image(image):
    data = bytearray(firmware())
    data[3000] ^= 1
    image.write_bytes(data)
    found = inspect(image, code=1)
    assert not found["ok"] and "checksum" in found["why"]


def test_inspect_a_release_with_and_without_keys(publish, tmp_path):
    run(*publish("--version", "1.0.0"))
    path = tmp_path / "site" / PRODUCT / "r" / "1.0.0.jws"
    found = inspect(path)
    assert (found["kind"], found["signature"]) == ("release", "not checked")
    assert found["manifest"]["version"] == "1.0.0"
    assert inspect(path, "--keys", public_keys(tmp_path))["signature"] == "good"
    stranger = inspect(path, "--keys", public_keys(tmp_path, 1), code=1)
    assert (stranger["signature"], stranger["ok"]) == ("unknown", False)
    token = path.read_text()
    header, payload, signature = token.split(".")
    path.write_text(".".join([header, payload, signature[:-6] + "AAAAAA"]))
    assert inspect(path, "--keys", public_keys(tmp_path), code=1)["signature"] == "bad"


def test_inspect_a_pointer_a_table_and_keys(publish, key, tmp_path):
    run(*publish("--version", "1.0.0"))
    assert inspect(tmp_path / "site" / PRODUCT / "stable.json")["offer"]["release"]
    private = run("inspect", key, "--json").stdout
    assert json.loads(private)["kind"] == "private key"
    assert signing_key().as_dict(private=True)["d"] not in private
    table = tmp_path / "table.bin"
    table.write_bytes(
        bytes.fromhex(
            "aa50010200900000004000006e76730000000000000000000000000000000000"
            "aa50001000000100000018006f74615f30000000000000000000000000000000"
        ).ljust(0xC00, b"\xff")
    )
    rows = inspect(table)["partitions"]
    assert [(r["label"], r["type"], r["subtype"], r["offset"]) for r in rows] == [
        ("nvs", "data", "nvs", 0x9000),
        ("ota_0", "app", "ota_0", 0x10000),
    ]


def test_inspect_for_people_shows_files_as_data(tmp_path):
    path = tmp_path / "stable.json"
    path.write_text('{"release": "[bold]r/1.jws[/bold]", "\\u001b[31m": "\\u001b[2J\\u202e"}')
    text = run("inspect", path).stdout
    assert "[bold]r/1.jws[/bold]" in text
    assert "\\x1b[2J\\u202e" in text and "\x1b" not in text


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x00" * 5000, b"{}", b"[]", b"{", b"a.b.c", b"\xff" * 100]
)
def test_inspect_names_what_it_does_not_know(tmp_path, content):
    path = tmp_path / "thing"
    path.write_bytes(content)
    assert str(path) in refusal("inspect", path)


@pytest.mark.parametrize(
    "content",
    [
        b"\xe9",
        b"eyJh.x.y",
        b"\xaa\x50",
        b'{"keys":[]}',
        b'{"release":5}',
        b'{"release":"r/1.jws","rollout":{"percent":101,"seed":""}}',
    ],
)
def test_inspect_describes_what_is_broken(tmp_path, content):
    path = tmp_path / "thing"
    path.write_bytes(content)
    found = inspect(path, code=1)
    assert found["ok"] is False and found["why"]


@settings(max_examples=300, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["image", "table", "pointer", "keys", "noise"]))
def test_inspect_survives_any_damage(data, kind, tmp_path_factory):
    whole = {
        "image": firmware(),
        "table": bytes.fromhex("aa50010200900000004000006e767300") + bytes(16) + b"\xff" * 0xBE0,
        "pointer": b'{"release": "r/1.0.0.jws", "rollout": {"percent": 5, "seed": "x"}}',
        "keys": json.dumps({"keys": [signing_key().as_dict(private=False)]}).encode(),
        "noise": data.draw(st.binary(max_size=600)),
    }[kind]
    content = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 4))):
        if content:
            where = data.draw(st.integers(0, min(len(content), 400) - 1))
            content[where] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content)
    try:
        found = inspection.inspect(path, {})
    except OtaError:
        return
    assert type(found["ok"]) is bool
    json.dumps(found)


@pytest.mark.parametrize("content", [b'{"a":' * 100_000, b'{"release":' * 100_000])
def test_inspect_survives_endless_nesting(tmp_path, content):
    path = tmp_path / "deep"
    path.write_bytes(content)
    assert "not JSON" in refusal("inspect", path)


def test_inspect_a_flash_file_tells_who_boots(tmp_path, image):
    flash = tmp_path / "flash.bin"
    options = ["--chip", "esp32", "--flash", "4MiB", "--slot", f"ota_0={image}"]
    run("board", "new", *options, "--out", flash)
    found = inspect(flash)
    assert found["kind"] == "flash"
    assert firmware()[-32:].hex() in json.dumps(found)
    assert found["boots"] == "ota_0"
    assert "ota_0" in run("inspect", flash).stdout


# ---- serve


def test_serve_obeys_signals_and_ends_cleanly(publish, tmp_path):
    run(*publish("--version", "1.0.0"))
    program = [*TWINSLOT, "serve"]
    with serving(tmp_path / "site", program=program) as server:
        assert isinstance(server, Running)
        with server.client() as client:
            assert client.get(f"/{PRODUCT}/stable.json").status_code == 200
        assert server.stop(signal.SIGTERM) == 0
        with pytest.raises(httpx.ConnectError), server.client() as client:
            client.get("/")


def test_serve_reports_why_it_cannot_start(tmp_path):
    done = run("serve", tmp_path / "nowhere", code=1)
    assert "not a folder" in done.stderr


def test_serve_takes_the_servers_options(publish, tmp_path):
    run(*publish("--version", "1.0.0"))
    options = ["--keys", str(public_keys(tmp_path)), "--name", "box.example.org", "--poll", "7"]
    with serving(tmp_path / "site", *options, program=[*TWINSLOT, "serve"]) as server:
        start = next(line for line in server.log() if line["event"] == "start")
        assert "box.example.org" in start["names"]
        assert not any("no --keys" in line["event"] for line in server.log())


def test_nothing_is_left_running_when_it_is_killed(publish, tmp_path):
    run(*publish("--version", "1.0.0"))
    with serving(tmp_path / "site", program=[*TWINSLOT, "serve"]) as server:
        server.stop(signal.SIGKILL)
        with pytest.raises(httpx.ConnectError), server.client() as client:
            client.get("/")
