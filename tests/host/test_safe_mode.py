"""Recovery without hands: whatever the application or its configuration is, the agent is reached.

The application lies on the volume, where a slip of its author breaks it. The guard counts the
starts that fail, and lets the agent run alone, so that a release that mends it can arrive.
"""

import time

import pytest

from twinslot_tools.lab import Lab
from twinslot_tools.virtual_esp32 import vfs

BROKEN = {
    "syntax error": "def main(:\n",
    "missing module": "import nowhere\n",
    "exception at import": "import json\nMODES = json.loads('')\n",
    "boot loop": "import machine\nmachine.reset()\n",
    "end": "import sys\nsys.exit()\n",
    "endless loop": "while True:\n    pass\n",
    "watchdog": "import machine\nmachine.WDT(timeout=200)\nwhile True:\n    pass\n",
}
# The guard waits two minutes for the application; here they pass in one. The network's
# patience is long instead.
SPEED = 120
PATIENT = {"timeout": 1200, "deadline": 1200, "hang": 1200, "stable": 5}


def lab_with(folder, main):
    """A lab whose board has the guard and the application as files."""
    lab = Lab(folder, settings=PATIENT, speed=SPEED, clock="host")
    lab.__enter__()
    lab.make_board(frozen_main=False)
    files = {"/boot.py": b"import twinslot.guard\ntwinslot.guard.start()\n"}
    vfs.write_files(lab.flash, {**files, "/main.py": main.encode()})
    return lab


@pytest.mark.parametrize("how", BROKEN)
def test_F30_broken_application_still_gets_the_release_that_mends_it(tmp_path, how):
    lab = lab_with(tmp_path / "lab", BROKEN[how])
    try:
        lab.publish(lab.firmware("1.1.0"), "1.1.0")
        lab.power_on(timeout=110)
        lab.wait(lambda e: e.name == "confirmed", timeout=100)
        lab.power_off()
    finally:
        lab.__exit__()
    text = "\n".join(lab.console)
    assert "the agent runs alone" in text
    assert [b["partition"] for b in lab.boots if b["event"] == "boot"][-1] == "ota_1"


@pytest.mark.parametrize(
    "damage",
    [b"\xff" * 300, b'{"product": "other"}', None],
    ids=["blank", "incomplete", "gone"],
)
def test_F30_damaged_configuration_is_replaced_by_the_last_one_that_worked(tmp_path, damage):
    with Lab(tmp_path / "lab") as lab:
        lab.power_on()
        lab.wait(lambda e: e.name == "idle")  # it has worked, and is kept
        lab.power_off()
        if damage is None:
            vfs.write_files(lab.flash, {}, remove=["/ota.json"])
        else:
            vfs.write_files(lab.flash, {"/ota.json": damage})
        lab.publish(lab.firmware("1.1.0"), "1.1.0")
        marker = len(lab.events)
        lab.power_on()
        lab.wait(lambda e: e.name == "confirmed", start=marker)
        lab.power_off()
    assert "using the last one that worked" in "\n".join(lab.console)


def test_F30_damaged_files_of_the_configuration_are_replaced_by_those_that_worked(tmp_path):
    """Keys and certificates, each blank, or cut short."""
    with Lab(tmp_path / "lab") as lab:
        lab.power_on()
        lab.wait(lambda e: e.name == "idle")
        lab.power_off()
        for number, damage in enumerate((b"", b"-----BEGIN CERTIFICATE-----\nMIID"), 1):
            damaged = {"/ota/keys.json": damage, "/ota/ca.pem": damage}
            vfs.write_files(lab.flash, damaged)
            version = f"1.{number}.0"
            lab.publish(lab.firmware(version), version)
            marker = len(lab.events)
            lab.power_on()
            lab.wait(lambda e: e.name == "confirmed", start=marker)
            lab.power_off()
    said = "\n".join(lab.console)
    assert "keys.json is damaged; using the last one that worked" in said
    assert "ca.pem is damaged; using the last one that worked" in said


def test_a_healthy_application_is_never_left_out(tmp_path):
    """Six resets in a row, after the application ran for a while each time."""
    with Lab(tmp_path / "lab") as lab:
        lab.power_on(timeout=110)
        for _ in range(6):
            marker = len(lab.events)
            lab.wait(lambda e: e.name == "idle", start=marker)
            lab.board.press_reset()
        lab.power_off()
    assert "runs alone" not in "\n".join(lab.console)


def _volume(lab):
    found = next(p for p in lab.describe()["partitions"] if p["label"] == "vfs")
    return found["offset"], found["size"]


def _fill(lab, at, content):
    with lab.flash.open("r+b") as file:
        file.seek(at)
        file.write(content)


def _start_and_see(lab, *said):
    """Switch the board on until it says one of these; return its lines."""
    first = len(lab.console)
    lab.power_on()
    deadline = time.monotonic() + 60
    while not any(word in line for line in lab.console[first:] for word in said):
        assert time.monotonic() < deadline, lab.console[first:]
        time.sleep(0.1)
    lab.power_off()
    return "\n".join(lab.console[first:])


def _slots(lab):
    """What decides which image boots, and the images."""
    offset, _ = _volume(lab)
    parts = {p["label"]: p for p in lab.describe()["partitions"]}
    return lab.flash.read_bytes()[parts["otadata"]["offset"] : offset]


def test_F27_a_damaged_file_system_costs_no_image_and_what_can_run_runs(tmp_path):
    """One superblock, both, all of it: the agent goes on; MicroPython stops, as on any board; a
    new volume is made. Slots and otadata stay, and with the volume back all is as before."""
    with Lab(tmp_path / "lab") as lab:
        _start_and_see(lab, "idle")
        offset, size = _volume(lab)
        whole = lab.flash.read_bytes()[offset : offset + size]
        before = _slots(lab)
        _fill(lab, offset, bytes(4096))  # littlefs has its superblock twice
        assert "NO UPDATES" not in _start_and_see(lab, "idle")
        _fill(lab, offset, bytes(8192))
        assert "corrupt" in _start_and_see(lab, "corrupt")
        _fill(lab, offset, b"\xff" * size)
        assert "Performing initial setup" in _start_and_see(lab, "NO UPDATES")
        _fill(lab, offset, whole)
        _start_and_see(lab, "idle")
        assert _slots(lab) == before
