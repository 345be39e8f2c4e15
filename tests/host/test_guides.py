"""The guides in docs/ are true: what they say is done, and their tables are compared."""

import re
import shutil
from pathlib import Path

import pytest
from guides import BIN, DOCS, HOST, Reader, blocks
from stockfirmware import application, combined
from test_errors import kinds

import twinslot
from twinslot_tools import cli, device_files
from twinslot_tools.compat import STUBS
from twinslot_tools.virtual_esp32 import layout
from twinslot_tools.virtual_esp32.chip import table

ROOT = Path(__file__).parents[2]
SETUP = ("make setup", ". .venv/bin/activate")


def guide(name):
    return (DOCS / f"{name}.md").read_text()


def commands(text):
    return re.findall(r"^\$ (.*)$", text, re.M)


@pytest.fixture
def checkout(tmp_path):
    """What of a checkout the guides use: the example and the library."""
    for name in ("boot.py", "main.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(
        ROOT / "lib" / "twinslot",
        tmp_path / "lib" / "twinslot",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    return tmp_path


@pytest.fixture
def downloads(tmp_path):
    """A folder with what somebody has downloaded from micropython.org."""
    (tmp_path / "ESP32_GENERIC-v1.28.0.bin").write_bytes(combined(application()))
    for number, version in enumerate(("1.29.0", "1.29.1"), 1):
        image = application(micropython=version, size=300_000, seed=number)
        (tmp_path / f"ESP32_GENERIC-v{version}.app-bin").write_bytes(image)
    return tmp_path


def test_getting_started_and_then_troubleshooting(downloads):
    text = guide("getting-started")
    trouble = guide("troubleshooting")
    with Reader(downloads, speed=8, skip=SETUP) as reader:
        reader.follow(text)
        assert [*SETUP, *reader.done] == commands(text)
        # The same board, asked what is wrong with it, then read out.
        dump = trouble.index("A board that says nothing")
        reader.follow(trouble[:dump])
        (downloads / "flash.bin").write_bytes(reader.unplug())
        reader.follow(trouble[dump:])


def test_how_it_works(tmp_path):
    with Reader(tmp_path) as reader:
        reader.follow(guide("how-it-works"))


def test_partition_tables(downloads):
    text = guide("partition-tables")
    with Reader(downloads) as reader:
        # The file is shown below the command that reads it first.
        for language, name, content in blocks(text):
            if name == "ota.json" and language == "json":
                (downloads / name).write_text(content)
        reader.follow(text)


def test_releases(checkout):
    with Reader(checkout) as reader:
        reader.follow(guide("releases"))


# ---- tables and words


def test_each_error_has_its_row_in_troubleshooting():
    rows = re.findall(r"^\| `(\w+)` \| (OTA_\d{3}) \| (yes|no) \|", guide("troubleshooting"), re.M)
    wanted = [(item.code, item.number, "yes" if item.retry else "no") for item in kinds()]
    assert sorted(rows) == sorted(wanted)


def test_the_partition_tables_of_the_guide_are_those_of_the_folder():
    rows = re.findall(
        r"^\| `(\S+)` \| ([\d.]+) MiB \| ([\d.]+) (KiB|MiB) \| (?:-|([\d.]+) MiB) \|$",
        guide("partition-tables"),
        re.M,
    )
    assert {row[0] for row in rows} == set(layout.builtin_layouts())
    for name, slot, files, unit, factory in rows:
        parts = {p.label: p for p in layout.load_layout(name)}
        assert parts["ota_0"].size == parts["ota_1"].size == float(slot) * (1 << 20)
        assert parts["vfs"].size == float(files) * (1 << 20 if unit == "MiB" else 1 << 10)
        found = [p.size for p in parts.values() if p.subtype == table.APP_FACTORY and not p.type]
        assert found == ([float(factory) * (1 << 20)] if factory else [])


def test_the_picture_of_the_flash_has_the_offsets_of_the_table():
    picture = next(c for lang, _, c in blocks(guide("how-it-works")) if lang == "mermaid")
    offsets = dict(re.findall(r'\["(\w+) (0x[0-9a-f]+)"\]', picture))
    for part in layout.load_layout("4MiB"):
        if part.label in offsets:
            assert int(offsets[part.label], 16) == part.offset
    assert {"nvs", "otadata", "ota_0", "ota_1", "vfs"} <= set(offsets)


def test_the_states_of_the_picture_are_those_of_the_agent():
    pictures = [c for lang, _, c in blocks(guide("how-it-works")) if lang == "mermaid"]
    states = set(re.findall(r"^\s+(\w+) -->", pictures[-1], re.M))
    assert pictures[-1].startswith("stateDiagram")
    parts = ("agent", "plan", "startup")
    sources = [(ROOT / "lib/twinslot" / f"{name}.py").read_text() for name in parts]
    told = set(re.findall(r'_emit\(\s*"(\w+)"', "".join(sources)))
    assert states <= told


def test_compatibility_names_what_is_checked():
    text = guide("compatibility")
    assert ", ".join(STUBS) in text
    for name in device_files.ARCHITECTURES:
        assert name in text


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.md")), ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    text = path.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        found = (path.parent / name) if name else path
        assert found.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", found.read_text(), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}
            assert anchor in slugs, target


def test_each_command_of_the_tools_is_in_a_guide_or_the_readme():
    texts = [path.read_text() for path in (*DOCS.glob("*.md"), ROOT / "README.md")]
    names = [c.name or c.callback.__name__ for c in cli.app.registered_commands]
    # The fleet's commands are a matter of server.md, which has its own test.
    names += [name for name, (module, *_) in cli._ELSEWHERE.items() if module != "fleet_cli"]
    for name in names:
        assert any(f"twinslot {name}" in text for text in texts), name


def test_what_getting_started_begins_with_exists():
    assert re.search(r"^setup: ", (ROOT / "Makefile").read_text(), re.M)
    assert (BIN / "twinslot").exists()
    assert HOST in guide("getting-started")
    assert set(re.findall(r"`twinslot\.(\w+)", guide("troubleshooting"))) <= {
        *twinslot._HOME,
        "guard",
    }
