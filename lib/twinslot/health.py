"""Decide whether the running image stays: reconcile after a boot, prove a trial, give one up.

    verdict = reconcile(slot, journal, machine.reset_cause())    # the boot guard, every boot
    await Trial(slot, journal, checks, health, emit).prove()     # the agent, on a trial boot

After any reboot the facts decide (which slot runs, what otadata says of both, which builds they
hold), together with the trial record that was written before the slot was activated. The record
matters: the CRC of an otadata entry does not cover its state, so a torn write can boot a new
image with the bootloader's rollback not armed, and after a fall-back within one boot otadata
names a slot that does not run. Nothing is ever confirmed while the two differ.

Source: design section 5; ESP-IDF esp_ota_ops.c; rules C.4, C.5, C.6, C.14 of the platform notes.
"""

import asyncio
import time

from .errors import HealthError, OtaError

TRIES = 3  # failures of a build that may not be its own fault before it counts as bad
_PWRON = 1  # machine.PWRON_RESET: also brown-out
_DEEPSLEEP = 4


def failed_builds(journal):
    """Builds that this board does not install again unless told to."""
    return [f[0] for f in journal.get("failed", list) if f[3] >= TRIES]


def _fail(journal, trial, reason, tries):
    """Record that a build failed here, and the report that says so."""
    build, version = trial.get("build", ""), trial.get("version", "")
    kept = []
    for f in journal.get("failed", list):
        if f[0] == build:
            tries += f[3]
        else:
            kept.append(f)
    report = {
        "attempt": trial.get("attempt", "none"),
        "version": version,
        "build": build,
        "status": "rolledback",
        "error": HealthError(reason).report(),
    }
    journal.update(
        trial=None,
        failed=kept + [[build, version, reason, tries]],
        reports=journal.get("reports", list) + [report],
    )


def reconcile(slot, journal, reset_cause):
    """Find out what this boot is, and put the journal in order.

    Args:
        reset_cause: ``machine.reset_cause()`` of this boot; after a rollback that is what ended
            the trial.

    Returns:
        ``"trial"``: the running image is on trial; ``"armed"``: a finished slot is activated and
        waits for a reset; ``"rejected"``: the way back is prepared, reset now; ``"idle"``: none
        of these.
    """
    status = slot.status()
    trial = journal.get("trial")
    if trial and trial.get("build") == status["build"]:
        return _on_trial(slot, journal, trial, status, reset_cause)
    if trial:
        if status["inactive_build"] == trial.get("build") and status["inactive_state"] == "new":
            return "armed"
        _not_running(journal, trial, status, reset_cause)
    known = status["build"] and status["build"] == journal.get("confirmed", str)
    if status["boot"] != status["running"]:
        # The bootloader fell back within one boot. At the next reset it would try again.
        if known or status["state"] == "valid":
            slot.settle()
    elif status["state"] == "pending":
        if not known:
            return "trial"  # activated by somebody else: held to the same health checks
        slot.confirm()  # the old image, activated again by reject()
    return "idle"


def _on_trial(slot, journal, trial, status, reset_cause):
    if status["state"] == "valid" and trial.get("confirming"):
        _confirmed(journal, trial)  # the power failed between flash and journal
        return "idle"
    boots = trial.get("boots", 0) + (reset_cause != _DEEPSLEEP)
    if boots > 1:
        # A second boot of an image on trial: the bootloader's rollback was not armed.
        return _give_up(slot, journal, trial, "reset before it was confirmed")
    journal.update(trial=dict(trial, boots=boots))
    return "trial"


def _give_up(slot, journal, trial, reason):
    try:
        reject(slot, journal, reason)
    except OtaError as exc:
        # Nothing to go back to: what runs is better than nothing.
        _fail(journal, trial, "%s; %s" % (reason, exc), 0)
        return "idle"
    return "rejected"


def _not_running(journal, trial, status, reset_cause):
    if status["inactive_state"] == "" or status["inactive_build"] != trial.get("build"):
        # Power failed before otadata named it, or while the bootloader rewrote its entry.
        _fail(journal, trial, "the trial was lost before it began", 1)
    elif status["boot"] != status["running"]:
        _fail(journal, trial, "the bootloader refused the image", TRIES)
    elif reset_cause == _PWRON:
        _fail(journal, trial, "power failed during the trial", 1)
    else:
        _fail(journal, trial, "reset before it was confirmed (cause %d)" % reset_cause, TRIES)


def _confirmed(journal, trial):
    """Book a confirmed trial. The security floor rises here and nowhere else."""
    build = trial.get("build", "")
    version = trial.get("version", "")
    versions = {build: version}
    back = trial.get("back", "")
    if back in journal.get("versions"):
        versions[back] = journal.get("versions")[back]
    report = {
        "attempt": trial.get("attempt", "none"),
        "version": version,
        "build": build,
        "status": "confirmed",
        "error": None,
    }
    journal.update(
        trial=None,
        confirmed=build,
        versions=versions,
        floor=max(journal.get("floor", int), trial.get("security", 0)),
        failed=[f for f in journal.get("failed", list) if f[0] != build],
        reports=journal.get("reports", list) + [report],
    )


def confirm(slot, journal):
    """Keep the running image for good.

    Raises:
        PartitionError: otadata names a slot that does not run; nothing was changed.
    """
    trial = journal.get("trial")
    build = slot.status()["build"]
    if trial.get("build") == build:
        # First the intent: a torn otadata entry can read as valid without anybody's word.
        journal.update(trial=dict(trial, confirming=True))
    slot.confirm()
    if trial.get("build") == build:
        _confirmed(journal, trial)
    else:
        journal.update(confirmed=build)


def reject(slot, journal, reason, tries=TRIES):
    """Prepare the way back from the running image and remember that it failed; reset next.

    Raises:
        RollbackError: the other slot holds nothing that boots; nothing was changed.
    """
    status = slot.status()
    slot.reject()
    trial = journal.get("trial")
    if trial.get("build") != status["build"]:
        version = journal.get("versions").get(status["build"]) or status["version"]
        trial = {"build": status["build"], "version": version}
    _fail(journal, trial, reason, tries)


class Trial:
    """The proof of an image on trial.

    Args:
        checks: list of ``(name, function)``; sync or async, true when all is well. A false
            answer, an exception or ten seconds of silence is a failure; it is asked again every
            second until the deadline.
        stable: seconds the application must have run.
        deadline: seconds after which a check that still fails ends the trial.
        feed: called once a second with nothing, to keep the software watchdog quiet.
    """

    def __init__(self, slot, journal, checks, stable, deadline, feed):
        self._slot = slot
        self._journal = journal
        self._checks = checks
        self._stable = stable
        self._deadline = deadline
        self._feed = feed

    async def prove(self):
        """Run until the image is proven, then confirm it.

        Raises:
            HealthError: the trial failed; the way back is prepared, reset now.
            RollbackError: it failed and there is no way back; the running image stays.
        """
        start = time.ticks_ms()
        complaint = "not stable yet"
        while True:
            self._feed()
            seconds = time.ticks_diff(time.ticks_ms(), start) // 1000
            if seconds >= self._stable:
                complaint = await self._complaint()
                if complaint is None:
                    return confirm(self._slot, self._journal)
                if seconds >= self._deadline:
                    break
            await asyncio.sleep_ms(200)
        # An unreachable server need not be the image's fault: it may be offered again.
        tries = 1 if complaint.startswith("check 'source'") else TRIES
        reject(self._slot, self._journal, complaint, tries)
        raise HealthError(complaint)

    async def _complaint(self):
        """Name the first check that fails, None if all pass."""
        for name, function in self._checks:
            try:
                answer = function()
                if hasattr(answer, "send"):  # a coroutine
                    answer = await asyncio.wait_for(answer, 10)
            except asyncio.TimeoutError:
                return "check '%s' did not answer in 10 s" % name
            except Exception as exc:
                return "check '%s' raised %s: %s" % (name, type(exc).__name__, exc)
            if not answer:
                return "check '%s' failed" % name
        return None
