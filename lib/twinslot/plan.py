"""What a poll comes to: nothing, or a release that is verified and to be installed; and, once its
image is there, the reset into it.

    url, seconds = await offer(agent, force)
    wanted = await judge(agent, manifest, report, name, force)
    await activate(agent, manifest, attempt)

Part of the agent, whose members it uses; of its own so that it can be let go while the image
comes, which is when an update needs most memory.
"""

import asyncio
import binascii
import gc
import hashlib
import sys

from . import errors, tidy, unload
from .agent import DAY_S, foreseen, mark
from .errors import OtaError

_POSTPONE_MAX_S = DAY_S  # an application that is never ready gets its update all the same
_POLL_MIN_S = 30  # for offers, which are not signed
# Bytes of GC heap: what verifies a release, then the modules of the download, a block, the JWS,
# headers, and room to run, beside the room that waits for the TLS context. What `make bench` and
# `make bench32` measure on ports of 64 and 32 bits.
_HEAP_NEED = (19 if sys.maxsize > 1 << 32 else 16) * 1024
_TLS_NEED = 24 * 1024  # bytes of IDF heap: mbedTLS' 16 + 4 KB buffers and its handshake


async def offer(agent, force):
    """Ask the source, and do what may be done only now that it answers.

    Args:
        agent: an ``Agent``.
        force: look again at a release that failed here before.

    Returns:
        None where nothing is to be installed, else a tuple:
        url: where the release is.
        seconds: it may be activated only then; 0: at once.

    Raises:
        OtaError: there is no memory for an update, or no answer.
    """
    agent._emit("checking")
    try:
        _preflight()
    except errors.BusyError as exc:
        agent._log_once(exc)
        raise
    await agent._clock.ensure()
    tidy()
    found = await _poll(agent)
    await _deliver(agent)
    _remember_time(agent)
    if agent._path:
        agent._let_go()
        from . import lastgood

        lastgood.keep(agent._path)
        agent._path = None
        del lastgood
        unload()
    await _renew_keys(agent, found.keyring)
    if found.poll:
        agent._poll_s = max(found.poll, min(agent._settings["poll"], _POLL_MIN_S))
    url = found.release
    name = agent._name(url)
    if url is None or (_is_left(agent, name) and not force) or not _is_chosen(agent, found):
        agent._emit("idle", version=agent.version())
        return None
    seconds = found.install
    if seconds and agent._waiting()[2] == binascii.crc32(name.encode()):
        agent._emit("waiting", seconds=seconds)
        return None
    return url, seconds


async def judge(agent, manifest, report, name, force):
    """Say whether a verified release is to be installed now.

    Args:
        manifest: a ``release.Release``.
        report: dict of what the source will be told of this attempt; filled in.
        name: what the release is called at the server and its mirrors.
        force: look again at a release that failed here before.

    Returns:
        False where it runs already, or rests.

    Raises:
        OtaError: what speaks against it.
    """
    report["version"] = manifest.version
    report["build"] = build = manifest.firmware.build
    if build == agent._running["build"] and manifest.product == agent._settings["product"]:
        _is_running(agent, manifest, name)
        return False
    _check(agent, manifest, force)
    await asyncio.sleep_ms(0)
    signed = manifest.version + build
    from . import tries

    if agent._journal.fetching() == mark(signed):
        tries.count(agent, signed)  # that one was ended by a reset
        agent._journal.set_fetching(0)
    if tries.rests(agent, signed) and not force:
        agent._emit("idle", version=agent.version())
        return False
    del tries
    unload()
    waiting = agent._waiting()
    if waiting[0] == build:
        report["attempt"] = waiting[1]  # it goes on
    else:
        await _permit(agent, "download", manifest)
        agent._spend(0)
    return True


async def activate(agent, manifest, attempt):
    """Write down what is about to be tried, then make it boot, with the application's leave.
    Never returns.

    Args:
        attempt: text, the attempt's identity.

    Raises:
        RefusedError: the application does not want it.
        OtaError: of the slot, or of the journal.
    """
    await _permit(agent, "activate", manifest)
    await agent._client.close()
    build = manifest.firmware.build
    own = agent._running["build"]
    journal = agent._journal
    journal.update(
        confirmed=own,
        versions={own: agent.version()},
        issued=max(journal.get("issued", int), manifest.issued),
        waiting=None,
        trial={
            "build": build,
            "version": manifest.version,
            "attempt": attempt,
            "security": manifest.security_version,
            "back": own,
            "hang": agent._settings["hang"],
        },
    )
    try:
        agent._slot.activate()
    except OtaError:
        journal.update(trial=None)
        raise
    print("twinslot: reset into", agent._running["inactive"])
    agent._machine.reset()


def _preflight():
    """Raise BusyError unless both heaps can carry an update."""
    tidy()
    if gc.mem_free() < _HEAP_NEED:
        raise errors.BusyError("heap", "%d bytes free" % gc.mem_free(), "%d or more" % _HEAP_NEED)
    import esp32

    largest = max(h[2] for h in esp32.idf_heap_info(esp32.HEAP_DATA))
    if largest < _TLS_NEED:
        raise errors.BusyError(
            "IDF heap", "largest block %d" % largest, "%d for a TLS connection" % _TLS_NEED
        )


async def _poll(agent):
    """Ask the source; where only dates have stood in the way for long, ask the tree."""
    agent._client = agent._trust.client
    at_home = agent._base == agent._settings["url"]
    try:
        source = agent._ask_source() if at_home else _tree(agent)
        offer = await source.poll(agent._client, agent.facts())
        agent._trust.verified()
    except errors.TlsError as exc:
        agent._client = agent._trust.regardless(exc, at_home)
        agent._clock.doubt()
        agent._emit("failed", **exc.report())
        offer = await _tree(agent).poll(agent._client, agent.facts())
    return offer


def _tree(agent):
    """The signed files of the server, or of a mirror, as a source."""
    from .sources.static import Static

    return Static(dict(agent._settings, url=agent._base))


async def _deliver(agent):
    """Hand over the reports that had to wait for a connection or a reboot."""
    for report in agent._journal.get("reports", list):
        try:
            await agent._send(report)
        except errors.HttpError as exc:
            print("twinslot: report refused:", exc)
            # 4xx: the server will never take it (429 and 408: not now).
            if not 400 <= exc.status < 500 or exc.status in (408, 429):
                return
        except Exception as exc:
            print("twinslot: report not delivered:", foreseen(exc))
            return  # an update that could mend this must not wait for it
        left = [r for r in agent._journal.get("reports", list) if r != report]
        agent._journal.update(reports=left)


def _remember_time(agent):
    """Keep a lower bound of the time for a boot without NTP; once a day, flash wears."""
    lasting = agent._clock.lasting()
    if lasting and lasting - agent._journal.get("time", int) > DAY_S:
        agent._journal.update(time=lasting)


async def _renew_keys(agent, version):
    """Take a newer keyring. That it fails is no reason to leave a release alone."""
    try:
        taken = await agent._trust.renew(agent._client, version, agent._base)
    except Exception as exc:
        agent._emit("failed", **foreseen(exc).report())
        return
    if taken:
        agent._done = None  # what an unknown key has signed may hold now
        agent._clock.floor = agent._floor()
        agent._tried = []
        agent._emit("keyring", version=taken)


def _is_left(agent, name):
    from . import tries

    return tries.is_done(agent, name) or tries.rests(agent, name)


def _is_chosen(agent, offer):
    from . import release

    return release.in_rollout(offer.percent, offer.seed, agent.device_id, hashlib.sha256)


async def _permit(agent, step, manifest):
    """Ask the application; return when it agrees or its time to postpone is over."""
    left = _POSTPONE_MAX_S
    while agent._ask is not None:
        try:
            answer = agent._ask(step, manifest)
            if hasattr(answer, "send"):
                answer = await asyncio.wait_for(answer, 60)
        except Exception as exc:  # also asyncio.TimeoutError: the same as "not now"
            print("twinslot: on_install:", type(exc).__name__, exc)
            answer = 60
        if answer is False:
            raise errors.RefusedError("the application refuses release " + manifest.version)
        if answer is True or left <= 0:
            return
        seconds = answer if type(answer) in (int, float) and answer > 0 else 60
        seconds = min(seconds, left)
        left -= seconds
        agent._emit("postponed", step=step, seconds=seconds)
        await asyncio.sleep(seconds)


def _is_running(agent, manifest, name):
    """The offered image already runs, confirmed. It may go by a newer version (never by an
    older one, which would let an old release in), or its security version was not known:
    it came over the cable, or by a way on which the trial record was lost. On trial, where
    this start failed to prove it, the image may still go back: nothing rises for it."""
    build = agent._running["build"]
    if (
        agent._slot.status()["state"] == "pending"
        or agent._journal.get("trial").get("build") == build
    ):
        agent._emit("idle", version=agent.version())
        return
    from . import semver, tries

    tries.look_past(agent, name)
    versions = dict(agent._journal.get("versions"))
    if semver.compare(manifest.version, agent.version()) > 0:
        versions[build] = manifest.version
    floor = max(agent._journal.get("floor", int), manifest.security_version)
    agent._journal.update(versions=versions, floor=floor)
    agent._emit("idle", version=agent.version())


def _check(agent, manifest, force):
    """Raise what speaks against a release."""
    from . import health

    failed = () if force else health.failed_builds(agent._journal)
    del health
    unload()  # one after the other, as in ``trust``
    from . import release

    s = agent._settings
    board = release.Board(
        s["product"],
        s["hardware"],
        agent._slot.chip_id,
        agent.version(),
        agent._running["build"],
        agent._journal.get("floor", int),
        agent._clock.now() if agent._clock.trusted else None,
        failed,
        agent._slot.size,
    )
    release.judge(manifest, board, agent._clock.earliest)
