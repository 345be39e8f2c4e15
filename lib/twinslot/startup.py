"""What an agent does once after a start: the way into its loop, and the proof of a trial.

Part of the agent, whose members it uses; of its own so that it can be let go.
"""

import asyncio
import hashlib

from . import errors, guard, tidy
from .agent import persist
from .errors import OtaError
from .journal import Journal
from .slot import FirmwareSlot

_BOOT_SPREAD_S = 300  # boards that get power together poll within this, not at once


async def begin(agent):
    """Start what keeps the network, wait until this board's turn, and tell what has been."""
    if agent._settings["wifi"]:
        agent._network = asyncio.create_task(persist(agent._keep_network))
    # After a trial or a rollback the news is told at once; after a reset because the next one
    # may come soon. Boards that merely got power back spread their first poll.
    calm = agent._verdict == "idle" and not agent._journal.starts()
    if calm and not agent._journal.get("reports", list):
        await asyncio.sleep_ms(first_delay_ms(agent))
    for report in agent._journal.get("reports", list):
        if report["status"] == "rolledback":
            agent._emit("rolledback", version=report["version"], **report["error"])


def first_delay_ms(agent):
    """A constant place of this board within the interval spreads the fleet for good."""
    digest = hashlib.sha256(agent.device_id.encode()).digest()
    spread_ms = min(agent._poll_s, _BOOT_SPREAD_S) * 1000
    return int.from_bytes(digest[:3], "big") % (spread_ms + 1)


async def prove(agent):
    """Confirm the image on trial, or reset into the way back."""
    from .trial import Trial

    s = agent._settings
    hang = s["hang"]
    guard.feed(hang)
    agent._emit("trial", version=agent.version())
    proof = Trial(
        agent._slot,
        agent._journal,
        agent._checks,
        s["stable"],
        s["deadline"],
        lambda: guard.feed(hang),
    )
    try:
        await proof.prove()
    except errors.HealthError as exc:
        agent._emit("rolledback", version=agent.version(), **exc.report())
        agent._machine.reset()
    except OtaError as exc:
        agent._emit("failed", **exc.report())
    else:
        agent._emit("confirmed", version=agent.version())
    guard.stop()
    agent._verdict = "idle"


async def reachable(agent):
    """The default health check: the source answers, with whatever HTTP status."""
    tidy()  # as before a poll
    try:
        await agent._clock.ensure()
        tidy()
        await agent._ask_source().poll(agent._client, agent.facts())
    except errors.HttpError as exc:
        if not exc.status:
            raise
    except errors.TlsError as exc:
        if not exc.dates:  # a calendar is no fault of the image
            raise
    return True


def give_up(reason):
    """End a trial that can't be proven: reset into the way back. Returns only without one."""
    import machine

    from . import health

    try:
        health.give_up(FirmwareSlot(), Journal.shared(), reason, health.TRIES)
        machine.reset()
    except OtaError as exc:
        print("twinslot:", exc)
