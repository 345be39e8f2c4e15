"""docs/keys.md is true: its commands are run against a virtual board, lost and stolen keys too."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from servers import firmware
from test_update import Answering

from twinslot import keyring
from twinslot_tools import keys
from twinslot_tools.lab import Lab
from twinslot_tools.virtual_esp32 import vfs

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "keys.md").read_text()
SECRET = "correct horse"


def section(title: str) -> list[tuple[str, list[str]]]:
    """The commands of a section, each with the lines it is said to print."""
    text = re.split(r"\n##+ ", TEXT.split(f"# {title}\n")[1])[0]
    steps: list[tuple[str, list[str]]] = []
    for block in re.findall(r"^```console\n(.*?)^```", text, re.S | re.M):
        for line in block.splitlines():
            if line.startswith("$ "):
                steps.append((line[2:], []))
            else:
                steps[-1][1].append(line)
    return steps


def follow(folder: Path, title: str) -> str:
    """Type the commands of a section where ``site/`` is; return what went to stderr.

    A command that is said to print ``twinslot: ...`` is one that is refused.
    """
    said = ""
    steps = section(title)
    assert steps, title
    for command, lines in steps:
        done = subprocess.run(
            command + " --passphrase-fd 0",
            input=SECRET,
            shell=True,
            cwd=folder,
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        refused = any(line.startswith("twinslot: ") for line in lines)
        assert done.returncode == refused, (command, done.stderr)
        said += done.stderr
        position = 0
        for line in lines:
            pattern = r"\s+".join(
                ".*?".join(re.escape(part) for part in word.split("…")) for word in line.split()
            )
            shown = done.stderr if refused else done.stdout
            match = re.compile(pattern).search(shown, position)
            assert match, (command, line, shown)
            position = match.end()
    return said


@pytest.fixture
def lab(tmp_path):
    with Lab(tmp_path / "lab", keys_known=False) as made:
        for version in ("1.1.0", "1.2.0", "1.3.0"):
            made.firmware(version).rename(made.folder / f"node-{version}.bin")
        yield made


def test_F97_stolen_and_lost_release_keys_are_survived_as_the_guide_says(lab):
    follow(lab.folder, "A root key and keyrings")
    key_file = (lab.folder / "root.pub.json").read_bytes()
    vfs.write_files(lab.flash, {"/ota/keys.json": key_file})
    lab.power_on(timeout=240)
    taken = [lab.wait(lambda e: e.name == "keyring").data]
    lab.wait(lambda e: e.name == "confirmed")
    marker = len(lab.events)
    follow(lab.folder, "Every year: renew")
    taken.append(lab.wait(lambda e: e.name == "keyring", start=marker).data)

    marker = len(lab.events)
    warned = follow(lab.folder, "The release key is stolen")
    assert "channel stable" in warned and "new version" in warned
    taken.append(lab.wait(lambda e: e.name == "keyring", start=marker).data)
    lab.wait(lambda e: e.name == "confirmed", start=marker)
    assert [t["version"] for t in taken] == ["1", "2", "3"]

    # The thief, who has the server too, offers his release and an older keyring.
    marker = len(lab.events)
    thief = keys.load_private(lab.folder / "release-1.key", SECRET.encode)
    ring = lab.site / "sensor-node" / "keyring.jws"
    kept = ring.read_bytes()
    ring.unlink()
    pointer = lab.site / "sensor-node" / "stable.json"
    honest = pointer.read_bytes()
    lab.publish(lab.firmware("9.0.0"), "9.0.0", key=thief, security_version=1)
    refused = lab.wait(lambda e: e.name == "failed", start=marker).data
    assert refused["code"] == "signature" and "signing key" in refused["message"]
    ring.write_bytes(kept)
    pointer.write_bytes(honest)

    marker = len(lab.events)
    follow(lab.folder, "The release key is lost")
    lab.wait(lambda e: e.name == "confirmed" and e.data["version"] == "1.3.0", start=marker)
    lab.power_off()
    stored = vfs.read_files(lab.flash)["/ota/keyring.jws"]
    assert stored == ring.read_bytes()


def test_F97_F78_a_thief_who_was_first_and_raised_the_floor_is_survived_as_the_guide_says(lab):
    """His release is genuine at the time, and confirmed: by itself a floor never sinks again."""
    follow(lab.folder, "A root key and keyrings")
    key_file = (lab.folder / "root.pub.json").read_bytes()
    vfs.write_files(lab.flash, {"/ota/keys.json": key_file})
    thief = keys.load_private(lab.folder / "release-1.key", SECRET.encode)
    lab.publish(lab.firmware("9.0.0"), "9.0.0", key=thief, security_version=(1 << 30) - 1)
    lab.power_on(timeout=240)
    lab.wait(lambda e: e.name == "confirmed" and e.data["version"] == "9.0.0")

    marker = len(lab.events)
    follow(lab.folder, "The release key is stolen")
    lab.wait(lambda e: e.name == "keyring", start=marker)
    assert lab.wait(lambda e: e.name == "idle", start=marker).data["version"] == "9.0.0"

    follow(lab.folder, "The thief raised the security version")
    lab.wait(lambda e: e.name == "confirmed" and e.data["version"] == "9.0.1", start=marker)


def test_F97_F76_a_keyring_put_back_and_a_lost_record_are_survived_as_the_guide_says(tmp_path):
    for version in ("1.1.0", "1.2.0"):
        (tmp_path / f"node-{version}.bin").write_bytes(firmware(version))
    follow(tmp_path, "A root key and keyrings")
    ring = tmp_path / "site" / "sensor-node" / "keyring.jws"
    stolen = ring.read_bytes()
    follow(tmp_path, "The release key is stolen")
    ring.write_bytes(stolen)
    follow(tmp_path, "The site has another keyring than the root")
    (tmp_path / "root.keyrings.json").unlink()
    assert "was believed" in follow(tmp_path, "The root's record is lost")
    roots = keys.load_trusted(tmp_path / "root.pub.json")[0]
    trusted = keyring.parse(ring.read_bytes(), roots, "sensor-node")[2]
    assert trusted == keys.load_public(tmp_path / "release-2.pub.json")


def test_a_poll_with_nothing_new_stays_one_request(lab):
    follow(lab.folder, "A root key and keyrings")
    ota = json.loads(vfs.read_files(lab.flash)["/ota.json"])
    settings = {"source": "static", "token": ""}
    vfs.write_files(
        lab.flash,
        {
            "/ota.json": json.dumps({**ota, **settings}).encode(),
            "/ota/keys.json": (lab.folder / "root.pub.json").read_bytes(),
        },
    )
    lab.stop_server()

    def answer(connection, head, _body):
        content = (lab.site / head.split()[1].decode().lstrip("/")).read_bytes()
        etag = b'"%s"' % hashlib.sha256(content).hexdigest().encode()
        if etag in head:
            connection.sendall(b"HTTP/1.1 304 Not Modified\r\nETag: %s\r\n\r\n" % etag)
        else:
            head = b"HTTP/1.1 200 OK\r\nETag: %s\r\nContent-Length: %d\r\n\r\n"
            connection.sendall(head % (etag, len(content)) + content)

    stand_in = Answering(lab, answer)
    stand_in.start()
    lab.power_on()
    lab.wait(lambda e: e.name == "confirmed")
    lab.wait(lambda e: e.name == "idle" and e.boot == 2)
    lab.wait(lambda e: e.name == "idle", start=len(lab.events))
    first, polls = len(stand_in.requests), len(lab.events)
    while [e.name for e in lab.events[polls:]].count("idle") < 3:
        lab.wait(lambda e: e.name == "idle", start=len(lab.events))
    requests = [r.split(b"\r\n")[0] for r in stand_in.requests[first:]]
    lab.power_off()
    stand_in.close()
    assert 3 <= len(requests) <= 4  # the fourth poll may have begun
    assert set(requests) == {b"GET /sensor-node/stable.json HTTP/1.1"}
    fetched = [r for r in stand_in.requests if b"keyring.jws" in r.split(b"\r\n")[0]]
    assert len(fetched) == 1


def test_the_guide_names_only_commands_and_options_that_exist():
    for words in re.findall(r"twinslot (\w+) ([^\n`]*)", TEXT):
        command, rest = words
        options = set(re.findall(r"--[a-z-]+", rest))
        if command in ("keygen", "keyring", "publish"):
            text = subprocess.run(
                [sys.executable, "-m", "twinslot_tools.cli", command, "--help"],
                capture_output=True,
                text=True,
                check=True,
                env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"},
            ).stdout
            for option in options - {"--passphrase-fd"}:
                assert option in text, (command, option)
