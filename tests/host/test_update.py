"""Whole-system stories: the real server, the real agent, a virtual board, one release or more."""

import json
import re
import socket
import struct
import threading
import time

import pytest

from twinslot_tools.lab import CRASH, HANG, Lab
from twinslot_tools.virtual_esp32.chip import otadata

OTADATA = 0xD000


@pytest.fixture
def make_lab(tmp_path):
    """Return a maker of labs that are switched off at the end."""
    made = []

    def make(**options):
        lab = Lab(tmp_path / f"lab{len(made)}", **options)
        made.append(lab)
        return lab.__enter__()

    yield make
    for lab in made:
        lab.__exit__()


def refusal(lab, start=0, timeout=30):
    return lab.wait(lambda e: e.name == "failed", start=start, timeout=timeout).data


def entries(lab):
    raw = lab.flash.read_bytes()[OTADATA : OTADATA + 0x2000]
    return [otadata.unpack(raw[i : i + 32]) for i in (0, 4096)]


def slot_bytes(lab, label):
    part = next(p for p in lab.describe()["partitions"] if p["label"] == label)
    return lab.flash.read_bytes()[part["offset"] : part["offset"] + part["size"]]


def install(lab, version, fault="", **spec):
    """Publish a version and wait until the board has reset into it."""
    lab.publish(lab.firmware(version, fault), version, **spec)
    return lab.wait(lambda e: e.name == "staged" and e.data["version"] == version)


def test_a_board_updates_itself_and_the_slot_holds_the_image_byte_for_byte(make_lab):
    lab = make_lab()
    lab.power_on()
    image = lab.firmware("1.1.0").read_bytes()
    install(lab, "1.1.0")
    lab.wait(lambda e: e.name == "confirmed")
    device = lab.wait_for_server(lambda d: d["status"] == "confirmed")
    lab.power_off()
    assert slot_bytes(lab, "ota_1")[: len(image)] == image
    assert device["current_version"] == "1.1.0"
    assert [h["status"] for h in device["history"]] == ["staging", "staged", "confirmed"]
    assert len({h["attempt"] for h in device["history"]}) == 1
    assert [otadata.STATES[e.state] for e in entries(lab)] == ["VALID", "VALID"]


def test_F12_F109_an_application_that_crashes_at_once_is_rolled_back(make_lab):
    lab = make_lab()
    lab.power_on()
    install(lab, "1.1.0", CRASH)
    event = lab.wait(lambda e: e.name == "rolledback")
    assert event.boot == 3
    device = lab.wait_for_server(lambda d: any(h["status"] == "rolledback" for h in d["history"]))
    assert device["current_version"] == "1.0.0"
    row = next(h for h in device["history"] if h["status"] == "rolledback")
    assert row["version"] == "1.1.0"
    assert row["error"]["code"] == "health"
    # It is not fetched again: the next polls leave it alone.
    lab.wait(lambda e: e.name == "failed" and e.data["code"] == "known_bad")
    seen = len(lab.events)
    lab.wait(lambda e: e.name == "idle", start=seen)
    assert [e.name for e in lab.events].count("staging") == 1


@pytest.mark.parametrize(
    "end",
    ["    import sys\n    sys.exit()\n", "    import machine\n    machine.deepsleep(100)\n"],
    ids=["ends", "sleeps"],
)
def test_F30_an_image_on_trial_that_only_ends_or_sleeps_is_rolled_back(make_lab, end):
    lab = make_lab()
    lab.power_on()
    install(lab, "1.1.0", end)
    event = lab.wait(lambda e: e.name == "rolledback")
    lab.wait_for_server(lambda d: any(h["status"] == "rolledback" for h in d["history"]))
    lab.power_off()
    # Later boots are not looked at: it may be offered again, as the image need not be to blame.
    boots = [b["partition"] for b in lab.boots if b["event"] == "boot"][: event.boot]
    assert boots == ["ota_0", *["ota_1"] * 12, "ota_0"]


def test_F15_an_application_that_hangs_is_rolled_back(make_lab):
    lab = make_lab()
    lab.power_on()
    install(lab, "1.1.0", HANG)
    assert lab.wait(lambda e: e.name == "rolledback").boot == 3
    assert any("stands still" in line for line in lab.console)


def test_F13_an_image_that_loses_the_network_is_not_confirmed(make_lab):
    lab = make_lab(settings={"deadline": 3, "timeout": 1})
    lab.power_on()
    install(lab, "1.1.0")
    lab.stop_server()
    event = lab.wait(lambda e: e.name == "rolledback")
    assert "source" in event.data["message"]
    assert not [e for e in lab.events if e.name == "confirmed"]
    # The server may have been at fault: the release is tried again when it is back.
    port = int(lab.url.rsplit(":", 1)[1])
    lab.start_server(port)
    lab.wait(lambda e: e.name == "confirmed", timeout=40)


# Put into main.py's application: a task that notes how long the event loop left it waiting.
TICKER = """    from time import ticks_diff, ticks_ms
    last = ticks_ms()
    gap = count = 0
    while True:
        await asyncio.sleep_ms(5)
        now = ticks_ms()
        gap = max(gap, ticks_diff(now, last) - 5)
        last = now
        count += 1
        beats += 1
        if count % 100 == 0:
            print("gap", gap)
"""


class Answering(threading.Thread):
    """Takes the server's place: accepts TLS with its certificate and answers each request."""

    def __init__(self, lab, answer):
        super().__init__(daemon=True)
        import ssl

        self.answer = answer
        self.requests = []
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(
            lab.folder / "server" / "server.crt", lab.folder / "server" / "server.key"
        )
        self.context = context
        port = int(lab.url.rsplit(":", 1)[1])
        self.listener = socket.create_server(("127.0.0.1", port))

    def run(self):
        while True:
            try:
                raw, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=(raw,), daemon=True).start()

    def serve(self, raw):
        try:
            with self.context.wrap_socket(raw, server_side=True) as connection:
                while True:
                    head = b""
                    while b"\r\n\r\n" not in head:
                        part = connection.recv(4096)
                        if not part:
                            return
                        head += part
                    self.requests.append(head)
                    head, _, body = head.partition(b"\r\n\r\n")
                    length = re.search(rb"content-length: (\d+)", head, re.I)
                    while length and len(body) < int(length[1]):
                        body += connection.recv(4096)
                    self.answer(connection, head, body)
        except OSError:
            pass

    def close(self):
        self.listener.close()


def test_F14_a_server_that_is_down_for_a_while_does_not_roll_a_good_image_back(make_lab):
    lab = make_lab(settings={"deadline": 30})
    lab.power_on()
    install(lab, "1.1.0")
    lab.stop_server()
    busy = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"
    stand_in = Answering(lab, lambda connection, head, body: connection.sendall(busy))
    stand_in.start()
    lab.wait(lambda e: e.name == "confirmed", timeout=60)
    stand_in.close()


def test_a_server_that_stalls_in_mid_body_neither_stops_the_application_nor_the_agent(make_lab):
    lab = make_lab(settings={"timeout": 2}, application=TICKER)
    published = lab.publish(lab.firmware("1.1.0"), "1.1.0")
    release = (lab.site / published.release).read_bytes()
    lab.stop_server()

    def answer(connection, head, body):
        def send(content, length=None):
            size = len(content) if length is None else length
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + content)

        if b"check-update" in head:
            send(
                json.dumps({"update_available": True, "release": "/" + published.release}).encode()
            )
        elif b".jws" in head:
            send(release)
        elif b"/blobs/" in head:
            content = lab.blob(published).read_bytes()
            send(content[: len(content) // 2], len(content))
            time.sleep(10)
        else:
            send(b"{}")

    stand_in = Answering(lab, answer)
    stand_in.start()
    started = time.monotonic()
    lab.power_on()
    data = refusal(lab)
    took = time.monotonic() - started
    stand_in.close()
    assert data["code"] == "timeout"
    assert took < 8
    lab.power_off()
    gaps = [int(line.split()[1]) for line in lab.console if line.startswith("gap ")]
    print("largest gap of the application's 5 ms ticker:", max(gaps), "ms")
    # It stalled for 2 s; what remains is flash and one slice of TLS.
    assert len(gaps) >= 3
    assert max(gaps) < 1000
    # The unfinished slot can't boot: its header was never programmed.
    assert slot_bytes(lab, "ota_1")[:32] == b"\xff" * 32
    assert slot_bytes(lab, "ota_1")[32:4096] != b"\xff" * 4064


def test_F18_an_unfinished_slot_never_boots_even_when_otadata_is_lost(make_lab):
    lab = make_lab(settings={"timeout": 2})
    published = lab.publish(lab.firmware("1.1.0"), "1.1.0")
    blob = lab.blob(published)
    content = bytearray(blob.read_bytes())
    content[-1] ^= 0x80  # in the appended digest: every other byte is the genuine one
    blob.write_bytes(content)
    lab.power_on()
    assert refusal(lab)["code"] in ("checksum", "timeout")
    lab.power_off()
    flash = bytearray(lab.flash.read_bytes())
    flash[OTADATA : OTADATA + 0x2000] = b"\xff" * 0x2000
    # An entry that names the unfinished slot, as a torn or stray write could leave it.
    flash[OTADATA : OTADATA + 32] = otadata.pack(otadata.Entry(2, b"\xff" * 20, 2, otadata.crc(2)))
    lab.flash.write_bytes(flash)
    result = lab.board.run(max_boots=1, timeout=5, stop_when_idle=True)
    assert result.boots[0].partition == "ota_0"


REFUSALS = [
    ("older", "0.9.0", {}, "version"),
    ("other hardware", "1.1.1", {"hardware": ("ESP32_OTHER",)}, "hardware"),
]


@pytest.mark.parametrize(("story", "version", "spec", "code"), REFUSALS, ids=lambda v: str(v)[:14])
def test_F80_a_release_that_does_not_suit_the_board_is_refused_and_reported(
    make_lab, story, version, spec, code
):
    # From the static tree: the server itself would not even offer these.
    lab = make_lab(settings={"source": "static", "token": ""})
    lab.publish(lab.firmware(version), version, **spec)
    before = slot_bytes(lab, "ota_1")
    lab.power_on()
    assert refusal(lab)["code"] == code
    lab.power_off()
    assert slot_bytes(lab, "ota_1") == before, "refused before the first erase"


def test_a_plain_web_server_is_enough(make_lab):
    lab = make_lab(settings={"source": "static", "token": ""})
    lab.power_on()
    install(lab, "1.1.0")
    lab.wait(lambda e: e.name == "confirmed")
    seen = len(lab.events)
    lab.wait(lambda e: e.name == "idle" and e.data["version"] == "1.1.0", start=seen)


def test_F8_a_trial_without_the_bootloaders_rollback_is_rolled_back_by_the_agent(make_lab):
    lab = make_lab()
    lab.power_on(max_boots=1)
    install(lab, "1.1.0", CRASH)
    lab._thread.join(10)
    # The state word of the new entry torn: 0xFFFFFFF5 boots, but nothing watches it.
    flash = bytearray(lab.flash.read_bytes())
    index = 1 if entries(lab)[1].seq == 2 else 0
    at = OTADATA + index * 4096 + 24
    assert struct.unpack_from("<I", flash, at) == (0,)
    struct.pack_into("<I", flash, at, 0xFFFFFFF5)
    lab.flash.write_bytes(flash)
    lab.power_on()
    event = lab.wait(lambda e: e.name == "rolledback")
    assert event.data["version"] == "1.1.0"
    lab.wait_for_server(lambda d: any(h["status"] == "rolledback" for h in d["history"]))
    lab.power_off()
    assert lab.describe()["boots"] == "ota_0"


def test_a_damaged_image_after_activation_falls_back_and_is_never_confirmed(make_lab):
    lab = make_lab()
    lab.power_on(max_boots=1)
    install(lab, "1.1.0")
    lab._thread.join(10)
    flash = bytearray(lab.flash.read_bytes())
    part = next(p for p in lab.describe()["partitions"] if p["label"] == "ota_1")
    flash[part["offset"] + 200_000] ^= 4
    lab.flash.write_bytes(flash)
    lab.power_on()
    event = lab.wait(lambda e: e.name == "rolledback")
    assert "bootloader refused" in event.data["message"]
    lab.wait(lambda e: e.name == "failed" and e.data["code"] == "known_bad")
    lab.power_off()
    found = lab.describe()
    assert found["boots"] == "ota_0"
    states = {s["label"]: s["state"] for s in found["slots"]}
    assert states["ota_0"] == "VALID"
    assert states["ota_1"] != "VALID"


def test_the_token_appears_in_no_output(make_lab):  # F104
    lab = make_lab()
    token = (lab.folder / "server" / "device-token").read_text().strip()
    lab.power_on()
    install(lab, "1.1.0", CRASH)
    lab.wait(lambda e: e.name == "rolledback")
    lab.stop_server()
    refusal(lab, start=len(lab.events))
    lab.power_off()
    assert len(token) >= 16
    assert token not in "\n".join(lab.console)
    assert token not in (lab.folder / "server.log").read_text()


def test_a_board_with_128_KB_of_heap_updates_a_image_of_1500_KB(make_lab):
    lab = make_lab(heap="128K", image_size=1_500_000)
    lab.power_on()
    install(lab, "1.1.0")
    lab.wait(lambda e: e.name == "confirmed")
    result = lab.power_off()
    assert result.heap["limit"] == 128 * 1024
    image = lab.firmware("1.1.0").read_bytes()
    assert len(image) >= 1_500_000
    assert slot_bytes(lab, "ota_1")[: len(image)] == image


CONFIRM_BY_HAND = """    await asyncio.sleep(2)
    twinslot.confirm()
    await asyncio.sleep(60)
"""


def test_what_a_person_confirmed_stays_though_a_check_fails(make_lab):
    lab = make_lab(settings={"deadline": 4})
    lab.power_on()
    install(lab, "1.1.0", CONFIRM_BY_HAND)  # beats stays 0: the application's own check fails
    ended = lab.wait(lambda e: e.name in ("confirmed", "rolledback"))
    assert ended.name == "confirmed"
    lab.wait(lambda e: e.name == "idle", start=lab.events.index(ended))
    assert entries(lab)[1].state == otadata.VALID


def test_a_board_fetches_at_any_time_and_installs_in_its_window(make_lab):
    """The board has no clock of its own to go by; the server's windows are enough."""
    lab = make_lab()
    now = time.gmtime(time.time() + 3 * 3600)
    hours = {"start": time.strftime("%H:%M", now), "end": time.strftime("%H:%M", now)}
    window = lab.api("POST", "windows", {"kind": "install", **hours, "days": [now.tm_wday]})
    lab.power_on()
    lab.publish(lab.firmware("1.1.0"), "1.1.0")
    waiting = lab.wait(lambda e: e.name == "waiting")
    assert int(waiting.data["seconds"]) > 3600
    device = lab.wait_for_server(lambda d: d.get("staged"))
    assert device["current_version"] == "1.0.0"
    assert device["attempts"][0]["state"] == "staged"
    assert device["flash"] == 4 << 20 and device["reset_cause"] == "power on"
    seen = len(lab.events)
    lab.wait(lambda e: e.name == "waiting", start=seen)
    lab.api("DELETE", f"windows/{window['id']}")
    lab.wait(lambda e: e.name == "confirmed")
    device = lab.wait_for_server(lambda d: d["status"] == "confirmed")
    (attempt,) = device["attempts"]
    assert (attempt["state"], attempt["version"]) == ("confirmed", "1.1.0")
    assert [e.name for e in lab.events].count("staging") == 2, "told again, not fetched again"
    assert [h["status"] for h in device["history"]] == ["staging", "staged", "confirmed"]
