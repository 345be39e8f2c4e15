"""The board's prompt: friendly REPL, raw REPL and raw paste, over the process's stdin and stdout.

Byte for byte what a board sends and takes, so mpremote and other tools work as over a serial port.
The parent feeds stdin as a UART would, puts a CR before each LF, and turns a Ctrl-C into a
KeyboardInterrupt while code runs; what it needs to know for that it hears from the event "prompt".
Not there: completion by TAB, auto-indent, and moving about within a line.

Source: MicroPython shared/runtime/pyexec.c, shared/readline/readline.c, ports/esp32/main.c.
"""

import gc
import io
import select
import sys

import micropython
import soc

_CTRL_A, _CTRL_B, _CTRL_C, _CTRL_D, _CTRL_E = 1, 2, 3, 4, 5
_ESCAPE = 27
_WINDOW = 128  # half of MICROPY_REPL_STDIN_BUFFER_MAX
_HISTORY = 8
_SLICE_MS = 5  # callbacks of machine.Timer run between two waits
_IN = 1  # select.POLLIN
_POLL = 3  # MP_STREAM_POLL

_COMPOUND = ("if", "while", "for", "try", "with", "def", "class", "async")


class Stdin(io.IOBase):
    """sys.stdin of a board: reads wait for all bytes, and timers go on meanwhile."""

    def __init__(self):
        self._file = sys.stdin.buffer
        self._poll = select.poll()
        self._poll.register(sys.stdin, _IN)
        self._data = b""
        self.buffer = self

    def any(self, wait_ms):
        """True when a byte is there; waits for it, -1 for ever."""
        while not self._data:
            soc.heed()
            if self._poll.poll(_SLICE_MS if wait_ms else 0):
                self._data = self._file.read(256) or b""
            elif wait_ms > 0:
                wait_ms = max(0, wait_ms - _SLICE_MS)
            elif not wait_ms:
                return False
        return True

    def take(self, n):
        """Return 1 to n bytes; waits for the first."""
        self.any(-1)
        data = self._data
        self._data = data[n:]
        return data[:n] if len(data) > n else data

    def readinto(self, buf):
        view = memoryview(buf)
        at = 0
        while at < len(view):
            data = self.take(len(view) - at)
            view[at : at + len(data)] = data
            at += len(data)
        return at

    def read(self, n=-1):
        buf = bytearray(n if n > 0 else 1)
        self.readinto(buf)
        return bytes(buf)

    def readline(self):
        line = b""
        while not line.endswith(b"\n"):
            line += self.take(1)
        return line

    def ioctl(self, op, arg):
        return arg & _IN if op == _POLL and self.any(0) else 0


class Text(io.IOBase):
    """sys.stdin itself: text, while sys.stdin.buffer gives bytes."""

    def __init__(self, stdin):
        self.buffer = stdin

    def ioctl(self, op, arg):
        return self.buffer.ioctl(op, arg)

    def readinto(self, buf):
        return self.buffer.readinto(buf)

    def read(self, n=-1):
        return self.buffer.read(n).decode()

    def readline(self):
        return self.buffer.readline().decode()


def _put(data):
    sys.stdout.buffer.write(data)


class Repl:
    """The prompt.

    Args:
        stdin: a `Stdin`.
        namespace: the globals that boot.py, main.py and the prompt share.
        soft_reset: ends this boot.
        banner: what the friendly prompt begins with.
    """

    def __init__(self, stdin, namespace, soft_reset, banner):
        self._stdin = stdin
        self._namespace = namespace
        self._soft_reset = soft_reset
        self._banner = banner
        self._history = []
        self._after_cr = False

    def run(self):
        """Serve for ever."""
        soc.event("prompt", open=True)
        while True:
            if soc.repl_mode == "raw":
                self._raw()
            else:
                self._friendly()

    def _take(self, n):
        try:
            return self._stdin.take(n)
        except KeyboardInterrupt:  # came when the code before was just done: a character
            return b"\x03"

    def _byte(self):
        return self._take(1)[0]

    # ---- raw REPL

    def _raw(self):
        _put(b"raw REPL; CTRL-B to exit\r\n>")
        line = b""
        while True:
            c = self._byte()
            if c == _CTRL_A:
                if line[:1] == b"\x05" and len(line) == 2:
                    self._raw_paste(line[1])
                    line = b""
                    _put(b">")
                    continue
                return  # and begin again
            if c == _CTRL_B:
                _put(b"\r\n")
                soc.repl_mode = "friendly"
                return
            if c == _CTRL_C:
                line = b""
            elif c != _CTRL_D:
                line += bytes((c,))
            else:
                _put(b"OK")
                if not line:
                    _put(b"\r\n")
                    self._soft_reset()
                self._execute(line, "exec", b"\x04")
                line = b""
                _put(b">")

    def _raw_paste(self, command):
        if command != 65:  # "A"
            _put(b"R\x00")
            return
        _put(b"R\x01" + bytes((_WINDOW, 0)) + b"\x01")
        source = io.BytesIO()
        left = _WINDOW
        while True:
            data = self._take(left)
            end = min(len(data) if (i := data.find(c)) < 0 else i for c in (b"\x03", b"\x04"))
            source.write(data if end == len(data) else data[:end])
            if end < len(data):
                _put(b"\x04")
                # What came with it stays in the buffer: the host waits for our word, but a
                # terminal may not.
                self._stdin._data = data[end + 1 :] + self._stdin._data
                if data[end] == _CTRL_C:
                    _put(b"\x04")
                    self._report(KeyboardInterrupt())
                    _put(b"\x04")
                    return
                break
            left -= end
            if left == 0:
                _put(b"\x01")
                left = _WINDOW
        self._execute(source.getvalue(), "exec", b"\x04")

    # ---- friendly REPL

    def _friendly(self):
        _put(self._banner)
        while True:
            line = self._line(b">>> ")
            if line == _CTRL_A:
                soc.repl_mode = "raw"
                _put(b"\r\n")
                return
            if line == _CTRL_B:
                _put(b"\r\n")
                return
            if line == _CTRL_D:
                _put(b"\r\n")
                self._soft_reset()
            if line == _CTRL_E:
                self._paste()
            if not isinstance(line, bytes) or not line.strip():
                continue
            while _continues(line.decode()):
                more = self._line(b"... ")
                if not isinstance(more, bytes):
                    line = b""
                    break
                line += b"\n" + more
            if line:
                self._execute(line, "single")

    def _paste(self):
        _put(b"\r\npaste mode; Ctrl-C to cancel, Ctrl-D to finish\r\n=== ")
        text = b""
        while True:
            c = self._byte()
            if c == _CTRL_C:
                _put(b"\r\n")
                return
            if c == _CTRL_D:
                _put(b"\r\n")
                break
            text += b"\n" if c == 13 else bytes((c,))
            _put(b"\r\n=== " if c == 13 else bytes((c,)))
        self._execute(text, "exec")

    def _line(self, prompt):
        """Read a line, or a control character at the beginning of one."""
        _put(prompt)
        line = b""
        at = len(self._history)
        while True:
            c = self._byte()
            if c == 10 and self._after_cr:
                self._after_cr = False
                continue
            self._after_cr = c == 13
            if c in (10, 13):
                _put(b"\r\n")
                if line.strip() and self._history[-1:] != [line]:
                    self._history = self._history[1 - _HISTORY :] + [line]
                return line
            if c == _CTRL_C:
                _put(b"\r\n")
                return c
            if c < 6 and not line:
                return c
            if c in (8, 127):
                if line:
                    line = line[:-1]
                    _put(b"\x08 \x08")
            elif c == _ESCAPE:
                up = self._bracket()
                if up and 0 <= at - up <= len(self._history):
                    at -= up
                    _put(b"\x08 \x08" * len(line))
                    line = (self._history + [b""])[at]
                    _put(line)
            elif c >= 32:
                line += bytes((c,))
                _put(bytes((c,)))

    def _bracket(self):
        """Read the rest of an escape sequence: 1 for the up key, -1 for down, 0 for others."""
        if self._byte() != 91:
            return 0
        c = self._byte()
        while 48 <= c <= 59:
            c = self._byte()
        return {65: 1, 66: -1}.get(c, 0)

    # ---- running code

    def _execute(self, source, kind, end=b""):
        """Compile and run; ``end`` follows the output, and the traceback."""
        try:
            code = compile(str(source, "utf-8"), "<stdin>", kind)
            del source
            gc.collect()
            soc.event("prompt", open=False)
            try:
                exec(code, self._namespace)
            finally:
                unlock_heap()
                soc.take_interrupt()  # one that comes too late is none
                soc.event("prompt", open=True)
            _put(end)
        except SystemExit:
            _put(end)
            self._soft_reset()
        except BaseException as e:
            _put(end)
            self._report(e)
        _put(end)

    def _report(self, error):
        print(traceback(error), end="")


def unlock_heap():
    """Let code allocate again, whatever ended the last one, as a board's prompt does.

    Here an interrupt can also come in the middle of a collection, which the next one ends.
    """
    gc.collect()
    micropython.heap_lock()
    for _ in range(micropython.heap_unlock()):
        micropython.heap_unlock()


def traceback(error):
    """Text of a traceback, without the frames of what is C code on a board."""
    text = io.StringIO()
    sys.print_exception(error, text)
    lines = text.getvalue().split("\n")
    return "\n".join([line for line in lines if not _is_ours(line)])


def _is_ours(line):
    for name in ("repl.py", "soc.py", "start.py", "shim_"):
        if line.startswith('  File "' + name):
            return True
    return False


def _continues(text):
    """True if a statement goes on in the next line. Source: py/repl.c."""
    word = ""
    for c in text:
        if not ("a" <= c <= "z" or c == "@"):
            break
        word += c
    if word in _COMPOUND or text.startswith("@"):
        return not text.endswith("\n")  # an empty line ends it
    depth = 0
    quote = ""
    i = 0
    while i < len(text):
        c = text[i]
        if quote:
            if c == "\\":
                i += 1
            elif text.startswith(quote, i):
                i += len(quote) - 1
                quote = ""
        elif c in "'\"":
            quote = c * 3 if text.startswith(c * 3, i) else c
            i += len(quote) - 1
        else:
            depth += (c in "([{") - (c in ")]}")
        i += 1
    return depth > 0 or len(quote) == 3 or text.endswith("\\")
