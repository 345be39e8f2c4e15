"""One life of a board, cut at a chosen flash operation, and what must hold afterwards.

A life is an update from the first look at the release to the confirmation (or the way back),
told by the real guard, agent, slot, health and journal on a virtual board; only the network is
left out: release and image lie in a partition that nothing writes. The library lies in a ROM file
system beside it, so that both firmwares are small and every flash operation counts.

Replay a point that failed, with the board's console:

    .venv/bin/python tests/host/powercut.py good --op 137 --mode torn --shape bits --seed 5
"""

import argparse
import io
import json
import random
import shutil
import struct
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from twinslot_tools import keys, publish
from twinslot_tools.virtual_esp32 import bootloader, build, layout, show, vfs
from twinslot_tools.virtual_esp32.board import Board, RunResult
from twinslot_tools.virtual_esp32.chip import image as chip_image
from twinslot_tools.virtual_esp32.chip import nvs, otadata
from twinslot_tools.virtual_esp32.chip.flash import Fault, Flash
from twinslot_tools.virtual_esp32.chip.image import CHIPS
from twinslot_tools.virtual_esp32.chip.table import Partition
from twinslot_tools.virtual_esp32.firmware import make_firmware, make_tree

LIB = Path(__file__).parent.parent.parent / "lib"
CHIP = "esp32"
FLASH = 1 << 20
SLOT = 0x10000
TABLE = """
nvs,     data, nvs,   0x9000,  0x4000,
otadata, data, ota,   0xd000,  0x2000,
ota_0,   app,  ota_0, 0x10000, 0x10000,
ota_1,   app,  ota_1, 0x20000, 0x10000,
shelf,   data, 0x40,  0x30000, 0x10000,
rom,     data, 0x41,  0x40000, 0x40000,
vfs,     data, fat,   0x80000, 0x70000,
"""
FACTORY = "factory, app,  factory, 0xf0000, 0x10000,\n"
PARTITIONS = {p.label: p for p in layout.parse_csv(TABLE + FACTORY, FLASH)}
SLOTS = {"ota_0": 0, "ota_1": 1}

# Nothing twice: a number that stands for two things would hide that one was taken for the other.
ANCIENT, OLD, NEW = "0.9.0", "1.2.3", "2.0.1"
SIZES = {ANCIENT: 13_000, OLD: 15_800, NEW: 17_400}
FLOOR_BEFORE, FLOOR_AFTER = 3, 5  # security versions

BOOT_PY = """
import sys, vfs
from esp32 import Partition
_part = Partition("rom")
_rom = bytearray(%d)
_part.readblocks(0, _rom)
vfs.mount(vfs.VfsRom(_rom), "/rom")
sys.path.insert(1, "/rom")
import twinslot.guard
twinslot.guard.start()
"""

MAIN_PY = """
import asyncio
import json
import machine
import twinslot
from esp32 import Partition
from twinslot.errors import OtaError
from twinslot.journal import Journal
from twinslot.slot import FirmwareSlot
from twinslot.sources import parse_offer
from twinslot.url import resolve

if FirmwareSlot().status()["version"] in %(crashes)r:
    machine.reset()

RELEASE = "http://shelf/lamp/r/%(new)s.jws"


class Body:
    status = 200
    etag = retry_after = None

    def __init__(self, start, length):
        self.length = length
        self.received = 0
        self._at = start
        self._end = start + length

    async def readinto(self, view):
        n = min(len(view), self._end - self._at)
        if n:
            Partition("shelf").readblocks(0, view[:n], self._at)
        self._at += n
        self.received += n
        return n

    async def read(self, limit):
        data = bytearray(self.length)
        await self.readinto(memoryview(data))
        return bytes(data)

    async def close(self):
        pass


class Shelf:
    async def get(self, url, **kw):
        return Body(*%(release)r) if url == RELEASE else Body(*%(image)r)

    async def close(self):
        pass


class Source:
    async def poll(self, client, facts):
        return parse_offer({"release": RELEASE}, RELEASE, resolve)

    async def report(self, client, facts, report):
        print("report:", report["status"], report["version"], report["error"])


agent = twinslot.Agent(%(settings)r, source=Source())
agent._client = agent._trust.client = Shelf()
try:
    asyncio.run(agent.update_now())
except OtaError as exc:
    pass
print("status:", json.dumps(FirmwareSlot().status()))
"""

SETTINGS = {
    "product": "lamp",
    "url": "http://shelf/",
    "allow_http": True,
    "keys": "/keys.json",
    "ntp": "",
    "stable": 0,
    "deadline": 0,
    "hang": 60,
}


@dataclass(frozen=True)
class Story:
    """A board before its update.

    Attributes:
        runs: label of the slot that holds OLD and runs; "factory" is there only if it does.
        crashes: NEW resets as soon as it runs.
        unarmed: begin after set_boot, with a torn state that the bootloader does not watch.
    """

    runs: str = "ota_0"
    crashes: bool = False
    unarmed: bool = False

    @property
    def other(self) -> str:
        return "ota_1" if self.runs == "ota_0" else "ota_0"

    @property
    def table(self) -> list[Partition]:
        """Rows of its partition table."""
        parts = PARTITIONS.values()
        return [p for p in parts if p.label != "factory" or self.runs == "factory"]


STORIES = {
    "good": Story(),
    "crash": Story(crashes=True),
    # Downwards it is harder: ota_0, the slot being written, is what boots without otadata.
    "good-down": Story("ota_1"),
    "crash-down": Story("ota_1", crashes=True),
    "unarmed": Story(unarmed=True),
    "unarmed-crash": Story(crashes=True, unarmed=True),
    "unarmed-crash-down": Story("ota_1", crashes=True, unarmed=True),
    "factory": Story("factory"),
    "factory-crash": Story("factory", crashes=True),
    "factory-unarmed-crash": Story("factory", crashes=True, unarmed=True),
}


@cache
def image(version: str) -> bytes:
    return make_firmware(
        None, chip=CHIP, version=version, project="", size=SIZES[version], seed=SIZES[version]
    )


def build_of(version: str) -> str:
    return image(version)[-32:].hex()


def slot_bytes(flash: bytes, label: str) -> bytes:
    part = PARTITIONS[label]
    return flash[part.offset : part.offset + part.size]


def make_board(folder: Path, story: Story) -> Path:
    """Make the board of a story, as it is before the update; return its flash file."""
    folder.mkdir(parents=True)
    key_path = folder / "release.key"
    keys.generate(key_path, 2048)
    new = folder / "new.bin"
    new.write_bytes(image(NEW))
    spec = publish.Spec("lamp", NEW, ("ESP32_GENERIC",), security_version=FLOOR_AFTER)
    published = publish.publish(new, spec, keys.load_private(key_path), folder / "site")
    token = (folder / "site" / published.release).read_bytes()
    shelf = image(NEW) + token
    entries = []
    slots = {story.runs: image(OLD)}
    if story.runs == "ota_1":
        slots["ota_0"] = image(ANCIENT)
        entries = [otadata.entry(1, otadata.VALID), otadata.entry(2, otadata.VALID)]
    flash = build.make_flash(CHIP, FLASH, story.table, slots, entries=entries)
    rom = make_tree(LIB)
    for label, content in (("shelf", shelf), ("rom", rom)):
        part = PARTITIONS[label]
        assert len(content) <= part.size, label
        flash[part.offset : part.offset + len(content)] = content
    path = folder / "flash.bin"
    path.write_bytes(flash)
    main = MAIN_PY % {
        "crashes": (NEW,) if story.crashes else (),
        "new": NEW,
        "release": (len(image(NEW)), len(token)),
        "image": (0, len(image(NEW))),
        "settings": SETTINGS,
    }
    files = {
        "/boot.py": (BOOT_PY % len(rom)).encode(),
        "/main.py": main.encode(),
        "/keys.json": keys.public_path(key_path).read_bytes(),
    }
    vfs.write_files(path, files)
    if story.runs == "ota_1":
        _give_past(path)
    if story.unarmed:
        _disarm(path, story)
    return path


def _give_past(path: Path) -> None:
    """A board that has lived: a journal, and NVS so full that it must compact on the way."""
    with path.open("r+b", buffering=0) as f:
        part = PARTITIONS["nvs"]
        store = nvs.Nvs(Flash(f, FLASH), part.offset, part.size)
        mine = store.open("application")
        for i in range(10):
            store.set_blob(mine, f"calibration{i % 3}", bytes([i + 1]) * 900)
        ours = store.open("twinslot")
        journal = {"floor": FLOOR_BEFORE, "confirmed": build_of(OLD)}
        journal["versions"] = {build_of(OLD): OLD, build_of(ANCIENT): ANCIENT}
        body = json.dumps(journal).encode()
        store.set_blob(ours, "journal", struct.pack("<BI", 1, otadata.crc32(body)) + body)


def _disarm(path: Path, story: Story) -> None:
    """Install, then tear the state of the new otadata entry: it boots, and nobody watches it."""
    result = Board(path).run(max_boots=1, timeout=20)
    assert result.outcome == "reset", result.console
    where = PARTITIONS["otadata"].offset
    flash = bytearray(path.read_bytes())
    found = otadata.read_entries(lambda at, buf: _read(flash, at, buf), where)
    index = otadata.active(found)
    assert found[index].state == otadata.NEW
    assert otadata.slot(found[index].seq, 2) == SLOTS[story.other]
    at = where + index * otadata.SECTOR
    flash[at : at + 32] = otadata.pack(found[index]._replace(state=0xFFFFFFF5))
    path.write_bytes(flash)


def _read(flash, at, buf):
    buf[:] = flash[at : at + len(buf)]


# ---- what must hold


class Broken(AssertionError):
    """The oracle's complaint."""


def check(holds: object, complaint: str) -> None:
    if not holds:
        raise Broken(complaint)


def journal_of(flash: bytes) -> dict:
    """The journal as the device finds it after a power cut; {} where there is none."""
    part = PARTITIONS["nvs"]
    store = nvs.open_or_erase(Flash(io.BytesIO(flash), len(flash)), part.offset, part.size)
    try:
        raw = store.get_blob(store.open("twinslot"), "journal")
    except nvs.NvsError:
        return {}
    check(raw[0] == 1, f"journal of format {raw[0]}")
    check(struct.unpack_from("<I", raw, 1)[0] == otadata.crc32(raw[5:]), "journal: wrong CRC")
    return json.loads(raw[5:])


def version_in(flash: bytes, label: str) -> str | None:
    """Which image a slot holds, every byte compared."""
    content = slot_bytes(flash, label)
    return next((v for v in SIZES if content.startswith(image(v))), None)


def state_of(flash: bytes, label: str) -> str | None:
    slots = show.describe(flash)["slots"]
    return next(s["state"] for s in slots if s["label"] == label)


def check_after_cut(flash: bytes, story: Story) -> None:
    """What holds at any moment, however the power failed."""
    check(version_in(flash, story.runs) == OLD, "the old image was touched")
    check_unfinished(flash, story)
    journal = journal_of(flash)
    floor = journal.get("floor", 0)
    if story.runs == "ota_1":
        check(floor >= FLOOR_BEFORE, f"the journal was lost: {journal}")
    if floor == FLOOR_AFTER:
        check(state_of(flash, story.other) == "VALID", "the floor rose before the confirmation")
        check(journal["confirmed"] == build_of(NEW), "a floor without its build")
    boots = bootloader.predict(flash, CHIP)
    check(boots.partition is not None, f"nothing boots: {boots.why}")
    running = version_in(flash, boots.partition.label)
    check(running in (OLD, NEW) or _not_yet_erased(story, flash), f"boots {running}")


def check_unfinished(flash: bytes, story: Story) -> None:
    """What is not complete can't boot: its header is the last thing that is written."""
    if version_in(flash, story.other) is not None:
        return
    part = PARTITIONS[story.other]
    content = slot_bytes(flash, story.other)
    wanted = image(NEW)
    if content[32:288] == wanted[32:288] and not content.startswith(wanted[32:], 32):
        check(content[:32] == b"\xff" * 32, f"unfinished, and begins with {content[:32].hex()}")
    try:
        chip_image.verify(
            lambda at, buf: _read(content, at, buf), part.size, CHIPS[CHIP], part.offset
        )
    except chip_image.ImageError:
        return
    raise Broken("an image that is neither of the two verifies")


def _not_yet_erased(story: Story, flash: bytes) -> bool:
    """Before the update the other slot may hold an image from earlier still."""
    return story.runs == "ota_1" and version_in(flash, story.other) == ANCIENT


def check_end(flash: bytes, result: RunResult, story: Story, anywhere: bool = False) -> None:
    """What holds when the board has come to rest.

    Args:
        anywhere: otadata was lost, so the images may have changed places.
    """
    outcomes = [b.outcome for b in result.boots]
    check(outcomes[-1] in ("idle", "stopped"), f"boots ended {outcomes}")
    check(set(outcomes[:-1]) <= {"reset"}, f"boots ended {outcomes}")
    errors = [b.error for b in result.boots if b.error]
    check(not errors, "\n".join(errors))
    label = result.boots[-1].partition
    journal = journal_of(flash)
    status = json.loads(result.console.rsplit("status: ", 1)[1])
    check(status["boot"] == status["running"] == label, f"unsettled: {status}")
    check("trial" not in journal, f"a trial was left over: {journal}")
    # Where both entries have wrong CRCs, no bootloader repairs them; ota_0 is what boots.
    states = ("VALID", None) if anywhere and label == "ota_0" else ("VALID",)
    if label != "factory":  # which has no entry
        check(state_of(flash, label) in states, f"{label} is {state_of(flash, label)}")
    runs = version_in(flash, label)
    if story.crashes:
        check(anywhere or label == story.runs, f"{label} runs")
        # Without otadata a board may wake up with the image from before, and stay with it.
        check(runs == OLD or (anywhere and runs == ANCIENT), f"{runs} runs")
        check(journal.get("floor", 0) in (0, FLOOR_BEFORE), f"floor {journal.get('floor')}")
        check(journal["confirmed"] == build_of(runs), "another image counts as confirmed")
        failed = [f for f in journal["failed"] if f[0] == build_of(NEW)]
        check(len(failed) == 1 and failed[0][1] == NEW and failed[0][2], f"failed: {failed}")
        check(failed[0][3] >= 3, f"not given up for good: {failed}")
    else:
        check(anywhere or label == story.other, f"{label} runs")
        check(runs == NEW, f"{runs} runs")
        check(journal["floor"] == FLOOR_AFTER, f"floor {journal['floor']}")
        check(journal["confirmed"] == build_of(NEW), "the new image is not booked as confirmed")
        check(not journal.get("failed"), f"failed: {journal.get('failed')}")


# ---- one point


MAX_BOOTS = 12
TIMEOUT = 60


@dataclass(frozen=True)
class Point:
    """Where and how a life is cut.

    Attributes:
        op, mode, shape, seed: the power cut, see `Fault`.
        wipe: what becomes of otadata meanwhile: a name of WIPES, or "".
        again: number of the operation of the recovery at which the power is cut once more; 0:
            it is not.
    """

    op: int
    mode: str = "before"
    shape: str | None = None
    seed: int = 0
    wipe: str = ""
    again: int = 0

    def options(self) -> str:
        """This point as options of the command line."""
        given = {k: v for k, v in asdict(self).items() if v not in ("", 0, None)}
        return " ".join(f"--{k} {v}" for k, v in given.items())


def _wipe_both(flash: bytearray, seed: int) -> None:
    at = PARTITIONS["otadata"].offset
    flash[at : at + 0x2000] = b"\xff" * 0x2000


def _wipe_one(flash: bytearray, seed: int) -> None:
    at = PARTITIONS["otadata"].offset + seed % 2 * 0x1000
    flash[at : at + 0x1000] = b"\xff" * 0x1000


def _scramble(flash: bytearray, seed: int) -> None:
    at = PARTITIONS["otadata"].offset
    flash[at : at + 0x2000] = random.Random(seed).randbytes(0x2000)


WIPES = {"both": _wipe_both, "one": _wipe_one, "noise": _scramble}


def live(path: Path, point: Point | None, on_console=None) -> tuple[bytes, RunResult]:
    """Run a life, cut its power at the point, switch on again, let it come to rest.

    Args:
        path: flash file of the board; changed.
        point: None: nothing happens to it.

    Returns:
        The flash at the (first) cut, and what ran after the last one.

    Raises:
        Broken: the power was not cut.
    """
    board = Board(path)
    if point is None:
        result = _run_to_rest(board, on_console)
        return path.read_bytes(), result
    first = _run_to_cut(board, Fault(point.op, point.mode, point.shape, point.seed), on_console)
    check(first.outcome == "power-cut", f"no cut: {[b.outcome for b in first.boots]}")
    flash = path.read_bytes()
    if point.wipe:
        changed = bytearray(flash)
        WIPES[point.wipe](changed, point.seed)
        path.write_bytes(changed)
    if point.again:
        second = _run_to_cut(board, Fault(point.again, "torn", None, point.seed), on_console)
        if second.outcome != "power-cut":  # it had come to rest before
            return flash, second
    return flash, _run_to_rest(board, on_console)


def _run_to_rest(board: Board, on_console) -> RunResult:
    """Run until main.py is done; the guard's timer would keep the board awake."""
    return board.run(MAX_BOOTS, TIMEOUT, on_console=on_console, until=_rests)


def _rests(event: dict) -> bool:
    return event["event"] == "idle"


def _run_to_cut(board: Board, fault: Fault, on_console) -> RunResult:
    result = board.run(
        MAX_BOOTS,
        TIMEOUT,
        fault=fault,
        on_console=on_console,
        until=lambda event: event.get("outcome") == "power-cut" or _rests(event),
    )
    if on_console:
        on_console(f"-- {result.outcome} --")
    return result


def prove(path: Path, story: Story, point: Point, on_console=None) -> None:
    """Cut one life at one point and hold it to the oracle. Raises Broken."""
    flash, result = live(path, point, on_console)
    check_after_cut(flash, story)
    check_end(path.read_bytes(), result, story, anywhere=bool(point.wipe))


def slot_operations(base: Path, scratch: Path, story: Story, ops: int) -> range:
    """Numbers of the operations that write the other slot, from the erase of block 0 to the
    header: found by cutting, as the flash itself does not tell."""

    def first(wanted) -> int:
        low, high = 1, ops + 1
        while low < high:
            middle = (low + high) // 2
            shutil.copyfile(base, scratch)
            _run_to_cut(Board(scratch), Fault(middle, "after", None, 0), None)
            low, high = (low, middle) if wanted(scratch.read_bytes()) else (middle + 1, high)
        return low

    before = slot_bytes(base.read_bytes(), story.other)
    begin = first(lambda flash: slot_bytes(flash, story.other) != before)
    return range(begin, first(lambda flash: version_in(flash, story.other) == NEW) + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Replay a power cut; without --op, none.")
    parser.add_argument("story", choices=STORIES)
    parser.add_argument("--op", type=int)
    parser.add_argument("--mode", default="before")
    parser.add_argument("--shape")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--wipe", choices=WIPES, default="")
    parser.add_argument("--again", type=int, default=0)
    args = parser.parse_args()
    story = STORIES[args.story]
    with tempfile.TemporaryDirectory() as folder:
        path = make_board(Path(folder) / "board", story)
        if args.op is None:
            _, result = live(path, None, print)
            print(json.dumps(result.flash), [b.outcome for b in result.boots])
            check_end(path.read_bytes(), result, story)
        else:
            point = Point(args.op, args.mode, args.shape, args.seed, args.wipe, args.again)
            prove(path, story, point, print)
    print("holds")


if __name__ == "__main__":
    main()
