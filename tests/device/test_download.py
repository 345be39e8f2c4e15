"""One image into the slot: which payload comes, what is kept of it, when another one is tried.

Slot, journal and payload stages are the board's own; the server is a `Site` to order.
"""

import binascii
import gc

import workbench as bench
from workbench import BLOCK, VALID

import twinslot
from twinslot import download, payload, release
from twinslot.errors import (
    BusyError,
    ChecksumError,
    FormatError,
    HttpError,
    NetworkError,
    OtaError,
    RefusedError,
    SpaceError,
    TimeoutError_,
    UnreachableError,
)
from twinslot.payload import BOUNDARY
from twinslot.slot import FirmwareSlot

HEAP = "4M"
BASE = "http://tree.example/lamp/"
RUNNING = "ab" * 32
IMAGE = bytes(bench.make_image(2 * BOUNDARY + 2 * BLOCK + 512))
BUILD = bench.signed(IMAGE).build


class Body:
    """An answer: bytes of a file from ``start`` on, or what is told otherwise."""

    def __init__(self, content=b"", start=None, status=None, length=None, cut=None, etag='"1"'):
        self.status = status or (206 if start else 200)
        self.etag = etag
        self.retry_after = 77 if status else None
        self.length = len(content) if length is None else length
        self.received = 0
        self.closed = False
        self._content = content
        self._cut = len(content) if cut is None else cut

    def take(self, view, n):
        n = min(n, self._cut - self.received)
        if n == 0 and self._cut < len(self._content):
            raise NetworkError("reset by peer")
        view[:n] = self._content[self.received : self.received + n]
        self.received += n
        return n or None

    async def wait(self):
        """There is nothing to wait for."""

    async def close(self):
        self.closed = True


class Site:
    """A server: ``{file: Body | exception | function(start, if_range)}``."""

    def __init__(self, **files):
        self.files = files
        self.asked = []
        self.bodies = []
        self.wanted = []

    async def get(self, url, start=None, if_range=None, deadline_ms=None, redirects=None):
        name = url[len(BASE) :]
        self.asked.append(name)
        self.wanted.append((start, if_range, deadline_ms, redirects))
        answer = self.files[name]
        if isinstance(answer, Exception):
            raise answer
        body = answer(start, if_range) if callable(answer) else answer
        self.bodies.append(body)
        return body


def serves(content, **how):
    """A file that obeys a Range."""
    return lambda start, if_range: Body(content[start or 0 :], start, **how)


def plain(url="a"):
    return release.Payload(url, "identity", len(IMAGE), 0, None, None)


def patch(url, size, base=RUNNING):
    return release.Payload(url, "identity", size, 0, "detools", base)


def number(n):
    """A number as a patch has it: 6 bits and a sign, then 7 bits each."""
    out = bytearray([n & 0x3F])
    n >>= 6
    while n:
        out[-1] |= 0x80
        out.append(n & 0x7F)
        n >>= 7
    return bytes(out)


def described(*payloads, **members):
    image = bench.signed(IMAGE, **members)
    return release.Image("firmware", 0, image.size, image.sha256, image.build, list(payloads))


class Downloading:
    """A board with this site; what was told and spent."""

    def __init__(self, site, budget=None):
        bench.otadata((1, VALID))
        bench.erase()
        self.journal = bench.new_journal()
        self.slot = FirmwareSlot()
        self.told = []
        self.spent = []
        self.budget = budget
        self.download = download.Download(self.slot, self.journal, site, self.emit, self.spend)

    def emit(self, name, **data):
        self.told.append((name, data))

    def spend(self, n):
        self.spent.append(n)
        if self.budget is not None and sum(self.spent) >= self.budget:
            raise BusyError("budget")

    async def run(self, *payloads, **members):
        await self.download.run(described(*payloads, **members), BASE, RUNNING)
        assert bench.read(len(IMAGE)) == IMAGE, "and then the slot holds the image"

    async def fails(self, kind, *payloads, **members):
        try:
            await self.run(*payloads, **members)
        except OtaError as exc:
            assert type(exc) is kind, repr(exc)
            return exc
        raise AssertionError("nothing raised, expected %s" % kind.__name__)


async def cut_at(n):
    """A download whose connection was lost after so many bytes; return its board."""
    board = Downloading(Site(a=serves(IMAGE, cut=n)))
    await board.fails(NetworkError, plain())
    return board


def again(board, site):
    """The next poll of a board: another connection, the same flash."""
    board.slot = FirmwareSlot()
    board.download = download.Download(board.slot, board.journal, site, board.emit, board.spend)
    board.told.clear()
    board.spent.clear()


async def test_an_image_comes_whole_and_every_byte_is_booked_once():
    site = Site(a=serves(IMAGE))
    board = Downloading(site)
    await board.run(plain())
    assert board.told == [
        ("progress", {"done": n, "total": len(IMAGE)})
        for n in (BOUNDARY, 2 * BOUNDARY, len(IMAGE))
    ]
    assert board.download.fetched == sum(board.spent) == len(IMAGE)
    assert site.bodies[0].closed
    assert board.journal.checkpoint() == {}
    board.slot.activate()


async def test_a_first_request_asks_for_all_and_leaves_time_for_its_size():
    site = Site(a=serves(IMAGE))
    await Downloading(site).run(plain())
    assert site.wanted == [(None, None, 60000 + len(IMAGE), 1)]


def of(build, url):
    """What a checkpoint tells a payload by."""
    return binascii.crc32((build + url).encode())


async def test_F51_a_download_that_was_cut_goes_on_at_its_checkpoint():
    board = await cut_at(BOUNDARY + 3 * BLOCK)
    kept = board.journal.checkpoint()
    assert (kept["of"], kept["etag"]) == (of(BUILD, "a"), '"1"')
    assert (kept["offset"], kept["at"], kept["position"]) == (BOUNDARY, BOUNDARY, 0)
    assert sum(board.spent) == board.download.fetched == BOUNDARY + 3 * BLOCK
    site = Site(a=serves(IMAGE))
    again(board, site)
    await board.run(plain())
    assert site.wanted[0][:2] == (BOUNDARY, '"1"')
    assert sum(board.spent) == board.download.fetched == len(IMAGE) - BOUNDARY
    assert board.told[0][1]["done"] == 2 * BOUNDARY


async def test_F51_a_download_goes_on_at_a_mirror_whose_files_have_other_etags():
    board = await cut_at(BOUNDARY + 3 * BLOCK)
    kept = board.journal.checkpoint()
    board.journal.save_checkpoint(dict(kept, base=kept["base"] ^ 1))  # as if from elsewhere
    site = Site(a=serves(IMAGE, etag='"2"'))
    again(board, site)
    await board.run(plain())
    assert site.wanted[0][:2] == (BOUNDARY, None)


async def test_F57_a_server_that_knows_no_ranges_begins_anew():
    board = await cut_at(BOUNDARY + 1)
    again(board, Site(a=Body(IMAGE)))
    await board.run(plain())
    assert board.download.fetched == len(IMAGE)
    assert board.told[0][1]["done"] == BOUNDARY


async def test_a_checkpoint_that_could_not_be_read_again_is_no_step_forward():
    it = Downloading(Site(a=serves(IMAGE, cut=BOUNDARY + 9000, etag='"%s"' % ("x" * 510))))
    it.journal.set_fetching(5)
    await it.fails(NetworkError, plain())
    assert it.journal.fetching() == 5 and not it.download.further
    assert it.journal.checkpoint() == {}


async def test_a_mark_of_the_download_goes_when_a_checkpoint_comes_further_than_before():
    """And not where it began anew: a server whose files have another name each time, and a reset
    each time, would never end."""
    it = Downloading(Site(a=serves(IMAGE, cut=BOUNDARY + 9000)))
    it.journal.set_fetching(5)
    await it.fails(NetworkError, plain())
    assert it.journal.fetching() == 0 and it.download.further
    it.journal.set_fetching(6)
    site = Site(a=Body(IMAGE, status=200, cut=BOUNDARY + 9000))
    it.download = download.Download(it.slot, it.journal, site, it.emit, it.spend)
    await it.fails(NetworkError, plain())
    assert site.wanted[0][0] == BOUNDARY and it.journal.fetching() == 6
    assert not it.download.further


async def test_a_checkpoint_of_another_build_or_payload_is_not_gone_on_from():
    for other in (of("cd" * 32, "a"), of(BUILD, "b")):
        board = await cut_at(BOUNDARY + 1)
        board.journal.save_checkpoint(dict(board.journal.checkpoint(), of=other))
        site = Site(a=serves(IMAGE))
        again(board, site)
        await board.run(plain())
        assert site.wanted[0][:2] == (None, None)


async def test_the_payload_that_was_begun_is_finished_before_a_smaller_one():
    board = await cut_at(BOUNDARY + 1)
    site = Site(a=serves(IMAGE), p=serves(b"\1"))
    again(board, site)
    await board.run(patch("p", 1), plain())
    assert site.asked == ["a"]


async def test_a_complete_slot_is_verified_and_not_fetched():
    site = Site()
    board = Downloading(site)
    bench.put(IMAGE)
    await board.run(plain())
    assert site.asked == [] and board.spent == []
    board.slot.activate()


async def test_the_smallest_payload_comes_first_and_gives_way_to_the_next():
    site = Site(p=serves(b"\1"), q=serves(b"\0\1"), a=serves(IMAGE))
    board = Downloading(site)
    await board.run(plain(), patch("q", 2), patch("p", 1), patch("other", 1, "cd" * 32))
    assert site.asked == ["p", "q", "a"]
    assert board.download.fetched == sum(board.spent) == 1 + 2 + len(IMAGE)
    assert all(body.closed for body in site.bodies)


def needs(heap):
    """The next download finds that payloads need as much."""
    payload.heap = heap
    twinslot.payload = payload  # it may have been unloaded


async def test_a_payload_larger_than_the_heap_is_left_out():
    site = Site(a=serves(IMAGE), z=serves(b"no gzip"))
    packed = release.Payload("z", "gzip", 7, 12, None, None)
    real = payload.heap
    try:
        needs(lambda candidate: gc.mem_free())
        await Downloading(site).run(plain(), packed)
        assert site.asked == ["a"]
        needs(lambda candidate: gc.mem_free() - 20 * 1024)
        await Downloading(site).run(plain(), packed)
        assert site.asked == ["a", "z", "a"]
    finally:
        needs(real)


async def test_a_payload_too_large_now_is_finished_all_the_same_where_it_was_begun():
    board = await cut_at(BOUNDARY + 1)
    kept = board.journal.checkpoint()
    kept["of"] = of(BUILD, "z")
    board.journal.save_checkpoint(kept)
    site = Site(z=Body(status=503), a=serves(IMAGE))
    again(board, site)
    real = payload.heap
    needs(lambda candidate: 1 << 29)
    try:
        packed = release.Payload("z", "gzip", len(IMAGE) - 1, 12, None, None)
        await board.fails(HttpError, plain(), packed)
    finally:
        needs(real)
    assert site.asked == ["z"]


async def test_where_no_payload_can_be_applied_that_is_said():
    board = Downloading(Site())
    exc = await board.fails(RefusedError, patch("p", 1, "cd" * 32))
    assert "no payload" in str(exc)


async def test_what_one_payload_left_behind_is_not_built_on_by_the_next():
    changed = bytearray(IMAGE)
    changed[BOUNDARY + 9] ^= 1
    wrong = serves(bytes(changed))
    begun = await cut_at(BOUNDARY + 1)
    site = Site(a=wrong, b=serves(IMAGE))
    again(begun, site)
    await begun.run(plain("a"), plain("b"))
    assert site.asked == ["a", "b"]
    assert [w[0] for w in site.wanted] == [BOUNDARY, None]
    board = Downloading(Site(a=wrong))
    await board.fails(ChecksumError, plain("a"))
    assert board.journal.checkpoint() == {}
    again(board, Site(a=wrong))
    await board.fails(ChecksumError, plain("a"))


async def test_each_payload_is_marked_as_under_way_until_its_own_first_checkpoint():
    wrong = bytearray(IMAGE)
    wrong[BOUNDARY + 9] ^= 1
    wrong = serves(bytes(wrong))
    board = Downloading(Site(a=wrong, b=wrong))
    marks = []
    board.download._emit = lambda name, done, total: marks.append((done, board.journal.fetching()))
    board.journal.set_fetching(7)
    await board.fails(ChecksumError, plain("a"), plain("b"))
    assert marks[:2] == marks[3:5] == [(BOUNDARY, 7), (2 * BOUNDARY, 0)], marks


async def test_the_last_payloads_error_is_told():
    site = Site(a=serves(IMAGE[:-600]), p=serves(b"\1"))
    await Downloading(site).fails(HttpError, patch("p", 1), plain())
    site = Site(a=serves(b"\1"), p=HttpError("payload", 404, "200", status=404))
    await Downloading(site).fails(FormatError, patch("p", 0), patch("a", 1))


async def test_F57_an_answer_about_one_file_leads_to_the_next_and_one_about_the_server_does_not():
    for status in (300, 302, 403, 404, 410, 416, 499):
        site = Site(p=Body(status=status), a=serves(IMAGE))
        await Downloading(site).run(patch("p", 1), plain())
        assert site.asked == ["p", "a"], status
    for status in (199, 201, 205, 207, 299, 408, 429, 500, 503):
        site = Site(p=Body(status=status), a=serves(IMAGE))
        exc = await Downloading(site).fails(HttpError, patch("p", 1), plain())
        assert (exc.status, exc.retry_after) == (status, 77)
        assert site.asked == ["p"] and site.bodies[0].closed


async def test_F57_a_part_that_was_not_asked_for_is_no_answer():
    site = Site(a=Body(IMAGE, status=206))
    exc = await Downloading(site).fails(HttpError, plain())
    assert exc.status == 206
    board = await cut_at(BOUNDARY + 1)
    again(board, Site(a=Body(IMAGE, status=416)))
    assert (await board.fails(HttpError, plain())).status == 416


async def test_F52_a_file_of_another_length_is_another_file():
    for length in (0, len(IMAGE) - 1, len(IMAGE) + 1):
        site = Site(a=Body(IMAGE, length=length))
        exc = await Downloading(site).fails(HttpError, plain())
        assert exc.status == 200 and site.bodies[0].received == 0
        assert exc.retry_after is None
    site = Site(a=serves(IMAGE), p=Body(b"\1\2"))
    await Downloading(site).run(patch("p", 1), plain())
    board = await cut_at(BOUNDARY + 1)
    site = Site(a=Body(IMAGE, start=BOUNDARY), b=serves(IMAGE))
    again(board, site)
    await board.run(plain("a"), plain("b"))
    assert site.asked == ["a", "b"]
    body = Body(IMAGE)
    body.length = None
    await Downloading(Site(a=body)).run(plain())


async def test_a_network_that_fails_is_not_tried_in_another_form_and_what_came_is_kept():
    for error in (NetworkError("reset"), UnreachableError("refused"), TimeoutError_("slow")):
        board = await cut_at(BOUNDARY + 1)
        site = Site(p=serves(IMAGE), a=error)
        again(board, site)
        await board.fails(type(error), patch("p", 1), plain())
        assert site.asked == ["a"]
        assert board.journal.checkpoint()["offset"] == BOUNDARY


async def test_running_out_of_memory_leads_to_another_payload_or_says_busy():
    site = Site(p=MemoryError("no room"), a=serves(IMAGE))
    await Downloading(site).run(patch("p", 1), plain())
    site = Site(p=MemoryError("no room"))
    exc = await Downloading(site).fails(BusyError, patch("p", 1))
    assert "no room" in str(exc)


async def test_want_of_memory_costs_no_checkpoint():
    board = await cut_at(BOUNDARY + 1)
    again(board, Site(a=MemoryError("no room")))
    await board.fails(BusyError, plain())
    site = Site(a=serves(IMAGE))
    again(board, site)
    await board.run(plain())
    assert site.wanted[0][0] == BOUNDARY


async def test_a_budget_that_is_used_up_ends_it_and_what_came_is_kept():
    site = Site(a=serves(IMAGE), b=serves(IMAGE))
    board = Downloading(site, budget=BOUNDARY)
    await board.fails(BusyError, plain("a"), plain("b"))
    assert len(site.asked) == 1 and site.bodies[0].closed
    assert sum(board.spent) == BOUNDARY
    assert board.journal.checkpoint()["offset"] == BOUNDARY
    board.budget = None
    again(board, site)
    await board.run(plain("a"), plain("b"))
    assert sum(board.spent) == len(IMAGE) - BOUNDARY


async def test_a_budget_that_ends_with_the_image_does_not_undo_it():
    board = Downloading(Site(a=serves(IMAGE)), budget=len(IMAGE))
    await board.run(plain())


async def test_a_checkpoint_that_can_not_be_kept_does_not_end_a_download():
    for error in (SpaceError("full"), MemoryError("no room")):
        board = Downloading(Site(a=serves(IMAGE)))
        save = board.journal._store

        def fails(key, body, error=error):
            raise error

        board.journal._store = fails
        try:
            await board.run(plain())
        finally:
            board.journal._store = save
        assert sum(board.spent) == len(IMAGE)


async def test_a_payload_that_can_not_be_gone_on_from_keeps_no_checkpoint():
    """Its boundary lies within a chunk of the patch."""
    head = b"\0" + number(len(IMAGE)) + b"\0" + b"\0" + number(len(IMAGE))
    content = head + IMAGE + b"\0"
    board = Downloading(Site(p=serves(content, cut=len(head) + BOUNDARY + BLOCK)))
    await board.fails(NetworkError, patch("p", len(content)))
    assert board.journal.checkpoint() == {}
    assert board.told == [("progress", {"done": BOUNDARY, "total": len(IMAGE)})]
