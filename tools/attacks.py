"""``twinslot demo --attacks``: what a server in an attacker's hands can do to a board. Nothing.

One virtual board with 1.1.0 confirmed polls a server that lies in another way each time. Whatever
is shown comes from the board's console and its flash; the attacker has every file of the server,
its certificate and its key, all releases ever signed, and the network. Not the signing keys.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from twinslot import base64url, keyring, release

from . import keyrings, keys, signing
from .hostile import SiteServer
from .lab import CRASH, PRODUCT, Event, Lab, temporary
from .virtual_esp32 import vfs

RUNS = "1.1.0"
BAD = "1.1.9"  # crashes
NEXT = [f"1.2.{number}" for number in range(5)]  # genuine, published, not yet offered
_TIMEOUT_S = 40


@dataclass(frozen=True)
class Outcome:
    """What was tried, and what the board did about it."""

    attack: str
    story: str
    code: str  # of the board's refusal; of each, where the keyring is refused, too
    message: str
    held: bool  # refused as it should be


class Attacker:
    """Has the server: changes its files, answers as it likes."""

    def __init__(self, lab: Lab, server: SiteServer):
        self.lab = lab
        self.server = server
        self.folder = lab.site / PRODUCT
        self.pointer = self.folder / "stable.json"
        self._number = 0
        self._honest = self.pointer.read_bytes()

    def point(self, target: str, **members: Any) -> None:
        self.pointer.write_text(json.dumps({"release": target, **members}))

    def restore(self) -> None:
        self.server.lie = lambda path, content: content
        self.pointer.write_bytes(self._honest)

    def genuine(self, version: str) -> dict[str, Any]:
        """The manifest of a release that the maker has signed."""
        token = (self.folder / "r" / f"{version}.jws").read_bytes()
        return json.loads(base64url.b64url_decode(token.split(b".")[1]))

    def sign(self, manifest: dict[str, Any], key: Any = None) -> str:
        """A release that a signer's slip, or a stranger, has signed; return its place."""
        signer = signing.signer_of(key or self.lab.key)
        return self.put(signing.document(manifest, signer, release.TYPE))

    def put(self, token: bytes) -> str:
        self._number += 1
        target = f"r/attack-{self._number}.jws"
        (self.folder / target).write_bytes(token)
        return target

    def lie_about(self, path: str, lie: Callable[[bytes], Any]) -> None:
        self.server.lie = lambda asked, content: lie(content) if asked == path else content

    def spoil(self, version: str, lie: Callable[[bytes], Any]) -> None:
        """Offer a genuine release, and lie about each form in which its image can be had."""
        payloads = self.genuine(version)["images"][0]["payloads"]
        paths = [f"/{PRODUCT}/{payload['url']}" for payload in payloads]
        self.server.lie = lambda asked, content: lie(content) if asked in paths else content
        self.point(f"r/{version}.jws")


def _replayed(a: Attacker) -> None:
    a.point("r/1.0.1.jws")


def _downgraded(a: Attacker) -> None:
    a.point(a.sign({**a.genuine(NEXT[0]), "security_version": 0, "downgrade": True}))


def _expired(a: Attacker) -> None:
    past = {"issued": "2020-01-01T00:00:00Z", "expires": "2021-01-01T00:00:00Z"}
    a.point(a.sign({**a.genuine(NEXT[0]), **past}))


def _not_yet(a: Attacker) -> None:
    a.point(a.sign({**a.genuine(NEXT[0]), "issued": "2099-01-01T00:00:00Z", "expires": None}))


def _wrong_key(a: Attacker) -> None:
    a.point(a.sign(a.genuine(NEXT[0]), a.lab.new_key("stranger")))


def _revoked_key(a: Attacker) -> None:
    a.point(a.sign(a.genuine(NEXT[0]), a.lab.new_key("revoked")))


def _old_keyring(a: Attacker) -> None:
    """Both an older keyring and a release that it would let in."""
    a.lie_about(f"/{PRODUCT}/keyring.jws", lambda _: (a.folder / "keyring-1.jws").read_bytes())
    a.point(a.sign(a.genuine(NEXT[0]), a.lab.new_key("revoked")), keyring=99)


def _stolen_server(a: Attacker) -> None:
    """Everything of the attacker's own: root, keyring, key, release."""
    own = a.lab.new_key("thief")
    ring = {"schema": 1, "product": PRODUCT, "version": 9, "keys": [keys.public_jwk(own)]}
    root = signing.signer_of(a.lab.new_key("thief root"))
    token = signing.document(ring, root, keyring.TYPE)
    a.lie_about(f"/{PRODUCT}/keyring.jws", lambda _: token)
    a.point(a.sign({**a.genuine(NEXT[0]), "version": "9.0.0"}, own), keyring=9)


def _no_signature(a: Attacker) -> None:
    parts = [json.dumps({"alg": "none"}).encode(), json.dumps(a.genuine(NEXT[0])).encode(), b""]
    a.point(a.put(b".".join(map(base64url.b64url_encode, parts))))


def _wrong_product(a: Attacker) -> None:
    a.point(a.sign({**a.genuine(NEXT[0]), "product": "door-lock"}))


def _wrong_model(a: Attacker) -> None:
    a.point(a.sign({**a.genuine(NEXT[0]), "hardware": ["ESP32_OTHER"]}))


def _wrong_chip(a: Attacker) -> None:
    manifest = a.genuine(NEXT[0])
    manifest["images"][0]["chip_id"] = 9
    a.point(a.sign(manifest))


def _same_version(a: Attacker) -> None:
    a.point(a.sign({**a.genuine(NEXT[0]), "version": RUNS}))


def _swapped(a: Attacker) -> None:
    """The image of another genuine release."""
    image = (a.lab.folder / "firmware-1.0.1.bin").read_bytes()
    a.spoil(NEXT[0], lambda _: image)


def _truncated(a: Attacker) -> None:
    a.spoil(NEXT[1], lambda content: content[: len(content) // 2])


def _tampered(a: Attacker) -> None:
    def flip(content: bytes) -> bytes:
        at = len(content) // 2
        return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]

    a.spoil(NEXT[2], flip)


def _endless(a: Attacker) -> None:
    def flood(sock: ssl.SSLSocket) -> None:
        sock.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            sock.sendall(b"1000\r\n" + b"\xe9" * 4096 + b"\r\n")

    a.spoil(NEXT[3], lambda _: flood)


def _bomb(a: Attacker) -> None:
    a.lie_about(f"/{PRODUCT}/stable.json", lambda _: b"[" * 2_000_000)


def _deep(a: Attacker) -> None:
    a.lie_about(f"/{PRODUCT}/stable.json", lambda _: b"[" * 1500)


def _portal(a: Attacker) -> None:
    page = b"<html><title>Please log in</title>" + b" " * 400 + b"</html>"
    a.server.lie = lambda path, content: page


def _redirected(a: Attacker) -> None:
    def elsewhere(sock: ssl.SSLSocket) -> None:
        sock.sendall(
            b"HTTP/1.1 302 Found\r\nLocation: http://evil.example/\r\nContent-Length: 0\r\n\r\n"
        )

    a.spoil(NEXT[4], lambda _: elsewhere)


def _path(a: Attacker) -> None:
    a.point("../../../etc/passwd")


def _foreign_host(a: Attacker) -> None:
    a.point("https://evil.example/r/1.jws")


def _known_bad(a: Attacker) -> None:
    a.point(f"r/{BAD}.jws")


# What is tried, how it is told, by what the board may refuse it: all its refusals in one poll.
ATTACKS: list[tuple[str, Callable[[Attacker], None], str, tuple[str, ...]]] = [
    ("replayed", _replayed, "an older genuine release is offered again", ("version",)),
    ("downgraded", _downgraded, "signed for a downgrade, below the floor", ("security_version",)),
    ("expired", _expired, "a genuine release past its date", ("expired",)),
    ("not yet", _not_yet, "a genuine release with a date to come", ("not_yet",)),
    ("wrong key", _wrong_key, "signed by a stranger", ("signature",)),
    ("revoked key", _revoked_key, "signed by a key the keyring has left out", ("signature",)),
    (
        "old keyring",
        _old_keyring,
        "the keyring before, and who was in it",
        ("keyring signature",),
    ),
    (
        "stolen server",
        _stolen_server,
        "the thief's own root, keyring and release",
        ("keyring signature",),
    ),
    ("no signature", _no_signature, 'a release with "alg": "none"', ("signature",)),
    ("wrong product", _wrong_product, "genuine, for another product", ("product",)),
    ("wrong model", _wrong_model, "genuine, for other hardware", ("hardware",)),
    ("wrong chip", _wrong_chip, "genuine, for another chip", ("hardware",)),
    ("same version", _same_version, "other contents under the version that runs", ("version",)),
    ("failed before", _known_bad, "a release that this board has rolled back", ("known_bad",)),
    ("swapped image", _swapped, "another genuine image in its place", ("checksum", "http")),
    ("truncated", _truncated, "half of the image", ("http", "format", "network")),
    ("tampered in flight", _tampered, "one bit of the image is flipped", ("checksum", "format")),
    ("endless body", _endless, "an image without an end", ("http", "image", "format")),
    ("megabyte of brackets", _bomb, "a pointer of two megabytes", ("http",)),
    ("nested brackets", _deep, "a pointer nested 1,500 deep", ("format",)),
    ("captive portal", _portal, "a login page instead of everything", ("format", "http")),
    ("redirect to http", _redirected, "the image moved to http://evil.example", ("http",)),
    ("foreign host", _foreign_host, "the release moved to evil.example", ("format",)),
    ("path", _path, "a release called ../../../etc/passwd", ("format",)),
]


@contextlib.contextmanager
def _stage(lab: Lab, console: Console) -> Iterator[Attacker]:
    """A board that runs 1.1.0, confirmed, with a floor of 2, a failed release and a keyring."""
    root = lab.new_key("root")
    for key in ("revoked", "release"):
        signer = signing.signer_of(root)
        revoke = [] if key == "revoked" else [lab.new_key("revoked").kid or ""]
        keyrings.update(
            lab.site, PRODUCT, signer, add=[keys.public_jwk(lab.new_key(key))], revoke=revoke
        )
        if key == "revoked":
            shutil.copy(lab.site / PRODUCT / "keyring.jws", lab.folder / "keyring-1.jws")
    vfs.write_files(lab.flash, {"/ota/keys.json": keys.public_set(root, root=True).encode()})
    server_folder = lab.folder / "server"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server_folder / "server.crt", server_folder / "server.key")
    port = int(lab.url.rsplit(":", 1)[1])
    lab.stop_server()
    server = SiteServer(lab.site, context, port)
    server.start()
    lab.publish(lab.firmware("1.0.1"), "1.0.1", security_version=2)
    lab.publish(lab.firmware(RUNS), RUNS)
    console.print(f"A board with 1.0.0 is switched on, takes {RUNS}, and gives up {BAD}.")
    lab.power_on(timeout=600)
    try:
        lab.wait(lambda e: e.name == "confirmed", timeout=_TIMEOUT_S)
        honest = (lab.site / PRODUCT / "stable.json").read_bytes()
        lab.publish(lab.firmware(BAD, CRASH), BAD)
        lab.wait(lambda e: e.name == "rolledback", timeout=_TIMEOUT_S)
        # Genuine, published by the maker, and not yet seen by this board.
        for version in NEXT:
            image = lab.firmware(version)
            lab.publish(image, version, channel="next", security_version=2)
        (lab.site / PRODUCT / "stable.json").write_bytes(honest)
        attacker = Attacker(lab, server)
        shutil.copy(lab.folder / "keyring-1.jws", attacker.folder / "keyring-1.jws")
        yield attacker
    finally:
        lab.power_off()
        server.close()


def _play(attacker: Attacker, name: str, act: Callable, story: str, codes: tuple) -> Outcome:
    lab = attacker.lab
    # One quiet poll in between, so that what follows is this attack's doing.
    attacker.restore()
    lab.wait(lambda e: e.name == "idle", start=len(lab.events), timeout=_TIMEOUT_S)
    marker = len(lab.events)
    act(attacker)
    with contextlib.suppress(TimeoutError):
        lab.wait(lambda e: e.name == "failed", start=marker, timeout=_TIMEOUT_S)
        # A refused keyring keeps no board from the release: the next poll says that all is done.
        refused = next(n for n, e in enumerate(lab.events) if n >= marker and e.name == "failed")
        lab.wait(lambda e: e.name == "checking", start=refused, timeout=_TIMEOUT_S)
    code, message, held = judged(lab.events[marker:], codes)
    return Outcome(name, story, code, message, held)


def judged(events: list[Event], codes: tuple[str, ...]) -> tuple[str, str, bool]:
    """What a board made of an attack, by its events up to the next poll.

    Returns:
        Its refusals' codes and messages, and whether it held: refused by one of ``codes``, and
        did not go on regardless.
    """
    refusals = [e.data for e in events if e.name == "failed"]
    code = " ".join(r["code"] for r in refusals) or "none"
    message = "; ".join(r["message"] for r in refusals) or "the board said nothing"
    wrong = {"staged", "waiting", "trial", "confirmed"} & {e.name for e in events}
    return code, message, code in codes and not wrong


def run(lab: Lab, console: Console) -> dict[str, Any]:
    """Play every attack against one board; return what became of them and of it."""
    with _stage(lab, console) as attacker:
        before, boots = _image_of(lab), len(lab.boots)
        outcomes = []
        for name, act, story, codes in ATTACKS:
            outcomes.append(_play(attacker, name, act, story, codes))
            mark = "[green]refused[/]" if outcomes[-1].held else "[red]NOT REFUSED[/]"
            console.print(f"  {name:<21} {mark}  {outcomes[-1].code}")
        attacker.restore()
        # And it is well: the genuine release comes through.
        attacker.pointer.write_bytes((attacker.folder / "next.json").read_bytes())
        marker = len(lab.events)
        untouched = _image_of(lab) == before
        resets = len(lab.boots) - boots
        done = lab.wait(lambda e: e.name == "confirmed", start=marker, timeout=_TIMEOUT_S)
    return {
        "attacks": [asdict(outcome) for outcome in outcomes],
        "held": sum(outcome.held for outcome in outcomes),
        "running_slot_untouched": untouched,
        "resets": resets,
        "version_after": done.data["version"],
    }


def _image_of(lab: Lab) -> str:
    """Digest of the slot that runs, and otadata: what no attack may change."""
    described = lab.describe()
    flash = lab.flash.read_bytes()
    parts = {p["label"]: p for p in described["partitions"]}
    digest = hashlib.sha256()
    for label in ("otadata", described["boots"]):
        digest.update(flash[parts[label]["offset"] :][: parts[label]["size"]])
    return digest.hexdigest()


def show(found: dict[str, Any], console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for title in ("tried", "how", "the board", "its words"):
        table.add_column(title, overflow="fold")
    for row in found["attacks"]:
        verdict = Text("refused", "green") if row["held"] else Text("NOT REFUSED", "bold red")
        table.add_row(row["attack"], row["story"], verdict, Text(row["message"][:90]))
    console.print(table)


def attacks(as_json: bool, keep: Path | None) -> None:
    """Play the attacks, show the table, exit with 1 if one was not refused."""
    console = Console(stderr=as_json, highlight=False)
    start = time.monotonic()
    settings = {"source": "static", "token": ""}
    with temporary(keys_known=False, settings=settings, image_size=120_000) as lab:
        try:
            found = run(lab, console)
        finally:
            if keep:
                shutil.copytree(lab.folder, keep, dirs_exist_ok=True)
    found["seconds"] = round(time.monotonic() - start, 1)
    show(found, console)
    console.print(
        f"{found['held']} of {len(found['attacks'])} attacks refused; the running slot was"
        f" {'not touched' if found['running_slot_untouched'] else 'TOUCHED'};"
        f" {found['seconds']} s."
    )
    if as_json:
        print(json.dumps(found))
    if found["held"] != len(found["attacks"]) or not found["running_slot_untouched"]:
        print("twinslot: demo: an attack was not refused", file=sys.stderr)
        raise typer.Exit(1)
