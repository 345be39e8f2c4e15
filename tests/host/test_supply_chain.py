"""What the project is made of: pinned by hash, and built twice to the same bytes (fault F125)."""

import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ENTRY = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)(\[[^]]*\])?==(?P<version>[^ ;\\]+)(?P<rest>.*)")


def pinned(name):
    """{canonical name: [(version, marker applies here, number of hashes)]} of a lock file."""
    entries = {}
    text = (ROOT / "requirements" / name).read_text().replace("\\\n", " ")
    for line in text.splitlines():
        if found := ENTRY.match(line):
            marker = Requirement(line.split(" --hash")[0].strip()).marker
            entries.setdefault(canonicalize_name(found["name"]), []).append(
                (
                    found["version"],
                    marker is None or marker.evaluate(),
                    line.count("--hash=sha256:"),
                )
            )
        else:
            assert line.strip() == "" or line.lstrip().startswith("#"), line
    return entries


def asked():
    """Each requirement of pyproject.toml with the lock file that has to answer it."""
    project, groups = PROJECT["project"], PROJECT["dependency-groups"]
    for line in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        yield Requirement(line), "dev.txt"
    yield from ((Requirement(line), "dev.txt") for line in groups["build"])
    yield from ((Requirement(line), "peers.txt") for line in groups["peers"])


@pytest.mark.parametrize("requirement, lock", list(asked()), ids=str)
def test_F125_every_dependency_is_pinned_to_a_version_that_is_allowed(requirement, lock):
    versions = pinned(lock)[canonicalize_name(requirement.name)]
    assert all(requirement.specifier.contains(version) for version, _, _ in versions)


@pytest.mark.parametrize("lock", ["dev.txt", "peers.txt"])
def test_F125_every_pinned_file_has_its_hash(lock):
    entries = pinned(lock)
    assert entries
    assert [name for name, rows in entries.items() if not all(row[2] for row in rows)] == []


def test_F125_what_the_tests_run_with_is_what_is_pinned():
    names = {
        canonicalize_name(d.metadata["Name"]): d.version
        for d in importlib.metadata.distributions()
    }
    wrong = {
        name: (names.get(name), version)
        for name, rows in pinned("dev.txt").items()
        for version, here, _ in rows
        if here and names.get(name) != version
    }
    assert wrong == {}


def built(folder, seed):
    """Name and SHA-256 of the wheel built from a copy of the sources in a folder of its own."""
    source, wheels = folder / f"tree-{seed}", folder / f"wheel-{seed}"
    source.mkdir()
    for name in ["pyproject.toml", "README.md", "LICENSE", "boot.py", "main.py"]:
        shutil.copy(ROOT / name, source)
    for name in ["lib", "tools", "server_stub", "partitions"]:
        shutil.copytree(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*pip, "--wheel-dir", wheels, source],
        check=True,
        env=os.environ | {"SOURCE_DATE_EPOCH": "1700000000", "PYTHONHASHSEED": str(seed)},
    )
    (wheel,) = wheels.iterdir()
    return wheel.name, hashlib.sha256(wheel.read_bytes()).hexdigest()


def test_F125_two_builds_of_the_package_are_the_same_bytes(tmp_path):
    assert built(tmp_path, 1) == built(tmp_path, 2)
