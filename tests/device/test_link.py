"""A connection of the HTTP client: the buffer for its lines is there while they are read."""

from harness import raises

from twinslot.errors import HttpError, NetworkError
from twinslot.http import Response
from twinslot.link import Link

MS = 1000


class Socket:
    """Gives the pieces it was made of, one with each read, then nothing."""

    def __init__(self, *pieces):
        self.pieces = list(pieces)

    def readinto(self, buf, n=None):
        if not self.pieces:
            return None
        piece = self.pieces.pop(0)
        n = min(len(piece), len(buf) if n is None else n)
        buf[:n] = piece[:n]
        if piece[n:]:
            self.pieces.insert(0, piece[n:])
        return n

    def close(self):
        pass


class Client:
    read_timeout_ms = rate_window_ms = MS
    min_rate = 1


def connected(*pieces):
    link = Link(("http", "board.example", 80))
    link._sock = Socket(*pieces)
    return link


async def test_a_buffer_comes_with_the_first_line_and_goes_with_the_last_byte_behind_it():
    link = connected(b"one\r\ntwo\r\nbody", b"rest")
    assert link._buf is None
    assert await link.line(0, 1 << 29, "header") == b"one"
    assert await link.line(0, 1 << 29, "header") == b"two"
    block = bytearray(8)
    assert link.take(block, 3) == 3 and link._buf is not None
    assert link.take(block, 8) == 1 and bytes(block) == b"yod\0\0\0\0\0"
    assert link.take(block, 8) == 0 and link._buf is None
    assert link.take(block, 8) == 0
    assert link.read(block, 8, "body") == 4 and bytes(block[:4]) == b"rest"


async def test_the_buffer_stays_while_lines_stand_between_the_chunks_of_a_body():
    link = connected(b"4\r\nbody\r\n", b"0\r\n\r\n")
    answer = Response(link, Client, 200, 1, {b"transfer-encoding": b"chunked"}, None, None)
    data = bytearray(8)
    await answer.wait()
    assert answer.take(data, 8) == 4 and bytes(data[:4]) == b"body"
    kept = link._buf
    assert answer.take(data, 8) == 0 and link._buf is kept
    await answer.wait()
    assert answer.take(data, 8) is None and link._buf is None and link._sock


async def test_a_connection_over_which_all_was_read_holds_no_buffer():
    link = connected(b"HTTP/1.1 204 No Content\r\n\r\n")
    await link.line(0, 1 << 29, "header")
    await link.line(0, 1 << 29, "header")
    assert link._buf is not None and link.is_quiet() and link._buf is None
    link = connected(b"line\r\nleft")
    await link.line(0, 1 << 29, "header")
    assert not link.is_quiet() and link._buf is not None  # what is left is somebody's
    link = connected(b"unasked")
    assert not link.is_quiet()
    link.close()
    assert not link.is_quiet()


async def test_only_a_long_line_gets_a_large_buffer():
    for length, size in ((254, 256), (255, 1024), (1022, 1024)):
        long = b"x" * length
        link = connected(b"short\r\n" + long + b"\r\nrest")
        assert await link.line(0, 1 << 29, "header") == b"short"
        assert len(link._buf) == 256
        assert await link.line(0, 1 << 29, "header") == long
        assert len(link._buf) == size, length
        block = bytearray(8)
        rest = bytes(block[: link.take(block, 8)])
        assert rest + bytes(block[: link.read(block, 8, "body") or 0]) == b"rest"


async def fails(kind, words, *pieces):
    try:
        await connected(*pieces).line(0, 1 << 29, "header")
    except kind as exc:
        assert words in exc.message, exc.message
    else:
        raise AssertionError("no error")


async def test_F56_a_line_is_bounded_and_plain():
    await fails(HttpError, "line too long: saw more, expected 1024 bytes", b"x" * 1024)
    await fails(HttpError, "does not end with CRLF", b"x\n")
    await fails(HttpError, "control character", b"x\0\r\n")
    await fails(NetworkError, "closed", b"x", b"")
    long = b"x" * 1022 + b"\r\n"
    assert await connected(long[:1000], long[1000:]).line(0, 1 << 29, "header") == long[:-2]


def test_a_connection_closed_by_this_side_says_so():
    link = connected()
    link.close()
    assert "by this side" in raises(NetworkError, link.read, bytearray(1), 1, "body").message
