"""From the body of a response to the slot, block by block: sizes, short reads, early ends."""

import gc

from harness import raises

from twinslot import payload, release
from twinslot.errors import FormatError, NetworkError
from twinslot.payload import BOUNDARY, PIECE, Writer

HEAP = "4M"
BLOCK = 4096
IDENTITY = release.Payload("blobs/a.bin", "identity", 0, 0, None, None)


class Sink:
    """A slot that keeps what it is given."""

    def __init__(self):
        self.content = b""
        self.sizes = []

    def write(self, block):
        whole = b"".join([bytes(piece) for piece in block])
        self.sizes.append(len(whole))
        self.content += whole


class Response:
    """A body that comes in pieces of these sizes, over and over."""

    def __init__(self, content, *pieces, error=None):
        self._content = memoryview(content)
        self._pieces = pieces or (BLOCK,)
        self._turn = 0
        self._come = False  # the next piece is there
        self._error = error
        self.received = 0

    def take(self, view, n):
        if not self._come:
            return 0
        self._come = False
        n = min(n, self._pieces[self._turn % len(self._pieces)])
        self._turn += 1
        n = min(n, len(self._content) - self.received)
        if n == 0 and self._error:
            raise self._error
        view[:n] = self._content[self.received : self.received + n]
        self.received += n
        return n or None

    async def wait(self):
        assert not self._come, "what was there has not been taken"
        self._come = True


def noise(n):
    return bytes((i * 7 + (i >> 8)) & 0xFF for i in range(n))


async def bring(content, *pieces, size=None, offset=0, error=None):
    """Carry a body to a slot; return the slot and the boundaries."""
    sink = Sink()
    size = len(content) if size is None else size
    seen = []
    stage = payload.open_stage(IDENTITY, Response(content, *pieces, error=error), None, size)
    await payload.pump(stage, Writer(sink, size, offset), lambda at, state: seen.append(at))
    return sink, seen


async def test_any_size_in_any_pieces_arrives_in_blocks():
    for size in (1, 31, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 5):
        content = noise(size)
        for pieces in ((BLOCK,), (1460,), (1,), (100, 4096, 1, 999)):
            if size > BLOCK + 1 and pieces == (1,):
                continue
            sink, _ = await bring(content, *pieces)
            assert sink.content == content
            assert sink.sizes[:-1] == [BLOCK] * (len(sink.sizes) - 1)
            assert sink.sizes[-1] == (size % BLOCK or BLOCK)


async def test_a_body_that_ends_early_names_what_is_missing():
    for have, size in ((0, 10), (BLOCK, BLOCK + 1), (5000, 9000)):
        try:
            await bring(noise(have), size=size)
        except FormatError as exc:
            assert str(size - have) in str(exc)
        else:
            raise AssertionError("nothing raised")


async def test_bytes_behind_the_image_are_not_asked_for():
    content = noise(2 * BLOCK)
    sink, _ = await bring(content, size=BLOCK + 3)
    assert sink.content == content[: BLOCK + 3]


async def test_an_error_of_the_network_comes_through():
    try:
        await bring(noise(BLOCK), size=2 * BLOCK, error=NetworkError("reset"))
    except NetworkError:
        return
    raise AssertionError("nothing raised")


async def test_boundaries_are_told_and_the_end():
    _, seen = await bring(noise(2 * BOUNDARY + 100))
    assert seen == [BOUNDARY, 2 * BOUNDARY, 2 * BOUNDARY + 100]


def test_the_writer_offers_no_more_than_the_image_wants():
    writer = Writer(Sink(), BLOCK + 10)
    assert writer.room == len(writer.view) == PIECE and writer.left() == BLOCK + 10
    for _ in range(BLOCK // PIECE - 1):
        assert writer.advance(PIECE) is False
        assert (writer.at, writer.room) == (0, PIECE)
    assert writer.advance(PIECE - 1) is False
    assert (writer.at, writer.room) == (PIECE - 1, 1)
    assert writer.advance(1) is True
    assert (writer.at, writer.room) == (0, 10)
    assert writer.advance(10) is True
    assert writer.left() == 0


async def test_a_block_in_pieces_of_several_sizes_is_filled_in_their_order():
    for size in (511, 512, 640, BLOCK, BLOCK + 700, 2 * BLOCK):
        content = noise(size)
        for pieces in ((BLOCK,), (100, 4096, 1, 999)):
            block = [memoryview(bytearray(n)) for n in [512] * 5 + [256] * 4 + [128] * 4]
            stage = payload.open_stage(IDENTITY, Response(content, *pieces), None, size)
            sink = Sink()
            await payload.pump(stage, Writer(sink, size, 0, block), lambda at, state: None)
            assert sink.content == content


def test_an_encoding_from_the_future_is_refused():
    later = release.Payload("blobs/a.bin", "zstd", 9, 0, None, None)
    raises(FormatError, payload.open_stage, later, Response(b""), None, 9)


async def test_the_steady_loop_keeps_nothing():
    class Drain:
        def write(self, block):
            pass

    content = noise(4 * BLOCK)

    class Endless(Response):
        def take(self, view, n):
            return PIECE

    async def used(blocks):
        stage = payload.open_stage(IDENTITY, Endless(content), None, blocks * BLOCK)
        writer = Writer(Drain(), blocks * BLOCK)
        gc.collect()
        before = gc.mem_alloc()
        gc.disable()
        await payload.pump(stage, writer, lambda at, state: None)
        after = gc.mem_alloc()
        gc.enable()
        return after - before

    few, many = await used(4), await used(14)
    assert many == few, "%d bytes of garbage per block" % ((many - few) / 10)
