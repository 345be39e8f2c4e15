"""What the board's half of a push decides by itself; with a cable: tests/host/test_push.py."""

import json

from workbench import PENDING, VALID
from world import OTHER, OWN, SETTINGS, World, make_release, start

from twinslot import guard, release
from twinslot.console import confirm
from twinslot.journal import Journal
from twinslot.push import Push

HEAP = "2M"


def test_I10_the_running_build_raises_no_floor_by_a_push_before_it_is_confirmed():
    image = make_release().firmware
    running = release.Image("firmware", 0, 5000, image.sha256, OWN, image.payloads)
    world = World(firmware=running, version="2.0.0")
    on_trial = {"build": OWN, "version": "2.0.0"}
    start(world, (3, PENDING), (2, VALID), trial=on_trial, confirmed=OTHER)
    with open("/ota.json", "w") as f:
        json.dump(SETTINGS, f)
    push = Push()
    push._trust = world
    push.start("r/2.0.0.jws")
    assert push._state["state"] == "failed" and push._state["code"] == "busy"
    assert world.released == []
    assert Journal.shared().get("floor", int) == 0
    confirm()
    push.start("r/2.0.0.jws")
    guard.stop()
    assert push._state["state"] == "same"
    assert Journal.shared().get("floor", int) == world.manifest.security_version > 0
