"""Copy files between a host folder and the board's volume, through MicroPython's own file system.

Run by `vfs.py` with a JSON file: {"flash", "flash_size", "chip", "write": {path: host file},
"remove": [path], "read": host folder or null}. It uses the same Partition as the board does.
Prints one JSON object at the end, {"error": text or null, "files": {path: host file}}.
"""

import json
import os

import esp32
import soc
import vfs

_VOLUME = "/volume:"


def main(config_path):
    with open(config_path) as f:
        config = json.load(f)
    soc.open_flash(config)
    files = {}
    error = None
    try:
        vfs.mount(_volume(), _VOLUME)
        for path in config["remove"]:
            _remove(_VOLUME + path)
        for path, source in config["write"].items():
            _make_folders(path)
            _copy(source, _VOLUME + path)
        if config["read"] is not None:
            _read_tree("", config["read"], files)
    except OSError as e:
        error = "%s" % e
    print(json.dumps({"error": error, "files": files}))


def _volume():
    """Return the file system, made if the volume is blank."""
    found = esp32.Partition.find(1, label="vfs")
    kind = vfs.VfsLfs2
    if not found:
        found = esp32.Partition.find(1, label="ffat", block_size=512)
        kind = vfs.VfsFat
    if not found:
        raise OSError("no vfs partition, and no space behind the last one")
    bdev = found[0]
    first = bytearray(bdev.ioctl(5, 0))
    bdev.readblocks(0, first)
    if first == b"\xff" * len(first):
        kind.mkfs(bdev)
    return kind(bdev)


def _make_folders(path):
    parts = path.split("/")
    for i in range(2, len(parts)):
        try:
            os.mkdir(_VOLUME + "/".join(parts[:i]))
        except OSError as e:
            if e.errno != 17:  # EEXIST
                raise


def _remove(path):
    try:
        if os.stat(path)[0] & 0x4000:
            for name in os.listdir(path):
                _remove(path + "/" + name)
            os.rmdir(path)
        else:
            os.remove(path)
    except OSError as e:
        if e.errno != 2:  # ENOENT
            raise


def _copy(source, target):
    buf = bytearray(4096)
    with open(source, "rb") as f, open(target, "wb") as out:
        while True:
            n = f.readinto(buf)
            if not n:
                break
            out.write(buf if n == len(buf) else memoryview(buf)[:n])


def _read_tree(path, folder, files):
    for entry in os.ilistdir(_VOLUME + path):
        name = path + "/" + entry[0]
        if entry[1] & 0x4000:
            _read_tree(name, folder, files)
        else:
            files[name] = "%s/%d" % (folder, len(files))
            _copy(_VOLUME + name, files[name])
