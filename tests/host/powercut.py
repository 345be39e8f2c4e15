"""One life of a board, cut at chosen flash operations, and what must hold afterwards.

A life is an update from the first look at the release to the confirmation (or the way back),
told by the real guard, agent, slot, health and journal on a virtual board; only the network is
left out: release and payloads lie in a partition that nothing writes. Library and application lie
in a ROM file system beside it, so that firmwares are small and every flash operation counts. The
application writes a file at each start, as applications do. `sweep.py` cuts them, and replays one
cut.
"""

import binascii
import io
import json
import random
import shutil
import struct
import tempfile
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple, Self

from twinslot_tools import keys, publish, sample
from twinslot_tools.virtual_esp32 import bootloader, build, layout, show, vfs
from twinslot_tools.virtual_esp32.board import Board, RunResult, memory
from twinslot_tools.virtual_esp32.chip import image as chip_image
from twinslot_tools.virtual_esp32.chip import nvs, otadata
from twinslot_tools.virtual_esp32.chip.flash import Fault, Flash
from twinslot_tools.virtual_esp32.chip.image import CHIPS
from twinslot_tools.virtual_esp32.chip.table import Partition
from twinslot_tools.virtual_esp32.firmware import make_firmware, make_tree

LIB = Path(__file__).parent.parent.parent / "lib"
CHIP = "esp32"
FLASH = 2 << 20
TABLE = """
nvs,     data, nvs,   0x9000,   0x4000,
otadata, data, ota,   0xd000,   0x2000,
ota_0,   app,  ota_0, 0x10000,  0x30000,
ota_1,   app,  ota_1, 0x40000,  0x30000,
shelf,   data, 0x40,  0x70000,  0x50000,
rom,     data, 0x41,  0xc0000,  0x40000,
vfs,     data, fat,   0x100000, 0x20000,
"""
FACTORY = "factory, app,  factory, 0x1c0000, 0x30000,\n"
PARTITIONS = {p.label: p for p in layout.parse_csv(TABLE + FACTORY, FLASH)}
READ_ONLY = {"shelf", "rom"}
SLOTS = {"ota_0": 0, "ota_1": 1}

# Nothing twice: a number that stands for two things would hide that one was taken for the other.
ANCIENT, OLD, NEW, NEWER = "0.9.0", "1.2.3", "2.0.1", "2.1.7"
SMALL = {ANCIENT: 13_000, OLD: 15_800, NEW: 17_400, NEWER: 16_600}
# NEW has two checkpoints on its way, and its last part is no whole block.
LARGE = {ANCIENT: 139_100, OLD: 141_300, NEW: 146_900, NEWER: 144_400}
FLOOR_BEFORE, FLOOR_AFTER = 3, 5  # security versions

# The guard's own threshold would collect garbage dozens of times a boot: half of all the time.
BOOT_PY = """
import gc, sys, vfs
gc.threshold(150000)
from esp32 import Partition
_part = Partition("rom")
_rom = bytearray(%d)
_part.readblocks(0, _rom)
vfs.mount(vfs.VfsRom(_rom), "/rom")
sys.path[:] = ["/rom", ".frozen"]  # else each import looks through the volume first
import twinslot.guard
twinslot.guard.start()
"""

MAIN_PY = "import application\n"
APPLICATION_PY = """
import asyncio
import binascii
import json
import machine
import os
import twinslot
from esp32 import Partition
from twinslot import guard
from twinslot.errors import BusyError, OtaError
from twinslot.journal import Journal
from twinslot.slot import FirmwareSlot
from twinslot.sources import parse_offer
from twinslot.url import resolve

starts = 1
try:
    with open("starts.txt") as f:
        starts += int(f.read())
except OSError:
    pass
with open("starts.new", "w") as f:
    f.write(str(starts))
os.rename("starts.new", "starts.txt")
print("starts:", starts)

found = FirmwareSlot().status()
if found["version"] in %(crashes)r:
    machine.reset()

FILES = %(files)r  # {URL: (offset on the shelf, length)}


class Body:
    etag = '"shelf"'
    retry_after = None

    def __init__(self, begin, length, start):
        self.status = 200 if start is None else 206
        self.length = length - (start or 0)
        self.received = 0
        self._at = begin + (start or 0)
        self._end = begin + length

    def take(self, view, n):
        n = min(n, self._end - self._at)
        if n:
            Partition("shelf").readblocks(0, view[:n], self._at)
        self._at += n
        self.received += n
        return n or None

    async def wait(self):
        pass

    async def read(self, limit):
        data = bytearray(self.length)
        self.take(memoryview(data), len(data))
        return bytes(data)

    async def close(self):
        pass


class Shelf:
    async def get(self, url, start=None, **kw):
        if not url.endswith(".jws"):
            print("fetch:", url, start or 0)
        return Body(*FILES[url], start)

    async def close(self):
        pass


class Source:
    async def poll(self, client, facts):
        known = Journal.shared()
        later = known.get("failed", list) or known.get("trial")
        if facts["current_version"] != %(old)r:
            later = True
        release = %(releases)r[-1 if later else 0]
        return parse_offer({"release": release}, release, resolve)

    async def report(self, client, facts, report):
        print("report:", report["status"], report["version"], report["error"])


class Hasty:
    # Somebody at the prompt is faster than the reset into the new image.

    reset_cause = machine.reset_cause
    reset = machine.soft_reset


agent = twinslot.Agent(%(settings)r, source=Source())
agent.check("well", lambda: found["version"] not in %(unhealthy)r)
if %(hasty)r and guard.start() == "idle":
    agent._machine = Hasty
if found["state"] == "pending":
    try:
        asyncio.run(FirmwareSlot().begin(None))
        print("error: the way back was given away")
    except BusyError:
        pass
agent._client = agent._trust.client = Shelf()
for _ in range(2):
    try:
        asyncio.run(agent.update_now())
    except OtaError as exc:
        pass
    if not agent._tried or agent._tried[1] < 3:
        break
    print("rests")
    agent._tried[2] -= 6 * 3600
crcs = {}
for name in os.listdir("/"):
    if name.endswith((".py", ".json")):
        with open("/" + name, "rb") as f:
            crcs["/" + name] = binascii.crc32(f.read())
print("status:", json.dumps(dict(FirmwareSlot().status(), files=crcs)))
"""

# What the application of a board that has lived keeps in NVS, beside the agent.
CALIBRATION = {f"calibration{i}": bytes([20 + i]) * 900 for i in range(3)}

SHELF = "http://shelf/"
SETTINGS = {
    "product": "lamp",
    "url": SHELF,
    "allow_http": True,
    "keys": "/keys.json",
    "ntp": "",
    "stable": 0,
    "deadline": 0,
    "hang": 60,
}


@dataclass(frozen=True)
class Story:
    """A board before its update, and what comes.

    Attributes:
        runs: label of the slot that holds OLD and runs; "factory" is there only if it does.
        crashes: NEW resets as soon as it runs.
        unhealthy: NEW runs, and fails a health check.
        unarmed: begin after set_boot, with a torn state that the bootloader does not watch.
        payload: "small": one that comes in one piece; "identity", "gzip", "delta": one of the
            large images, in that form, with checkpoints on the way.
        refused: a byte of the image on the shelf is not what was signed.
        newer: NEWER is offered once NEW is on trial, or has failed. Where NEW is well, somebody
            soft-resets the board before it resets into the slot that was activated.
        broken: both slots hold images that don't verify, and otadata names one of them.
    """

    runs: str = "ota_0"
    crashes: bool = False
    unhealthy: bool = False
    unarmed: bool = False
    payload: str = "small"
    refused: bool = False
    newer: bool = False
    broken: bool = False

    @property
    def other(self) -> str:
        return "ota_1" if self.runs == "ota_0" else "ota_0"

    @property
    def table(self) -> list[Partition]:
        """Rows of its partition table."""
        parts = PARTITIONS.values()
        return [p for p in parts if p.label != "factory" or self.runs == "factory"]

    @property
    def last(self) -> str:
        """The version that it runs in the end."""
        if self.newer:
            return NEWER
        return OLD if self.fails or self.refused else NEW

    @property
    def fails(self) -> bool:
        """Whether NEW can't prove itself."""
        return self.crashes or self.unhealthy

    @property
    def replaced(self) -> bool:
        """Whether OLD itself is overwritten, once NEW is confirmed."""
        return self.newer and not self.fails

    @property
    def complete(self) -> tuple[str, ...]:
        """Versions that may run at some time."""
        return (OLD, NEW, NEWER) if self.newer else (OLD, NEW)

    def image(self, version: str) -> bytes:
        return _image(version, self.payload)

    def build(self, version: str) -> str:
        return self.image(version)[-32:].hex()


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
    "broken-slots": Story("factory", broken=True),
    "broken-slots-crash": Story("factory", broken=True, crashes=True),
    "unhealthy": Story(unhealthy=True),
    "unhealthy-down": Story("ota_1", unhealthy=True),
    "unarmed-unhealthy": Story(unhealthy=True, unarmed=True),
    "factory-unhealthy": Story("factory", unhealthy=True),
    "refused": Story(refused=True),
    "mended": Story(crashes=True, newer=True),
    "superseded": Story(newer=True),
    "superseded-down": Story("ota_1", newer=True),
    "resumed": Story(payload="identity"),
    "resumed-crash": Story("ota_1", crashes=True, payload="identity"),
    "gzip": Story(payload="gzip"),
    "delta": Story("ota_1", payload="delta"),
}


@cache
def _image(version: str, payload: str) -> bytes:
    size = (SMALL if payload == "small" else LARGE)[version]
    filler = None
    if payload in ("gzip", "delta"):
        filler = sample.code(size, changes=size % 7)
    return make_firmware(
        None, chip=CHIP, version=version, project="", size=size, seed=size, filler=filler
    )


def slot_bytes(flash: bytes, label: str) -> bytes:
    part = PARTITIONS[label]
    return flash[part.offset : part.offset + part.size]


def make_board(folder: Path, story: Story) -> Path:
    """Make the board of a story, as it is before the update; return its flash file."""
    folder.mkdir(parents=True)
    shelf, files, releases = _stock_shelf(folder, story)
    entries = []
    slots = {story.runs: story.image(OLD)}
    if story.runs == "ota_1":
        slots["ota_0"] = story.image(ANCIENT)
    if story.broken or story.runs == "ota_1":
        entries = [otadata.entry(1, otadata.VALID), otadata.entry(2, otadata.VALID)]
    flash = build.make_flash(CHIP, FLASH, story.table, slots, entries=entries)
    rom = _make_rom(folder / "rom", story, files, releases)
    written = {"shelf": shelf, "rom": rom}
    if story.broken:
        broken = bytearray(story.image(ANCIENT))
        broken[9_000] ^= 1
        written |= {"ota_0": broken, "ota_1": broken}
    for label, content in written.items():
        part = PARTITIONS[label]
        assert len(content) <= part.size, (label, len(content))
        flash[part.offset : part.offset + len(content)] = content
    path = folder / "flash.bin"
    path.write_bytes(flash)
    files = {
        "/boot.py": (BOOT_PY % len(rom)).encode(),
        "/main.py": MAIN_PY.encode(),
        "/keys.json": keys.public_path(folder / "release.key").read_bytes(),
    }
    vfs.write_files(path, files)
    if story.runs == "ota_1":
        _give_past(path, story)
    if story.unarmed:
        _disarm(path, story)
    return path


def _make_rom(folder: Path, story: Story, files: dict, releases: list[str]) -> bytes:
    shutil.copytree(LIB, folder, ignore=shutil.ignore_patterns("__pycache__"))
    text = APPLICATION_PY % {
        "crashes": (NEW,) if story.crashes else (),
        "unhealthy": (NEW,) if story.unhealthy else (),
        "hasty": story.replaced,
        "old": OLD,
        "files": files,
        "releases": releases,
        "settings": SETTINGS,
    }
    (folder / "application.py").write_text(text)
    return make_tree(folder)


def _stock_shelf(folder: Path, story: Story) -> tuple[bytes, dict, list[str]]:
    """Publish what is offered. Returns the shelf, {URL: (offset, length)} and release URLs."""
    key_path = folder / "release.key"
    keys.generate(key_path, 2048)
    key = keys.load_private(key_path)
    old = folder / "old.bin"
    old.write_bytes(story.image(OLD))
    shelf, files, releases = bytearray(), {}, []
    for version in story.complete[1:]:
        new = folder / "new.bin"
        new.write_bytes(story.image(version))
        spec = publish.Spec(
            "lamp",
            version,
            ("ESP32_GENERIC",),
            security_version=FLOOR_AFTER,
            bases=(str(old),) if story.payload == "delta" else (),
        )
        published = publish.publish(new, spec, key, folder / "site")
        found = published.manifest["images"][0]["payloads"]
        best = min(found, key=lambda p: p["size"])
        kind = "delta" if "patch" in best else best["encoding"]
        assert kind == (story.payload if story.payload != "small" else "identity"), kind
        releases.append(f"{SHELF}lamp/{published.release.split('/', 1)[1]}")
        for url, path in [(releases[-1], folder / "site" / published.release)] + [
            (f"{SHELF}lamp/{p['url']}", folder / "site" / "lamp" / p["url"]) for p in found
        ]:
            content = bytearray(path.read_bytes())
            if story.refused and url != releases[-1]:
                content[len(content) // 2] ^= 4
            files[url] = (len(shelf), len(content))
            shelf += content
    return bytes(shelf), files, releases


def _give_past(path: Path, story: Story) -> None:
    """A board that has lived: a journal, and NVS so full that it must compact on the way."""
    with path.open("r+b", buffering=0) as f:
        part = PARTITIONS["nvs"]
        store = nvs.Nvs(Flash(f, FLASH), part.offset, part.size)
        mine = store.open("application")
        for i in range(7):
            store.set_blob(mine, f"calibration{i % 3}", bytes([i + 1]) * 900)
        for key, content in CALIBRATION.items():
            store.set_blob(mine, key, content)
        ours = store.open("twinslot")
        journal = {"floor": FLOOR_BEFORE, "confirmed": story.build(OLD)}
        journal["versions"] = {story.build(v): v for v in (OLD, ANCIENT)}
        body = json.dumps(journal).encode()
        store.set_blob(ours, "journal", struct.pack("<BI", 1, otadata.crc32(body)) + body)


def _disarm(path: Path, story: Story) -> None:
    """Install, then tear the state of the new otadata entry: it boots, and nobody watches it."""
    result = switch_on(path).run(max_boots=1, timeout=20)
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
    """The oracle's complaint.

    Attributes:
        kind: one of KINDS.
    """

    def __init__(self, complaint: str, kind: str = "other"):
        super().__init__(complaint)
        self.kind = kind


# bricked: nothing boots, or the board does not come to rest. wrong: it rests on another image
# than it should. unverified: bytes ran that are no complete image of ours. lost: a checkpoint was
# there, and what it stands for was fetched again. other: all else that must hold.
KINDS = ("bricked", "wrong", "unverified", "lost", "other")


def check(holds: object, complaint: str, kind: str = "other") -> None:
    if not holds:
        raise Broken(complaint, kind)


def nvs_blob(flash: bytes, namespace: str, key: str) -> bytes | None:
    """A blob as the device finds it after a power cut."""
    part = PARTITIONS["nvs"]
    try:
        store = nvs.Nvs(Flash(io.BytesIO(flash), len(flash)), part.offset, part.size)
    except nvs.NvsError as exc:
        raise Broken(f"NVS would be erased: {exc}") from exc
    try:
        return store.get_blob(store.open(namespace), key)
    except nvs.NvsError as exc:
        check(exc.code == nvs.ERR_NOT_FOUND, f"{key}: {exc}")
        return None


def freed_by_half(flash: bytes) -> bool:
    """Whether a page of NVS was being erased that had been copied, and its header is left.

    The one state in which ESP-IDF itself loses what an application keeps: it takes the page for
    one that is still to be copied, erases the copy, and copies what is left (nvs_pagemanager.cpp,
    PageManager::load). Only an erase leaves entries blank that the bitmap calls written.
    """
    part = PARTITIONS["nvs"]
    for at in range(part.offset, part.offset + part.size, nvs.SECTOR):
        page = flash[at : at + nvs.SECTOR]
        if struct.unpack_from("<I", page) != (0xFFFFFFF8,):
            continue
        for i in range(nvs.ENTRIES):
            written = page[32 + (i >> 2)] >> (i & 3) * 2 & 3 == 2
            if written and page[64 + 32 * i : 96 + 32 * i] == b"\xff" * 32:
                return True
    return False


def nvs_number(flash: bytes, key: str) -> int:
    """A number of the agent; 0 where there is none."""
    part = PARTITIONS["nvs"]
    store = nvs.Nvs(Flash(io.BytesIO(flash), len(flash)), part.offset, part.size)
    try:
        return store.get_i32(store.open("twinslot"), key)
    except nvs.NvsError:
        return 0


def blob_of(flash: bytes, key: str) -> dict:
    """A blob of the agent; {} where there is none."""
    raw = nvs_blob(flash, "twinslot", key)
    if raw is None:
        return {}
    check(raw[0] == 1, f"{key} of format {raw[0]}")
    check(struct.unpack_from("<I", raw, 1)[0] == otadata.crc32(raw[5:]), f"{key}: wrong CRC")
    return json.loads(raw[5:])


def journal_of(flash: bytes) -> dict:
    return blob_of(flash, "journal")


def version_in(flash: bytes, label: str, story: Story) -> str | None:
    """Which image a slot holds, every byte compared."""
    return _version_of(slot_bytes(flash, label), story)


def _version_of(content: bytes, story: Story) -> str | None:
    return next((v for v in SMALL if content.startswith(story.image(v))), None)


def state_of(flash: bytes, label: str) -> str | None:
    slots = show.describe(flash)["slots"]
    return next(s["state"] for s in slots if s["label"] == label)


def check_after_cut(flash: bytes, story: Story) -> None:
    """What holds at any moment, however the power failed."""
    journal = journal_of(flash)
    kept = {story.build(v): v for v in story.complete}.get(journal.get("confirmed", ""), OLD)
    where = _slot_of(flash, kept, story) if story.replaced else story.runs
    check(
        where and version_in(flash, where, story) == (kept if story.replaced else OLD),
        f"the way back to {kept} was touched",
        "bricked",
    )
    check_unfinished(flash, story)
    floor = journal.get("floor", 0)
    if story.runs == "ota_1":
        check(floor >= FLOOR_BEFORE, f"the journal was lost: {journal}")
        for key, content in CALIBRATION.items() if not freed_by_half(flash) else ():
            check(nvs_blob(flash, "application", key) == content, f"{key} was lost from NVS")
    if floor == FLOOR_AFTER:
        check(kept in story.complete[-2:] and kept != OLD, "a floor without its build")
        where = _slot_of(flash, kept, story)
        check(where, "the confirmed image is gone")
        check(state_of(flash, where) == "VALID", "the floor rose before the confirmation")
    boots = bootloader.predict(flash, CHIP)
    check(boots.partition is not None, f"nothing boots: {boots.why}", "bricked")
    running = version_in(flash, boots.partition.label, story)
    check(running in story.complete or _not_yet_erased(story, flash), f"boots {running}", "wrong")


def _slot_of(flash: bytes, version: str, story: Story) -> str | None:
    """Which slot holds an image."""
    labels = (story.runs, story.other)
    return next((label for label in labels if version_in(flash, label, story) == version), None)


def check_unfinished(flash: bytes, story: Story) -> None:
    """What is not complete can't boot: its header is the last thing that is written."""
    for label in {story.other, story.runs} & SLOTS.keys():
        if version_in(flash, label, story) is None:
            _check_unfinished(flash, label, story)


def _check_unfinished(flash: bytes, label: str, story: Story) -> None:
    part = PARTITIONS[label]
    content = slot_bytes(flash, label)
    for version in story.complete[1:]:
        wanted = story.image(version)
        begun = content[32:288] == wanted[32:288]
        if begun and not (content.startswith(wanted[32:], 32) or _being_erased(content, wanted)):
            check(
                content[:32] == b"\xff" * 32,
                f"unfinished, and begins with {content[:32].hex()}",
                "unverified",
            )
    try:
        chip_image.verify(
            lambda at, buf: _read(content, at, buf), part.size, CHIPS[CHIP], part.offset
        )
    except chip_image.ImageError:
        return
    raise Broken("an image that is none of ours verifies", "unverified")


def _being_erased(content: bytes, image: bytes) -> bool:
    """Whether it was complete, and has lost nothing yet but some 0 bits of its first sector: the
    erase that a new download begins with was cut."""
    was, now = (int.from_bytes(c[: otadata.SECTOR], "little") for c in (image, content))
    rest = slice(otadata.SECTOR, len(image))
    return content[rest] == image[rest] and now & was == was


def _not_yet_erased(story: Story, flash: bytes) -> bool:
    """Before the update the other slot may hold an image from earlier still."""
    return story.runs == "ota_1" and version_in(flash, story.other, story) == ANCIENT


class Volume(NamedTuple):
    """What must not be lost from the file system.

    Attributes:
        files: {path: CRC-32} of what nothing writes after the board was made.
        starts: how often the application has written down that it started.
    """

    files: dict[str, int]
    starts: int

    @classmethod
    def read(cls, flash: bytes) -> Self:
        """Of a board that is switched off. Raises Broken where it can't be read."""
        with tempfile.NamedTemporaryFile(dir=memory()) as copy:
            copy.write(flash)
            copy.flush()
            try:
                found = vfs.read_files(copy.name)
                starts = int(found.get("/starts.txt", b"0"))
            except (vfs.VolumeError, ValueError) as exc:
                raise Broken(f"the file system is damaged: {exc!r}") from exc
        kept = (".py", ".json")
        return cls({k: binascii.crc32(v) for k, v in found.items() if k.endswith(kept)}, starts)


def check_volume(result: RunResult, status: dict, volume: Volume) -> None:
    """Nothing that the application has kept was lost."""
    check(status.get("files") == volume.files, f"files were lost or changed: {status}")
    told = [line for line in result.console.splitlines() if line.startswith("starts: ")]
    check(told, "the application never ran")
    counted = int(told[0][8:])
    check(counted > volume.starts, f"start {counted} after {volume.starts}: a file was lost")


def check_end(
    flash: bytes, result: RunResult, story: Story, volume: Volume, anywhere: bool = False
) -> None:
    """What holds when the board has come to rest.

    Args:
        volume: as it was when the power failed last.
        anywhere: otadata was lost, so the images may have changed places.
    """
    outcomes = [b.outcome for b in result.boots]
    check(outcomes[-1] in ("idle", "stopped"), f"boots ended {outcomes}", "bricked")
    check(set(outcomes[:-1]) <= {"reset", "soft-reset"}, f"boots ended {outcomes}", "bricked")
    errors = [b.error for b in result.boots if b.error]
    check(not errors, "\n".join(errors))
    check("error: " not in result.console, result.console)
    label = result.boots[-1].partition
    journal = journal_of(flash)
    check("status: " in result.console, "the application was lost")
    status = json.loads(result.console.rsplit("status: ", 1)[1].splitlines()[0])
    check_volume(result, status, volume)
    check(status["boot"] == status["running"] == label, f"unsettled: {status}")
    check("trial" not in journal, f"a trial was left over: {journal}")
    runs = version_in(flash, label, story)
    goes_back = story.last == OLD
    if label != "factory":  # which has no entry
        _check_state(state_of(flash, label), label, goes_back or anywhere)
    if story.replaced:  # one slot further; only one where NEW failed by the power cut
        other = story.other if label == story.runs else story.runs
        back = version_in(flash, other, story)
        check(anywhere or back == (NEW if label == story.runs else OLD), f"back to {back}")
    else:
        wanted = story.runs if goes_back else story.other
        check(anywhere or label == wanted, f"{label} runs", "wrong")
    # Without otadata a board may wake up with the image from before, and stay with it.
    stays = goes_back and anywhere and runs == ANCIENT
    check(runs == story.last or stays, f"{runs} runs", "wrong")
    failed = [f for f in journal.get("failed", ()) if f[0] == story.build(NEW)]
    if goes_back:
        check(journal.get("floor", 0) in (0, FLOOR_BEFORE), f"floor {journal.get('floor')}")
    else:
        check(journal.get("floor") == FLOOR_AFTER, f"floor {journal.get('floor')}")
    if story.refused:
        check("failed" in result.console, "nothing was said of the refusal")
        return
    check(journal.get("confirmed") == story.build(runs), "another image counts as confirmed")
    if story.fails:
        check(len(failed) == 1 and failed[0][1] == NEW and failed[0][2], f"failed: {failed}")
        check(failed[0][3] >= 3 or story.newer, f"not given up for good: {failed}")
    else:
        others = [f for f in journal.get("failed", ()) if f not in failed or not story.newer]
        check(not others, f"failed: {others}")


def _check_state(state: str | None, label: str, goes_back: bool) -> None:
    """The bootloader boots what it rests on, and never on trial.

    Where both entries have wrong CRCs, no bootloader repairs them: ota_0 is what boots. A state
    of which some bits were torn counts as none that is known: it boots, and is not watched. A new
    image is marked valid, whatever came before.
    """
    fine = state == "VALID"
    if goes_back:
        fine = fine or state not in ("NEW", "PENDING_VERIFY", "INVALID", "ABORTED")
        fine = fine and (state is not None or label == "ota_0")
    check(fine, f"{label} is {state}")


# ---- one point


MAC = bytes.fromhex("240ac4506f77")
MAX_BOOTS = 12
TIMEOUT = 60


class Cut(NamedTuple):
    """Where and how the power fails, see `Fault`; operations count from when it came last."""

    op: int
    mode: str = "before"
    shape: str | None = None
    seed: int = 0

    def __str__(self) -> str:
        told = [str(self.op), self.mode]
        if self.mode == "torn":
            told += [self.shape or "", str(self.seed)]
        return ":".join(told)

    @classmethod
    def parse(cls, text: str) -> Self:
        op, mode, shape, seed = [*text.split(":"), *["before", "", "0"][text.count(":") :]]
        return cls(int(op), mode, shape or None, int(seed))


@dataclass(frozen=True)
class Point:
    """How a life is cut.

    Attributes:
        cuts: the first one counts from the start of the story, the others from the last one.
        wipe: what becomes of otadata after the first cut: a name of WIPES, or "".
        seed: of the wipe.
    """

    cuts: tuple[Cut, ...]
    wipe: str = ""
    seed: int = 0

    def options(self) -> str:
        """This point as options of the command line."""
        told = [f"--cut {cut}" for cut in self.cuts]
        if self.wipe:
            told.append(f"--wipe {self.wipe} --seed {self.seed}")
        return " ".join(told)


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


def switch_on(path: Path, cuts: tuple[Cut, ...] = (), unsteady: Path | None = None) -> Board:
    """The board of a flash file, the same one whatever the file is called; with memory enough
    that no life takes another turn for want of it."""
    return Board(path, strict=is_strict(cuts), mac=MAC, heap="256K", unsteady=unsteady)


def is_strict(cuts: tuple[Cut, ...]) -> bool:
    """Whether flash takes no program of a 0 bit back to 1 any more, as nothing does in an
    undamaged life. Behind a torn operation it ANDs, as the part does: littlefs programs what
    looks erased at its beginning, reads it back, and goes elsewhere when it was not."""
    return all(cut.mode != "torn" for cut in cuts)


def run_to_rest(board: Board, story: Story, on_console=None, **options) -> RunResult:
    """Run until main.py is done; the guard's timer would keep the board awake.

    Raises:
        Broken: bytes ran that are no complete image of ours.
    """
    look = partial(_look, board, story)
    return board.run(
        MAX_BOOTS, TIMEOUT, on_console=on_console, until=_rests, on_event=look, **options
    )


def _look(board: Board, story: Story, event: dict) -> None:
    if event["event"] == "boot":
        part = PARTITIONS[event["partition"]]
        with board.path.open("rb", buffering=0) as f:
            f.seek(part.offset)
            runs = _version_of(f.read(part.size), story)
        known = runs in (*story.complete, ANCIENT)
        check(known, f"{event['partition']} runs, no complete image", "unverified")


def _rests(event: dict) -> bool:
    return event["event"] == "idle"


def _run_to_cut(board: Board, story: Story, fault: Fault, on_console) -> RunResult:
    result = board.run(
        MAX_BOOTS,
        TIMEOUT,
        fault=fault,
        on_console=on_console,
        on_event=partial(_look, board, story),
        until=lambda event: event.get("outcome") == "power-cut" or _rests(event),
    )
    if on_console:
        on_console(f"-- {result.outcome} --")
    return result


class Fetch(NamedTuple):
    """A payload that was asked for: its URL, from which byte on."""

    url: str
    start: int


def fetches(console: str, story: Story) -> list[Fetch]:
    """All that was asked for until an image was there; where it never is, until it was refused."""
    found = []
    end = "twinslot: failed " if story.refused else "twinslot: staged "
    for line in console.splitlines():
        if line.startswith(end):
            break
        if line.startswith("fetch: "):
            url, start = line[7:].rsplit(" ", 1)
            found.append(Fetch(url, int(start)))
    return found


def check_checkpoint(flash: bytes, fetched: list[Fetch], story: Story) -> None:
    """Held at the checkpoint that flash held when the power failed: another payload is no way to
    go on from it either."""
    kept = blob_of(flash, "checkpoint")
    for url, start in fetched if kept else []:
        payload = url.removeprefix(f"{SHELF}lamp/")
        names = [(story.build(v) + payload).encode() for v in story.complete]
        complaint = f"a checkpoint at {kept['at']} of {kept['of']}, fetched {url} from {start}"
        mine = kept["of"] in [binascii.crc32(name) for name in names]
        check(mine and start >= kept["at"], complaint, "lost")


def prove(
    path: Path, story: Story, point: Point, on_console=None, **options
) -> tuple[bytes, tuple[Cut, ...], RunResult]:
    """Live a life, cut where the point says, and hold it to the oracle after each cut.

    Args:
        path: flash file of the board; changed.
        options: of its last run, see `Board.run`.

    Returns:
        What flash held when the power failed last, the cuts by then, and what came after.

    Raises:
        Broken: it does not hold; or the power was not cut for the first time.
    """
    volume = Volume.read(path.read_bytes())
    left, done = b"", ()
    for i, cut in enumerate(point.cuts):
        board = switch_on(path, point.cuts[:i])
        result = _run_to_cut(board, story, Fault(*cut), on_console)
        if left and not point.wipe:
            check_checkpoint(left, fetches(result.console, story), story)
        if result.outcome != "power-cut":
            check(left, f"no cut: {[b.outcome for b in result.boots]}")
            break  # it had come to rest before
        left, done = path.read_bytes(), point.cuts[: i + 1]
        if i == 0 or not point.wipe:
            check_after_cut(left, story)
        volume = volume._replace(starts=Volume.read(left).starts)
        if point.wipe and i == 0:
            changed = bytearray(left)
            WIPES[point.wipe](changed, point.seed)
            path.write_bytes(changed)
    else:
        result = run_to_rest(switch_on(path, point.cuts), story, on_console, **options)
        if left and not point.wipe:
            check_checkpoint(left, fetches(result.console, story), story)
    check_end(path.read_bytes(), result, story, volume, anywhere=bool(point.wipe))
    return left, done, result
