"""The firmware slot: write the inactive partition, verify it, make it boot. Over esp32.Partition.

    slot = FirmwareSlot()
    offset = await slot.begin(image)          # image: release.Image
    slot.write(block)                         # in pieces; 4096 bytes each, the last may be shorter
    await slot.finish()
    slot.activate()                           # then machine.reset()

The rules (design section 5) live here and nowhere else: the running slot is never written; a
wrong file is refused before the first erase; a block that already holds its bytes costs no
erase; block 0 is erased first and its first 32 bytes, the 0xE9 header, are programmed last, so
that no bootloader can take a slot half done for a bootable one; what counts is what flash holds
when read back; the only fallback of an image on trial is never overwritten. What an operation
that was cut short has left may read right now, and wrong tomorrow: in a slot without a header
that another boot has left, each block is written, whatever it seems to hold.

``write`` blocks for one erase and write of a block (typically 50 ms, at most 1 s); ``activate``
for a hash of the whole image (the bootloader's own check). The rest yields every few blocks.
Memory: 512 bytes, in which flash is read, from ``begin`` to ``finish``. A block comes in pieces of
as much or less: in a heap that an application fills, a hole of 4 KiB may be nowhere.

Source: ESP-IDF esp_ota_ops.c, bootloader_common_loader.c; MicroPython esp32_partition.c.
"""

import asyncio
import binascii
import hashlib
import struct

from . import errors, unload
from .errors import OtaError

BLOCK = 4096
PIECE = 512  # bytes that are read, compared and programmed at a time: two pages of flash
_LEAST = 128  # where the heap has no room for so much in one piece; a multiple of 32
_TURN = 4 * BLOCK  # read back in one go, some 10 ms, then other tasks run
_HEADER_LEN = 32
_FACTORY = 0x00
_OTA_MIN = 0x10
_STATES = {0: "new", 1: "pending", 2: "valid", 3: "invalid", 4: "aborted"}


def _crc(seq):
    return binascii.crc32(struct.pack("<I", seq), 0xFFFFFFFF) & 0xFFFFFFFF


def new_block():
    """Return the pieces of a block, empty: memoryviews of ``PIECE`` bytes, 4096 in all. Once the
    heap has no such hole those that follow are smaller. Never the first: an image's head has to
    fit into it."""
    block = []
    left, n = BLOCK, PIECE
    while left:
        try:
            block.append(memoryview(bytearray(n)))
            left -= n
        except MemoryError:
            if n == _LEAST or not block:
                raise
            n //= 2
    return block


class FirmwareSlot:
    """The two app partitions of a board, seen from the one that runs.

    Args:
        partition: the class ``esp32.Partition``, by default.

    Raises:
        PartitionError: this board has no second app slot; run ``twinslot.doctor()``.
    """

    kind = "firmware"

    def __init__(self, partition=None):
        if partition is None:
            from esp32 import Partition as partition
        self._partition = partition
        self._running = partition(partition.RUNNING)  # pyright: ignore (stubs know labels only)
        try:
            self._target = self._running.get_next_update()
        except OSError:
            raise errors.PartitionError(
                "this board has no OTA slots; its partition table has none"
            )
        if self._target.get_next_update().info() == self._target.info():
            raise errors.PartitionError("this board has one OTA slot; an update needs two")
        self._firm = False  # no operation was cut short behind its header
        self.abandon()

    @property
    def size(self):
        """Bytes of the inactive slot."""
        return self._target.info()[3]

    @property
    def chip_id(self):
        """Chip id of the running image: that of this chip, or it would not run."""
        head = bytearray(14)
        self._running.readblocks(0, head, 0)
        return head[12] | head[13] << 8

    # -- what the platform says -------------------------------------------------------------

    def _entries(self):
        """Return the otadata entries with a good CRC as ``[(seq, state, slot index)]``."""
        slots = 0
        for part in self._partition.find(self._partition.TYPE_APP):
            slots += _OTA_MIN <= part.info()[1] < _OTA_MIN + 16
        found = []
        for otadata in self._partition.find(self._partition.TYPE_DATA, 0)[:1]:
            raw = bytearray(32)
            for block in (0, 1):
                otadata.readblocks(block, raw, 0)
                seq, state, crc = struct.unpack("<I20xII", raw)
                if seq not in (0, 0xFFFFFFFF) and crc == _crc(seq):
                    found.append((seq, state, (seq - 1) % slots))
        return found

    def _state(self, part):
        """State of a slot's otadata entry: a name of ``_STATES``, "undefined" for any other
        value, "" where no entry names it. With two entries for it, the newer one."""
        index = part.info()[1] - _OTA_MIN
        newest, name = 0, ""
        for seq, state, slot in self._entries():
            if slot == index and seq > newest:
                newest, name = seq, _STATES.get(state, "undefined")
        return name

    def _build(self, part):
        from . import espimage

        try:
            return espimage.identify(
                lambda offset, buf: part.readblocks(0, buf, offset), part.info()[3]
            )[1]
        except errors.ImageError:
            return ""

    def _running_head(self):
        from . import espimage

        head = bytearray(espimage.HEAD_LEN)
        self._running.readblocks(0, head, 0)
        try:
            return espimage.parse(head)
        except errors.ImageError:  # it runs all the same
            return {"version": "", "secure_version": 0}

    def _version(self):
        from . import semver

        version = self._running_head()["version"]
        try:
            semver.parse(version)
            return version
        except OtaError:
            return ""

    def _boot(self):
        """Label of the slot that otadata names."""
        try:
            return self._partition(self._partition.BOOT).info()[4]  # pyright: ignore
        except OSError:
            return ""

    def status(self):
        """Facts, read from flash now.

        Returns:
            dict: ``running``, ``inactive``, ``boot`` (labels; ``boot`` is what otadata names),
            ``state`` and ``inactive_state`` (new pending valid invalid aborted undefined, or ""
            without an entry), ``build`` and ``inactive_build`` (appended digest in hex, "" where
            there is no image), ``version`` (of the running image's app descriptor, "" unless it
            is SemVer: stock MicroPython leaves it empty).
        """
        return {
            "running": self._running.info()[4],
            "inactive": self._target.info()[4],
            "boot": self._boot(),
            "state": self._state(self._running),
            "inactive_state": self._state(self._target),
            "build": self._build(self._running),
            "inactive_build": self._build(self._target),
            "version": self._version(),
        }

    def base(self):
        """Return ``(read, size)`` of the running slot, the base of a patch: ``read(offset, buf)``
        and its bytes."""
        running = self._running
        return (lambda offset, buf: running.readblocks(0, buf, offset)), running.info()[3]

    # -- writing ----------------------------------------------------------------------------

    async def begin(self, image, checkpoint=None):
        """Prepare the inactive slot for ``image`` (a ``release.Image``). Erases nothing yet.

        Args:
            checkpoint: what ``checkpoint()`` gave for this very image, also before a reboot. It
                counts only if flash still holds what it says.

        Returns:
            The offset in the image from which bytes are wanted: ``image.size`` when the slot
            already holds all of it (a power cut after ``finish``), that of the checkpoint, or 0.

        Raises:
            BusyError: the running image is on trial, and the inactive slot its only way back.
            SpaceError: the image is larger than the slot.
            PartitionError: flash refused to be read, or what is complete to be written once more.
        """
        if self._state(self._running) == "pending":
            raise errors.BusyError("the running image is on trial; the other slot is its way back")
        if image.size > self.size:
            raise errors.SpaceError("image size", image.size, "at most %d, the slot" % self.size)
        self._image = image
        self._ready = False
        self._pos = 0
        self._crc = 0
        self._header = None
        self._piece = memoryview(bytearray(PIECE))
        try:
            build = self._build(self._target)
            if build:
                self._firm = True
            if build == image.build and await self._is_whole():
                self._pos = image.size
            elif checkpoint:  # also behind a header that was torn: the same is programmed over it
                await self._resume(checkpoint)
        except OSError as exc:
            raise errors.PartitionError("flash failed before the update: %s" % exc)
        unload()  # what has looked at the image that was there
        return self._pos

    async def _is_whole(self):
        """True if the slot holds all of the image, for good."""
        # Programmed once more, over itself: had that been cut short, or an erase of what it
        # replaces, its bits might not stay what they are now.
        for at in range(0, BLOCK, PIECE):
            piece = self._read_piece(at)
            self._target.writeblocks(0, piece, at)  # pyright: ignore (it is there)
        return await self._digest() == self._image.sha256

    async def _resume(self, checkpoint):
        """Go on at ``checkpoint`` if the slot holds all that lies before it."""
        offset, header = checkpoint.get("offset"), checkpoint.get("header")
        try:
            header = binascii.unhexlify(header)
        except (ValueError, TypeError):
            return
        if type(offset) is not int or not 0 < offset < self._image.size or offset % BLOCK:
            return
        if len(header) != _HEADER_LEN:
            return
        self._header = header
        crc = 0
        for at in range(0, offset, PIECE):
            crc = binascii.crc32(self._read_piece(at), crc)
            if at % _TURN == 0:
                await asyncio.sleep_ms(0)
        if crc == checkpoint.get("crc"):
            self._pos = offset
            self._crc = crc

    def checkpoint(self):
        """Return ``{"offset", "crc", "header"}``: where writing stands, at a whole block, with
        the CRC-32 of the image so far and the held-back header in hex."""
        header = binascii.hexlify(self._header or b"").decode()
        return {"offset": self._pos, "crc": self._crc, "header": header}

    def write(self, block):
        """Write the next bytes of the image: one block of 4096, or the last, shorter one.

        Args:
            block: a list of buffers of at most ``PIECE`` bytes, whose sizes are multiples of 32
                (a cipher's, where flash is encrypted) but for the image's last one. The first of
                an image holds its head.

        Raises:
            ImageError, HardwareError, SecurityVersionError: the first block is no image, one for
                another chip, or one below the running image's secure_version; nothing was erased.
            PartitionError: flash refused the write.
        """
        n = 0
        for piece in block:
            if n % _HEADER_LEN or len(piece) > PIECE:
                raise ValueError("pieces of at most %d bytes, multiples of 32" % PIECE)
            n += len(piece)
        if self._image is None or self._pos % BLOCK or not 0 < n <= BLOCK:
            raise ValueError("write blocks of %d after begin()" % BLOCK)
        if self._pos + n > self._image.size:
            raise errors.ImageError("image", "%d bytes" % (self._pos + n), self._image.size)
        try:
            if self._pos == 0:
                self._first(block)
            elif not (self._firm and self._holds(block)):
                self._target.ioctl(6, self._pos // BLOCK)
                self._program(block)
        except OSError as exc:
            self._firm = False  # as if the power had failed
            raise errors.PartitionError("flash write at %d failed: %s" % (self._pos, exc))
        for piece in block:
            self._crc = binascii.crc32(piece, self._crc)
        self._pos += n

    def _first(self, block):
        from . import espimage

        head = espimage.parse(block[0])
        if head["chip_id"] != self.chip_id:
            raise errors.HardwareError(
                "image is for",
                espimage.chip_name(head["chip_id"]),
                espimage.chip_name(self.chip_id),
            )
        if not head["hash_appended"]:
            raise errors.ImageError("the image has no appended SHA-256, so its checksum is 8 bits")
        # Where the bootloader's own anti-rollback is on, its eFuse stands at what runs, or below.
        least = self._running_head()["secure_version"]
        del espimage
        unload()  # until it is all here
        if head["secure_version"] < least:
            raise errors.SecurityVersionError(
                "secure_version of the image", head["secure_version"], "%d or higher" % least
            )
        self._header = bytes(block[0][:_HEADER_LEN])
        # Always erased, even if it reads blank: an interrupted erase reads so too.
        self._target.ioctl(6, 0)
        self._program(block, _HEADER_LEN)

    def _program(self, block, skip=0):
        """Program a block that is erased, without its first ``skip`` bytes."""
        at = self._pos
        for piece in block:
            self._target.writeblocks(0, memoryview(piece)[skip:] if skip else piece, at + skip)
            at += len(piece)
            skip = 0

    def _holds(self, block):
        """Tell whether flash holds these bytes already: a block that differs mostly does so in its
        first piece."""
        at = self._pos
        for piece in block:
            n = len(piece)
            seen = self._piece if n == PIECE else self._piece[:n]
            self._target.readblocks(0, seen, at)  # pyright: ignore (any buffer will do)
            if seen != piece:
                return False
            at += n
        return True

    def _read_piece(self, offset):
        """Return a piece of the slot, the held-back header put in its place."""
        piece = self._piece
        self._target.readblocks(0, piece, offset)  # pyright: ignore (any buffer will do)
        if offset == 0 and self._header:
            piece[:_HEADER_LEN] = self._header
        return piece

    async def _digest(self, walk=None):
        """SHA-256 of the image in hex, as flash holds it; ``walk`` sees the same bytes."""
        digest = hashlib.sha256()
        size = self._image.size
        for offset in range(0, size, PIECE):
            piece = self._read_piece(offset)
            if size - offset < PIECE:
                piece = piece[: size - offset]
            digest.update(piece)
            if walk:
                walk.feed(piece)
            if offset % BLOCK == 0:
                await asyncio.sleep_ms(0)
        return "".join("%02x" % b for b in digest.digest())

    async def finish(self):
        """Read the slot back, verify it and make it bootable by programming its header.

        Raises:
            ImageError: bytes are missing, the image can't boot (its segments, checksum or own
                digest don't hold), or its build is not the one that was signed.
            ChecksumError: what flash holds is not the image.
        """
        image = self._image
        if self._ready:
            return
        if image is None or self._pos != image.size:
            raise errors.ImageError(
                "image", "%d bytes" % self._pos, image.size if image else "begin()"
            )
        from .walk import Walk

        try:
            walk = Walk()
            seen = await self._digest(walk)
            if seen != image.sha256:
                # Half of each is enough to tell them apart in a log.
                raise errors.ChecksumError("SHA-256 of the slot", seen[:32], image.sha256[:32])
            build = walk.finish()
            if build != image.build:
                raise errors.ImageError("build of the image", build[:32], image.build[:32])
            if self._header is not None:
                self._target.writeblocks(0, self._header, 0)
            self._check_build()
        except OSError as exc:
            raise errors.PartitionError("flash failed while verifying: %s" % exc)
        self._ready = True
        self._piece = None

    def _read(self, offset, buf):
        self._target.readblocks(0, buf, offset)

    def _check_build(self):
        from . import espimage

        build = espimage.identify(self._read, self._image.size)[1]
        if build != self._image.build:
            raise errors.ImageError("build of the image", build[:32], self._image.build[:32])

    def abandon(self):
        """Forget the update that was begun and give its buffer back."""
        self._image = self._piece = None
        self._pos = 0
        self._ready = False

    # -- switching --------------------------------------------------------------------------

    def activate(self):
        """Make the finished slot boot next, on trial. Reset right after, by machine.reset().

        The platform verifies the whole image once more, from flash, before it writes otadata.

        Raises:
            PartitionError: not finished, or otadata names a slot that does not run.
            ChecksumError: the image in flash no longer verifies.
        """
        if not self._ready:
            raise errors.PartitionError("activate() needs an image that finish() has verified")
        if not self.is_settled():
            raise errors.PartitionError("otadata names a slot that does not run; settle() first")
        self._check_build()
        try:
            self._target.set_boot()
        except OSError as exc:
            raise errors.ChecksumError("the platform refuses the image: %s" % exc)

    def is_settled(self):
        """True unless otadata names another slot than the one that runs (after a fall-back)."""
        return self._boot() == self._running.info()[4]

    def settle(self):
        """Make the running slot the one otadata names again, and confirm it.

        For a board whose bootloader fell back from a damaged image: confirming there would mark
        the damaged one valid. Only for a running image that was confirmed before.

        Raises:
            PartitionError: the platform refused.
        """
        if not self.is_settled():
            try:
                self._running.set_boot()
            except OSError as exc:
                raise errors.PartitionError(
                    "the running slot can't be made the boot slot: %s" % exc
                )
        self.confirm()

    def confirm(self):
        """Mark the running image valid, for good. No flash write if it is already.

        Raises:
            PartitionError: otadata names another slot, whose entry would be marked instead.
        """
        if not self.is_settled():
            raise errors.PartitionError(
                "otadata names a slot that does not run; it stays unconfirmed"
            )
        state = self._state(self._running)
        if state in ("valid", ""):
            return
        try:
            if state in ("aborted", "invalid"):
                # Given up, and it runs all the same, as nothing else boots. An entry in such a
                # state counts for nothing and can't be marked: it takes a new one.
                self._running.set_boot()
            self._partition.mark_app_valid_cancel_rollback()
        except OSError as exc:
            raise errors.PartitionError("confirm failed: %s" % exc)

    def reject(self):
        """Prepare the way back: after this, machine.reset() boots another image.

        On trial the bootloader's own rollback does it. Where that is not armed (a torn otadata
        write can do that), or would not find the way, the other slot is activated; its agent
        confirms it again.

        Raises:
            RollbackError: nothing else here boots; the running image stays.
        """
        back, valid = self._way_back()
        if self._state(self._running) == "pending" and self.is_settled() and valid:
            if not self._build(back):
                raise errors.RollbackError("no image to roll back to in " + back.info()[4])
            return
        try:
            back.set_boot()
        except OSError as exc:
            raise errors.RollbackError("no image to roll back to: %s" % exc)

    def _way_back(self):
        """Return ``(partition, valid)``: what to return to, and whether the bootloader goes there
        by itself once it has given up the running image."""
        own = self._running.info()
        apps = self._partition.find(self._partition.TYPE_APP)
        for _, state, index in self._entries():
            for part in apps:
                if part.info()[1] == _OTA_MIN + index and part.info() != own:
                    if _STATES.get(state) not in ("invalid", "aborted"):
                        return part, True
        for part in apps:
            if part.info()[1] == _FACTORY and part.info() != own:
                return part, True
        return self._target, False
