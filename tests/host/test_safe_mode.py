"""Recovery without hands: whatever the application or its configuration is, the agent is reached.

The application lies on the volume, where a slip of its author breaks it. The guard counts the
starts that fail, and lets the agent run alone, so that a release that mends it can arrive.
"""

import pytest

from twinslot_tools.lab import Lab
from twinslot_tools.virtual_esp32 import vfs

BROKEN = {
    "syntax error": "def main(:\n",
    "missing module": "import nowhere\n",
    "exception at import": "import json\nMODES = json.loads('')\n",
    "boot loop": "import machine\nmachine.reset()\n",
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
