"""Copy MicroPython's type stubs where pyright looks for them: ``python tools/stubs.py FOLDER``.

The stubs of the standard library must replace typeshed's, so they need a folder of their own;
pip has put them between everything else it installed.
"""

import shutil
import sys
from importlib.metadata import files
from pathlib import Path

PACKAGES = ("micropython-esp32-stubs", "micropython-stdlib-stubs")


def copy(folder: Path) -> int:
    """Copy every stub file into ``folder``, made anew; return how many."""
    shutil.rmtree(folder, ignore_errors=True)
    count = 0
    for package in PACKAGES:
        for file in files(package) or ():
            if file.suffix in (".pyi", ".py", "") and ".dist-info" not in file.parts[0]:
                target = folder / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file.locate(), target)
                count += 1
    return count


if __name__ == "__main__":
    print(f"{copy(Path(sys.argv[1]))} stubs in {sys.argv[1]}")
