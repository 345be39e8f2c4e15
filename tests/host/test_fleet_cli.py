"""The fleet's commands, against a server process: what they print, and their exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import servers
from fleet import Board, Fleet

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


def test_a_fleet_is_run_from_the_command_line(server, tmp_path):
    boards = tmp_path / "boards.csv"
    boards.write_text("device_id,product,labels,token\nb1,sensor-node,ring=pilot,new\n")
    name, token = call(server, "device", "import", boards).strip().split(",")
    assert name == "b1" and len(token) > 20
    made = server.data.parent / "made"
    uploaded = call(
        server, "release", "upload", made, "sensor-node", "1.1.0", "--pilot-ready", "--json"
    )
    assert json.loads(uploaded)["pilot_ready"] is True
    board = Board(Remote(server), "b1")
    board.token = token
    board.poll()
    moved = call(server, "release", "promote", 1, "stable", "--dry-run")
    assert moved.strip() == "boards to move: 1"
    draft = json.loads(
        call(
            server, "rollout", "create", "sensor-node", "1.1.0", "--stage", "ring=pilot",
            "--stage", "100%", "--policy", "bake_s=0", "--json",
        )
    )  # fmt: skip
    assert (draft["state"], draft["preview"]) == ("draft", [1, 1])
    number = draft["id"]
    call(server, "rollout", "start", number)
    assert "offers 1.1.0" in call(server, "device", "explain", "b1")
    call(server, "rollout", "pause", number, "--why", "lunch")
    assert "is paused: lunch" in call(server, "device", "explain", "b1")
    assert "members=1" in call(server, "rollout", "target", number, "ring=pilot")
    call(server, "rollout", "resume", number)
    assert board.update() == "1.1.0"
    assert "complete" in call(server, "rollout", "wait", number, "--timeout", "30")
    assert "confirmed" in call(server, "device", "show", "b1")
    assert "b1" in call(server, "device", "list", "--label", "ring=pilot")
    assert call(server, "device", "label", "b1", "ring-", "site=attic").strip() == "site=attic"
    call(server, "release", "block", 1, "no good")
    assert "no good" in call(server, "release", "list")
    call(server, "release", "unblock", 1)
    assert "pinned" in call(server, "device", "pin", "b1", "1.1.0")
    assert "free" in call(server, "device", "pin", "b1")
    assert "rollout.pause" in call(server, "fleet", "audit")
    assert call(server, "fleet", "export", "devices").startswith("device_id,")
    assert json.loads(call(server, "fleet", "call", "get", "windows")) == {"windows": []}
    call(server, "device", "decommission", "b1")
    board.fleet.client.close()


def test_refusals_are_one_line_and_exit_code_1(server):
    error = call(server, "device", "show", "nobody", code=1)
    assert error == "twinslot: no_device: no device 'nobody'\n"
    assert "unauthorized" in call(server, "device", "list", code=1, TWINSLOT_TOKEN="wrong")
    gone = call(server, "rollout", "list", code=1, TWINSLOT_URL="https://127.0.0.1:1")
    assert gone.startswith("twinslot: https://127.0.0.1:1: ") and gone.count("\n") == 1


class Remote(Fleet):
    def __init__(self, server):
        self.client = server.client()
