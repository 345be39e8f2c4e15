"""The fleet's commands, against a server process: what they print, and their exit codes."""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import servers
import typer
from fleet import Board, Fleet
from test_uploads import form_of

from twinslot_tools import fleet_cli, keys
from twinslot_tools.fleet_http import Api

TWINSLOT = Path(sys.executable).with_name("twinslot")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "site").mkdir()
    (folder / "made").mkdir()
    servers.publish_version(folder / "made", "1.1.0")
    with servers.serving(folder / "site", "--keys", str(servers.public_keys(folder))) as running:
        yield running


def call(server, *arguments, code=0, **environment):
    env = {
        **os.environ,
        "TWINSLOT_URL": server.url,
        "TWINSLOT_TOKEN": server.token("operator"),
        "TWINSLOT_CA": str(server.data / "server.crt"),
        **environment,
    }
    done = subprocess.run(
        [TWINSLOT, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=env,
        timeout=60,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.fixture
def typed(monkeypatch, capsys):
    """Return what runs a command in this process, as an administrator; it returns its stdout."""

    def run(*arguments):
        command = typer.main.get_command(getattr(fleet_cli, arguments[0]))
        code = command([str(a) for a in arguments[1:]], standalone_mode=False)
        assert not code, arguments
        return capsys.readouterr().out

    def at(running):
        monkeypatch.setenv("TWINSLOT_URL", running.url)
        monkeypatch.setenv("TWINSLOT_TOKEN", running.token("operator"))
        monkeypatch.setenv("TWINSLOT_CA", str(running.data / "server.crt"))

    run.at = at
    return run


def test_a_fleet_is_run_from_the_command_line(server, tmp_path, typed):
    typed.at(server)
    boards = tmp_path / "boards.csv"
    boards.write_text("device_id,product,labels,token\nb1,sensor-node,ring=pilot,new\n")
    name, token = typed("device", "import", boards).strip().split(",")
    assert name == "b1" and len(token) > 20
    made = server.data.parent / "made"
    uploaded = typed("release", "upload", made, "sensor-node", "1.1.0", "--pilot-ready", "--json")
    assert json.loads(uploaded)["pilot_ready"] is True
    board = Board(Remote(server), "b1")
    board.token = token
    board.poll()
    moved = typed("release", "promote", 1, "stable", "--dry-run")
    assert moved.strip() == "boards to move: 1"
    draft = json.loads(
        typed(
            "rollout", "create", "sensor-node", "1.1.0", "--stage", "ring=pilot",
            "--stage", "100%", "--policy", "bake_s=0", "--json",
        )
    )  # fmt: skip
    assert (draft["state"], draft["preview"]) == ("draft", [1, 1])
    number = draft["id"]
    typed("rollout", "start", number)
    assert "offers 1.1.0" in typed("device", "explain", "b1")
    typed("rollout", "pause", number, "--why", "lunch")
    assert "is paused: lunch" in typed("device", "explain", "b1")
    assert "members=1" in typed("rollout", "target", number, "ring=pilot")
    typed("rollout", "resume", number)
    assert board.update() == "1.1.0"
    assert "complete" in typed("rollout", "wait", number, "--timeout", "30")
    assert "confirmed" in typed("device", "show", "b1")
    assert " confirmed 1.1.0" in typed("device", "log", "b1")
    assert "b1" in typed("device", "list", "--label", "ring=pilot")
    assert typed("device", "label", "b1", "ring-", "site=attic").strip() == "site=attic"
    typed("release", "block", 1, "no good")
    assert "no good" in typed("release", "list")
    typed("release", "unblock", 1)
    assert "pinned" in typed("device", "pin", "b1", "1.1.0")
    assert "free" in typed("device", "pin", "b1")
    assert "rollout.pause" in typed("fleet", "audit")
    assert typed("fleet", "export", "devices").startswith("device_id,")
    assert json.loads(typed("fleet", "call", "get", "windows")) == {"windows": []}
    typed("device", "decommission", "b1")
    board.fleet.client.close()


# Every command that changes or shows the fleet, in an order that works on a new server.
EVERYTHING = """
fleet status
fleet call get labels
fleet settings
fleet set poll '{{"default": 600}}'
fleet set poll null
device accept --all --label ring=pilot
device import {boards}
device list --enrolment accepted --label ring=pilot
device show b1
device explain b1
fleet filter save pilots --label ring=pilot --enrolment accepted
fleet filter list
device list --filter pilots
fleet filter remove pilots
device label b1 site=attic
device hold b1
device accept b1
device pin b1
device token b1
fleet label describe site "where it is"
fleet label list
release upload {made} sensor-node 1.1.0 --pilot-ready
release upload {made} sensor-node 0.9.0 --pilot-ready
release list
release mark 1 --stable --notes better
release show 1
release promote 1 stable --dry-run
release promote 1 stable
release download 1 {folder}/image.bin
release block 1 bad
release unblock 1
fleet window add 22:00 04:00 --label site=attic --zone Europe/Berlin --days mon,tue
fleet window list
fleet window remove 1
fleet schedule add weekly "0 9 * * mon" gc
fleet schedule list
fleet schedule remove 1
fleet job create 1 --label ring=pilot --dry-run
fleet job create 1 --node b1 --force
fleet job list --status pending
fleet job pending
fleet job progress 1 b1 --part 3
fleet job show 1
fleet job cancel 1
rollout create sensor-node 1.1.0 --stage 100% --name June --at 2040-12-01T09:00+01:00
rollout list
rollout show 1
rollout start 1
rollout pause 1 --why lunch
rollout resume 1
rollout expand 1
rollout target 1 ring=pilot
rollout policy 1 failure_percent=10 gate=true
rollout back 1 0.9.0
rollout abort 2
fleet user set anna operator --password-fd {password}
fleet user list
fleet user remove anna
fleet webhook add https://example.org/hook --event rollout.*
fleet webhook list
fleet webhook remove 1
fleet audit
fleet export attempts
release upload {made} sensor-node 1.2.0
release remove 3
release gc
device decommission b1
"""


def test_every_call_of_the_api_has_its_command(tmp_path, monkeypatch, typed):
    """The routes are those of the application: one that is added needs a command, and a line."""
    for place in ("site", "made"):
        (tmp_path / place).mkdir()
    for version in ("1.1.0", "1.2.0", "0.9.0"):
        servers.publish_version(tmp_path / "made", version, downgrade=version == "0.9.0")
    boards = tmp_path / "boards.csv"
    boards.write_text(
        "device_id,product,hardware,labels,token\nb1,sensor-node,ESP32_GENERIC,ring=pilot,new\n"
    )
    keys = str(servers.public_keys(tmp_path))
    seen = set()
    for name in ("call", "fetch"):
        real = getattr(Api, name)

        def spy(api, *arguments, real=real, **options):
            method, path = arguments[:2] if real.__name__ == "call" else ("GET", arguments[0])
            seen.add((method.upper(), f"/api/v1/{path.partition('?')[0]}"))
            return real(api, *arguments, **options)

        monkeypatch.setattr(Api, name, spy)
    with servers.serving(tmp_path / "site", "--keys", keys) as server:
        typed.at(server)
        for line in EVERYTHING.strip().splitlines():
            reader, writer = os.pipe()
            os.write(writer, b"correct horse battery\n")
            os.close(writer)
            places = {"boards": boards, "made": tmp_path / "made", "folder": tmp_path}
            if line.startswith("rollout back"):  # only who took it is sent back
                board = Board(Remote(server), "b1", version="1.1.0")
                board.token = typed("device", "token", "b1").split()[-1]
                board.poll()
                board.fleet.client.close()
            words = shlex.split(line.format(**places, password=reader))
            assert typed(*words).strip(), line
            os.close(reader)
        assert (tmp_path / "image.bin").read_bytes() == servers.firmware("1.1.0")
        paths = Api(server.url, "", server.data / "server.crt").call("GET", "openapi.json")[
            "paths"
        ]
    by_boards = {"/api/v1/check-update", "/api/v1/report-status"}
    missing = [
        (method.upper(), path)
        for path, methods in paths.items()
        for method in methods
        if path not in by_boards
        and not any(
            m == method.upper() and re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", path), p)
            for m, p in seen
        )
    ]
    assert missing == []


def test_refusals_are_one_line_and_exit_code_1(server):
    error = call(server, "device", "show", "nobody", code=1)
    assert error == "twinslot: no_device: no device 'nobody'\n"
    assert "unauthorized" in call(server, "device", "list", code=1, TWINSLOT_TOKEN="wrong")
    gone = call(server, "rollout", "list", code=1, TWINSLOT_URL="https://127.0.0.1:1")
    assert gone.startswith("twinslot: https://127.0.0.1:1: ") and gone.count("\n") == 1


def test_an_image_that_can_not_boot_is_refused_by_what_is_wrong_with_it(server, tmp_path):
    """The whole image is signed and hashed as it is: what is wrong is a bit of its code."""
    image = bytearray(servers.firmware("1.4.0"))
    image[5000] ^= 1
    image[-32:] = hashlib.sha256(image[:-32]).digest()
    form = dict(form_of(bytes(image), version="1.4.0"))
    product = tmp_path / servers.PRODUCT
    digest = hashlib.sha256(image).hexdigest()
    for path, content in (
        (product / "r" / "1.4.0.jws", form["release"][1]),
        (product / "blobs" / digest[:2] / f"{digest}.bin", form["file"][1]),
    ):
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    upload = "release", "upload", tmp_path, servers.PRODUCT, "1.4.0"
    error = call(server, *upload, code=1)
    assert error.startswith("twinslot: image: blobs/") and error.count("\n") == 1
    assert "checksum 0x" in error
    assert "1.4.0" not in call(server, "release", "list")


class Remote(Fleet):
    def __init__(self, server):
        self.client = server.client()


def test_publish_makes_deltas_from_what_the_fleet_runs(tmp_path):
    """The most common first; a build that is not in the site, or is the new one, gets none."""
    site = tmp_path / "made"
    site.mkdir()
    (tmp_path / "site").mkdir()
    for version in ("1.0.0", "1.1.0", "1.2.0"):  # nobody runs 1.2.0
        servers.publish_version(site, version)
    keys.generate(tmp_path / "r.key", 2048)
    (tmp_path / "2.0.0.bin").write_bytes(servers.firmware("2.0.0"))
    keyed = "--keys", str(servers.public_keys(tmp_path))
    with servers.serving(tmp_path / "site", *keyed) as running:
        fleet = Remote(running)
        runs = ("1.1.0", "1.0.0", "1.1.0", "0.9.0", "2.0.0")
        for number, version in enumerate(runs):
            board = Board(fleet, f"b{number}", version)
            board.token = running.token("device")
            board.poll()
        fleet.client.close()
        command = ["publish", tmp_path / "2.0.0.bin", "--version", "2.0.0", "--product"]
        command += [servers.PRODUCT, "--hardware", servers.HARDWARE, "--key", tmp_path / "r.key"]
        command += ["--to", site, "--from", "fleet", "--security-version", "0"]
        refused = call(running, *command, code=1, TWINSLOT_TOKEN="none")
        assert refused.startswith("twinslot: ") and "token" in refused
        assert not (site / servers.PRODUCT / "r" / "2.0.0.jws").exists()
        told = json.loads(call(running, *command, "--json"))
    assert [(r["version"], r["boards"], r["taken"]) for r in told["fleet"]] == [
        ("1.1.0", 2, True),
        ("1.0.0", 1, True),
        ("0.9.0", 1, False),
    ]
    made = [row["payload"] for row in told["sizes"]]
    assert made[2:] == ["delta from 1.1.0", "delta from 1.0.0"]
