"""A board at the end of a cable: twinslot push, status, doctor, log, confirm and rollback."""

import contextlib
import io
import json
import sys

import pytest
from boards import new_board
from fakechip import Rfc2217Bridge
from prompts import Attended

from twinslot_tools import cli, push, remote
from twinslot_tools.lab import Lab
from twinslot_tools.virtual_esp32 import vfs
from twinslot_tools.virtual_esp32.board import Board

RESETS = "    import machine\n    machine.reset()\n"  # an application that does, first of all


class Done:
    """What a run of the command line left."""

    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err

    @property
    def json(self):
        return json.loads(self.out)


def twinslot(*args, code=0):
    """Run the command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    seen = 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["twinslot", *map(str, args)])
        patch.setattr(sys, "stdin", io.StringIO())
        try:
            cli.main()
        except SystemExit as exc:
            seen = exc.code or 0
    done = Done(seen, out.getvalue(), err.getvalue())
    assert done.code == code, done.out + done.err
    return done


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A server, keys, and the flash of a board with 1.0.0."""
    # It polls seldom: what arrives comes over the cable.
    settings = {"poll": 86400, "hang": 15, "deadline": 20}
    with Lab(tmp_path_factory.mktemp("lab"), settings=settings, compressible=True) as made:
        made.pristine = made.flash.read_bytes()
        yield made


@pytest.fixture
def attended(lab):
    """The board with 1.0.0, switched on, with a serial port."""
    lab.flash.write_bytes(lab.pristine)
    with Attended(Board(lab.flash)) as at:
        yield at


@pytest.fixture(scope="module")
def newer(lab):
    """An image of 1.1.0."""
    return lab.firmware("1.1.0")


def key(lab):
    return lab.folder / "release.key"


def inactive(lab):
    """What the other slot holds."""
    part = next(p for p in lab.describe()["partitions"] if p["label"] == "ota_1")
    return lab.flash.read_bytes()[part["offset"] : part["offset"] + part["size"]]


def test_an_image_is_signed_sent_tried_and_confirmed(lab, attended, newer):
    done = twinslot("push", newer, "--port", attended.url, "--key", key(lab), "--json").json
    assert (done["state"], done["version"]) == ("confirmed", "1.1.0")
    image = newer.read_bytes()
    assert done["encoding"] == "gzip"
    assert done["sent"] < len(image)
    assert inactive(lab)[: len(image)] == image
    assert attended.port.lost == 0  # the receive buffer never ran over
    facts = twinslot("status", "--port", attended.url, "--json").json
    assert (facts["running"], facts["state"], facts["on_trial"]) == ("ota_1", "valid", False)
    assert facts["versions"][facts["build"]] == "1.1.0"
    notes = twinslot("log", "--port", attended.url, "--json").json
    assert [attempt[1:3] for attempt in notes["attempts"]] == [["1.1.0", "confirmed"]]
    assert "1.1.0" in twinslot("log", "--port", attended.url).out


def test_a_release_of_a_site_goes_as_a_delta_where_the_board_runs_its_base(lab, attended):
    base = lab.folder / "firmware-1.0.0.bin"
    image = lab.firmware("1.2.0")
    published = lab.publish(image, "1.2.0", bases=(str(base),), channel="cable")
    path = lab.site / published.release
    done = twinslot("push", path, "--port", attended.url, "--json").json
    assert done["state"] == "confirmed"
    assert done["encoding"] == "gzip+detools"
    assert done["sent"] < len(image.read_bytes()) // 4
    assert inactive(lab)[: image.stat().st_size] == image.read_bytes()


def test_a_push_that_was_cut_goes_on_where_it_stopped(lab, attended, newer, monkeypatch):
    class Cut(Exception):
        pass

    def cut(what, at, total):
        if what == "sending" and at > total // 2:
            raise Cut

    command = ("push", newer, "--port", attended.url, "--key", key(lab))
    with remote.Device.open(attended.url, fresh=True) as device:
        facts = push.hello(device)
        signer = lab.new_key("release")
        folder = lab.folder / "half"
        path = push.make_release(newer, push.Wish(), facts, signer, folder)
        with pytest.raises(Cut):
            push.send(device, path, progress=cut)
    done = twinslot(*command, "--json").json
    assert done["state"] == "confirmed"
    image = newer.read_bytes()
    assert done["encoding"] == "gzip"
    assert done["start"] > len(image) // 8  # of the payload, which is smaller than the image
    assert inactive(lab)[: len(image)] == image


def test_a_push_that_a_reset_has_ended_goes_on_where_it_stopped(lab, attended, newer):
    def reset(what, at, total):
        if what == "sending" and at > total // 2:
            attended.board.press_reset()

    device = remote.Device.open(attended.url, fresh=True)
    device.transport.serial.timeout = 1
    path = push.make_release(
        newer, push.Wish(), push.hello(device), lab.new_key("release"), lab.folder / "reset"
    )
    with pytest.raises(remote.RemoteError), device:
        push.send(device, path, progress=reset)
    done = twinslot("push", newer, "--port", attended.url, "--key", key(lab), "--json").json
    assert done["state"] == "confirmed"
    assert done["start"] > 0


def test_F68_what_a_stranger_has_signed_is_refused_before_anything_is_erased(lab, attended, newer):
    before = inactive(lab)
    lab.new_key("stranger")
    stranger = lab.folder / "stranger.key"
    done = twinslot("push", newer, "--port", attended.url, "--key", stranger, code=1)
    assert "the board refuses: signing key" in done.err
    assert "(signature, OTA_006)" in done.err
    assert inactive(lab) == before
    # And the application runs again.
    attended.wait(lambda: [b["event"] for b in attended.events].count("boot") >= 3)


def test_what_is_not_signed_is_not_even_sent(lab, attended, newer):
    done = twinslot("push", newer, "--port", attended.url, code=2)
    assert "--key" in done.err


def test_an_older_version_needs_to_be_called_a_downgrade(lab, attended, newer):
    command = ("push", newer, "--port", attended.url, "--key", key(lab), "--version", "0.9.0")
    done = twinslot(*command, code=1)
    assert "(version, OTA_002)" in done.err
    done = twinslot(*command, "--downgrade", "--json").json
    assert (done["state"], done["version"]) == ("confirmed", "0.9.0")


def test_a_tampered_payload_is_found_out(lab, attended, newer, tmp_path):
    with remote.Device.open(attended.url, fresh=True) as device:
        path = push.make_release(
            newer, push.Wish("1.3.0"), push.hello(device), lab.new_key("release"), tmp_path
        )
        for blob in (path.parent.parent / "blobs").rglob("*.*"):
            content = bytearray(blob.read_bytes())
            content[len(content) // 2] ^= 4
            blob.write_bytes(content)
        with pytest.raises(remote.RemoteError, match="checksum, OTA_007"):
            push.send(device, path)


def test_an_image_that_fails_comes_back_and_the_push_says_why(lab, attended):
    image = lab.firmware("1.4.0", RESETS)
    done = twinslot("push", image, "--port", attended.url, "--key", key(lab), "--json", code=1)
    assert done.json["state"] == "rolledback"
    assert "reset before it was confirmed" in done.json["reason"]
    facts = twinslot("status", "--port", attended.url, "--json").json
    assert facts["running"] == "ota_0"
    assert [failure[1] for failure in facts["failed"]] == ["1.4.0"]
    # Nothing is sent a second time, unless somebody insists.
    done = twinslot("push", image, "--port", attended.url, "--key", key(lab), code=1)
    assert "(known_bad, OTA_002)" in done.err


def test_the_image_that_runs_is_not_sent(lab, attended):
    image = lab.folder / "firmware-1.0.0.bin"
    done = twinslot("push", image, "--port", attended.url, "--key", key(lab), "--json").json
    assert (done["state"], done["sent"]) == ("same", 0)


def test_a_trial_goes_on_after_a_look_and_can_be_decided_by_hand(lab, attended, newer):
    # Its server is out of reach, so the trial takes its time.
    lab.stop_server()
    try:
        command = ("push", newer, "--port", attended.url, "--key", key(lab), "--wait", "0")
        assert twinslot(*command, "--json").json["state"] == "activated"
        attended.wait_for_line("twinslot: trial version=1.1.0")
        done = twinslot("status", "--port", attended.url)
        assert "The image is on trial" in done.err
        assert "pending" in done.out
        done = twinslot(*command, code=1)
        assert "the board is on trial" in done.err
        # Each look was followed by a soft reset, and another beginning of the same trial.
        trial = "twinslot: trial version=1.1.0"
        attended.wait(lambda: attended.console.count(trial) == 3)
        done = twinslot("confirm", "--port", attended.url)
        assert done.out == "1.1.0 in ota_1 is confirmed\n"
        facts = twinslot("status", "--port", attended.url, "--json").json
        assert (facts["running"], facts["state"]) == ("ota_1", "valid")
    finally:
        lab.start_server(int(lab.url.rsplit(":", 1)[1]))


def test_rollback_by_hand(lab, attended, newer):
    twinslot("push", newer, "--port", attended.url, "--key", key(lab))
    done = twinslot("rollback", "--port", attended.url)
    assert done.out == "the board resets into ota_0\n"
    attended.wait_for_line("twinslot: confirmed version=1.0.0")


def test_rollback_without_another_image_is_refused(lab, attended):
    done = twinslot("rollback", "--port", attended.url, code=1)
    assert "RollbackError: no image to roll back to" in done.err


def test_the_doctor_is_asked_over_the_cable(lab, attended):
    found = twinslot("doctor", "--port", attended.url, "--json").json
    assert {line["level"] for line in found} <= {"ok", "warn"}
    assert {"firmware", "running", "otadata", "config", "keys"} <= {x["topic"] for x in found}
    done = twinslot("doctor", "--port", attended.url)
    assert done.out.endswith(
        "safe mode connects by it, and by it alone\nThis board can be updated.\n"
    )
    assert "ok    running" in done.out and "1 trusted, by the key file" in done.out


@pytest.mark.filterwarnings("ignore:set(Daemon|Name):DeprecationWarning")  # pyserial 3.5
def test_a_board_behind_a_terminal_server_is_pushed_to(lab, attended, newer):
    bridge = Rfc2217Bridge(attended)
    bridge.start()
    try:
        command = ("push", newer, "--port", bridge.url, "--key", key(lab), "--json")
        assert twinslot(*command).json["state"] == "confirmed"
    finally:
        bridge.close()


def test_the_doctor_finds_a_board_that_cannot_be_updated(lab):
    lab.flash.write_bytes(lab.pristine)
    vfs.write_files(lab.flash, {"/ota.json": b'{"product": "sensor-node"}'})
    with Attended(Board(lab.flash)) as at:
        done = twinslot("doctor", "--port", at.url, code=1)
        assert "-> correct /ota.json" in done.out
        assert "This board can't be updated." in done.out
        # A push says the same, in one line.
        command = ("push", lab.firmware("1.1.0"), "--port", at.url, "--key", key(lab))
        done = twinslot(*command, code=1)
        assert "ConfigError: configuration member url: saw nothing" in done.err


def test_a_board_without_twinslot_is_named_as_such(tmp_path):
    with Attended(new_board(tmp_path, "print('bare')\n")) as at:
        done = twinslot("status", "--port", at.url, code=1)
    assert "twinslot is not on this board" in done.err
    assert done.err.count("\n") == 1


def test_a_port_where_nobody_is_gives_one_line(tmp_path):
    for port in ("/dev/no-such-port", "socket://127.0.0.1:1"):
        done = twinslot("status", "--port", port, code=1)
        assert done.err.startswith(f"twinslot: {port}: can't be opened")
        assert done.err.count("\n") == 1


def test_a_file_that_is_no_firmware_is_refused_on_the_host(lab, attended, tmp_path):
    junk = tmp_path / "junk.bin"
    junk.write_bytes(b"nothing" * 1000)
    done = twinslot("push", junk, "--port", attended.url, "--key", key(lab), code=1)
    assert "junk.bin" in done.err
    done = twinslot("push", junk, "--port", attended.url, "--version", "1.0.0", code=2)
    assert "--key" in done.err


def test_a_release_takes_no_other_version(lab, attended):
    published = lab.publish(lab.firmware("1.5.0"), "1.5.0", channel="cable")
    path = lab.site / published.release
    done = twinslot("push", path, "--port", attended.url, "--version", "2.0.0", code=2)
    assert "signed already" in done.err
