"""Make what MicroPython's package installer reads: package.json files and a static index.

    python -m twinslot_tools.mip                 # write package*.json of the checkout
    python -m twinslot_tools.mip --check         # exit code 1: they are not what they should be
    python -m twinslot_tools.mip --index FOLDER  # an index for any web server, with .mpy in it

With the files of the checkout a board gets the sources, straight from a repository:

    mpremote mip install github:OWNER/twinslot
    mpremote mip install github:OWNER/twinslot/package-console.json

With an index it gets compiled modules, and an extra brings the core along:

    mpremote mip install --index https://example.org/mip twinslot-console

mip overwrites what it installs, and removes nothing: a ``foo.py`` from an earlier installation
hides a new ``foo.mpy``. ``twinslot.doctor()`` names such files.

Source: micropython-lib micropython/mip/mip/__init__.py and tools/build.py (format of the index);
relative URLs in a package.json: mip of MicroPython 1.25, mpremote 1.25.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import twinslot

from .device_files import LIBRARY, compile_mpy, modules

_ROOT = Path(__file__).parent.parent
_CORE = "twinslot"
_MPY_FORMAT = "6"  # sys.implementation._mpy & 0xFF of MicroPython 1.19 and later
_ANY_ARCHITECTURE = "xtensawin"  # of bytecode alone: mip can't tell boards apart
_SHORT = 8  # digits of a hash in an index


def name_of(part: str) -> str:
    """Return a package's name: core is `twinslot`, an extra is `twinslot-EXTRA`."""
    return _CORE if part == "core" else f"{_CORE}-{part}"


def package_files(library: Path = LIBRARY) -> dict[str, str]:
    """Return {"package.json": text ...}: one per package, with URLs relative to themselves."""
    files = {}
    for part, sources in modules(library).items():
        names = [source.relative_to(library.parent).as_posix() for source in sources]
        urls = ",\n".join(f"    {json.dumps([name, f'lib/{name}'])}" for name in names)
        file = "package.json" if part == "core" else f"package-{part}.json"
        version = json.dumps(twinslot.__version__)
        files[file] = f'{{\n  "version": {version},\n  "urls": [\n{urls}\n  ]\n}}\n'
    return files


def build_index(folder: Path, library: Path = LIBRARY) -> list[str]:
    """Write an index; return the names of its packages.

    For each package a description for boards that read .mpy of our format and one for all others,
    by version and as "latest", and each file once, under its hash.
    """
    names = []
    for part, sources in modules(library).items():
        name = name_of(part)
        names.append(name)
        for form in (_MPY_FORMAT, "py"):
            hashes = [_add_file(folder, source, form, library) for source in sources]
            for version in (twinslot.__version__, "latest"):
                deps = [] if part == "core" else [[_CORE, version]]
                described = {"v": 1, "version": twinslot.__version__, "hashes": hashes}
                path = folder / "package" / form / name / f"{version}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(described | ({"deps": deps} if deps else {})))
    return names


def _add_file(folder: Path, source: Path, form: str, library: Path) -> list[str]:
    """Put a module under its hash; return [path on the board, hash]."""
    target = source.relative_to(library.parent)
    data = source.read_bytes()
    if form != "py":
        compiled = compile_mpy(source, _ANY_ARCHITECTURE, library)
        if compiled[2] >> 2 == 0:  # native code, which names its architecture, stays source
            target, data = target.with_suffix(".mpy"), compiled
    short = hashlib.sha256(data).hexdigest()[:_SHORT]
    path = folder / "file" / short[:2] / short
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return [target.as_posix(), short]


def stale(folder: Path = _ROOT) -> list[str]:
    """Return the names of package files that are not what they should be."""
    wanted = package_files()
    present = {path.name: path.read_text() for path in folder.glob("package*.json")}
    return sorted(name for name in wanted | present if wanted.get(name) != present.get(name))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="twinslot_tools.mip", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="only compare (exit code 1: stale)")
    parser.add_argument("--index", type=Path, metavar="FOLDER", help="build an index there")
    options = parser.parse_args(argv)
    if options.index:
        for name in build_index(options.index):
            print(f"{options.index}: {name} {twinslot.__version__}")
        return 0
    found = stale()
    if options.check:
        if found:
            print(f"stale: {', '.join(found)}: run  make packages", file=sys.stderr)
        return 1 if found else 0
    for name, text in package_files().items():
        (_ROOT / name).write_text(text)
    for name in set(found) - set(package_files()):
        (_ROOT / name).unlink()
    print(f"written: {', '.join(found)}" if found else "nothing to do")
    return 0


if __name__ == "__main__":
    sys.exit(main())
