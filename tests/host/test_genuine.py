"""Genuine ESP32 images: published, restored by other tools, and taken by a board as a delta."""

import subprocess
import sys
from pathlib import Path

import pytest

from twinslot_tools import genuine, images

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def pair():
    try:
        return [genuine.fetch(version) for version in genuine.IMAGES]
    except genuine.GenuineError as exc:
        if "pip can't fetch" not in str(exc):
            raise
        pytest.skip(str(exc))


def test_another_file_than_it_was_is_refused(tmp_path):
    (tmp_path / "devboard-1.0.0.bin").write_bytes(b"\xe9 something else")
    with pytest.raises(genuine.GenuineError, match=r"saw SHA-256 .*, expected 90ca7169"):
        genuine.fetch("1.0.0", tmp_path)


def test_the_bootloaders_checks_accept_genuine_images(pair):
    for path in pair:
        data = path.read_bytes()
        assert images.check_as_bootloader(data, "esp32c5").length == len(data)


def test_a_board_goes_from_one_genuine_image_to_the_next_by_delta(pair):
    done = subprocess.run(
        [sys.executable, "-m", "twinslot_tools.genuine"],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last == "the board fetched 54,047 bytes for an image of 1,102,272: 4.9 %"
    told = " ".join((DOCS / "payloads.md").read_text().split())
    for figure in ("711,281", "54,047", "1,102,272"):
        assert figure in done.stdout and figure in told
