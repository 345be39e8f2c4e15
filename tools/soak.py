"""One virtual board, one update after another, with faults and power cuts: `make soak N= SEED=`.

Each update is a new version, published into a tree that a small web server hands out. Dice choose
what goes wrong on the way: the power fails before, in or after some flash operation, once or
twice; the server refuses, cuts or damages what it sends; the new application crashes. Then the
board is switched on until it comes to rest, and must run the new image, or the old one with a
reason in its journal. Anything else is unexplained, and ends the soak with what is needed to
replay it: the same seed plays the same dice. Some hours pass before it is switched on again, so
that a release that came to rest after three vain downloads is tried once more.

The agent, guard, slot, journal and HTTP client are the real ones, over loopback without TLS:
what TLS adds is tested elsewhere. Images carry no Python; the library lies in a partition of its
own, so that each flash operation counts. The board's time runs 20 times as fast as the host's.
"""

from __future__ import annotations

import argparse
import http.server
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import twinslot
from twinslot.journal import LIMIT

from . import keys, publish
from .log_cli import Notes
from .log_cli import read as read_notes
from .virtual_esp32 import bootloader, build, layout, show, vfs
from .virtual_esp32.board import Board, RunResult
from .virtual_esp32.chip.flash import MODES, SECTOR, Fault, Stats
from .virtual_esp32.firmware import make_firmware, make_tree

FLASH = 2 << 20
TABLE = """
nvs,     data, nvs,   0x9000,  0x4000,
otadata, data, ota,   0xd000,  0x2000,
ota_0,   app,  ota_0, 0x10000, 0x40000,
ota_1,   app,  ota_1, 0x50000, 0x40000,
rom,     data, 0x41,  0x90000, 0x60000,
vfs,     data, fat,   0xf0000, 0x40000,
"""
PARTITIONS = {p.label: p for p in layout.parse_csv(TABLE, FLASH)}
PRODUCT = "lamp"
SPEED = 20
MAX_BOOTS = 12
TIMEOUT_S = 60
HOURS_OFF = 7
POLLS = 6  # of one power-on, then the board is switched off and on
HEAP_GROWTH = 4096  # bytes
ERASES = 5  # of the most worn sector, by each update: otadata's
SIZES = (18_000, 90_000)  # of an image, from and to

# Garbage is collected when the heap is full; the guard's own threshold would do so all the time.
BOOT_PY = """
import gc, sys, vfs
gc.threshold(100000)
from esp32 import Partition
part = Partition("rom")
rom = bytearray(%d)
part.readblocks(0, rom)
vfs.mount(vfs.VfsRom(rom), "/rom")
sys.path[:] = ["/rom", ".frozen"]  # else each import looks through the volume first
import twinslot.guard
twinslot.guard.start()
"""

MAIN_PY = """
import asyncio, gc, json, machine, sys
import twinslot
from twinslot.errors import OtaError

agent = twinslot.Agent.from_config("/ota.json")
with open("/crashes") as f:
    if agent.version() in f.read().split():
        machine.reset()

async def main():
    for poll in range(%d):
        try:
            await agent.update_now()
            return
        except OtaError as exc:
            if not exc.retry:
                return
        await asyncio.sleep(1)

try:
    asyncio.run(main())
except Exception as exc:
    sys.print_exception(exc)
gc.collect()
print("rest:", json.dumps([agent.version(), gc.mem_alloc()]))
"""


class Unexplained(Exception):
    """An update ended as none may; the text says how and where.

    Attributes:
        tally: what had happened by then, once it left `run`.
    """

    tally: Tally | None = None


@dataclass
class Tally:
    """What happened, over all updates."""

    updates: int = 0
    boots: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    cuts: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    unexplained: int = 0
    erases: list[int] = field(default_factory=lambda: [0] * (FLASH // SECTOR))
    journal: list[int] = field(default_factory=list)  # bytes, after each update
    heap: list[int] = field(default_factory=list)  # bytes taken at rest, after each update

    def worn(self) -> tuple[str, int]:
        """The most worn sector: its partition, and its erases."""
        most = max(range(len(self.erases)), key=self.erases.__getitem__)
        at = most * SECTOR
        label = next(
            (p.label for p in PARTITIONS.values() if p.offset <= at < p.offset + p.size), "?"
        )
        return label, self.erases[most]


class _Handler(http.server.BaseHTTPRequestHandler):
    """Files of the site with ETag and Range; breaks what `server.fault` says."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        site: Path = self.server.site  # type: ignore[attr-defined]
        path = site / self.path.lstrip("/")
        fault = self.server.take_fault(self.path)  # type: ignore[attr-defined]
        if fault.kind == "error":
            self._broke(fault)
            self._answer(503, b"busy")
            return
        if not path.is_file():
            self._answer(404, b"")
            return
        body = path.read_bytes()
        etag = f'"{len(body)}-{path.name[:40]}-{path.stat().st_mtime_ns}"'
        start = 0
        wanted = self.headers.get("Range", "")
        if wanted.startswith("bytes=") and self.headers.get("If-Range", etag) == etag:
            start = int(wanted[6:].split("-")[0])
        fields = {"ETag": etag}
        if start:
            fields["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        part = body[start:]
        if fault.kind == "damage" and part:
            at = fault.at % len(part)
            part = part[:at] + bytes([part[at] ^ 0x10]) + part[at + 1 :]
            self._broke(fault)
        if fault.kind == "cut":
            if fault.at % (len(part) + 1) < len(part):
                self._broke(fault)
            self._answer(206 if start else 200, part, fields, fault.at % (len(part) + 1))
            return
        self._answer(206 if start else 200, part, fields)

    def _broke(self, fault: _Break) -> None:
        self.server.broken[f"network {fault.kind}"] += 1  # type: ignore[attr-defined]

    def _answer(
        self, status: int, body: bytes, fields: dict[str, str] | None = None, room: int = 1 << 40
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (fields or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:room])
        if room < len(body):
            self.close_connection = True


@dataclass(frozen=True)
class _Break:
    kind: str = ""
    at: int = 0


class _Site(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, site: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.site = site
        self.faults: list[_Break] = []
        self.broken: Counter[str] = Counter()  # by kind; what really happened
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def take_fault(self, path: str) -> _Break:
        return self.faults.pop(0) if self.faults else _Break()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # the power of the board failed


@dataclass(frozen=True)
class Trouble:
    """What goes wrong with one update: a line of the dice."""

    cuts: tuple[Fault, ...] = ()
    network: tuple[_Break, ...] = ()
    crashes: bool = False

    def names(self) -> list[str]:
        found = [f"power cut {f.mode}" for f in self.cuts]
        found += [f"network {b.kind}" for b in self.network if b.kind]
        return found + ["application crashes"] * self.crashes


def roll(dice: random.Random, ops: int) -> Trouble:
    """Choose what goes wrong. ``ops``: flash operations of an update, about."""
    kind = dice.choices(
        ("nothing", "cut", "cuts", "network", "both", "crash", "crash and cut"),
        (20, 30, 10, 20, 10, 5, 5),
    )[0]
    cuts = {"cut": 1, "cuts": 2, "both": 1, "crash and cut": 1}.get(kind, 0)
    network: tuple[_Break, ...] = ()
    if kind in ("network", "both"):
        network = tuple(
            _Break(dice.choice(("", "cut", "damage", "error")), dice.randrange(100_000))
            for _ in range(dice.randrange(1, 5))
        )
    return Trouble(
        tuple(
            Fault(dice.randrange(1, ops), dice.choice(MODES), None, dice.randrange(1 << 20))
            for _ in range(cuts)
        ),
        network,
        kind.startswith("crash"),
    )


class Soak:
    """The board and its site, in a folder.

    Args:
        folder: made if absent.
        seed: of all dice.
    """

    def __init__(self, folder: Path, seed: int):
        self.folder = folder
        self.seed = seed
        self.tally = Tally()
        self.dice = random.Random(seed)
        folder.mkdir(parents=True, exist_ok=True)
        keys.generate(folder / "release.key", 2048)
        self.key = keys.load_private(folder / "release.key")
        self.site = folder / "site"
        self.site.mkdir()
        self.server = _Site(self.site)
        self.images: dict[str, bytes] = {}
        self.version = "1.0.0"
        self.crashes: list[str] = []
        self.ops = 600
        self.now = time.time()  # on the board's clock
        self.console: list[str] = []
        self._make_board()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def _image(self, version: str, number: int) -> bytes:
        size = self.dice.randrange(*SIZES)
        self.images[version] = make_firmware(
            None, chip="esp32", version=version, project=PRODUCT, size=size, seed=number
        )
        return self.images[version]

    def _make_board(self) -> None:
        rom = make_tree(Path(twinslot.__path__[0]).parent)
        flash = build.make_flash(
            "esp32", FLASH, PARTITIONS.values(), {"ota_0": self._image(self.version, 0)}
        )
        at = PARTITIONS["rom"].offset
        if len(rom) > PARTITIONS["rom"].size:
            raise RuntimeError(f"the library takes {len(rom)} bytes")
        flash[at : at + len(rom)] = rom
        self.flash = self.folder / "flash.bin"
        self.flash.write_bytes(flash)
        settings = {
            "product": PRODUCT,
            "url": f"http://127.0.0.1:{self.server.server_port}/",
            "allow_http": True,
            "keys": "/keys.json",
            "ntp": "",
            "stable": 1,
            "deadline": 10,
            "hang": 600,
            "timeout": 20,
        }
        vfs.write_files(
            self.flash,
            {
                "/boot.py": (BOOT_PY % len(rom)).encode(),
                "/main.py": (MAIN_PY % POLLS).encode(),
                "/keys.json": keys.public_path(self.folder / "release.key").read_bytes(),
                "/ota.json": json.dumps(settings).encode(),
                "/crashes": b" ",
            },
        )
        # Behind a torn write flash ANDs, as the part does: ESP-IDF takes for free what looks so.
        self.board = Board(self.flash, speed=SPEED, strict=False)

    # -- one update

    def update(self, number: int) -> str:
        """Publish a version, let trouble happen, and see how it ends. Returns the outcome.

        Raises:
            Unexplained: it ended as no update may.
        """
        trouble = roll(self.dice, self.ops)
        old, new = self.version, f"1.{number}.0"
        self._publish(new, number, trouble)
        self.console = []
        for fault in trouble.cuts:
            result = self._run(fault)
            if result.outcome != "power-cut":
                continue  # the board came to rest before that operation
            self.tally.cuts += 1
            self.tally.faults[f"power cut {fault.mode}"] += 1
            self._check(old, new)
        outcome = self._settle(old, new, trouble)
        self.tally.updates += 1
        self.tally.faults += self.server.broken
        self.server.broken.clear()
        self.tally.faults["application crashes"] += outcome.startswith("rolled back")
        self.tally.outcomes[outcome] += 1
        return outcome

    def _publish(self, new: str, number: int, trouble: Trouble) -> None:
        image = self.folder / "new.bin"
        image.write_bytes(self._image(new, number))
        spec = publish.Spec(PRODUCT, new, ("ESP32_GENERIC",), security_version=number // 10)
        publish.publish(image, spec, self.key, self.site)
        self.server.faults = list(trouble.network)
        if trouble.crashes:
            self.crashes = [new]  # versions from before can't come back
            vfs.write_files(self.flash, {"/crashes": new.encode()})

    def _run(self, fault: Fault | None = None) -> RunResult:
        self.now += HOURS_OFF * 3600
        self.board._rtc.clock = self.now
        result = self.board.run(
            MAX_BOOTS,
            TIMEOUT_S,
            fault=fault,
            until=lambda event: event.get("outcome") == "power-cut",
        )
        self.tally.boots += len(result.boots)
        self.console.append(result.console)
        with (self.board._scratch / "stats").open("rb", buffering=0) as f:
            for i, n in enumerate(Stats(f).erases()):
                self.tally.erases[i] += n
        for boot in result.boots:
            if boot.error or "Traceback" in boot.console or boot.outcome in ("crash", "no-boot"):
                raise Unexplained(f"{boot.outcome} {boot.why}\n{boot.console[-1500:]}")
        return result

    def _settle(self, old: str, new: str, trouble: Trouble) -> str:
        for _ in range(4):
            result = self._run()
            if result.outcome != "idle":
                raise Unexplained(f"the board does not come to rest: {result.outcome}")
            running, heap = json.loads(result.console.rsplit("rest: ", 1)[1].splitlines()[0])
            notes = self._check(old, new)
            reason = next((f for f in notes.journal.get("failed", []) if f[1] == new), None)
            if running == new or (reason and reason[3] >= 3):
                break
        self.tally.heap.append(heap)
        self.tally.journal.append(len(json.dumps(notes.journal)))
        if "trial" in notes.journal:
            raise Unexplained(f"at rest, and on trial: {notes.journal}")
        if running == new and not trouble.crashes:
            self._check_confirmed(new, notes)
            self.version = new
            return "confirmed"
        if running == old and trouble.crashes and reason:
            return "rolled back: " + reason[2].split(" (")[0]
        raise Unexplained(f"{running} runs after an update from {old} to {new}: {notes}")

    def _check_confirmed(self, new: str, notes: Notes) -> None:
        """It was proven, and journal and otadata say so."""
        if notes.journal.get("confirmed") != self.images[new][-32:].hex():
            raise Unexplained(f"{new} runs, and counts as not confirmed: {notes.journal}")
        flash = self.flash.read_bytes()
        boots = bootloader.predict(flash, "esp32").partition
        label = boots.label if boots else ""
        states = {slot["label"]: slot["state"] for slot in show.describe(flash)["slots"]}
        if states.get(label) != "VALID":
            raise Unexplained(f"{new} runs in {label}, and otadata says {states}")

    def _check(self, old: str, new: str) -> Notes:
        """What holds at any time: what would boot is whole, and one of the two."""
        flash = self.flash.read_bytes()
        boots = bootloader.predict(flash, "esp32").partition
        if boots is None:
            raise Unexplained("nothing boots")
        content = flash[boots.offset : boots.offset + boots.size]
        if not any(content.startswith(self.images[version]) for version in (old, new)):
            raise Unexplained(f"what boots in {boots.label} is neither {old} nor {new}")
        return read_notes(flash)

    def replay(self) -> str:
        return f"make soak N={self.tally.updates + 1} SEED={self.seed}"


def growth(values: list[int]) -> int:
    """How much more the last fifth takes than the second one, on average."""
    n = max(1, len(values) // 5)
    return round(sum(values[-n:]) / n - sum(values[n : 2 * n] or values[:n]) / n)


def report(tally: Tally) -> str:
    label, erases = tally.worn()
    last = (tally.journal or [0])[-1]
    lines = [
        f"updates        {tally.updates} ({tally.boots} boots)",
        "faults         "
        + (", ".join(f"{k} {v}" for k, v in sorted(tally.faults.items())) or "0"),
        f"power cuts     {tally.cuts}",
        "outcomes       " + ", ".join(f"{k} {v}" for k, v in sorted(tally.outcomes.items())),
        f"unexplained    {tally.unexplained}",
        f"most worn      a sector of {label}: {erases} erases",
        f"journal        {max(tally.journal, default=0)} bytes at most, {last} at the end",
        f"heap           {(tally.heap or [0])[-1]} bytes at the end, growth {growth(tally.heap)}",
    ]
    return "\n".join(lines)


def hold(tally: Tally) -> None:
    """Limits of wear and memory, over all updates. Raises Unexplained."""
    if max(tally.journal) >= LIMIT:
        raise Unexplained(f"the journal has grown to {max(tally.journal)} bytes")
    # What is in use at rest differs by some 2 KB, by what the last boot had to do. It is the heap
    # of a boot of its own: what grows there is what flash holds. Leaks from poll to poll of one
    # boot are looked for in test_time_and_space.py.
    if growth(tally.heap) >= HEAP_GROWTH:
        raise Unexplained(f"the heap in use has grown: {tally.heap}")
    label, erases = tally.worn()
    if erases > ERASES * tally.updates:
        raise Unexplained(f"a sector of {label} was erased {erases} times")
    if tally.outcomes["confirmed"] < tally.updates // 2:
        raise Unexplained(f"too few were confirmed: {tally.outcomes}")


def run(n: int, seed: int, folder: Path, say=lambda line: None) -> Tally:
    """Play ``n`` updates. Raises Unexplained."""
    soak = Soak(folder, seed)
    began = time.monotonic()
    try:
        for number in range(1, n + 1):
            outcome = soak.update(number)
            say(f"{number:5} {outcome}  ({(time.monotonic() - began) / number:.1f} s each)")
        hold(soak.tally)
    except Unexplained as exc:
        text = "".join(soak.console)[-3000:]
        found = Unexplained(f"{exc}\n{text}\nreplay: {soak.replay()}")
        found.tally = soak.tally
        found.tally.unexplained += 1
        raise found from exc
    finally:
        soak.close()
    return soak.tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("n", type=int, nargs="?", default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quiet", action="store_true")
    args = parser.parse_args()
    print(f"seed           {args.seed}", flush=True)
    say = (lambda line: None) if args.quiet else (lambda line: print(line, file=sys.stderr))
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        try:
            tally = run(args.n, args.seed, Path(folder) / "soak", say)
        except Unexplained as exc:
            print(f"twinslot: soak: {exc}", file=sys.stderr)
            if exc.tally:
                print(report(exc.tally))
            sys.exit(1)
    print(report(tally))


if __name__ == "__main__":
    main()
