"""Check the device package against the type stubs of each supported MicroPython.

    python -m twinslot_tools.compat        # or  make compat; exit code 1: something does not fit

Downloads the stubs from PyPI into build/ the first time, then runs pyright once per version. It
sees what the test over tests/host/api_since.json can't: methods and arguments of objects. Stubs
are made from documentation and from the firmware itself; where both are silent, so is this.
"""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

_ROOT = Path(__file__).parent.parent
_FOLDER = _ROOT / "build" / "compat"

# MicroPython: micropython-esp32-stubs, micropython-stdlib-stubs.
STUBS = {
    "1.24": ("1.24.1.post2", "1.24.1.post2"),
    "1.25": ("1.25.0.post5", "1.25.0"),
    "1.26": ("1.26.0.post1", "1.26.0.post3"),
    "1.27": ("1.27.0.post1", "1.27.0.post2"),
    "1.28": ("1.28.0.post4", "1.28.0.post6"),
    "1.29": ("1.29.0.post1", "1.29.0.post2"),
}


def fetch(esp32: str, stdlib: str, folder: Path) -> None:
    """Install both stub packages into ``folder``, unless they are there.

    Raises:
        subprocess.CalledProcessError: no network, or no such version.
    """
    ready = folder / ".ready"
    if ready.exists():
        return
    packages = [f"micropython-esp32-stubs=={esp32}", f"micropython-stdlib-stubs=={stdlib}"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
    command += ["--disable-pip-version-check", "--target", str(folder)]
    subprocess.run([*command, *packages], check=True)
    ready.touch()


def check(stubs: Path) -> list[str]:
    """Return pyright's errors over lib/ with these stubs."""
    settings = tomllib.loads((_ROOT / "pyproject.toml").read_text())["tool"]["pyright"]
    # Relative to the settings' own folder: an absolute "include" is not taken.
    settings |= {"include": ["../../lib"], "stubPath": stubs.name, "typeshedPath": stubs.name}
    config = stubs.parent / f"pyright-{stubs.name}.json"
    config.write_text(json.dumps(settings))
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "-p", str(config), "--outputjson"],
        check=False,
        capture_output=True,
        text=True,
    )
    return [
        f"{Path(found['file']).relative_to(_ROOT)}:{found['range']['start']['line'] + 1}:"
        f" {found['message'].splitlines()[0]}"
        for found in json.loads(done.stdout)["generalDiagnostics"]
        if found["severity"] == "error"
    ]


def main() -> int:
    failed = False
    for version, (esp32, stdlib) in STUBS.items():
        folder = _FOLDER / version
        fetch(esp32, stdlib, folder)
        errors = check(folder)
        failed |= bool(errors)
        print(f"MicroPython {version}: {len(errors) or 'no'} errors", flush=True)
        for error in errors:
            print(f"  {error}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
