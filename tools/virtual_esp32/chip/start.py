"""Start the virtual chip: what the ROM loader, MicroPython's main.c and _boot.py do.

Run as
    micropython -c "r = []; (lambda: r.append(bytearray(N)))(); import sys;
    sys.path.insert(0, HERE); import start; start.main(r, CONFIG)"
with the number of a file that holds the configuration, see `process.py`.
The N bytes are the heap of the user, set aside before anything else takes a place in it. When the
fakes are loaded, the holes between them are plugged and the N bytes are given back, so user code
finds a heap of that size, in one piece, as on a board.

The order is that of a board: NVS, partitions, the volume at /, the firmware's frozen modules,
boot.py, main.py. When this is done the code under test sees only the board's own files, and none
of the modules of this folder but the ones that a board has.

Frozen code: a firmware's Python tree is a ROMFS in its image, mounted where `os.listdir` does not
show it. A frozen boot.py or main.py wins over the file on the volume.

Source: MicroPython ports/esp32/main.c, modules/_boot.py, flashbdev.py, inisetup.py,
shared/runtime/pyexec.c.
"""

import gc
import json
import sys

import repl
import shim_os
import shim_time
import soc

# What a board offers under these names; the rest of this folder disappears from sys.modules.
_SHIMS = ("time", "tls", "os", "select", "sys", "_thread")
_FAKES = ("esp32", "machine", "network", "esp")
# All of them but sys, which is made of the board's configuration.
_LATER = ["shim_" + name.strip("_") for name in _SHIMS if name != "sys"] + list(_FAKES)

_kept = []  # a file that must not be closed

_STUB_BOOT = """\
# This file is executed on every boot (including wake-boot from deepsleep)
#import esp
#esp.osdebug(None)
#import webrepl
#webrepl.start()
"""

_CORRUPTED = """\
The filesystem appears to be corrupted. If you had important data there, you
may want to make a flash snapshot to try to recover it. Otherwise, perform
factory reprogramming of MicroPython firmware (completely erase flash, followed
by firmware programming).
"""


def main(reserve, config_fd, ready_fd=-1):
    """Boot. Does not return.

    Args:
        reserve: list with one bytearray, the user's heap.
        config_fd: what is read there waits until a board is switched on.
        ready_fd: a byte is written there when all is done that needs no board; -1: nowhere.
    """
    for name in _LATER:
        __import__(name)
    _grow_qstr_pool()
    gc.collect()
    if ready_fd >= 0:
        _kept.append(open(ready_fd, "wb"))
        _kept[0].write(b"!")
    with open(config_fd, "rb") as f:
        config = f.read(1)
        config += f.read()
    soc.start(json.loads(config))
    del config
    bent = shim_time.configure(soc.config["speed"], soc.config["wrap_in_ms"])
    bdev = _install_modules()
    if bent:
        import shim_asyncio

        sys.modules["_asyncio"] = shim_asyncio
    tree = soc.load_tree()
    sys.modules["esp32"]._start_nvs()
    namespace = _clean_namespace()
    frozen = _mount(bdev, tree)
    del tree, bdev
    stdin = None
    if soc.attended:
        stdin = repl.Stdin()
        sys.modules["sys"].stdin = repl.Text(stdin)
    _hand_over_heap(reserve)
    soc.repl_mode = soc.config["repl"]
    error = _run("boot", frozen, namespace)
    if error is None and soc.repl_mode != "raw":  # neither after a boot.py that failed
        error = _run("main", frozen, namespace)
    soc.event("heap", at="end", alloc=gc.mem_alloc(), free=gc.mem_free())
    if stdin:
        _prompt(stdin, namespace, error)
    _idle(error)


_plugs = [None] * 1000
_QSTRS = 1400  # what this folder's modules intern, and then some: over 1260, where a pool ends


def _grow_qstr_pool():
    """Intern names until a new pool of strings is begun.

    A pool is twice the size of the last one and in one piece (py/qstr.c). The names of the fakes
    have filled the small ones, so the user's next name would take 15 KB for a pool that on a
    board, which has those names in flash, begins with 10 entries.
    """
    for i in range(_QSTRS - 630):
        getattr(_QSTRS, "qstr%d" % i, None)


def _hand_over_heap(reserve):
    """Fill what the fakes left free, then free the user's heap."""
    gc.collect()
    fakes = gc.mem_alloc() - len(reserve[0])
    count = 0
    size = 65536
    gc.disable()
    while size >= 16 and count < len(_plugs):
        try:
            # A bytearray is its header and its data; a float is one block of 32 bytes.
            _plugs[count] = bytearray(size) if size >= 32 else count + 0.5
            count += 1
        except MemoryError:
            size //= 2
    gc.enable()
    reserve.clear()
    gc.collect()
    soc.event("heap", at="start", fakes=fakes, alloc=gc.mem_alloc(), free=gc.mem_free())


def _install_modules():
    """Put the fakes in place; return the block device of the volume, or None."""
    modules = sys.modules
    loaded = {}
    for name in _SHIMS:
        loaded[name] = __import__("shim_" + name.strip("_"))
        loaded["u" + name] = loaded[name]
    for name in _FAKES:
        loaded[name] = __import__(name)
    modules.clear()
    modules.update(loaded)
    partition = modules["esp32"].Partition
    found = partition.find(1, label="vfs") or partition.find(1, label="ffat", block_size=512)
    modules["flashbdev"] = _Module()
    modules["flashbdev"].bdev = found[0] if found else None
    return modules["flashbdev"].bdev


class _Module:
    pass


def _clean_namespace():
    """Return the empty namespace of __main__, which boot.py and main.py share."""
    import __main__

    namespace = __main__.__dict__
    for name in list(namespace):
        if name != "__name__":
            del namespace[name]
    return namespace


def _mount(bdev, tree):
    """Swap the host's files for the board's. Returns the mount point of the frozen modules."""
    import vfs

    frozen = shim_os.FROZEN if tree else None
    sys.path[:] = ["", ".frozen"] + (["/" + frozen] if frozen else []) + ["/lib"]
    sys.argv[:] = []
    vfs.umount("/")
    if bdev is not None:
        try:
            vfs.mount(bdev, "/")
        except OSError:
            _make_volume(bdev)
    if frozen:
        vfs.mount(vfs.VfsRom(tree), "/" + frozen)
    shim_os.chdir("/")
    return frozen


def _make_volume(bdev):
    """Format an empty volume, as inisetup.py does; don't touch one that holds something."""
    import vfs

    first = bytearray(bdev.ioctl(5, 0))
    bdev.readblocks(0, first)
    for byte in first:
        if byte != 0xFF:
            _corrupted()
    print("Performing initial setup")
    kind = vfs.VfsLfs2 if bdev.info()[4] == "vfs" else vfs.VfsFat
    kind.mkfs(bdev)
    vfs.mount(kind(bdev), "/")
    with open("/boot.py", "w") as f:
        f.write(_STUB_BOOT)


def _corrupted():
    """Say so for ever, as a board does."""
    soc.event("idle", error=_CORRUPTED)
    while True:
        print(_CORRUPTED)
        soc._sleep_ms(3000)


def _run(name, frozen, namespace):
    """Run boot.py or main.py as __main__, from the frozen modules or from the volume.

    Returns the traceback that ended it, or None.
    """
    try:
        if frozen and _exists("/%s/%s.mpy" % (frozen, name)):
            # A false fromlist is what the interpreter's own -m passes: the module is __main__.
            __import__("%s/%s" % (frozen, name), None, None, False)
            return None
        path = name + ".py"
        if frozen and _exists("/%s/%s" % (frozen, path)):
            path = "/%s/%s" % (frozen, path)
        elif not _exists(path):
            return None
        with open(path) as f:
            code = f.read()
        code = compile(code, name + ".py", "exec")
        gc.collect()
        exec(code, namespace)
        return None
    except SystemExit:
        sys.modules["machine"].soft_reset()
    except BaseException as e:
        repl.unlock_heap()
        text = repl.traceback(e)
        print(text, end="")
        return text


def _exists(path):
    try:
        return shim_os.stat(path)[0] & 0x8000 != 0
    except OSError:
        return False


def _idle(error):
    """Where a board shows its prompt: timers and threads go on, and so does the watchdog."""
    told = None
    while True:
        busy = bool(soc.timers or soc.threads)
        if busy != told:
            soc.event("idle", error=error, busy=busy)
            told = busy
        shim_time.sleep_ms(20)


def _prompt(stdin, namespace, error):
    """Serve the prompt, for ever."""
    soc.event("idle", error=error, busy=True)
    name = "; ".join((sys.version.split("; ")[-1], soc.config["machine"]))
    banner = '%s\r\nType "help()" for more information.\r\n' % name
    soft_reset = sys.modules["machine"].soft_reset
    repl.Repl(stdin, namespace, soft_reset, banner.encode()).run()
