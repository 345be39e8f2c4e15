"""What must survive a reboot: one small dict in ``esp32.NVS``, written whole and atomically.

    journal = Journal.shared()
    journal.update(trial={...}, time=1795165200)     # None deletes a key

One blob, because NVS is atomic for one key and not for two. Unreadable, half-written or newer
content means "nothing known" and is never an exception: a board must boot with any NVS. So does
a key whose value has another shape than below: other software may have written it.

Where a power cut leaves an entry half-written, ESP-IDF may take it for a free one: what goes
there next is damaged, and the old value erased. So the first thing written after a boot is a
number that is worth nothing (``probe``). And where others fill NVS, an image on trial perhaps, the
journal has room for its next writing: it gives up what it keeps free (``spare``), then the log.

    off size field
    0   1    format, 1
    1   4    CRC-32 of the rest, little-endian
    5   ...  JSON object

Keys: ``trial`` what was activated and is not yet confirmed, ``confirmed`` the last build that
was, ``versions`` {build: version}, ``failed`` [[build, version, reason, tries]], ``floor`` the
highest security version confirmed, ``time`` the last time that may be believed at the next boot,
``issued`` the newest signed date, ``reports`` those not yet delivered, ``spent`` [day, bytes] and
``tried`` [release, times, time, times of any] what downloads have cost, ``waiting`` [build,
attempt, release] what is in the other slot and may be installed later. Two numbers of their own:
``starts`` that failed in a row, ``fetch`` which release was being downloaded when the board was
reset.

Source: ESP-IDF nvs_flash, "Internals", and nvs_page.cpp, Page::mLoadEntryTable; MicroPython
ports/esp32/esp32_nvs.c.
"""

import binascii
import json
import struct
import time

from . import errors

REASON = 80  # characters of a reason in the log
LIMIT = 2048  # bytes of the whole blob; the smallest NVS we ship holds about 12 KB
_CHECKPOINT_LIMIT = 512  # bytes of that blob: the longest ETag fits, if it were all quotes
_FORMAT = 1
_KEY = "journal"
_CHECKPOINT = "checkpoint"
_STARTS = "starts"
_FETCH = "fetch"
_LOG = "log"
_LOG_KEEP = 16
_PROBE = "probe"
_SPARE = "spare"
_ABSENT = -0x1102  # ESP_ERR_NVS_NOT_FOUND
_TOO_SMALL = -0x110C  # ESP_ERR_NVS_INVALID_LENGTH: of the buffer
_KEEP = 4  # entries of each list: the newest

_shared = None


class Journal:
    """The agent's memory. Reads flash once, in the constructor; writes it in ``update``.

    Args:
        nvs: an ``esp32.NVS``.
    """

    def __init__(self, nvs):
        self._nvs = nvs
        self._probed = self._spared = False  # in this boot
        from .health import fits  # which leaves memory when it has done its work

        found = self._load(_KEY)
        self._data = {key: found[key] for key in found if fits(key, found[key])}

    @classmethod
    def shared(cls):
        """Return the one journal of this board, in NVS namespace ``twinslot``.

        One, because two would overwrite each other's changes, and because every NVS object
        takes a handle of ESP-IDF that is never given back.
        """
        global _shared
        if _shared is None:
            from esp32 import NVS

            _shared = cls(NVS("twinslot"))
        return _shared

    def _load(self, key, limit=LIMIT):
        size = limit >> 2  # most are short, and so much in one piece is rare
        while True:
            buf = bytearray(size)
            try:
                n = self._nvs.get_blob(key, buf)
                break
            except OSError as exc:
                # Absent, of another type, or larger than we ever write.
                if exc.args[0] != _TOO_SMALL or size == limit:
                    return {}
                size <<= 1
        if buf[0] != _FORMAT:
            return {}
        body = bytes(memoryview(buf)[5:n])
        if struct.unpack_from("<I", buf, 1)[0] != binascii.crc32(body) & 0xFFFFFFFF:
            return {}
        try:
            data = json.loads(body)
        except ValueError:
            return {}
        return data if isinstance(data, dict) else {}

    def get(self, key: str, kind: type = dict):
        """Return the value of ``key``, or an empty one of type ``kind`` if there is none such."""
        if key in self._data and type(self._data[key]) is kind:
            return self._data[key]
        return kind()

    def version(self, build):
        """Return the version by which an image came here, on trial or before; "" if unknown."""
        trial = self.get("trial")
        on_trial = trial.get("version", "") if trial.get("build") == build else ""
        return on_trial or self.get("versions").get(build, "")

    def update(self, **changes):
        """Set keys (None deletes one) and write the journal, in one step, if anything changed.

        Raises:
            SpaceError: NVS is full or the journal would exceed ``LIMIT``, even with only the
                newest report and failure in it; the journal in flash and in memory is as before.
        """
        data = dict(self._data)
        for key, value in changes.items():
            if value is None:
                data.pop(key, None)
            elif isinstance(value, list):
                data[key] = value[-_KEEP:]
            else:
                data[key] = value
        if data == self._data:
            return
        body = json.dumps(data).encode()
        while len(body) + 5 > LIMIT:
            # Old news goes first: what is on trial must find its place.
            for key in ("reports", "failed"):
                if len(data.get(key, ())) > 1:
                    data[key] = data[key][1:]
                    break
            else:
                raise errors.SpaceError(
                    "journal", "%d bytes" % (len(body) + 5), "at most %d" % LIMIT
                )
            body = json.dumps(data).encode()
        self._store(_KEY, body)
        self._data = data
        if not self._spared:
            self._keep_room(LIMIT - 5 - len(body))

    def _store(self, key, body):
        blob = struct.pack("<BI", _FORMAT, binascii.crc32(body) & 0xFFFFFFFF) + body
        lesser = [_LOG, _SPARE] if key == _KEY else []
        while True:
            try:
                self._probe()
                self._nvs.set_blob(key, blob)
                self._nvs.commit()
                return
            except OSError as exc:
                if not lesser:
                    full = errors.SpaceError("the journal can't be written: %s" % exc)
                    full.retry = True  # others share NVS, and may make room
                    raise full
            self._spared = False
            self._erase(lesser.pop())

    def _probe(self):
        """Write the entry that may be lost, once after each boot."""
        if not self._probed:
            self._nvs.set_i32(_PROBE, self._number(_PROBE) ^ 1)
            self._probed = True

    def _keep_room(self, size):
        """Take what journal and spare may hold together; less, where it is not to be had."""
        self._spared = True
        try:
            self._nvs.get_blob(_SPARE, bytearray(1))
            return
        except OSError as exc:
            if exc.args[0] != _ABSENT:
                return  # too large for that
        while size > 128:
            try:
                self._nvs.set_blob(_SPARE, bytes(size & -32))  # as many entries as were there
                self._nvs.commit()
                return
            except (OSError, MemoryError):
                size -= size >> 3  # also without it

    def _erase(self, key):
        try:
            self._nvs.erase_key(key)
            self._nvs.commit()
        except OSError:
            pass  # there was none

    def checkpoint(self):
        """Return the checkpoint of a download that was cut (a dict), {} if there is none such."""
        kept = self._load(_CHECKPOINT, _CHECKPOINT_LIMIT)
        for name in ("offset", "crc", "at", "position"):
            number = kept.get(name)
            if type(number) is not int or not 0 <= number <= 0xFFFFFFFF:
                return {}
        return kept if type(kept.get("etag", "")) is str or kept["etag"] is None else {}

    def save_checkpoint(self, checkpoint=None):
        """Keep a checkpoint, in a blob of its own: it is written every 64 KiB and is worth
        nothing when the journal itself is not. None removes it.

        Raises:
            SpaceError: NVS is full, or it is larger than ``checkpoint`` reads.
        """
        if checkpoint is None:
            self._erase(_CHECKPOINT)
            return
        body = json.dumps(checkpoint).encode()
        if len(body) + 5 > _CHECKPOINT_LIMIT:
            raise errors.SpaceError(
                "checkpoint", "%d bytes" % (len(body) + 5), "at most %d" % _CHECKPOINT_LIMIT
            )
        self._store(_CHECKPOINT, body)

    def starts(self):
        """Return what starts that failed in a row have come to, as ``guard`` counts them."""
        return self._number(_STARTS)

    def set_starts(self, n):
        """Count starts. Costs a flash write only when the number changes; never raises."""
        self._set_number(_STARTS, n)

    def fetching(self):
        """Return the mark of a download that is under way, or that a reset has ended before it
        came to its next checkpoint; 0 if there is none."""
        return self._number(_FETCH)

    def set_fetching(self, mark):
        """Keep such a mark, 31 bits; 0 removes it. Written and failing as ``set_starts``."""
        self._set_number(_FETCH, mark)

    def _number(self, key):
        try:
            return self._nvs.get_i32(key)
        except OSError:
            return 0

    def _set_number(self, key, n):
        try:
            if n != self._number(key):
                self._probe()
                self._nvs.set_i32(key, n)
                self._nvs.commit()
        except OSError:
            pass  # NVS is full: a board that can't count still starts

    def log(self):
        """Return the newest attempts, oldest first: ``[time or 0, version, status, reason]``."""
        entries = self._load(_LOG).get("log")
        if type(entries) is not list:
            return []
        kinds = [int, str, str, str]
        return [e for e in entries if type(e) is list and [type(item) for item in e] == kinds]

    def add_to_log(self, version, status, reason=""):
        """Note how an attempt ended. Never raises: a log is not worth an update."""
        now = 0
        if time.gmtime()[0] > 2024:
            now = int(time.time()) + (946684800 if time.gmtime(0)[0] == 2000 else 0)
        try:
            entries = self.log()[1 - _LOG_KEEP :]
            # It may quote anybody.
            reason = "".join(c if " " <= c <= "~" else "?" for c in reason[:REASON])
            entries.append([now, version, status, reason])
            body = json.dumps({"log": entries}).encode()
            while len(body) + 5 > LIMIT:
                del entries[0]
                body = json.dumps({"log": entries}).encode()
            self._store(_LOG, body)
        except (errors.SpaceError, MemoryError) as exc:
            print("twinslot: not logged:", exc)
