"""A proxy that breaks what passes through it, exactly as told; a process of its own.

    python proxy.py TARGET_PORT FOLDER      prints {"http": port, "tls": port, "through": port,
                                            "elsewhere": port, "elsewhere_tls": port}

Three doors lead to the same HTTPS server: "http" and "tls" are ended here (the faults fall on
bytes of HTTP), "through" is passed on (the faults fall on TLS records). "elsewhere" is somebody
else's server, where nothing of ours should ever arrive. FOLDER holds certificates, NAME.crt and
NAME.key. Commands come as JSON lines on stdin, each is answered by one on stdout:

    {"plan": {...}}   forget what was counted, break things like this from now on
    {"report": 1}     say what passed, and what of the plan did not happen ("missed")
    {"go": 1}         break the connection that "hold" has stopped (no answer)

The plan: {"connections": [program...], "rest": program} by order of arrival. A program:

    accept      "reset", "fin", "silent"; at the door
    identity    name of another certificate (tls)
    answers     [{"on": part of the path, "raw": text, "end": "keep", "fin", "reset" or "stall",
                "times": n}]: this instead of the server's
    edits       [{"on": part of the path or "" for the whole connection, "at": byte, "do": what,
                "n": bytes, "times": n}], what: reset fin stall flip drop dup swap insert drip hold
    up          edits of what the device sends, counted from the connection's first byte
    replace     [{"on": part of the path, "find": regex, "by": text, "times": n}] in the head

Counts of "times" belong to the plan, not to a connection. Nothing breaks without being told.
"""

from __future__ import annotations

import json
import re
import select
import socket
import ssl
import sys
import threading
import time
from pathlib import Path
from typing import Any

from faultserver import reset

_WHOLE = 1 << 40


class Broken(Exception):
    """This connection is over, by plan."""


class Proxy:
    """The doors, the plan and what was seen."""

    def __init__(self, target: int, folder: Path):
        self.target = target
        self.folder = folder
        self.lock = threading.Lock()
        self.held = threading.Event()
        self.contexts: dict[str, ssl.SSLContext] = {}
        self.upstream = ssl.create_default_context(cafile=str(folder / "server.crt"))
        # A 1.3 server sends tickets of its own accord, and recv() would wait for what follows.
        self.upstream.maximum_version = ssl.TLSVersion.TLSv1_2
        self.begin({})
        self.ports = {}
        for door in ("http", "tls", "through", "elsewhere", "elsewhere_tls"):
            listener = socket.create_server(("127.0.0.1", 0), backlog=128)
            self.ports[door] = listener.getsockname()[1]
            threading.Thread(target=self._accept, args=(listener, door), daemon=True).start()

    def begin(self, plan: dict[str, Any]) -> None:
        with self.lock:
            self.plan = plan
            self.seen = 0
            self.down = 0
            self.payload = 0
            self.requests: list[str] = []
            self.leaks: list[str] = []
            self.used: dict[int, int] = {}
            self.met: set[int] = set()
            self.held.set()

    def report(self) -> dict[str, Any]:
        with self.lock:
            return {
                "connections": self.seen,
                "down": self.down,
                "payload": self.payload,
                "requests": self.requests,
                "elsewhere": self.leaks,
                "missed": self._missed(),
            }

    def happened(self, told: dict[str, Any]) -> None:
        """Note that a rule, or the program of a door, has changed what the device got."""
        with self.lock:
            self.met.add(id(told))

    def _missed(self) -> list[dict[str, Any]]:
        """What the plan told, and did not happen."""
        programs = [*self.plan.get("connections", ()), self.plan.get("rest")]
        told = []
        for program in filter(None, programs):
            told += [program] if program.keys() & {"accept", "identity"} else []
            for key in ("answers", "edits", "up", "replace"):
                told += program.get(key, ())
        return [one for one in told if id(one) not in self.met]

    def context(self, name: str) -> ssl.SSLContext:
        if name not in self.contexts:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.maximum_version = ssl.TLSVersion.TLSv1_2
            context.load_cert_chain(self.folder / f"{name}.crt", self.folder / f"{name}.key")
            self.contexts[name] = context
        return self.contexts[name]

    def due(self, rule: dict[str, Any]) -> bool:
        """Take one of a rule's times; False when they are used up."""
        with self.lock:
            used = self.used.get(id(rule), 0)
            self.used[id(rule)] = used + 1
            return used < rule.get("times", 1)

    def _accept(self, listener: socket.socket, door: str) -> None:
        while True:
            device, _ = listener.accept()
            threading.Thread(target=self._serve, args=(device, door), daemon=True).start()

    def _serve(self, device: socket.socket, door: str) -> None:
        device.settimeout(20)
        device.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            if door.startswith("elsewhere"):
                self._elsewhere(device, door)
                return
            with self.lock:
                programs = self.plan.get("connections", [])
                mine = programs[self.seen] if self.seen < len(programs) else None
                program = mine if mine is not None else self.plan.get("rest", {})
                self.seen += 1
            Connection(self, device, program, door).run()
        except (OSError, Broken):
            pass
        finally:
            device.close()

    def _elsewhere(self, device: socket.socket, door: str) -> None:
        if door == "elsewhere_tls":
            device = self.context("proxy").wrap_socket(device, server_side=True)
        head = device.recv(4096)
        with self.lock:
            self.leaks.append(head.decode(errors="replace"))
        device.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nelsewhere")
        device.close()


class Connection:
    """One connection of the device, and the one to the server that answers it."""

    def __init__(self, proxy: Proxy, device: socket.socket, program: dict[str, Any], door: str):
        self.proxy = proxy
        self.device = device
        self.program = program
        self.door = door
        self.path = ""
        self.sent = 0  # bytes to the device, of this connection
        self.answered = 0  # bytes to the device, of this answer
        self.up = 0
        self.head: bytes | None = None  # of an answer that is being rewritten
        self.drip = 0
        self.late = b""  # goes behind the byte that comes next

    def run(self) -> None:
        self._enter()
        server = socket.create_connection(("127.0.0.1", self.proxy.target), 20)
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.door != "through":
            server = self.proxy.upstream.wrap_socket(server, server_hostname="127.0.0.1")
        try:
            self._relay(server)
        finally:
            server.close()

    def _enter(self) -> None:
        if self.program.keys() & {"accept", "identity"}:
            self.proxy.happened(self.program)
        accept = self.program.get("accept")
        if accept == "reset":
            self._break("reset")
        if accept == "fin":
            self._break("fin")
        if accept == "silent":
            self._break("stall")
        if self.door == "tls":
            context = self.proxy.context(self.program.get("identity", "proxy"))
            self.device = context.wrap_socket(self.device, server_side=True)

    def _relay(self, server: socket.socket) -> None:
        while True:
            for source in self._ready(server):
                data = source.recv(16384)
                if not data:
                    return
                if source is self.device:
                    self._from_device(data, server)
                else:
                    self._to_device(data)

    def _ready(self, server: socket.socket) -> list[socket.socket]:
        both = [self.device, server]
        pending = [s for s in both if isinstance(s, ssl.SSLSocket) and s.pending()]
        return pending or select.select(both, [], [], 20)[0] or [self.device]

    # -- towards the server

    def _from_device(self, data: bytes, server: socket.socket) -> None:
        if self.door != "through" and data[:4] in (b"GET ", b"POST"):
            self.path = data.split(b" ", 2)[1].decode()
            self.answered = 0
            self.head = None
            with self.proxy.lock:
                self.proxy.requests.append(data.partition(b"\r\n\r\n")[0].decode())
            if any(r["on"] in self.path for r in self.program.get("replace", ())):
                self.head = b""
            for rule in self.program.get("answers", ()):
                if rule["on"] in self.path and self.proxy.due(rule):
                    self.proxy.happened(rule)
                    self._write(rule["raw"].encode("latin-1"))
                    if rule.get("end", "keep") != "keep":
                        self._break(rule["end"])
                    return
        for at, edit in self._edits("up", self.up, len(data)):
            server.sendall(data[:at])
            data = self._apply(edit, data[at:])
        self.up += len(data)
        server.sendall(data)

    # -- towards the device

    def _to_device(self, data: bytes) -> None:
        if self.head is not None:
            self.head += data
            if b"\r\n\r\n" not in self.head:
                return
            data, self.head = self._rewritten(self.head), None
        data, self.late = data[:1] + self.late + data[1:], b""
        while data:
            found = self._edits("edits", self.sent, len(data))
            if not found:
                break
            at, edit = found[0]
            self._write(data[:at])
            data = self._apply(edit, data[at:])
        self._write(data)

    def _rewritten(self, data: bytes) -> bytes:
        head, mark, body = data.partition(b"\r\n\r\n")
        text = (head + mark).decode("latin-1")
        for rule in self.program["replace"]:
            if rule["on"] in self.path and self.proxy.due(rule):
                before = text
                text = re.sub(rule["find"], rule["by"], text, flags=re.I | re.M)
                if text != before:
                    self.proxy.happened(rule)
        return text.encode("latin-1") + body

    def _edits(self, key: str, done: int, n: int) -> list[tuple[int, dict[str, Any]]]:
        """The next edit that falls into these bytes, as [(offset in them, edit)]."""
        best = None
        for edit in self.program.get(key, ()):
            on = edit.get("on", "")
            if on and (on not in self.path or key == "up"):
                continue
            at = edit["at"] - (self.answered if on else done)
            used = self.proxy.used.get(id(edit), 0)
            if 0 <= at < n and used < edit.get("times", 1) and (not best or at < best[0]):
                best = (at, edit)
        if best is None or not self.proxy.due(best[1]):
            return []
        return [best]

    def _apply(self, edit: dict[str, Any], data: bytes) -> bytes:
        """Carry out an edit at the beginning of ``data``; return what is sent on."""
        changed = self._changed(edit, data)
        if changed != data or edit["do"] == "drip":
            self.proxy.happened(edit)
        return changed

    def _changed(self, edit: dict[str, Any], data: bytes) -> bytes:
        do, n = edit["do"], edit.get("n", 1)
        if do == "flip":
            return bytes(b ^ edit.get("mask", 1) for b in data[:n]) + data[n:]
        if do == "drop":
            return data[n:]
        if do == "dup":
            return data[:n] + data
        if do == "swap":
            n = min(n, len(data) // 2)
            while n and data[:n] == data[n : 2 * n]:  # would change nothing
                n -= 1
            if not n:
                self.late = data[:1]
                return data[1:]
            return data[n : 2 * n] + data[:n] + data[2 * n :]
        if do == "insert":
            return b"\0" * n + data
        if do == "drip":
            self.drip = n
            return data
        if do == "hold":
            self.proxy.held.clear()
            say({"held": self.path})
            self.proxy.held.wait(30)
            do = "reset"  # what lies in buffers of this host would never have been sent
        self.proxy.happened(edit)
        self._break(do)
        return b""

    def _write(self, data: bytes) -> None:
        self.sent += len(data)
        self.answered += len(data)
        with self.proxy.lock:
            self.proxy.down += len(data)
            if "/blobs/" in self.path:
                self.proxy.payload += len(data)
        if not self.drip:
            self.device.sendall(data)
            return
        for i in range(len(data)):
            self.device.sendall(data[i : i + 1])
            time.sleep(self.drip / 1000)

    def _break(self, how: str) -> None:
        if how == "reset":
            reset(self.device)
        while how == "stall":
            if not self.device.recv(4096):  # the device has given up
                break
        raise Broken


_say = threading.Lock()


def say(what: dict[str, Any]) -> None:
    with _say:
        print(json.dumps(what), flush=True)


def main() -> None:
    proxy = Proxy(int(sys.argv[1]), Path(sys.argv[2]))
    say(proxy.ports)
    for line in sys.stdin:
        command = json.loads(line)
        if "plan" in command:
            proxy.begin(command["plan"])
            say({"begun": 1})
        elif "report" in command:
            say(proxy.report())
        elif "go" in command:
            proxy.held.set()


if __name__ == "__main__":
    main()
