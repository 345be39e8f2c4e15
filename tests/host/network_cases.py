"""The scripted network faults of test_network_faults.py: tables, and offsets rolled by a seed.

A case is a plan for the proxy and what an update may cost under it. Each is told for one or more
of the proxy's doors: plain HTTP, TLS ended in the proxy (faults in HTTP), TLS passed through
(faults in TLS records).
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

SEED = 20261120
SIZE = 72_000  # of the image: one checkpoint in it
CHECKPOINT = 65_536
SLACK = 24_000  # on the way when a connection breaks: sockets' buffers, TLS records, heads
EXCHANGE = 74_400  # bytes of a whole update towards the device, about
POINTER, RELEASE, BLOB = ".json", "/r/", "/blobs/"
WHERE = {"pointer": POINTER, "release": RELEASE, "payload": BLOB}
LENGTHS = {"pointer": 280, "release": 1430, "payload": SIZE + 300}
CUTS = ("reset", "fin", "stall")
ENDED = ("http", "tls")
MAY_PASS = re.compile(
    r"(reset|fin|stall)-(release|payload|\d)|(flip|drop|dup|swap|insert|up)-|dns-dead-addresses"
)
DOORS = ("http", "tls", "through")


@dataclass
class Case:
    """One fault.

    Attributes:
        name: tells the fault; the door follows in its id.
        plan: see `proxy.py`.
        faults: how many polls it may spoil.
        again: the image may have to come whole once more for each fault (it was damaged, not
            cut).
        wish: seconds the device was asked to wait.
        dns: what the board's name service says, one answer per look-up.
        row: line of docs/faults.md that this case belongs to.
    """

    row: str
    name: str
    door: str
    plan: dict[str, Any] = field(default_factory=dict)
    faults: int = 1
    again: bool = False
    wish: float | None = None
    dns: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return f"{self.name}-{self.door}"

    @property
    def may_pass(self) -> bool:
        """The first poll may install under it: what is damaged may be a field that nobody reads,
        the answer may be complete before the request's last bytes break, and a request on a kept
        connection that breaks before its answer is sent once more, on a fresh one."""
        return bool(MAY_PASS.match(self.name))

    @property
    def waits(self) -> bool:
        """The board may wait in vain: for bytes that got lost, or are never sent."""
        words = ("stall", "silent", "drip", "drop", "flip", "insert", "dup", "swap", "9999999")
        return any(word in json.dumps(self.plan) for word in words)

    def bound(self, spoiled: int) -> int:
        """Bytes that may come to the device in all, with so many polls in vain."""
        once = EXCHANGE if self.again else CHECKPOINT
        return EXCHANGE + SLACK + spoiled * (once + SLACK)


def first(program: dict[str, Any]) -> dict[str, Any]:
    """A plan in which the first connection has a program."""
    return {"connections": [program]}


def rest(program: dict[str, Any]) -> dict[str, Any]:
    return {"rest": program}


def answer(status: str, *fields: str, body: str = "") -> str:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *fields]
    return "\r\n".join(lines) + "\r\n\r\n" + body


HTML = "<html><title>Welcome to the hotel</title>Please log in</html>"


# What each row of faults ends in; docs/faults.md quotes it, test_network_faults.py proves it.
THEN = {
    "the server does not take connections": "the poll fails; a later one installs",
    "the connection breaks, ends or falls silent at some byte": "the poll fails, after the time "
    "limit where it fell silent; the next goes on at the last 64 KiB that flash is known to hold",
    "bytes are damaged on the way": "TLS, the signature or the hash of what flash holds notices; "
    "what was damaged is fetched again",
    "bytes are lost on the way": "as above, or the board waits in vain and gives up in time",
    "bytes come twice": "as above",
    "bytes come in the wrong order": "as above",
    "bytes come that nobody sent": "as above",
    "the request does not reach the server whole": "the poll fails or is refused; a later one "
    "installs",
    "the server gives a wrong length": "refused; nothing but the right number of bytes is used",
    "the server answers wrongly when a download is resumed": "never spliced: refused, or begun "
    "again from the start",
    "the server answers with an error": "the poll fails; the next installs",
    "the server is overloaded for long": "after three polls in vain the release rests for six "
    "hours, then it is installed",
    "the server asks for patience": "Retry-After is obeyed, up to six hours; what is no number "
    "and no date is ignored",
    "a captive portal answers in the server's place": "recognised as no answer of ours; the "
    "release is not blamed",
    "the server sends the board elsewhere": "another host, scheme or a loop is not followed; no "
    "token leaves",
    "the certificate changes in the middle of an update": "one of the same CA is taken; with any "
    "other nothing is asked, and the download goes on when the right one is back",
    "the name service fails": "the poll fails; dead addresses are passed over",
    "the server is slow": "given up when an answer takes too long; what came is kept",
}


def at_the_door() -> Iterator[Case]:
    for door in DOORS:
        for how in ("reset", "fin", "silent"):
            yield Case("the server does not take connections", f"door-{how}", door,
                       first({"accept": how}))  # fmt: skip
            plan = {"connections": [{"accept": how}] * 3}
            yield Case("the server does not take connections", f"door-{how}-3-times", door,
                       plan, faults=3)  # fmt: skip


def cuts(dice: random.Random, n: int) -> Iterator[Case]:
    row = "the connection breaks, ends or falls silent at some byte"
    for door in ENDED:
        for do in CUTS:
            for where, on in WHERE.items():
                length = LENGTHS[where]
                for at in sorted(dice.sample(range(length), n if where == "payload" else n // 2)):
                    edit = {"on": on, "at": at, "do": do}
                    yield Case(row, f"{do}-{where}-{at}", door, rest({"edits": [edit]}))
            edit = {"on": BLOB, "at": CHECKPOINT + 5000, "do": do, "times": 3}
            yield Case(row, f"{do}-3-times-behind-the-checkpoint", door, rest({"edits": [edit]}),
                       faults=3)  # fmt: skip
    for do in CUTS:
        for at in sorted(dice.sample(range(EXCHANGE), n)):
            yield Case(row, f"{do}-{at}", "through", first({"edits": [{"at": at, "do": do}]}))


def damage(dice: random.Random, n: int) -> Iterator[Case]:
    rows = {
        "flip": "bytes are damaged on the way",
        "drop": "bytes are lost on the way",
        "dup": "bytes come twice",
        "swap": "bytes come in the wrong order",
        "insert": "bytes come that nobody sent",
    }
    for do, row in rows.items():
        for door in DOORS:
            for _ in range(n):
                size = dice.choice((1, 7, 100, 1448))
                if door == "through":
                    edit = {"at": dice.randrange(EXCHANGE), "do": do, "n": size}
                    yield Case(row, f"{do}-{size}-at-{edit['at']}", door,
                               first({"edits": [edit]}), again=True)  # fmt: skip
                    continue
                where = dice.choice(("pointer", "release", "payload", "payload"))
                edit = {"on": WHERE[where], "at": dice.randrange(LENGTHS[where]), "do": do}
                edit["n"] = size
                yield Case(row, f"{do}-{size}-in-{where}-at-{edit['at']}", door,
                           rest({"edits": [edit]}), again=True)  # fmt: skip


def requests(dice: random.Random, n: int) -> Iterator[Case]:
    row = "the request does not reach the server whole"
    for door in DOORS:
        for do in (*CUTS, "flip", "drop"):
            for _ in range(n):
                at = dice.randrange(200 if door != "through" else 900)
                edit = {"at": at, "do": do, "n": 1}
                yield Case(row, f"up-{do}-{at}", door, first({"up": [edit]}), again=True)


def lengths() -> Iterator[Case]:
    row = "the server gives a wrong length"
    ways = {
        "short": "Content-Length: 7",
        "long": "Content-Length: 9999999",
        "none": "X-Nothing: 1",
        "twice": "Content-Length: 5\r\nContent-Length: 6",
        "negative": "Content-Length: -5",
        "huge": "Content-Length: 99999999999999999999",
        "word": "Content-Length: many",
        "and-chunked": r"Content-Length: \1\r\nTransfer-Encoding: chunked",
        "gzipped": r"Content-Length: \1\r\nContent-Encoding: gzip",
    }
    for name, by in ways.items():
        for where, on in WHERE.items():
            rule = {"on": on, "find": r"^content-length: *(\d+)\r?$", "by": by}
            if "\r\n" not in by and "\\r\\n" not in by:
                rule["by"] = by + r"\r"
            else:
                rule["by"] = by + r"\r"
            yield Case(row, f"length-{name}-{where}", "http", rest({"replace": [rule]}),
                       again=True)  # fmt: skip


def ranges() -> Iterator[Case]:
    """What a server may answer when a download goes on behind the checkpoint."""
    row = "the server answers wrongly when a download is resumed"
    cut = {"on": BLOB, "at": CHECKPOINT + 4000, "do": "reset"}
    ways = {
        "shifted": (r"^content-range: *bytes (\d+)-", "Content-Range: bytes 1-"),
        "other-total": (r"^content-range: *(.*)/\d+", r"Content-Range: \1/77777"),
        "no-range": (r"^content-range:", "X-Range:"),
        "garbage": (r"^content-range: .*$", "Content-Range: all of it\r"),
        "other-etag": (r"^etag: .*$", 'ETag: "another"\r'),
        "no-etag": (r"^etag:", "X-Tag:"),
        "weak-etag": (r"^etag: *", "ETag: W/"),
        "status-200": (r"^HTTP/1.1 206.*$", "HTTP/1.1 200 OK\r"),
        "status-416": (r"^HTTP/1.1 206.*$", "HTTP/1.1 416 No\r"),
        "status-404": (r"^HTTP/1.1 206.*$", "HTTP/1.1 404 No\r"),
        "status-500": (r"^HTTP/1.1 206.*$", "HTTP/1.1 500 No\r"),
    }
    for name, (find, by) in ways.items():
        for door in ENDED:
            rule = {"on": BLOB, "find": find, "by": by}
            plan = {"connections": [{"edits": [cut]}], "rest": {"replace": [rule]}}
            yield Case(row, f"resume-{name}", door, plan, faults=2, again=True)


def statuses() -> Iterator[Case]:
    row = "the server answers with an error"
    codes = (
        "204 No Content", "206 Partial Content", "300 Multiple", "304 Not Modified",
        "400 Bad Request", "401 Unauthorized", "403 Forbidden", "404 Not Found", "408 Timeout",
        "410 Gone", "412 Precondition Failed", "418 Teapot", "421 Misdirected", "425 Too Early",
        "429 Too Many", "500 Error", "501 Not Implemented", "502 Bad Gateway",
        "503 Unavailable", "504 Timeout", "599 Nothing",
    )  # fmt: skip
    for code in codes:
        for where, on in WHERE.items():
            rule = {"on": on, "raw": answer(code)}
            yield Case(row, f"status-{code[:3]}-{where}", "http", rest({"answers": [rule]}))
    for times in (2, 3):
        for door in ENDED:
            rules = [
                {"on": on, "raw": answer("503 Unavailable", body="busy"), "times": times}
                for on in WHERE.values()
            ]
            yield Case("the server is overloaded for long", f"storm-{times}", door,
                       rest({"answers": rules}), faults=3 * times)  # fmt: skip
    early = "HTTP/1.1 100 Continue\r\n\r\n" * 50
    for where, on in WHERE.items():
        yield Case(row, f"100-storm-{where}", "http",
                   rest({"answers": [{"on": on, "raw": early, "end": "fin"}]}))  # fmt: skip


def retry_after() -> Iterator[Case]:
    row = "the server asks for patience"
    date = "Date: Sun, 06 Nov 1994 08:49:37 GMT"
    ways: dict[str, tuple[str, float]] = {
        "seconds": ("Retry-After: 120", 120),
        "zero": ("Retry-After: 0", 0),
        "date": ("Retry-After: Sun, 06 Nov 1994 08:51:37 GMT", 120),
        "past": ("Retry-After: Sun, 06 Nov 1994 08:29:37 GMT", 0),
        "days": ("Retry-After: 999999", 6 * 3600),
        "huge": ("Retry-After: 99999999999999999999", 6 * 3600),
        "negative": ("Retry-After: -5", 0),
        "fraction": ("Retry-After: 1.5", 0),
        "word": ("Retry-After: soon", 0),
        "empty": ("Retry-After:", 0),
    }
    for name, (line, seconds) in ways.items():
        for code in ("429 Too Many", "503 Unavailable"):
            rule = {"on": POINTER, "raw": answer(code, line, date)}
            yield Case(row, f"retry-{name}-{code[:3]}", "http", rest({"answers": [rule]}),
                       wish=seconds)  # fmt: skip


def portals() -> Iterator[Case]:
    row = "a captive portal answers in the server's place"
    ok = answer("200 OK", "Content-Type: text/html", body=HTML)
    ways = {
        "page": ok,
        "login": answer("302 Found", "Location: http://elsewhere.example/login"),
        "511": answer("511 Network Authentication Required", body=HTML),
        "tls-login": answer("307 Temporary", "Location: https://portal.example/login"),
        "json": answer("200 OK", body='{"login": true}'),
        "empty": answer("200 OK"),
        "not-http": "SSH-2.0-portal\r\n",
    }
    for name, raw in ways.items():
        for where, on in {"": "", **WHERE}.items():
            rule = {"on": on, "raw": raw, "times": 1 if on else 2, "end": "fin"}
            yield Case(row, f"portal-{name}-{where or 'everything'}", "http",
                       rest({"answers": [rule]}), faults=2, again=True)  # fmt: skip
    for identity in ("stranger", "self_signed", "wrong_name"):
        yield Case(row, f"portal-with-certificate-{identity}", "tls",
                   first({"identity": identity}))  # fmt: skip


def redirects() -> Iterator[Case]:
    row = "the server sends the board elsewhere"
    for where, on in WHERE.items():
        for target in ("elsewhere", "elsewhere_tls", "http", "loop", "none", "file"):
            for door in ENDED:
                raw = answer("302 Found", f"Location: <{target}>")
                if target == "none":
                    raw = answer("302 Found")
                yield Case(row, f"redirect-{where}-to-{target}", door,
                           rest({"answers": [{"on": on, "raw": raw, "times": 2}]}),
                           faults=2)  # fmt: skip


def certificates(dice: random.Random, n: int) -> Iterator[Case]:
    row = "the certificate changes in the middle of an update"
    for identity in ("renewed", "stranger", "self_signed", "wrong_name", "expired"):
        for at in dice.sample(range(LENGTHS["payload"]), n):
            cut = {"on": BLOB, "at": at, "do": dice.choice(("reset", "fin"))}
            plan = {"connections": [{"edits": [cut]}, {"identity": identity}]}
            yield Case(row, f"certificate-{identity}-{at}", "tls", plan, faults=2)


def names() -> Iterator[Case]:
    row = "the name service fails"
    for said in ("unknown", "later", "empty", "wrong"):
        yield Case(row, f"dns-{said}", "http", dns=(said,))
        yield Case(row, f"dns-{said}-3-times", "tls", dns=(said,) * 3, faults=3)
    yield Case(row, "dns-dead-addresses-first", "http", dns=("dead",), faults=0)


def slow(dice: random.Random) -> Iterator[Case]:
    row = "the server is slow"
    for where, on in WHERE.items():
        edit = {"on": on, "at": 20, "do": "drip", "n": 400}
        yield Case(row, f"drip-{where}", "http", first({"edits": [edit]}))
    for at in dice.sample(range(CHECKPOINT, SIZE - 100), 2):
        edit = {"on": BLOB, "at": at, "do": "drip", "n": 100}
        yield Case(row, f"drip-payload-{at}", "tls", first({"edits": [edit]}))
    for at in (3, 90, 900):
        yield Case(row, f"drip-{at}", "through", first({"edits": [{"at": at, "do": "drip",
                                                                  "n": 300}]}))  # fmt: skip


def cases(seed: int = SEED, n: int = 4) -> list[Case]:
    """All of them, their offsets rolled by the seed; ``n`` offsets of each kind."""
    dice = random.Random(seed)
    made = [
        *at_the_door(), *cuts(dice, 2 * n), *damage(dice, n), *requests(dice, max(1, n // 2)),
        *lengths(), *ranges(), *statuses(), *retry_after(), *portals(), *redirects(),
        *certificates(dice, max(1, n // 2)), *names(), *slow(dice),
    ]  # fmt: skip
    found: dict[str, Case] = {}
    for case in made:
        found.setdefault(case.id, case)
    return list(found.values())
