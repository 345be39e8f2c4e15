"""One image into the slot: choose a payload, fetch it, go on where a download was cut.

    fetched = await Download(slot, journal, client, emit, spend).run(image, base, build)

The smallest payload that this board can undo, with the heap it has, comes first, unless another
one was cut in the middle: that is finished. A payload that fails gives way to the next one: what
counts is the image's hash, read back from flash. Only what the network itself gets wrong is not
tried in another form. Loaded when there is something to fetch.

At every 64 KiB of the image a checkpoint goes to the journal. What a reset, a power cut or a lost
connection costs is at most that much, and what was already under way.
"""

import gc
import sys
from asyncio import sleep_ms
from binascii import crc32

from . import errors, tidy
from .errors import OtaError
from .slot import new_block

# For all else: what asks for the payload and reads the head of the answer, then the block, events,
# checkpoints, and holes between objects. What `make bench` measures on a 64-bit port.
_SPARE_HEAP = (27 if sys.maxsize > 1 << 32 else 22) * 512

# A minute, and a second for each 1000 bytes: what did not come by then goes on from its checkpoint
# at the next poll.
_DEADLINE_MS = 60000


class Download:
    """See the module.

    Args:
        slot: a ``FirmwareSlot``.
        journal: a ``Journal``, for checkpoints.
        client: an ``http.Client``.
        emit: ``emit("progress", done, total)``, called at every 64 KiB.
        spend: ``spend(n)``, called with every ``n`` bytes that came; what it raises ends the
            download, and what came so far is kept.
    """

    def __init__(self, slot, journal, client, emit, spend):
        self._slot = slot
        self._journal = journal
        self._client = client
        self._emit = emit
        self._spend = spend
        self.fetched = 0  # bytes of payloads that came over the network
        self.further = False  # a checkpoint came further than those before

    async def run(self, image, base, build):
        """Bring an image into the slot and verify it there.

        Args:
            image: a ``release.Image``.
            base: URL that payload URLs are relative to.
            build: of the running image, the base of patches.

        Raises:
            NetworkError, BusyError: what came so far is kept; a later run goes on from there.
            OtaError: of the last payload, when none would do.
        """
        kept = self._journal.checkpoint()
        error = None
        mark = self._journal.fetching()
        for chosen in self._choose(image, build, kept):
            try:
                self._journal.set_fetching(mark)  # a checkpoint of the payload before took it away
                await self._fetch(image, chosen, base, kept)
                await self._slot.finish()
                self._journal.save_checkpoint()  # done with
                return
            except Exception as exc:  # also a slip of ours: another payload may get by without it
                if isinstance(exc, (errors.NetworkError, errors.BusyError)) and not _is_missing(
                    exc
                ):
                    raise  # another payload would come over the same network, or not now either
                error = exc
            print("twinslot: payload %s:" % (chosen.patch or chosen.encoding), error)
            if not isinstance(error, MemoryError):
                self._journal.save_checkpoint()  # what was built on has failed, or was not there
            self._slot.abandon()
            gc.collect()
        if isinstance(error, MemoryError):
            error = errors.BusyError("out of memory: %s; %d bytes free" % (error, gc.mem_free()))
        raise error or errors.RefusedError("release has no payload this device can apply")

    def _choose(self, image, build, kept):
        """Payloads to try, in order."""
        from . import payload

        gc.collect()
        room = gc.mem_free() - _SPARE_HEAP
        chosen = []
        for candidate in payload.usable(image, build, payload.encodings()):
            if kept.get("of") == _key(image, candidate):
                chosen.insert(0, candidate)
            elif candidate.encoding == "identity" or payload.heap(candidate) <= room:
                chosen.append(candidate)
        return chosen

    async def _fetch(self, image, chosen, base, kept):
        """Fetch one payload; all of the image is in the slot then."""
        from . import payload

        room = payload.buffers(chosen)
        del payload
        resume = kept if kept.get("of") == _key(image, chosen) else None
        offset = self._begun = await self._slot.begin(image, resume)
        if offset == image.size:
            return
        state = (resume["at"], resume["position"]) if offset else None
        # Of one server: a mirror gives the same file another one. There its size must do, and in
        # the end the image's hash.
        etag = resume.get("etag") if state and resume.get("base") == crc32(base.encode()) else None
        gc.collect()
        await sleep_ms(0)
        place = bytearray(room)  # for its buffers, while there is so much in one piece
        from .url import resolve

        url = resolve(base, chosen.url)
        del resolve
        response = await self._client.get(
            url,
            start=state[0] if state else None,
            if_range=etag,
            deadline_ms=_DEADLINE_MS + chosen.size,
            redirects=1,
        )
        self._booked = 0
        try:
            if state and response.status == 200:  # no Range there, or another file by now
                state, offset = None, await self._slot.begin(image)
            elif response.status != (206 if state else 200):
                raise errors.HttpError(
                    "payload",
                    response.status,
                    "200",
                    status=response.status,
                    retry_after=response.retry_after,
                )
            left = chosen.size - (state[0] if state else 0)
            if response.length not in (None, left):
                raise errors.HttpError(
                    "payload length", response.length, left, status=response.status
                )
            tidy()  # what has asked, and read the head of the answer
            block = new_block()  # before modules take the larger holes
            from . import payload

            writer = payload.Writer(self._slot, image.size, offset, block)
            payload.load(chosen)
            del place
            gc.collect()
            await sleep_ms(0)
            stage = payload.open_stage(chosen, response, self._slot.base(), image.size, state)
            await payload.pump(stage, writer, self._boundary(image, chosen, response, base))
        finally:
            self.fetched += response.received
            try:
                self._book(response)
            except errors.BusyError:
                pass  # what is here is here
            await response.close()

    def _book(self, response):
        n, self._booked = response.received - self._booked, response.received
        self._spend(n)

    def _boundary(self, image, chosen, response, base):
        """Return what is done at every 64 KiB: tell the listeners, keep a checkpoint."""

        def boundary(offset, state):
            self._emit("progress", done=offset, total=image.size)
            if state is None:
                return
            try:
                kept = self._slot.checkpoint()
                kept["of"] = _key(image, chosen)
                kept["at"], kept["position"] = state
                kept["etag"], kept["base"] = response.etag, crc32(base.encode())
                self._journal.save_checkpoint(kept)
                if offset > self._begun:
                    self.further = True
                    self._journal.set_fetching(0)  # a reset from here on was not in vain
            except (OtaError, MemoryError) as exc:
                print("twinslot: no checkpoint:", exc)  # the download itself goes on
            self._book(response)

        return boundary


def _key(image, chosen):
    """What a checkpoint tells a payload by: 32 bits. Should it be another's after all, the image
    that comes of it is refused."""
    return crc32((image.build + chosen.url).encode())


def _is_missing(error):
    """True for an answer that speaks of this one file: not there, moved away, of another size."""
    if error.status in (408, 429):  # 0 where nothing answered
        return False
    return error.status in (200, 206) or 300 <= error.status < 500
