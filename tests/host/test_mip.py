"""Installing as users of MicroPython do: mip's package.json, a mip index, a freezing manifest."""

import functools
import hashlib
import http.server
import json
import subprocess
import threading
from pathlib import Path

import pytest
from boards import new_board
from mpremote import mip as mpremote_mip

import twinslot
from twinslot_tools import device_files, mip
from twinslot_tools.virtual_esp32.firmware import make_firmware
from twinslot_tools.virtual_esp32.process import find_micropython

ROOT = Path(__file__).parents[2]
LIB = ROOT / "lib"
SOURCES = {p.relative_to(LIB).as_posix(): p.read_bytes() for p in LIB.rglob("twinslot/**/*.py")}
EXTRA_SOURCES = {f"twinslot/{n}" for names in device_files.EXTRAS.values() for n in names}


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    """Return a maker of web servers: folder to URL."""
    servers = []

    def make(folder):
        handler = functools.partial(Quiet, directory=str(folder))
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.05,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


class FolderBoard:
    """What mpremote's installer asks of a board, over a folder of the host."""

    def __init__(self, folder, mpy=6 | 3 << 8 | 10 << 10):
        self.folder = folder
        self.mpy = mpy

    def _path(self, path):
        return self.folder / path.lstrip("/")

    def fs_exists(self, path):
        return self._path(path).exists()

    def fs_mkdir(self, path):
        self._path(path).mkdir()

    def fs_writefile(self, path, data, progress_callback=None):
        self._path(path).write_bytes(data)

    def fs_hashfile(self, path, algorithm):
        return hashlib.new(algorithm, self._path(path).read_bytes()).digest()

    def exec(self, code):
        assert code == "import sys"

    def eval(self, code):
        assert code == "getattr(sys.implementation, '_mpy', 0) & 0xFF"
        return self.mpy & 0xFF


def mpremote_install(board, package, index="", version=None):
    mpremote_mip._install_package(board, package, index, "/lib", version, True)


def installed(folder):
    lib = folder / "lib"
    return {p.relative_to(lib).as_posix(): p.read_bytes() for p in lib.rglob("*") if p.is_file()}


def micropython(code, *args, path=""):
    done = subprocess.run(
        [find_micropython(), "-X", "heapsize=4M", "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        env={"MICROPYPATH": f"{path}:.frozen"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---- package.json


def test_the_committed_package_files_are_what_the_script_makes():
    assert mip.stale() == [], "run  make packages"
    assert mip.main(["--check"]) == 0


def test_every_module_is_in_one_package_with_the_version_of_the_library():
    seen = []
    for name, text in mip.package_files().items():
        described = json.loads(text)
        assert described["version"] == twinslot.__version__
        for target, url in described["urls"]:
            assert url == f"lib/{target}" and (ROOT / url).is_file(), name
            seen.append(target)
    assert sorted(seen) == sorted(SOURCES)
    assert set(mip.package_files()) == {"package.json"} | {
        f"package-{extra}.json" for extra in device_files.EXTRAS
    }


def test_a_module_that_came_or_went_is_noticed(tmp_path):
    for name, text in mip.package_files().items():
        (tmp_path / name).write_text(text)
    assert mip.stale(tmp_path) == []
    (tmp_path / "package-old.json").write_text("{}")
    (tmp_path / "package.json").write_text("{}")
    assert mip.stale(tmp_path) == ["package-old.json", "package.json"]


def test_mpremote_installs_the_core_then_an_extra_from_a_repository(tmp_path, serve):
    board = FolderBoard(tmp_path)
    url = serve(ROOT)
    mpremote_install(board, f"{url}/package.json")
    core = {name: data for name, data in SOURCES.items() if name not in EXTRA_SOURCES}
    assert installed(tmp_path) == core
    for extra in device_files.EXTRAS:
        mpremote_install(board, f"{url}/package-{extra}.json")
    assert installed(tmp_path) == SOURCES


def test_micropythons_own_mip_installs_from_a_repository_and_the_core_runs_alone(tmp_path, serve):
    (tmp_path / "lib").mkdir()
    micropython(
        "import mip, sys; mip.install(sys.argv[1], target=sys.argv[2])",
        f"{serve(ROOT)}/package.json",
        tmp_path / "lib",
    )
    assert set(installed(tmp_path)) == set(SOURCES) - EXTRA_SOURCES
    modules = [
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in SOURCES
        if name not in EXTRA_SOURCES
    ]
    said = micropython(
        "import sys\nfor name in sys.argv[1:]: __import__(name)\nprint('all')",
        *modules,
        path=tmp_path / "lib",
    )
    assert said == "all\n"


# ---- an index


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    names = mip.build_index(folder)
    assert names == ["twinslot", "twinslot-console", "twinslot-blink"]
    return folder


def test_an_extra_from_an_index_brings_the_compiled_core_along(tmp_path, serve, index):
    board = FolderBoard(tmp_path)
    mpremote_install(board, "twinslot-console", serve(index))
    found = installed(tmp_path)
    wanted = {n for n in SOURCES if n != "twinslot/blink.py"}
    assert {name.replace(".mpy", ".py") for name in found} == wanted
    for name, data in found.items():
        if name.endswith(".mpy"):  # loads on every board: format 6, and no architecture
            assert data[:2] == b"M\x06" and data[2] >> 2 == 0, name
        else:
            assert data == SOURCES[name] and b"micropython.viper" in data, name


def test_an_index_offers_sources_to_boards_that_read_another_format(tmp_path, serve, index):
    board = FolderBoard(tmp_path, mpy=0)
    mpremote_install(board, "twinslot", serve(index), twinslot.__version__)
    assert installed(tmp_path) == {n: d for n, d in SOURCES.items() if n not in EXTRA_SOURCES}


def test_installing_again_from_an_index_writes_nothing(tmp_path, serve, index, capsys):
    board = FolderBoard(tmp_path)
    url = serve(index)
    mpremote_install(board, "twinslot", url)
    capsys.readouterr()
    mpremote_install(board, "twinslot", url)
    said = capsys.readouterr().out
    assert "Installing:" not in said and said.count("Exists:") == len(SOURCES) - len(EXTRA_SOURCES)


def test_micropythons_own_mip_installs_compiled_modules_that_run(tmp_path, serve, index):
    (tmp_path / "lib").mkdir()
    micropython(
        "import mip, sys; mip.install('twinslot', index=sys.argv[1], target=sys.argv[2])",
        serve(index),
        tmp_path / "lib",
    )
    code = "import twinslot, twinslot.agent as a; print(twinslot.__version__, a.__file__)"
    said = micropython(code, path=tmp_path / "lib").split()
    assert said[0] == twinslot.__version__
    assert said[1].endswith("/lib/twinslot/agent.mpy")


# ---- leftovers


def test_a_source_left_beside_its_new_module_hides_it(tmp_path):
    """The fact that makes leftovers matter, on MicroPython itself."""
    (tmp_path / "twinslot").mkdir()
    new = device_files.compile_mpy(LIB / "twinslot" / "__init__.py", "xtensawin")
    (tmp_path / "twinslot" / "__init__.mpy").write_bytes(new)
    code = "import twinslot; print(twinslot.__version__)"
    assert micropython(code, path=tmp_path).strip() == twinslot.__version__
    (tmp_path / "twinslot" / "__init__.py").write_text("__version__ = 'old'\n")
    assert micropython(code, path=tmp_path).strip() == "old"


def test_leftovers_are_the_sources_of_what_was_installed_compiled():
    present = [
        "/lib/twinslot/agent.py",
        "/lib/twinslot/agent.mpy",
        "/lib/twinslot/mine.py",
        "/a.py",
    ]
    new = ["/lib/twinslot/agent.mpy", "/lib/twinslot/jws.mpy", "/main.py"]
    assert device_files.leftovers(new, present) == ["/lib/twinslot/agent.py"]
    assert device_files.leftovers(["/lib/twinslot/agent.py"], present) == []


# ---- freezing


class Manifest:
    """The functions of a manifest.py that ours uses, with the meaning they have in freezing.

    Source: MicroPython tools/manifestfile.py, docs/reference/manifest.rst.
    """

    class Options:
        def __init__(self, given):
            self._given = given

        def defaults(self, **values):
            self.__dict__.update({**values, **self._given})

    def __init__(self, path, **options):
        self.frozen = {}  # name in the firmware: (source, optimisation)
        self.described = {}
        self.folder = path.parent
        functions = {
            "metadata": self.described.update,
            "package": self.package,
            "module": self.module,
            "options": self.Options(options),
        }
        exec(compile(path.read_text(), path.name, "exec"), functions)

    def package(self, name, files=None, base_path=".", opt=None):
        base = self.folder / base_path
        paths = [base / name / f for f in files] if files else (base / name).rglob("*.py")
        for path in paths:
            assert path.is_file()
            self.frozen[path.relative_to(base).as_posix()] = (path, opt)

    def module(self, name, base_path=".", opt=None):
        path = self.folder / base_path / name
        assert path.is_file()
        self.frozen[name] = (path, opt)


def test_the_manifest_freezes_the_whole_library_and_the_guard_on_request():
    manifest = Manifest(ROOT / "manifest.py")
    assert set(manifest.frozen) == set(SOURCES)
    assert set(Manifest(ROOT / "manifest.py", boot=True).frozen) == {*SOURCES, "boot.py"}
    assert manifest.described["version"] == twinslot.__version__
    assert manifest.described["license"] == "MIT"


def test_what_is_frozen_compiles_and_runs_from_a_firmware(tmp_path):
    tree = tmp_path / "tree"
    for name, (path, _) in Manifest(ROOT / "manifest.py").frozen.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(path.read_bytes())
    (tree / "main.py").write_text("import twinslot\nprint(twinslot.__version__, twinslot.Agent)\n")
    image = make_firmware(tree, chip="esp32", version="", project="")
    board = new_board(tmp_path, slots={"ota_0": image})
    result = board.run(max_boots=1, timeout=20)
    assert result.console.splitlines()[-1] == f"{twinslot.__version__} <class 'Agent'>"
