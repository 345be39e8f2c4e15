"""Whole-system stories of payloads: gzip, deltas, what replaces them, and downloads that were cut.

The board is virtual, the server is the real one or, where it has to misbehave, one that serves the
same site. What the board fetched is counted by the server.
"""

import gzip
import hashlib
import http.server
import json
import re
import ssl
import threading
import time

import pytest

from twinslot_tools import payloads
from twinslot_tools.lab import PRODUCT, Lab

SLACK = 20_000  # bytes that were under way when a connection was cut
MEMBER = 65536


@pytest.fixture
def make_lab(tmp_path):
    """Return a maker of labs that are switched off at the end."""
    made = []

    def make(**options):
        options.setdefault("compressible", True)
        lab = Lab(tmp_path / f"lab{len(made)}", **options)
        made.append(lab)
        return lab.__enter__()

    yield make
    for lab in made:
        lab.__exit__()


class Web(threading.Thread):
    """A web server with the lab's certificate and port, for a board that reads the static tree.

    ``served`` lists (path, first byte, bytes sent). Set ``cut`` to end a payload's transfer after
    so many bytes, ``on_cut`` to be told; ``ranges`` False ignores Range; ``etag`` is appended to
    each ETag.
    """

    def __init__(self, lab):
        super().__init__(daemon=True)
        self.cut = None
        self.on_cut = lambda: None
        self.ranges = True
        self.etag = ""
        self.served = []
        web = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                web.answer(self, lab.site / self.path.lstrip("/"))

        port = int(lab.url.rsplit(":", 1)[1])
        lab.stop_server()
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        data = lab.folder / "server"
        context.load_cert_chain(data / "server.crt", data / "server.key")
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.start()

    def run(self):
        self.server.serve_forever(poll_interval=0.05)

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, handler, path):
        if not path.is_file():
            handler.send_error(404)
            return
        content = path.read_bytes()
        etag = f'"{hashlib.sha256(content).hexdigest()[:16]}{self.etag}"'
        first = 0
        wanted = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range") or "")
        if wanted and self.ranges and handler.headers.get("If-Range") in (None, etag):
            first = int(wanted[1])
        handler.send_response(206 if first else 200)
        if first:
            span = f"bytes {first}-{len(content) - 1}/{len(content)}"
            handler.send_header("Content-Range", span)
        handler.send_header("ETag", etag)
        handler.send_header("Content-Length", str(len(content) - first))
        handler.end_headers()
        end = len(content)
        if self.cut is not None and "/blobs/" in handler.path:
            end = min(end, first + self.cut)
        self.served.append((handler.path, first, end - first))
        handler.wfile.write(content[first:end])
        if end < len(content):
            handler.wfile.flush()
            handler.close_connection = True
            self.on_cut()

    def blobs(self):
        return [(first, sent) for path, first, sent in self.served if "/blobs/" in path]


@pytest.fixture
def make_web():
    made = []

    def make(lab):
        made.append(Web(lab))
        return made[-1]

    yield make
    for web in made:
        web.close()


STATIC = {"source": "static", "token": ""}


def publish(lab, *, delta=True, version="1.1.0"):
    """Publish a version; return its payloads as {"identity", "gzip", "detools": entry}."""
    bases = (str(lab.firmware("1.0.0")),) if delta else ()
    done = lab.publish(lab.firmware(version), version, bases=bases)
    entries = done.manifest["images"][0]["payloads"]
    return {entry.get("patch", entry["encoding"]): entry for entry in entries}


def path_of(lab, entry):
    return lab.site / PRODUCT / entry["url"]


def staged(lab, timeout=40):
    return int(lab.wait(lambda e: e.name == "staged", timeout=timeout).data["bytes"])


def slot_holds(lab, version="1.1.0"):
    image = (lab.folder / f"firmware-{version}.bin").read_bytes()
    part = next(p for p in lab.describe()["partitions"] if p["label"] == "ota_1")
    return lab.flash.read_bytes()[part["offset"] :][: len(image)] == image


def test_a_board_updates_by_gzip(make_lab):
    lab = make_lab()
    found = publish(lab, delta=False)
    lab.power_on()
    assert staged(lab) == found["gzip"]["size"] < 0.8 * found["identity"]["size"]
    lab.wait(lambda e: e.name == "confirmed")
    device = lab.wait_for_server(lambda d: d["status"] == "confirmed")
    lab.power_off()
    assert slot_holds(lab)
    assert device["current_version"] == "1.1.0"


def test_a_board_updates_by_delta_and_tells_how_little_it_fetched(make_lab):
    lab = make_lab()
    found = publish(lab)
    lab.power_on()
    assert staged(lab) == found["detools"]["size"] < 0.1 * found["gzip"]["size"]
    lab.wait(lambda e: e.name == "confirmed")
    lab.power_off()
    assert slot_holds(lab)


def forge(lab, entry, content):
    """Put other bytes in a payload's place, of the size that the release says."""
    path = path_of(lab, entry)
    assert len(content) <= entry["size"]
    path.write_bytes(content.ljust(entry["size"], b"\0"))


def test_F91_a_tampered_delta_gives_way_to_the_gzip(make_lab):
    """Whoever holds the server can make a patch that inflates and applies: the hash finds it."""
    lab = make_lab(settings=STATIC)
    found = publish(lab)
    old = lab.firmware("1.0.0").read_bytes()
    evil = bytearray(lab.firmware("1.1.0").read_bytes())
    evil[200_000] ^= 1
    content = payloads.patch_payload(old, bytes(evil))
    found["detools"]["size"] = max(found["detools"]["size"], len(content))
    genuine = path_of(lab, found["detools"]).stat().st_size
    content = content[:genuine] if len(content) > genuine else content
    forge(lab, {**found["detools"], "size": genuine}, content)
    lab.power_on()
    assert staged(lab) == genuine + found["gzip"]["size"]
    lab.wait(lambda e: e.name == "confirmed")
    assert any(line.startswith("twinslot: payload detools: ") for line in lab.console)
    lab.power_off()
    assert slot_holds(lab)


def test_tampered_delta_and_gzip_give_way_to_the_plain_image(make_lab):
    lab = make_lab(settings=STATIC)
    found = publish(lab)
    damaged = bytearray(path_of(lab, found["detools"]).read_bytes())
    damaged[len(damaged) // 2] ^= 0x10
    forge(lab, found["detools"], bytes(damaged))
    forge(lab, found["gzip"], gzip.compress(b"no image", mtime=0))
    lab.power_on()
    fetched = staged(lab)
    lab.wait(lambda e: e.name == "confirmed")
    lab.power_off()
    assert slot_holds(lab)
    size = found["identity"]["size"]
    assert size < fetched <= size + found["detools"]["size"] + found["gzip"]["size"]


def test_a_delta_that_is_gone_from_the_server_gives_way(make_lab, make_web):
    lab = make_lab(settings=STATIC)
    found = publish(lab)
    path_of(lab, found["detools"]).unlink()
    make_web(lab)
    lab.power_on()
    assert staged(lab) == found["gzip"]["size"]


def test_a_board_short_of_heap_does_not_try_what_it_cannot_afford(make_lab):
    lab = make_lab(settings=STATIC, heap="73K")
    found = publish(lab)
    lab.power_on()
    assert staged(lab) == found["identity"]["size"]
    assert not any(line.startswith("twinslot: payload") for line in lab.console)
    lab.power_off()
    assert slot_holds(lab)


FORMS = ["identity", "gzip", "detools"]


def only(lab, found, form):
    """Leave one payload in the release: sign it again."""
    entry = found[form]
    path = lab.site / PRODUCT / "r" / "1.1.0.jws"
    from twinslot import base64url
    from twinslot_tools import publish as publishing
    from twinslot_tools.signing import document, signer_of

    manifest = json.loads(base64url.b64url_decode(path.read_bytes().split(b".")[1]))
    manifest["images"][0]["payloads"] = [entry]
    body = json.dumps(manifest, separators=(",", ":")).encode()
    path.write_bytes(document(body, signer_of(lab.key), publishing.TYPE))
    return entry


def large(lab, form):
    """Publish an image of which each form has several members; return the form's entry."""
    return only(lab, publish(lab), form)


@pytest.mark.parametrize("form", FORMS)
def test_F93_a_download_cut_by_a_reset_goes_on_there(make_lab, make_web, form):
    lab = make_lab(settings=STATIC, image_size=700_000)
    entry = large(lab, form)
    web = make_web(lab)
    web.cut = entry["size"] * 6 // 10
    web.on_cut = lab_reset(lab, web)
    lab.power_on()
    staged(lab)
    lab.wait(lambda e: e.name == "confirmed")
    lab.power_off()
    assert slot_holds(lab)
    (_, sent), (resumed, rest) = web.blobs()[:2]
    assert resumed > 0, "it began again"
    # In the payload, 64 KiB of the image take less; what was under way is lost as well.
    assert sent + rest - entry["size"] <= MEMBER + SLACK
    assert len(web.blobs()) == 2


def lab_reset(lab, web):
    """Press reset when the board has used what came, and waits for more."""

    def cut():
        web.cut = None
        seen = -1
        while seen != len(lab.console):
            seen = len(lab.console)
            time.sleep(0.3)
        lab.board.press_reset()

    return cut


def test_a_download_cut_again_and_again_gets_there(make_lab, make_web):
    lab = make_lab(settings=STATIC, image_size=700_000)
    entry = large(lab, "gzip")
    web = make_web(lab)
    web.cut = entry["size"] // 3 + 60_000
    lab.power_on()
    lab.wait(lambda e: e.name == "staged", timeout=60)
    lab.power_off()
    assert slot_holds(lab)
    firsts = [first for first, _ in web.blobs()]
    assert firsts == sorted(set(firsts)) and len(firsts) > 1


def test_F57_a_server_without_ranges_serves_all_of_it_again(make_lab, make_web):
    lab = make_lab(settings=STATIC, image_size=700_000)
    entry = large(lab, "gzip")
    web = make_web(lab)
    web.ranges = False
    web.cut = entry["size"] * 6 // 10
    web.on_cut = lambda: setattr(web, "cut", None)
    lab.power_on()
    assert staged(lab) == entry["size"]
    lab.power_off()
    assert slot_holds(lab)
    assert web.blobs() == [(0, entry["size"] * 6 // 10), (0, entry["size"])]


def test_F59_a_file_that_changed_meanwhile_is_fetched_from_its_beginning(make_lab, make_web):
    lab = make_lab(settings=STATIC, image_size=700_000)
    entry = large(lab, "gzip")
    web = make_web(lab)
    web.cut = entry["size"] * 6 // 10

    def replaced():
        web.cut = None
        web.etag = "-2"

    web.on_cut = replaced
    lab.power_on()
    assert staged(lab) == entry["size"]
    assert slot_holds(lab)
    assert [first for first, _ in web.blobs()] == [0, 0]


def test_only_blocks_that_differ_are_erased(make_lab):
    """The inactive slot holds a near relative of the new image, as after a rollback."""
    lab = make_lab(settings=STATIC)
    publish(lab)
    new = (lab.folder / "firmware-1.1.0.bin").read_bytes()
    relative = bytearray(new)
    for at in (5000, 100_000, 300_000):
        relative[at] ^= 0xFF
    part = next(p for p in lab.describe()["partitions"] if p["label"] == "ota_1")
    flash = bytearray(lab.flash.read_bytes())
    flash[part["offset"] : part["offset"] + len(relative)] = relative
    lab.flash.write_bytes(flash)
    lab.power_on()
    staged(lab)
    lab.wait(lambda e: e.name == "confirmed")
    counts = lab.power_off().flash
    # Block 0 always, the three that differ, and a few sectors of otadata and NVS.
    assert counts["sector_erases"] <= 4 + 12
    assert counts["bytes_programmed"] < 4 * 4096 + 20_000
    assert slot_holds(lab)
