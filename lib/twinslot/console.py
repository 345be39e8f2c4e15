"""What a person types at the prompt: ``twinslot.status()``, ``log()``, ``confirm()``,
``rollback()``."""

from . import health
from .errors import OtaError, PartitionError, RollbackError
from .journal import Journal
from .slot import FirmwareSlot


def status(path="/ota.json"):
    """Print and return slots, versions, states and the last failures.

    Args:
        path: the configuration; it may name the version of what was flashed by cable.

    Raises:
        PartitionError: the board has no second slot.
    """
    facts = FirmwareSlot().status()
    journal = Journal.shared()
    versions = journal.get("versions")
    trial = journal.get("trial")
    known = journal.version(facts["build"])
    facts["version"] = known or facts["version"] or _flashed(path)
    for which in ("running", "inactive"):
        prefix = "" if which == "running" else "inactive_"
        build = facts[prefix + "build"]
        version = versions.get(build) if prefix else facts["version"]
        print(
            "%-9s %s  version %s  build %s  %s"
            % (which, facts[which], version or "?", build[:12] or "none", facts[prefix + "state"])
        )
    if trial:
        print("on trial  version", trial.get("version"))
    for failure in journal.get("failed", list):
        print("failed    version %s: %s" % (failure[1], failure[2]))
    facts["versions"] = versions
    facts["trial"] = trial
    facts["failed"] = journal.get("failed", list)
    return facts


def _flashed(path):
    from . import config

    try:
        return config.load(path)["version"]
    except OtaError:
        return ""


def on_trial():
    """Return True while the running image is not confirmed: a reset would roll it back."""
    try:
        facts = FirmwareSlot().status()
    except PartitionError:
        return False
    trial = Journal.shared().get("trial")
    return facts["state"] == "pending" or (bool(trial) and trial.get("build") == facts["build"])


def log():
    """Print and return the newest attempts to update: ``[time or 0, version, status, reason]``."""
    entries = Journal.shared().log()
    for when, version, how, reason in entries:
        print("%10d  %-12s %-10s %s" % (when, version, how, reason))
    return entries


def confirm():
    """End the trial by hand: keep the running image.

    Raises:
        PartitionError: otadata names a slot that does not run.
    """
    health.confirm(FirmwareSlot(), Journal.shared())


def rollback():
    """Return to the other slot, now: the board resets.

    Raises:
        RollbackError: the other slot holds nothing that boots.
    """
    import machine

    slot, journal = FirmwareSlot(), Journal.shared()
    if slot.status()["build"] == slot.status()["inactive_build"]:
        raise RollbackError("both slots hold the same image")
    health.reject(slot, journal, "rolled back by hand")
    print("twinslot: reset into", slot.status()["inactive"])
    machine.reset()
