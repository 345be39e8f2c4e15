"""``twinslot.doctor()``: can this board be updated safely, and if not, what to do about it.

Nobody inside the package imports this module: its function goes by the same name
(``twinslot.doctor``) and the first import of a submodule would shadow it.
"""

import gc
import os
import sys
import time

from . import config, espimage
from .errors import OtaError
from .journal import Journal
from .slot import FirmwareSlot

_OLDEST = (1, 24)


def doctor(path="/ota.json"):
    """Look at everything an update needs; print one line each, with the remedy where one is due.

    Args:
        path: the configuration to check.

    Returns:
        list of ``(level, topic, text, remedy)``; ``level`` is ``"ok"``, ``"warn"`` or ``"fail"``.
    """
    found = []

    def say(level, topic, text, remedy=""):
        found.append((level, topic, text, remedy))
        print("%-4s  %-10s %s" % (level, topic, text))
        if remedy:
            print("%16s -> %s" % ("", remedy))

    _platform(say)
    _slots(say)
    _journal(say)
    _memory(say)
    _files(say)
    _configuration(say, path)
    worst = [f for f in found if f[0] != "ok"]
    print("This board can be updated." if not worst else "%d to look at." % len(worst))
    return found


def _platform(say):
    version = sys.implementation.version
    text = ".".join(str(n) for n in version[:3])
    if version[:2] < _OLDEST:
        say("fail", "firmware", "MicroPython " + text, "flash MicroPython 1.24 or newer")
    else:
        say("ok", "firmware", "MicroPython " + text)
    if time.gmtime()[0] < 2024:
        say("warn", "clock", "not set", "it is set by NTP or by the server at the first poll")
    else:
        say("ok", "clock", "%d-%02d-%02d %02d:%02d:%02d UTC" % time.gmtime()[:6])


def _slots(say):
    try:
        slot = FirmwareSlot()
    except OtaError as exc:
        say("fail", "slots", str(exc), "flash a partition table with two OTA slots")
        return
    status = slot.status()
    say("ok", "running", "%s  build %s" % (status["running"], status["build"][:12]))
    _room(say, slot)
    state = status["state"]
    if status["boot"] != status["running"]:
        say(
            "fail",
            "otadata",
            "names %s, but %s runs" % (status["boot"] or "nothing", status["running"]),
            "reset the board; the agent puts it right at the next start",
        )
    elif state == "pending":
        say("warn", "otadata", "the running image is on trial", "wait, or twinslot.confirm()")
    elif state == "undefined":
        say(
            "fail",
            "otadata",
            "the bootloader's rollback is not armed",
            "flash a bootloader with rollback: MicroPython 1.21 or newer, over USB",
        )
    else:
        say("ok", "otadata", state or "blank; the bootloader fills it in")
    if status["inactive_build"]:
        say("ok", "fallback", "%s  build %s" % (status["inactive"], status["inactive_build"][:12]))
    else:
        say("ok", "fallback", "%s is empty until the first update" % status["inactive"])


def _room(say, slot):
    from esp32 import Partition

    running = Partition(Partition.RUNNING)  # pyright: ignore (stubs know labels only)
    own = running.info()[3]
    length = espimage.identify(lambda offset, buf: running.readblocks(0, buf, offset), own)[0]
    room = slot.size - length
    text = "%d bytes, the running image has %d" % (slot.size, length)
    if room < 0:
        say("fail", "slot size", text, "flash a partition table with larger slots")
    elif room < length // 20:
        say("warn", "slot size", text, "the next MicroPython may not fit: plan for larger slots")
    else:
        say("ok", "slot size", text)


def _journal(say):
    try:
        journal = Journal.shared()
        for build, version, reason, _ in journal.get("failed", list):
            say("warn", "history", "%s (%s) failed: %s" % (version, build[:12], reason))
        journal.update(probe=not journal.get("probe", bool))
        journal.update(probe=None)
        say("ok", "journal", "NVS can be written")
    except (OtaError, OSError) as exc:
        say("fail", "journal", str(exc), "erase the NVS partition, or make it larger")


def _memory(say):
    gc.collect()
    free = gc.mem_free()
    if free < 24 * 1024:
        say("fail", "heap", "%d bytes free" % free, "an update needs 24 KB: import less")
    else:
        say("ok", "heap", "%d bytes free" % free)
    try:
        import esp32

        largest = max(h[2] for h in esp32.idf_heap_info(esp32.HEAP_DATA))
    except (ImportError, AttributeError, ValueError):
        return
    if largest < 24 * 1024:
        say(
            "fail",
            "IDF heap",
            "largest block %d bytes" % largest,
            "TLS needs 24 KB: connect before the application fills the heap",
        )
    else:
        say("ok", "IDF heap", "largest block %d bytes" % largest)


def _files(say):
    stats = os.statvfs("/")
    free = stats[0] * stats[3]
    say("ok" if free > 8192 else "warn", "files", "%d bytes free" % free)
    for folder in ("/lib/twinslot", "/lib"):
        try:
            names = os.listdir(folder)
        except OSError:
            continue
        for name in names:
            if name.endswith(".mpy") and name[:-3] + "py" in names:
                say(
                    "fail",
                    "files",
                    "%s/%spy hides %s" % (folder, name[:-3], name),
                    "remove the .py: MicroPython imports it first",
                )


def _configuration(say, path):
    from .keyring import read

    try:
        settings = config.load(path)
        for name in ("ca", "client_cert", "client_key"):
            if settings[name]:
                read(settings[name])
    except OtaError as exc:
        say("fail", "config", str(exc), "correct " + path)
        return
    say("ok", "config", "%s, channel %s" % (settings["product"], settings["channel"]))
    _keys(say, settings)
    if settings["url"].startswith("http://"):
        say("warn", "transport", "http: anybody on the way sees the update", "use https")
    if not settings["wifi"]:
        say("warn", "network", "no wifi in " + path, "safe mode connects by it, and by it alone")


def _keys(say, settings):
    try:
        from .journal import Journal
        from .keyring import Keyring

        ring = Keyring(settings["keys"], Journal.shared(), settings["product"], settings["demo"])
        keys = ring.keys()
    except OtaError as exc:
        say("fail", "keys", str(exc), "make them with: twinslot keygen, twinslot keyring")
        return
    what = "keyring %d" % ring.version if ring.version else "the key file"
    say("ok", "keys", "%d trusted, by %s" % (len(keys), what))
    if settings["demo"]:
        say("warn", "keys", "sample keys are taken", "a demo board only; remove demo")
