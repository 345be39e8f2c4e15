"""boot.py and main.py, a user's starting point: they run whatever ota.json says."""

import json
import re
import shutil
from pathlib import Path

import pytest
from prompts import Attended

import twinslot
from twinslot_tools.lab import Lab
from twinslot_tools.virtual_esp32 import vfs
from twinslot_tools.virtual_esp32.board import Board
from twinslot_tools.virtual_esp32.firmware import make_firmware

ROOT = Path(__file__).parents[2]
GOOD = {
    "product": "sensor-node",
    "url": "https://127.0.0.1:1/",
    "fingerprint": "00" * 32,
    "keys": "/ota/keys.json",
    "ntp": "",
    "timeout": 1,
}
# The example, and a line each second that tells that its application lives.
BEAT = "        beats += 1\n"
MAIN = (ROOT / "main.py").read_text()
assert BEAT in MAIN
MAIN = MAIN.replace(BEAT, BEAT + "        beats % 10 or print('beat', beats)\n")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with Lab(tmp_path_factory.mktemp("lab"), settings={"hang": 30}) as made:
        made.pristine = made.flash.read_bytes()
        yield made


@pytest.fixture(scope="module")
def base(lab):
    """A board whose firmware has the library, but boot.py and main.py on its volume."""
    frozen = lab.flash.read_bytes()
    lab.make_board(frozen_main=False)
    vfs.write_files(
        lab.flash, {"/boot.py": (ROOT / "boot.py").read_bytes(), "/main.py": MAIN.encode()}
    )
    content = lab.flash.read_bytes()
    lab.flash.write_bytes(frozen)
    return content


@pytest.fixture
def make_board(base, tmp_path):
    """Return a maker of boards with an ota.json (dict or text) and options of `Board`."""

    def make(settings, **options):
        flash = tmp_path / "flash.bin"
        flash.write_bytes(base)
        text = settings if isinstance(settings, str) else json.dumps(settings)
        vfs.write_files(flash, {"/ota.json": text.encode()})
        return Board(flash, **options)

    return make


def test_the_example_fits_on_one_screen():
    for name in ("boot.py", "main.py"):
        lines = (ROOT / name).read_text().splitlines()
        assert len(lines) <= 40
        assert max(map(len, lines)) < 100


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ("{", "configuration /ota.json is not JSON"),
        (dict(GOOD, pol=60), "configuration member: saw pol, expected one of"),
        (dict(GOOD, url="http://127.0.0.1/"), "url: saw http://, expected https://"),
        (dict(GOOD, keys="/ota/gone.json"), "file /ota/gone.json can't be read"),
        (dict(GOOD, wifi={"ssid": ""}), "member of wifi: ssid: saw nothing"),
    ],
    ids=["damaged", "misspelt", "http", "no-keys", "no-ssid"],
)
def test_with_a_bad_configuration_the_board_says_so_and_its_application_runs(
    make_board, settings, complaint
):
    with Attended(make_board(settings, speed=10)) as at:
        line = at.wait_for_line("twinslot: NO UPDATES: ")
        assert complaint in line
        at.wait_for_line("beat 30")
    assert "Traceback" not in at.result.console


def test_without_a_configuration_it_runs_on_and_no_guard_resets_it(make_board):
    board = make_board(GOOD, speed=60)
    main = MAIN.replace("/ota.json", "/other.json")
    vfs.write_files(board.path, {"/main.py": main.encode()})
    with Attended(board) as at:
        at.wait_for_line("NO UPDATES: configuration /other.json can't be read")
        # 150 seconds: longer than the guard waits for an event loop that feeds it.
        at.wait_for_line("beat 1500")
    assert [boot.outcome for boot in at.result.boots] == ["stopped"]


def test_a_release_that_can_make_no_agent_goes_back(lab):
    lab.flash.write_bytes(lab.pristine)
    lab.board = Board(lab.flash)
    tree = lab.folder / "tree-1.1.0"
    lab.firmware("1.1.0")
    text = (tree / "main.py").read_text()
    (tree / "main.py").write_text(text.replace("/ota.json", "/moved.json"))
    image = lab.folder / "moved.bin"
    image.write_bytes(make_firmware(tree, chip="esp32", version="1.1.0", project="sensor-node"))
    lab.publish(image, "1.1.0")
    lab.power_on()
    try:
        event = lab.wait(lambda e: e.name == "rolledback", timeout=60)
    finally:
        lab.power_off()
    assert "no agent: configuration /moved.json can't be read" in event.data["message"]
    assert event.boot == 3


def test_wifi_is_joined_and_joined_again(make_board):
    settings = dict(GOOD, wifi={"ssid": "home", "password": "secret"})
    with Attended(make_board(settings, network=False, speed=10)) as at:
        at.wait(lambda: at.console.count("twinslot: joining home") >= 2)  # it doesn't give up
        at.board.set_network(True)
        seen = len(at.console)
        at.wait_for_line("beat ", start=seen)
        at.board.set_network(False)
        at.wait(lambda: "twinslot: joining home" in at.console[seen:])
        assert not [e for e in at.events if e["event"] == "wlan" and e["interface"] == "ap"]
    assert "secret" not in at.result.console


def points(at):
    """The access point's changes: [(active, name, security), ...]."""
    told = [e for e in at.events if e["event"] == "wlan" and e["interface"] == "ap"]
    return [(e["active"], e["ssid"], e["security"]) for e in told]


def test_a_recovery_access_point_opens_when_asked_for_and_closes_again(make_board):
    wifi = {"ssid": "home", "password": "secret", "ap_password": "recovery", "ap_after": 60}
    with Attended(make_board(dict(GOOD, wifi=wifi), network=False, speed=20)) as at:
        line = at.wait_for_line("no network; access point")
        name = f"twinslot-{at.board.mac.hex()[-6:]}"
        assert line.endswith(name)
        assert points(at)[-1] == (True, name, 3)  # WPA2-PSK
        before = at.console[: at.console.index(line)]
        assert before.count("twinslot: joining home") >= 3  # a minute of trying came first
        at.board.set_network(True)
        at.wait(lambda: points(at)[-1][0] is False)
    assert "recovery" not in at.result.console


def test_a_board_whose_application_has_its_own_network_is_left_alone(make_board):
    with Attended(make_board(GOOD, network=False, speed=20)) as at:
        at.wait_for_line("beat 100")
        assert not [e for e in at.events if e["event"] == "wlan"]


def pins(events):
    return [e["value"] for e in events if e["event"] == "pin" and e["pin"] == 2]


def test_the_led_blinks_with_progress_and_ten_times_for_an_error(lab):
    lab.flash.write_bytes(lab.pristine)
    board = Board(lab.flash)
    site = lab.site / "sensor-node"
    shutil.rmtree(site, ignore_errors=True)
    with Attended(board) as at:
        at.wait_for_line("twinslot: idle")
        published = lab.publish(lab.firmware("1.1.0"), "1.1.0")
        blob = lab.blob(published)
        content = blob.read_bytes()
        blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        at.wait_for_line("twinslot: failed code=checksum")
        at.wait(lambda: len(pins(at.events)) >= 26)
        levels = pins(at.events)
    # 400 KB are seven steps of 64 KiB; then ten flashes, each on and off.
    total = 400_016
    steps = -(-total // 65536)
    flashes = levels[steps:] if levels[steps - 1] == 0 else levels[steps + 1 :]
    assert flashes[:18] == [1, 0] * 9


def test_the_readme_names_what_the_example_uses():
    text = (ROOT / "main.py").read_text()
    assert set(re.findall(r"twinslot\.(\w+)", text)) <= set(twinslot._HOME)
