"""Follow a guide of docs/ step by step, as its reader would, with a board on the table.

    with Reader(tmp_path) as reader:
        reader.follow((DOCS / "getting-started.md").read_text())

What a fenced block means:

    ```console            each line after "$ " is run by a shell, in one folder; the lines below it
                          appear in its output in that order ("…" stands for anything). A command
                          that ends in & goes on; its first line of output is compared.
    ```json ota.json      is written into that file (any other language with a file name, too)
    ```text board         these lines appear on the board's console, in that order, in time
    ```pycon              is typed at the board's prompt

The rest (mermaid, plain text) is for people. Addresses, ports and secrets are put in for what the
guide says: see `Reader.typed`.
"""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

from fakechip import FakeChip
from prompts import Attended

from twinslot_tools.virtual_esp32.board import Board

DOCS = Path(__file__).parents[2] / "docs"
BIN = Path(sys.executable).parent
PORT = "/dev/ttyUSB0"
HOST = "192.168.1.10"
SECRET = "correct horse"
_FLASH = 4 << 20


def blocks(text):
    """Yield (language, rest of the info string, content) of each fenced block."""
    for info, content in re.findall(r"^```([^\n]*)\n(.*?)^```$", text, re.S | re.M):
        language, _, rest = info.partition(" ")
        yield language, rest.strip(), content


def told(block):
    """Split a console block into [(command, [lines of output])]."""
    steps = []
    for line in block.splitlines():
        if line.startswith("$ "):
            steps.append((line[2:], []))
        else:
            steps[-1][1].append(line)
    return steps


def appear_in_order(lines, output):
    """Check that each line appears after the one before; "…" stands for anything."""
    pos = 0
    for line in lines:
        match = re.compile(_pattern(line)).search(output, pos)
        assert match, f"not in the output after what came before: {line!r}\n{output}"
        pos = match.end()


def _pattern(line):
    return r"\s+".join(".*?".join(re.escape(p) for p in word.split("…")) for word in line.split())


class Reader:
    """See the module. Use as a context manager.

    Args:
        folder: an empty one, where commands run.
        speed: of the board's time.
        skip: commands that can't be run here, each checked by its own test.
    """

    def __init__(self, folder, speed=5, skip=()):
        self.folder = folder
        self.done = []  # commands that ran
        self._speed = speed
        self._skip = skip
        self._flash = bytearray(b"\xff" * _FLASH)
        self._at = None
        self._seen = 0  # lines of the board's console that a block has matched
        self._background = []
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._web = str(free.getsockname()[1])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.unplug()
        for process in self._background:
            process.terminate()
            process.wait(20)
            process.stdout.close()

    # ---- the board on the table

    def unplug(self):
        """Switch the board off; return its flash."""
        if self._at:
            self._at.__exit__()
            self._flash[:] = self._at.board.path.read_bytes()
            self._at = None
        return self._flash

    def _plug_in(self):
        """Switch the board on, unless it runs."""
        if self._at is None:
            path = self.folder / ".board.bin"
            path.write_bytes(self._flash)
            self._at = Attended(Board(path, speed=self._speed)).__enter__()
            self._seen = 0
        return self._at

    # ---- the guide

    def follow(self, text):
        for language, rest, content in blocks(text):
            if language == "console":
                for command, lines in told(content):
                    self._run(command, lines)
            elif (language, rest) == ("text", "board"):
                self._watch(content.splitlines())
            elif language == "pycon":
                self._type_at_prompt(content)
            elif rest:
                path = self.folder / rest
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(self.typed(content))

    def typed(self, text):
        """What is typed here for what the guide says."""
        text = text.replace("0.0.0.0", "127.0.0.1").replace(HOST, "127.0.0.1")
        return text.replace("8443", self._web)

    def _run(self, command, lines):
        if command in self._skip:
            return
        self.done.append(command)
        if command.startswith("twinslot flash ") and PORT in command:
            self.unplug()
            with FakeChip(self._flash) as chip:
                self._shell(command, lines, f"socket://127.0.0.1:{chip.port}")
        else:
            self._shell(command, lines, self._plug_in().url if PORT in command else "")

    def _shell(self, command, lines, port):
        typed = self.typed(command).replace(PORT, port)
        # Asked for at the terminal; here there is none.
        secret = ".key" in typed and typed.startswith("twinslot") and "phrase" not in typed
        environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "COLUMNS": "120"}
        environment["PYTHONUNBUFFERED"] = "1"
        if typed.endswith("&"):
            process = subprocess.Popen(
                typed.rstrip("& ").split(),
                cwd=self.folder,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            self._background.append(process)
            appear_in_order([self.typed(line) for line in lines], process.stdout.readline())
            return
        done = subprocess.run(
            typed + " --passphrase-fd 0" * secret,
            input=SECRET * secret,
            shell=True,
            check=False,
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,  # in the order of a terminal
            text=True,
            timeout=120,
        )
        expected = 1 if lines and lines[-1].startswith("twinslot: ") else 0
        assert done.returncode == expected, f"{command}\n{done.stdout}"
        appear_in_order([self.typed(line).replace(PORT, port) for line in lines], done.stdout)

    def _watch(self, lines):
        at = self._plug_in()
        for line in lines:
            pattern = re.compile(_pattern(line))
            at.wait(lambda pattern=pattern: self._find(at, pattern), timeout=90)

    def _find(self, at, pattern):
        for number, line in enumerate(at.console[self._seen :], self._seen):
            if pattern.search(line):
                self._seen = number + 1
                return True
        return False

    def _type_at_prompt(self, content):
        with self._plug_in().transport() as transport:
            for entry in re.split(r"^>>> ", content, flags=re.M)[1:]:
                line, *output = entry.splitlines()
                try:
                    value = transport.exec(_statement(line))
                except Exception as exc:
                    raise AssertionError(f"{line}: {exc}") from exc
                appear_in_order(output, value.decode())


def _statement(line):
    """What the friendly prompt does with an expression: print its value."""
    return f"exec(compile({line!r}, '<stdin>', 'single'))"
