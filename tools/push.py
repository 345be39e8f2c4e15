"""Send a release to a board over its prompt: the host's half of `twinslot push`.

The board asks, this answers: it hands over the files that the board's own agent wants, from where
it wants them. What the board takes is for the board to judge (`lib/twinslot/push.py`).

Bytes go as base64 in short programs, by raw paste: its flow control is what keeps a UART's receive
buffer of 260 bytes from running over while flash is erased, on every board that has a prompt.
"""

import base64
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from joserfc.jwk import RSAKey

from twinslot import base64url, release, semver
from twinslot.errors import OtaError

from . import images, publish, tree
from .files import Progress, quiet
from .remote import Device, RemoteError
from .signing import Signer

# Two blocks in three lines of code each would cost the board 16 KB of heap; a smaller chunk more
# round trips. At 115200 baud this one takes a quarter of a second.
CHUNK = 2048
_BEGIN = "from binascii import a2b_base64 as _64\nfrom twinslot.push import Push\n_push = Push()\n"


@dataclass
class Outcome:
    """What became of a push.

    Attributes:
        state: ``same`` (it runs already), ``activated`` (not waited for the trial), ``confirmed``,
            ``rolledback``, or ``unknown`` (the board said nothing in time).
        encoding: of the payload that was sent, with ``+detools`` for a delta; "" for none.
        start: byte of the payload that it began with: above 0 where an earlier push was cut.
        sent: bytes of the payload that were sent.
        seconds: that took.
        reason: why it was rolled back.
    """

    state: str
    version: str
    build: str
    encoding: str = ""
    start: int = 0
    sent: int = 0
    seconds: float = 0.0
    reason: str = ""


def hello(device: Device) -> dict[str, Any]:
    """Make the board ready for a push; return what it says of itself.

    Raises:
        RemoteError: it is on trial, can't make an agent of its configuration, or has none.
    """
    if device.on_trial:
        raise RemoteError(
            f"{device.port}: the board is on trial, and its other slot is its way back: wait, or"
            " decide with twinslot confirm or twinslot rollback"
        )
    return device.ask(_BEGIN + "_push.hello()")


@dataclass(frozen=True)
class Wish:
    """What a user says of a bare image; None: as the board has it."""

    version: str | None = None
    security_version: int | None = None
    downgrade: bool = False
    notes: str | None = None


def make_release(
    image: Path,
    wish: Wish,
    facts: dict[str, Any],
    key: RSAKey | Signer,
    folder: Path,
    progress: Progress = quiet,
) -> Path:
    """Sign an image as a release for this one board; return its path in ``folder``.

    Raises:
        OtaError: no image, or one that this board would refuse.
        RemoteError: nobody says its version, or its security version where it needs one.
    """
    version = wish.version or _version_in(image)
    if not version:
        raise RemoteError(
            f"{image}: the image doesn't say its version: add --version, higher than the"
            f" {facts['current_version']} that the board runs"
        )
    floor = facts["floor"]
    if floor and wish.security_version is None:
        # A board in other hands may say anything, and what is signed is good for every board.
        raise RemoteError(
            f"the board says that its security floor is {floor}: if your releases have come so"
            f" far, add --security-version {floor}"
        )
    spec = publish.Spec(
        product=facts["product"],
        version=version,
        hardware=(facts["hardware"],),
        security_version=wish.security_version or 0,
        downgrade=wish.downgrade,
        notes=wish.notes,
    )
    return folder / publish.publish(image, spec, key, folder, progress).release


def send(
    device: Device, path: Path, *, force: bool = False, progress: Progress = quiet
) -> Outcome:
    """Bring a release into the board's inactive slot, verified; ``activate`` is what remains.

    Args:
        path: ``r/VERSION.jws`` in the folder of its product, the payloads beside ``r``.
        force: also a release that failed on this board before.

    Returns:
        Outcome: its state is ``ready`` or ``same``.

    Raises:
        RemoteError: the board refuses it, or the line broke. What was sent is kept.
    """
    manifest = _peek(path)
    image = manifest.firmware
    encodings = {p.url: p.encoding + (f"+{p.patch}" if p.patch else "") for p in image.payloads}
    done = Outcome("", manifest.version, image.build)
    began = time.monotonic()
    data, at = b"", 0
    state = device.ask(f"_push.start('r/{path.name}', {force})")
    while state["state"] in ("wants", "more"):
        if state["state"] == "wants":
            data, at = _file(path.parent.parent, state["url"]), state["start"]
            if state["url"] in encodings:
                done.encoding, done.start, done.sent = encodings[state["url"]], at, 0
            state = device.ask(f"_push.answer({-1 if data is None else len(data) - at})")
            continue
        chunk = (data or b"")[at : at + CHUNK]
        if not chunk:
            raise RemoteError(f"{path}: the board wants more of it than there is")
        text = base64.b64encode(chunk).decode()
        state = device.ask(f"_push.feed(_64('{text}'))")
        at += len(chunk)
        if done.encoding:
            done.sent += len(chunk)
            progress("sending", at, len(data))
    done.seconds = round(time.monotonic() - began, 2)
    done.state = state["state"]
    if done.state == "failed":
        _refused(device, state)
    return done


def activate(
    device: Device, done: Outcome, wait_s: float, on_line: Callable[[str], object]
) -> None:
    """Let the board reset into its new image and, for ``wait_s`` seconds, see how the trial ends.

    Args:
        done: gets the state.
        on_line: called with each line of the board's console.

    Raises:
        RemoteError: the board refused to activate it.
    """
    end = None
    done.state = "unknown"
    for line in device.let_go("_push.go()"):
        if line is None:
            if end is not None and time.monotonic() > end:
                return
            continue
        if line.startswith('{"') and end is None:
            _refused(device, json.loads(line))
        on_line(line)
        if line.startswith("twinslot: reset into") and end is None:
            if not wait_s:
                done.state = "activated"
                return
            end = time.monotonic() + wait_s
        for word in ("confirmed", "rolledback"):
            if line.startswith(f"twinslot: {word} ") and end is not None:
                done.state = word
                done.reason = line.partition("message=")[2].partition(" number=")[0]
                return
        if end is not None and time.monotonic() > end:
            return


def _peek(path: Path) -> release.Release:
    """The manifest of a release, whoever signed it."""
    try:
        return release.parse(base64url.b64url_decode(tree.token(path).split(b".")[1]))
    except (OtaError, ValueError, IndexError) as exc:
        raise RemoteError(f"{path}: not a release: {exc}") from exc


def _version_in(image: Path) -> str:
    """The version in the image's app descriptor, "" unless it is SemVer (stock MicroPython)."""
    version = images.load(image).app_version
    try:
        semver.parse(version)
    except OtaError:
        return ""
    return version


def _file(product: Path, url: str) -> bytes | None:
    """The content of what the board wants, None where it is not there."""
    path = (product / url).resolve()
    if not path.is_relative_to(product.resolve()) or not path.is_file():
        return None
    return tree.image(path)


def _refused(device: Device, state: dict[str, Any]) -> None:
    raise RemoteError(
        f"{device.port}: the board refuses: {state['message']} ({state['code']},"
        f" {state['number']})"
    )
