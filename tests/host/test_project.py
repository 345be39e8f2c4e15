"""The rules of the project that no other test would notice being broken."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import twinslot

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# What MicroPython 1.24 on the ESP32 has, built in or frozen; nothing else may be imported there.
ON_THE_DEVICE = set(
    "_thread array asyncio binascii cryptolib deflate errno esp esp32 espnow gc hashlib io json"
    " machine math micropython neopixel network ntptime os platform random re select socket ssl"
    " struct sys time tls uctypes vfs websocket collections twinslot".split()
)


def imports(path: Path) -> set[str]:
    """Top-level names of the modules a file imports, relative ones left out."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
    return found


def files(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found
    return found


@pytest.mark.parametrize("path", files("lib"), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_the_device_package_needs_nothing_that_a_device_lacks(path):
    assert imports(path) <= ON_THE_DEVICE


@pytest.mark.parametrize("path", files("lib"), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_the_device_package_is_free_of_what_micropython_lacks(path):
    text = path.read_text()
    for name in ("FileNotFoundError", "ConnectionError", "PermissionError", "FileExistsError"):
        assert not re.search(rf"except[^:\n]*\b{name}\b", text), name
    assert not re.search(r"^\s*except\s*:", text, re.MULTILINE), "a bare except hides a reset"


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [("server_stub", "twinslot_tools"), ("tools", "twinslot_server"), ("lib", "twinslot_tools")],
)
def test_tools_server_and_device_keep_apart(folder, forbidden):
    for path in files(folder):
        assert forbidden not in imports(path), path


def test_the_server_holds_nothing_that_could_sign_a_release():
    for path in files("server_stub"):
        assert "joserfc" not in imports(path), path


def test_every_package_folder_is_installed():
    mapped = PROJECT["tool"]["setuptools"]["package-dir"]
    packages = set(PROJECT["tool"]["setuptools"]["packages"])
    for package in ("twinslot", "twinslot_server", "twinslot_tools"):
        root = ROOT / mapped[package]
        for init in root.rglob("__init__.py"):
            name = ".".join([package, *init.parent.relative_to(root).parts])
            assert name in packages, name


def test_the_version_is_said_once():
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "twinslot.__version__"}
    twinslot_version = twinslot.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", twinslot_version)


def test_the_changelog_knows_the_version_or_what_is_to_come():
    headings = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased" or headings[0] == twinslot.__version__
    assert len(set(headings)) == len(headings)


@pytest.mark.parametrize("script", [".ci/run"])
def test_scripts_can_be_run(script):
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


# ---- make, on a machine that lacks something


def fake_python(folder: Path, body: str) -> Path:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def make(folder: Path, python: Path) -> subprocess.CompletedProcess:
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "requirements", folder / "requirements")
    return subprocess.run(
        ["make", "setup", f"PYTHON={python}"],
        check=False,
        cwd=folder,
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("MAKE")},
    )


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@needs_make
def test_make_names_the_python_that_is_too_old(tmp_path):
    old = fake_python(tmp_path, 'case "$1" in -V) echo Python 3.9.2;; -c) exit 1;; esac')
    run = make(tmp_path, old)
    assert run.returncode != 0
    assert "Python 3.9.2" in run.stderr and "3.11 or newer" in run.stderr


@needs_make
def test_make_names_the_package_that_is_missing(tmp_path):
    """Debian's python3 comes without ensurepip: `python3 -m venv` fails half way."""
    bare = fake_python(
        tmp_path,
        f'case "$2" in venv) mkdir -p "$3/bin"; ln -s {sys.executable} "$3/bin/python"; exit 1;;'
        " virtualenv) exit 1;; *) exit 0;; esac",
    )
    run = make(tmp_path, bare)
    assert run.returncode != 0
    assert "apt install python3-venv" in run.stderr
    assert not (tmp_path / ".venv").exists()


# ---- sizes


def test_the_size_report_compiles_every_module_for_every_architecture():
    run = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "size.py")],
        check=True,
        capture_output=True,
        text=True,
    )
    for path in files("lib"):
        assert path.relative_to(ROOT / "lib").as_posix() in run.stdout
    assert "xtensawin" in run.stdout and "rv32imc" in run.stdout
    rows = {
        cells[1].strip(): cells[2:4] for cells in map(_cells, run.stdout.splitlines()) if cells
    }
    core, everything = (int(rows[name][0].replace(",", "")) for name in ("core", "all"))
    extras = [int(row[0].replace(",", "")) for name, row in rows.items() if "extra" in name]
    assert len(extras) >= 2 and core + sum(extras) == everything
    # The heap: what runs needs more than what was imported, and less from within the firmware.
    used = [int(rows[stage][0].replace(",", "")) for stage in ("import twinslot", "an Agent made")]
    inside = int(rows["an Agent made"][1].replace(",", ""))
    assert 0 < used[0] < inside < used[1]


def _cells(line: str) -> list[str]:
    return line.split("│") if "│" in line else []


def test_the_size_report_fails_for_a_module_that_does_not_compile(tmp_path):
    shutil.copytree(ROOT / "lib", tmp_path / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "size.py", tmp_path / "tools")
    (tmp_path / "lib" / "twinslot" / "broken.py").write_text("match x:\n    case 1: pass\n")
    run = subprocess.run(
        [sys.executable, str(tmp_path / "tools" / "size.py")],
        check=False,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert "twinslot/broken.py" in run.stderr
