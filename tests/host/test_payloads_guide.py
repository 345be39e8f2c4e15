"""docs/payloads.md is true: its commands are run, in their order."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_readme import ROOT, appear_in_order, told

from twinslot_tools import payloads

GUIDE = (ROOT / "docs" / "payloads.md").read_text()


def blocks():
    return [part.split("```")[0] for part in GUIDE.split("```console\n")[1:]]


def test_the_commands_of_the_guide_do_what_it_says(tmp_path):
    for name in ("boot.py", "main.py"):
        shutil.copy(ROOT / name, tmp_path)
    library = ROOT / "lib" / "twinslot"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(library, tmp_path / "lib" / "twinslot", ignore=ignored)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for command, lines in [step for block in blocks() for step in told(block)]:
        done = subprocess.run(
            command,
            shell=True,
            cwd=tmp_path,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        appear_in_order(lines, done.stdout)
    old = tmp_path / "node-1.0.0.bin"
    deltas = {p.stat().st_size: p for p in tmp_path.glob("site/sensor-node/blobs/*/*.gz")}
    pytest.importorskip("detools", reason="detools is not installed: it needs a C compiler")
    small = deltas[min(deltas)]
    assert small.stat().st_size < 0.2 * old.stat().st_size
    subprocess.run(
        f"gunzip -c {small} > delta && detools apply_patch {old.name} delta made.bin",
        shell=True,
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        check=True,
        capture_output=True,
    )
    assert (tmp_path / "made.bin").read_bytes() == (tmp_path / "node-1.1.0.bin").read_bytes()


def test_the_limits_in_the_guide_are_those_of_the_code():
    assert f"above {payloads.GZIP_LIMIT:.0%} of the image".replace("%", " %") in " ".join(
        GUIDE.split()
    )
    assert f"above {payloads.DELTA_LIMIT:.0%} of the gzip".replace("%", " %") in " ".join(
        GUIDE.split()
    )
    assert f"{payloads.DELTAS_MAX} times at most" in GUIDE
