"""``twinslot demo``: a board updates itself, meets a bad release, and comes back by itself.

Every line shown is observed: from the board's console, from its flash, or from the server's
database. Nothing is scripted but what is published, and when.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from .lab import CRASH, Event, Lab, temporary

_SHOWN = {
    "trial": "[yellow]on trial[/]",
    "confirmed": "[green]confirmed[/]",
    "rolledback": "[red]rolled back[/]",
    "failed": "[red]refused[/]",
}


class _Story:
    """Tells the demo while it happens, and collects what it saw."""

    def __init__(self, lab: Lab, console: Console):
        self.lab = lab
        self.console = console
        self.refusals: dict[str, dict[str, str]] = {}
        self.downloaded = 0
        self.marker = 0  # events before this one belong to earlier chapters
        self.progress = Progress(
            TextColumn("  board   downloading"),
            BarColumn(bar_width=40),
            DownloadColumn(),
            console=console,
            transient=True,
        )
        self.task = None
        lab.on_event = self.show

    def show(self, event: Event) -> None:
        data = event.data
        if event.name == "staging":
            self.task = self.progress.add_task("", total=int(data["size"]))
        elif event.name == "progress" and self.task is not None:
            self.progress.update(self.task, completed=int(data["done"]))
        elif event.name == "staged":
            self._end_bar()
            self.downloaded += int(data["bytes"])
            self.say("board", f"{data['version']} downloaded ({data['bytes']} bytes) and verified")
        elif event.name in _SHOWN:
            self._end_bar()
            reason = data.get("message", "")
            self.say(
                "board",
                f"{data.get('version', '')} {_SHOWN[event.name]}".strip()
                + (f": {reason}" if reason else ""),
            )

    def _end_bar(self) -> None:
        if self.task is not None:
            self.progress.remove_task(self.task)
            self.task = None

    def say(self, who: str, text: str) -> None:
        self.console.print(f"  [dim]{who:<7}[/] {text}")

    def chapter(self, text: str) -> None:
        self.console.print(f"[bold]{text}[/]")
        self.marker = len(self.lab.events)

    def wait(self, wanted: Callable[[Event], object]) -> Event:
        return self.lab.wait(wanted, start=self.marker)

    def slots(self) -> dict[str, str]:
        """Say what the flash holds; return {label: state}."""
        found = self.lab.describe()
        states = {}
        for slot in found["slots"]:
            label, state = slot["label"], slot["state"]
            states[label] = state
            runs = "  <- boots next" if label == found["boots"] else ""
            version = slot["version"] or "empty or unfinished"
            self.say("flash", f"{label}  {version:<8} {state or 'no entry'}{runs}")
        return states


def _refused(story: _Story, title: str, code: str) -> None:
    event = story.wait(lambda e: e.name == "failed" and e.data["code"] == code)
    story.refusals[title] = {"code": code, "message": event.data["message"]}


def _play(story: _Story) -> dict[str, Any]:
    lab = story.lab
    story.chapter("A board with 1.0.0 is switched on. Its clock is unset.")
    lab.power_on()
    first = story.wait(lambda e: e.name == "idle")
    before = first.data["version"]
    row = lab.wait_for_server(lambda d: d["current_version"] == before)
    story.say("board", f"runs {before}, has asked the server: nothing new")
    story.say("server", f"board {row['device_id']} runs {row['current_version']}")

    story.chapter("1.1.0 is published.")
    lab.publish(lab.firmware("1.1.0"), "1.1.0")
    story.wait(lambda e: e.name == "confirmed")
    row = lab.wait_for_server(lambda d: d["current_version"] == "1.1.0")
    story.say("server", f"board {row['device_id']} runs {row['current_version']}")

    story.chapter("1.2.0 is published. Its application crashes.")
    lab.publish(lab.firmware("1.2.0", CRASH), "1.2.0")
    story.wait(lambda e: e.name == "rolledback")
    lab.wait_for_server(
        lambda d: (
            any(r["status"] == "rolledback" for r in d["history"])
            and d["current_version"] == "1.1.0"
        )
    )
    story.say("server", "board runs 1.1.0 again; 1.2.0 is recorded as rolled back")
    _refused(story, "crashes", "known_bad")
    rolled_back_to = lab.device()["current_version"]
    story.slots()

    story.chapter("1.2.1 is published. It mends the crash.")
    lab.publish(lab.firmware("1.2.1"), "1.2.1")
    story.wait(lambda e: e.name == "confirmed")

    story.chapter("1.3.0 is published, then a byte of it is changed on the server.")
    image = lab.firmware("1.3.0")
    pointer = lab.site / "sensor-node" / "stable.json"
    kept = pointer.read_bytes()
    published = lab.publish(image, "1.3.0")
    blob = lab.blob(published)
    content = bytearray(blob.read_bytes())
    content[len(content) // 2] ^= 1
    blob.write_bytes(content)
    _refused(story, "tampered", "checksum")

    story.chapter("1.4.0 is signed by a stranger.")
    pointer.write_bytes(kept)
    lab.publish(lab.firmware("1.4.0"), "1.4.0", key=lab.new_key("stranger"), security_version=0)
    _refused(story, "stranger", "signature")

    story.chapter("At the end:")
    states = story.slots()
    device = lab.wait_for_server(lambda d: d["current_version"] == "1.2.1")
    lab.power_off()
    fetched = [e.data["version"] for e in lab.events if e.name == "staging"]
    return {
        "version_before": before,
        "version_after": device["current_version"],
        "version_after_rollback": rolled_back_to,
        "slots": states,
        "refusals": story.refusals,
        "crashing_release_downloads": fetched.count("1.2.0"),
        "bytes_downloaded": story.downloaded,
        "boots": sum(b["event"] == "boot" for b in lab.boots),
    }


def _holds(found: dict[str, Any]) -> bool:
    return (
        found["version_before"] == "1.0.0"
        and found["version_after"] == "1.2.1"
        and found["version_after_rollback"] == "1.1.0"
        and found["crashing_release_downloads"] == 1
        and set(found["refusals"]) == {"crashes", "tampered", "stranger"}
    )


def demo(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object at the end.")
    ] = False,
    keep: Annotated[
        Path | None, typer.Option(help="Keep flash, site and logs in this folder.")
    ] = None,
    attacks: Annotated[
        bool, typer.Option("--attacks", help="Play attacks on it, and show what it did.")
    ] = False,
) -> None:
    """Watch a virtual board update itself and survive a bad release, or attacks."""
    if attacks:
        from .attacks import attacks as play

        play(as_json, keep)
        return
    console = Console(stderr=as_json, highlight=False)
    start = time.monotonic()
    # The server is not told the keys: what it would refuse to offer, the board must refuse.
    with temporary(keys_known=False) as lab:
        story = _Story(lab, console)
        try:
            with story.progress:
                found = _play(story)
        finally:
            if keep:
                shutil.copytree(lab.folder, keep, dirs_exist_ok=True)
    found["seconds"] = round(time.monotonic() - start, 1)
    console.print(
        f"{found['boots']} boots, {found['bytes_downloaded']} bytes downloaded,"
        f" {found['seconds']} s."
    )
    if as_json:
        print(json.dumps(found))
    if not _holds(found):
        print("twinslot: demo: the board did not end as it should", file=sys.stderr)
        raise typer.Exit(1)
