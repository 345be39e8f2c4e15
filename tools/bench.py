"""Measure what an update costs, each figure against its target and a limit that fails the run.

    python -m twinslot_tools.bench                    # or  make bench: all, a few minutes
    python -m twinslot_tools.bench --short            # only what no clock decides: CI does this
    python -m twinslot_tools.bench --pair OLD NEW     # bytes and time for two genuine images too
    python -m twinslot_tools.bench --json

Images are made at run time (``sample``). Times are ratios of two runs on the same virtual board in
the same minute. A limit is what was reached, with some room for a 64-bit port or a busy machine; a
target is what was wished for. Plots and ``bench.json`` go to docs/bench.

Exit code 1: a figure is beyond its limit or, where no clock decides it, worse by more than 5 %
than in the ``bench.json`` of docs/bench.
"""

import argparse
import json
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import payloads, sample, size
from .lab import PRODUCT, Lab, temporary
from .virtual_esp32.chip.flash import ERASE_SECTOR_US, PROGRAM_PAGE_US, SECTOR, Stats

OUT = Path(__file__).resolve().parent.parent / "docs" / "bench"
FORMS = ("identity", "gzip", "delta")
_STATIC = {"source": "static", "token": ""}
_IMAGE = 1_600_000  # bytes of an image on a board
_TOLERANCE = 1.05  # against the figure kept
_SLACK = 32  # bytes, for small figures: one block of the heap
_NEIGHBOUR, _YEAR = 600, 5500  # functions changed in an image of 1.5 MB
_PAGE = 256
_TICK_MS = 5


@dataclass
class Figure:
    """One line of the table. ``limit`` None: told, not judged. ``kept``: the same of an earlier
    run, unless a clock decides it."""

    group: str
    name: str
    value: float
    unit: str
    target: str = ""
    limit: float | None = None
    kept: float | None = None

    @property
    def ok(self) -> bool:
        beyond = self.limit is not None and self.value > self.limit
        slack = _SLACK if self.unit == "B" else 0
        worse = self.kept is not None and self.value > self.kept * _TOLERANCE + slack
        return not beyond and not worse


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="only what no clock decides")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--pair", nargs=2, action="append", metavar=("OLD", "NEW"), default=[])
    parser.add_argument("--out", type=Path, default=OUT, help="folder for bench.json and plots")
    options = parser.parse_args()
    figures: list[Figure] = []
    plots: dict[str, str] = {}
    talk = Console(stderr=True, highlight=False)
    parts: list[Callable[[], Iterator[Figure]]] = [
        lambda: bytes_on_the_air(options.pair, plots),
        garbage,
        lambda: cost_by_size(plots, clock=not options.short),
        modules,
        wear,
        enough_heap,
    ]
    if not options.short:
        parts += [live_heap, smallest_heap, import_time, wall_time, ticker]
    kept = _kept()
    for part in parts:
        for figure in part():
            if not figure.group.startswith(_TIMED):
                figure.kept = kept.get((figure.group, figure.name))
            figures.append(figure)
            talk.print(f"  {figure.group}: {figure.name} {_shown(figure)}")
    if not options.short:
        options.out.mkdir(parents=True, exist_ok=True)
        fields = ("group", "name", "value", "unit", "target", "limit")
        text = json.dumps([{k: getattr(f, k) for k in fields} for f in figures], indent=1)
        (options.out / "bench.json").write_text(text + "\n")
        for name, svg in plots.items():
            (options.out / f"{name}.svg").write_text(svg)
    if options.json:
        print(json.dumps([asdict(f) | {"ok": f.ok} for f in figures], indent=1))
    else:
        Console(highlight=False, width=None if sys.stdout.isatty() else 110).print(_table(figures))
    bad = [f for f in figures if not f.ok]
    for figure in bad:
        seen = _shown(figure)
        print(
            f"bench: {figure.group}: {figure.name}: {seen}, limit {figure.limit},"
            f" kept {figure.kept}",
            file=sys.stderr,
        )
    return 1 if bad else 0


# Groups that a clock decides: judged by their limit alone.
_TIMED = ("time", "gap", "import time")


def _kept() -> dict[tuple[str, str], float]:
    """The figures of the run that is in the repository, by group and name."""
    try:
        rows = json.loads((OUT / "bench.json").read_text())
    except FileNotFoundError:
        return {}
    return {(row["group"], row["name"]): row["value"] for row in rows}


def _shown(figure: Figure) -> str:
    value = figure.value
    text = f"{value:,.0f}" if value == int(value) or value >= 100 else f"{value:.2f}"
    return f"{text} {figure.unit}".strip()


def _table(figures: list[Figure]) -> Table:
    table = Table("what", "figure", "target", "limit", box=None, pad_edge=False)
    group = ""
    for figure in figures:
        if figure.group != group:
            group = figure.group
            table.add_row(f"[bold]{group}[/bold]")
        limit = "" if figure.limit is None else f"{figure.limit:,g}"
        table.add_row(f"  {figure.name}", _shown(figure), figure.target, limit)
    return table


# ---- without a board: the device's pipeline alone, on files


def bytes_on_the_air(pairs: list[list[str]], plots: dict[str, str]) -> Iterator[Figure]:
    """Item 1. Shares of the image."""
    base = sample.code(1_500_000)
    made = {
        "neighbouring build": (base, sample.code(1_500_000, changes=_NEIGHBOUR)),
        "a year apart": (base, sample.code(1_500_000, changes=_YEAR)),
    }
    for old, new in pairs:
        made[f"{Path(old).name} to {Path(new).name}"] = (
            Path(old).read_bytes(),
            Path(new).read_bytes(),
        )
    rows = []
    for name, (old, new) in made.items():
        since = time.monotonic()
        delta = len(payloads.patch_payload(old, new)) / len(new)
        seconds = time.monotonic() - since
        packed = len(payloads.gzip_payload(new)) / len(new)
        ours = name in ("neighbouring build", "a year apart")
        limits = (0.7, 0.2 if name == "neighbouring build" else 0.55) if ours else (None, None)
        group = f"bytes, {name}"
        yield Figure(group, "gzip", packed, "of the image", "", limits[0])
        yield Figure(group, "delta", delta, "of the image", "", limits[1])
        if pairs:
            yield Figure("time", f"making the delta, {name}", seconds, "s", "seconds")
        rows += [(f"{name}: gzip", packed), (f"{name}: delta", delta)]
    plots["bytes"] = bars("Bytes on the air, share of the image", [("identity", 1.0), *rows])


def _jobs(folder: Path, size_of_image: int, **more: Any) -> list[dict[str, Any]]:
    """A job of ``apply_payload`` for each form."""
    old = sample.code(size_of_image)
    new = sample.code(size_of_image, changes=_NEIGHBOUR * size_of_image // 1_500_000)
    contents = {
        "identity": new,
        "gzip": payloads.gzip_payload(new),
        "delta": payloads.patch_payload(old, new),
        "base": old,
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [
        {
            "payload": str(folder / form),
            "base": str(folder / "base"),
            "encoding": "identity" if form == "identity" else "gzip",
            "patch": "detools" if form == "delta" else None,
            "window": payloads.WINDOW,
            "size": size_of_image,
            **more,
        }
        for form in FORMS
    ]


def garbage() -> Iterator[Figure]:
    """Item 4. In the steady state, between two checkpoints, without the reads of the network."""
    with tempfile.TemporaryDirectory() as folder:
        results = payloads.apply(_jobs(Path(folder), 512 << 10, measure="garbage"))
    for form, result in zip(FORMS, results, strict=True):
        yield Figure("allocated per 4 KiB block", form, round(result["garbage"]), "B", "0", 0)


def cost_by_size(plots: dict[str, str], clock: bool) -> Iterator[Figure]:
    """Item 8, and the live heap of the pipeline alone."""
    sizes = [256 << 10, 1 << 20, 4 << 20]
    live: dict[str, list[float]] = {form: [] for form in FORMS}
    times: dict[str, list[float]] = {form: [] for form in FORMS}
    for total in sizes if clock else sizes[:2]:
        with tempfile.TemporaryDirectory() as folder:
            jobs = _jobs(Path(folder), total)
            measured = payloads.apply([{**job, "measure": "live"} for job in jobs])
            timed = payloads.apply(jobs) if clock else measured
        for form, heap, run in zip(FORMS, measured, timed, strict=True):
            live[form].append(heap["live"])
            times[form].append(run["ms"])
    for form, limit in zip(FORMS, (6500, 20400, 20900), strict=True):
        yield Figure("live heap of the pipeline", form, max(live[form]), "B", "flat", limit)
        growth = live[form][-1] / live[form][0]
        yield Figure("live heap of the pipeline", f"{form}, growth", growth, "x", "1", 1.1)
        if clock:
            per_byte = times[form][-1] / times[form][-2] / 4
            yield Figure("time, 4 MiB against 1 MiB", form, per_byte, "x per byte", "1", 2.0)
    if clock:
        marks = [f"{total >> 10} KiB" for total in sizes]
        plots["time-by-size"] = lines("Pipeline time by image size, ms", marks, times)
        plots["heap-by-size"] = lines("Live heap of the pipeline, bytes", marks, live)


# Tells each module of the package when it is first loaded, and all that are there after a change.
_LOADED = """    import builtins, sys
    real, told = builtins.__import__, set()
    def spy(*words):
        try:
            return real(*words)
        finally:
            for name in sys.modules:
                if name.startswith("twinslot") and name not in told:
                    told.add(name)
                    print("loaded", name)
    builtins.__import__ = spy
    before = ()
    while True:
        here = [name for name in sys.modules if name.startswith("twinslot")]
        if here != before:
            print("here", *here)
            before = here
        await asyncio.sleep_ms(0)
"""


def loaded() -> tuple[set[str], set[str]]:
    """Names of the modules that one identity update from a plain tree loads, from the import of
    ``twinslot`` to the reset; and of those that are there while the image comes."""
    with _lab("identity", application=_LOADED) as lab:
        _publish(lab, "identity")
        lab.power_on(max_boots=1)
        lab.wait(lambda e: e.name == "staged", timeout=30)
        lab.power_off()
        ever = {line.split()[1] for line in lab.console if line.startswith("loaded ")}
        comes = next(n for n, line in enumerate(lab.console) if "progress" in line)
        here = [line.split()[1:] for line in lab.console[:comes] if line.startswith("here ")]
        return ever, set([names for names in here if "twinslot.payload" in names][-1])


def modules() -> Iterator[Figure]:
    """Item 7. The core is what an update loads, whatever else the package brings."""
    ever, here = loaded()
    core = resident = everything = 0
    for _, path, columns in size.sizes(size.LIBRARY):
        bytes_ = max(columns)
        everything += bytes_
        name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        core += bytes_ if name in ever else 0
        resident += bytes_ if name in here else 0
    yield Figure(".mpy", "core: what an identity update loads", core, "B", "40,960", 83_000)
    yield Figure(".mpy", "of that, what is there while the image comes", resident, "B", "", 40_960)
    yield Figure(".mpy", "the whole package", everything, "B")
    stages = size.heap(frozen=True)
    yield Figure("heap of the package, frozen", "import twinslot", stages["import"], "B", "", 2048)
    yield Figure("heap of the package, frozen", "with an Agent", stages["agent"], "B", "", 100_000)


# ---- on a virtual board


def _publish(lab: Lab, form: str) -> int:
    """Publish 1.1.0 so that the form is the smallest payload; return its bytes."""
    bases = (str(lab.folder / "firmware-1.0.0.bin"),) if form == "delta" else ()
    done = lab.publish(lab.firmware("1.1.0"), "1.1.0", bases=bases)
    return min(p["size"] for p in done.manifest["images"][0]["payloads"])


def _lab(form: str, **options: Any):
    """A lab in which ``_publish`` can do that: what is to be fetched plain is noise."""
    options.setdefault("settings", _STATIC)
    return temporary(compressible=form != "identity", **options)


def wear() -> Iterator[Figure]:
    """Item 6. A delta over a slot that holds another image."""
    with _lab("delta", image_size=_IMAGE // 2) as lab:
        part = next(p for p in lab.describe()["partitions"] if p["label"] == "ota_1")
        flash = bytearray(lab.flash.read_bytes())
        old = (lab.folder / "firmware-1.0.0.bin").read_bytes()
        flash[part["offset"] : part["offset"] + len(old)] = old
        lab.flash.write_bytes(flash)
        _publish(lab, "delta")
        new = (lab.folder / "firmware-1.1.0.bin").read_bytes()
        lab.power_on()
        lab.wait(lambda e: e.name == "staged", timeout=60)
        counts = lab.power_off().flash
        with (lab.board._scratch / "stats").open("rb", buffering=0) as file:
            erases = list(Stats(file, lab.board.size).erases())
    first = part["offset"] // SECTOR
    mine = erases[first : first + part["size"] // SECTOR]
    differ = [
        at
        for at in range(0, len(new), SECTOR)
        if at == 0 or old[at : at + SECTOR] != new[at : at + SECTOR]
    ]
    pages = -(-SECTOR // _PAGE)
    least = len(differ) * (ERASE_SECTOR_US + pages * PROGRAM_PAGE_US)
    yield Figure("flash", "erases per sector that differs", sum(mine) / len(differ), "", "1", 1.0)
    yield Figure("flash", "sectors of the image", -(-len(new) // SECTOR), "")
    yield Figure("flash", "sectors that differ", len(differ), "")
    yield Figure("flash", "bytes programmed", counts["bytes_programmed"], "B")
    # NVS (checkpoints), otadata and littlefs are in it.
    ratio = counts["busy_us"] / least
    yield Figure("flash", "modelled time against the least for that part", ratio, "x", "1", 1.6)


def completes(form: str, kib: int) -> bool:
    """True if a board with so much heap takes the form, and not a larger one, and confirms it."""
    with _lab(form, heap=f"{kib}K", image_size=400_000) as lab:
        wanted = _publish(lab, form)
        lab.power_on()
        ends = ("confirmed", "failed", "rolledback")
        try:
            event = lab.wait(lambda e: e.name in ends, timeout=25)
        except TimeoutError:
            return False
        fetched = [int(e.data["bytes"]) for e in lab.events if e.name == "staged"]
        return event.name == "confirmed" and fetched == [wanted]


_HEAPS = {"identity": (64, 65), "gzip": (80, 77), "delta": (96, 81)}  # target, limit in KiB


def enough_heap() -> Iterator[Figure]:
    """Item 3 in the short form: does a board with the heap of the limit do it?"""
    for form, (_, limit) in _HEAPS.items():
        fails = 0 if completes(form, limit) else 1
        yield Figure("heap", f"fails with {limit} KiB: {form}", fails, "", "0", 0)


def smallest_heap() -> Iterator[Figure]:
    """Item 3, searched for."""
    for form, (target, limit) in _HEAPS.items():
        low, high = limit - 24, limit
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if completes(form, middle) else (middle, high)
        yield Figure("heap", f"smallest that completes: {form}", high, "KiB", f"{target}", limit)


# Samples what is alive each time the agent lets it run: between any two blocks. All modules are
# imported before, and stay: what is measured is beyond them. (What they take themselves, and that
# most are there for a moment only, shows in the smallest heap that completes an update.)
_LIVE = """    import gc, sys
    import twinslot.agent, twinslot.blink, twinslot.download
    import twinslot.inflate, twinslot.native, twinslot.patch
    for name in twinslot._RARE.split():
        __import__("twinslot." + name)
    twinslot.unload = lambda: None
    for name in sys.modules:
        if name.startswith("twinslot.") and hasattr(sys.modules[name], "unload"):
            sys.modules[name].unload = twinslot.unload
    gc.collect()
    base = peak = gc.mem_alloc()
    print("live imported", base)
    while True:
        gc.collect()
        now = gc.mem_alloc()
        if now > peak:
            peak = now
            print("live peak", peak - base)
        await asyncio.sleep_ms(0)
"""


def live_heap() -> Iterator[Figure]:
    """Item 3: live objects of the agent beyond what is imported."""
    for form, limit in zip(FORMS, (24_000, 32_500, 34_500), strict=True):
        with _lab(form, application=_LIVE, image_size=400_000) as lab:
            _publish(lab, form)
            lab.power_on(max_boots=1)
            lab.wait(lambda e: e.name == "staged", timeout=60)
            lab.power_off()
            peaks = [int(line.split()[2]) for line in lab.console if line.startswith("live peak")]
        target = "15,360" if form == "identity" else ""
        yield Figure("live heap beyond import", form, max(peaks), "B", target, limit)


# The simplest loop that could work, on the same board, over the same TLS.
_SIMPLEST = """    import hashlib, socket, time
    from esp32 import Partition
    from twinslot.certs import Tls
    with open("/ota/ca.pem") as f:
        tls = Tls(ca=f.read())
    part = Partition(Partition.RUNNING).get_next_update()
    sock = socket.socket()
    sock.connect(socket.getaddrinfo("127.0.0.1", %d)[0][-1])
    sock = tls.wrap(sock, "127.0.0.1")
    sock.write(b"GET %s HTTP/1.1\\r\\nHost: board\\r\\nConnection: close\\r\\n\\r\\n")
    while sock.readline() != b"\\r\\n":
        pass
    left, n, digest = %d, 0, hashlib.sha256()
    block = bytearray(4096)
    since = time.ticks_ms()
    while left > 0:
        got = sock.readinto(block)
        digest.update(block)
        part.writeblocks(n, block)
        n += 1
        left -= got
    print("simplest", time.ticks_diff(time.ticks_ms(), since))
    while True:
        await asyncio.sleep(1)
"""


def import_time() -> Iterator[Figure]:
    """Item 7, the rest of it."""
    times = size.heap(frozen=True)
    yield Figure("import time", "import twinslot and an Agent, frozen", times["ms"], "ms", "", 250)


def wall_time() -> Iterator[Figure]:
    """Item 2. Both on one board, one after the other, over a slot full of something else.

    Once as it is on a virtual board, whose flash takes no time, so that what is compared is how
    busy the processor is: the agent looks at each block before it writes it, reads all of it back,
    and keeps a checkpoint every 64 KiB in NVS; the loop does none of that. (Flash and NVS of a
    virtual board are Python, some 20 us a call, and the agent calls for each 512 bytes.) And once
    with the time that the flash of a board would have taken for each.
    """
    for form, target, limit in zip(FORMS, (1.25, 2.0, 2.0), (12.0, 12.0, 14.0), strict=True):
        runs = [_race(form) for _ in range(3)]
        group = "time against the simplest loop"
        real = min(with_flash for _, with_flash in runs)
        yield Figure(group, f"{form}, with the flash's", real, "x", f"{target:g}", target)
        busy = min(without for without, _ in runs)
        yield Figure(group, f"{form}, processor alone", busy, "x", f"{target:g}", limit)


def _race(form: str) -> tuple[float, float]:
    """Return the ratio of times without and with that of the flash."""
    with _lab(form, image_size=_IMAGE) as lab:
        # Another image of the same size for the loop to fetch, so that the agent has all to write.
        other = lab.firmware("1.0.5").read_bytes()
        other = bytes(b ^ 0xFF for b in other)
        path = lab.site / PRODUCT / "blobs" / "00" / f"{0:064}.bin"
        path.parent.mkdir(parents=True)
        path.write_bytes(other)
        port = int(lab.url.rsplit(":", 1)[1])
        url = f"/{PRODUCT}/blobs/00/{path.name}"
        lab._application = _SIMPLEST % (port, url, len(other))
        lab.make_board()
        _publish(lab, form)
        lab.power_on(max_boots=1)
        staged = lab.wait(lambda e: e.name == "staged", timeout=120)
        flash_ms = lab.power_off().flash["busy_us"] / 1000
        line = next(line for line in lab.console if line.startswith("simplest"))
        ours, simplest = int(staged.data["ms"]), int(line.split()[1])
        sectors = -(-len(other) // SECTOR)
        loops_ms = sectors * (ERASE_SECTOR_US + SECTOR // _PAGE * PROGRAM_PAGE_US) / 1000
        return ours / simplest, (ours + flash_ms - loops_ms) / (simplest + loops_ms)


class Proxy(threading.Thread):
    """A TCP relay to the server that is slow, or falls silent in the middle."""

    def __init__(self, rate: int | None, stall: tuple[int, float] | None):
        super().__init__(daemon=True)
        self.rate, self.stall = rate, stall
        self.upstream = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]

    def run(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self.upstream))
            threading.Thread(target=self.relay, args=(client, server, False), daemon=True).start()
            threading.Thread(target=self.relay, args=(server, client, True), daemon=True).start()

    def relay(self, source: socket.socket, target: socket.socket, shaped: bool) -> None:
        sent = 0
        try:
            while data := source.recv(2048 if shaped and self.rate else 65536):
                target.sendall(data)
                sent += len(data)
                if shaped and self.rate:
                    time.sleep(len(data) / self.rate)
                if shaped and self.stall and sent > self.stall[0]:
                    time.sleep(self.stall[1])
                    sent = -(1 << 40)
        except OSError:
            pass
        finally:
            for end in (source, target):
                with _suppressed():
                    end.shutdown(socket.SHUT_RDWR)


@contextmanager
def _suppressed() -> Iterator[None]:
    try:
        yield
    except OSError:
        pass


_TICKER = f"""    from time import ticks_diff, ticks_ms
    last = ticks_ms()
    while True:
        await asyncio.sleep_ms({_TICK_MS})
        now = ticks_ms()
        gap = ticks_diff(now, last) - {_TICK_MS}
        if gap > 1:
            print("gap", gap)
        last = ticks_ms()
"""


def ticker() -> Iterator[Figure]:
    """Item 5: what the application notices while the image comes."""
    servers = {"fast": (None, None), "slow": (400_000, None), "stalled": (None, (300_000, 2.0))}
    for name, (rate, stall) in servers.items():
        proxy = Proxy(rate, stall)
        settings = {**_STATIC, "url": f"https://127.0.0.1:{proxy.port}/"}
        with _lab("identity", settings=settings, application=_TICKER, image_size=600_000) as lab:
            proxy.upstream = int(lab.url.rsplit(":", 1)[1])
            proxy.start()
            _publish(lab, "identity")
            lab.power_on(max_boots=1)
            lab.wait(lambda e: e.name == "staged", timeout=60)
            lab.power_off()
            begun = next(i for i, line in enumerate(lab.console) if "staging" in line)
            gaps = [int(x.split()[1]) for x in lab.console[begun:] if x.startswith("gap ")]
        proxy.listener.close()
        # The virtual flash takes no time; a block of a real one takes about 50 ms more.
        yield Figure("gap of a 5 ms ticker", name, max(gaps, default=0), "ms", "10 + flash", 150)


# ---- plots


def bars(title: str, rows: list[tuple[str, float]]) -> str:
    """Horizontal bars, from 0 to the largest."""
    most = max(value for _, value in rows)
    body = []
    for i, (label, value) in enumerate(rows):
        y = 34 + 24 * i
        width = 330 * value / most
        body.append(f'<text x="245" y="{y + 13}" text-anchor="end">{label}</text>')
        body.append(f'<rect x="252" y="{y}" width="{width:.1f}" height="17" fill="#3b7dd8"/>')
        body.append(f'<text x="{258 + width:.1f}" y="{y + 13}">{value:.3g}</text>')
    return _svg(title, 34 + 24 * len(rows) + 8, body)


_COLOURS = ("#3b7dd8", "#d8743b", "#4c9f50", "#8d5bb5")


def lines(title: str, marks: list[str], series: dict[str, list[float]]) -> str:
    """Lines over equally spaced marks, from 0 to the largest."""
    most = max(max(values) for values in series.values()) or 1
    step = 360 / max(1, len(marks) - 1)
    body = ['<path d="M70 40V250H470" fill="none" stroke="#888"/>']
    body.append(f'<text x="64" y="46" text-anchor="end">{most:,.0f}</text>')
    body.append('<text x="64" y="254" text-anchor="end">0</text>')
    for i, mark in enumerate(marks):
        body.append(f'<text x="{80 + i * step:.0f}" y="270" text-anchor="middle">{mark}</text>')
    for (name, values), colour in zip(series.items(), _COLOURS, strict=False):
        points = [(80 + i * step, 250 - 205 * v / most) for i, v in enumerate(values)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        body.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        x, y = points[-1]
        body.append(f'<text x="{x + 8:.1f}" y="{y + 4:.1f}" fill="{colour}">{name}</text>')
    return _svg(title, 282, body)


def _svg(title: str, height: int, body: list[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="640" height="{height}"'
        ' font-family="sans-serif" font-size="12">'
    )
    background = f'<rect width="640" height="{height}" fill="#fff"/>'
    text = f'<text x="12" y="20" font-size="14" font-weight="bold">{title}</text>'
    return "\n".join([head, background, text, *body, "</svg>", ""])


if __name__ == "__main__":
    sys.exit(main())
