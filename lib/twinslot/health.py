"""Decide whether the running image stays: reconcile after a boot, confirm it, or give it up.

    verdict = reconcile(slot, journal, machine.reset_cause())    # the boot guard, every boot
    confirm(slot, journal)                                       # `twinslot.trial`, or somebody

After any reboot the facts decide (which slot runs, what otadata says of both, which builds they
hold), together with the trial record that was written before the slot was activated. The record
matters: the CRC of an otadata entry does not cover its state, so a torn write can boot a new
image with the bootloader's rollback not armed, and after a fall-back within one boot otadata
names a slot that does not run. Nothing is ever confirmed while the two differ.

Source: design section 5; ESP-IDF esp_ota_ops.c; rules C.4, C.5, C.6, C.14 of the platform notes.
"""

from . import errors

TRIES = 3  # failures of a build that may not be its own fault before it counts as bad
_WAKES = 10  # from sleep, or soft resets, within one trial; then it has failed
_PWRON = 1  # machine.PWRON_RESET: also brown-out
_DEEPSLEEP = 4
_SOFT = 5
_UNKNOWN = 0  # also a reset over USB or JTAG


def fits(key, value):
    """True if ``value`` is what is written under ``key``. Of what has nothing inside,
    ``Journal.get`` knows the type."""
    if key == "trial":
        if type(value) is not dict:
            return False
        numbers = [value.get(name, 0) for name in ("security", "hang", "boots", "wakes")]
        texts = [value.get(name, "") for name in ("build", "version", "attempt", "back")]
        return _row(numbers, int, int, int, int) and _texts(texts)
    if key == "versions":
        return type(value) is dict and _texts(value.values())
    if key == "failed":
        return type(value) is list and all(_row(item, str, str, str, int) for item in value)
    if key == "reports":
        return type(value) is list and all(_is_report(item) for item in value)
    if key == "waiting":
        return _row(value, str, str, int)
    if key == "spent":
        return _row(value, int, int)
    return key != "tried" or _row(value, int, int, int, int)


def _row(value, *kinds):
    """True for a list of just these types."""
    return type(value) is list and [type(item) for item in value] == list(kinds)


def _texts(values):
    return all(type(value) is str for value in values)


def _is_report(value):
    names = ("attempt", "version", "build", "status")
    return type(value) is dict and _texts([value.get(name) for name in names])


def _failed(journal):
    return [f[0] for f in journal.get("failed", list)]


def failed_builds(journal):
    """Builds that this board does not install again unless told to."""
    return [f[0] for f in journal.get("failed", list) if f[3] >= TRIES]


def _fail(journal, trial, reason, tries, status="rolledback", **changes):
    """Record that a build failed here, and the report that says so."""
    build, version = trial.get("build", ""), trial.get("version", "")
    error = errors.HealthError(reason).report()
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
        "status": status,
        "error": error,
    }
    journal.update(
        trial=None,
        failed=kept + [[build, version, error["message"], tries]],
        reports=journal.get("reports", list) + [report],
        **changes,
    )
    journal.add_to_log(version, status, error["message"])


def reconcile(slot, journal, reset_cause):
    """Find out what this boot is, and put otadata and the journal in order.

    Args:
        reset_cause: ``machine.reset_cause()`` of this boot; after a rollback that is what ended
            the trial.

    Returns:
        ``"trial"``: the running image is on trial; ``"armed"``: a finished slot is activated and
        waits for a reset; ``"rejected"``: the way back is prepared, reset now; ``"idle"``: none
        of these.
    """
    status = slot.status()
    build = status["build"]
    unsettled = status["boot"] != status["running"]
    if unsettled and status["inactive_state"] == "new" and reset_cause in (_DEEPSLEEP, _SOFT):
        return "armed"  # the bootloader has not looked at otadata since it was activated
    trial = journal.get("trial")
    if trial and trial.get("build") == build:
        return _on_trial(slot, journal, trial, reset_cause)
    if trial:
        _not_running(journal, trial, status, reset_cause)
    if unsettled:
        # What otadata names did not boot, and would be tried first at every reset.
        slot.settle()
    confirmed = journal.get("confirmed", str)
    if build and build == confirmed:
        if status["state"] == "pending":
            slot.confirm()  # the old image, activated again by reject()
        return "idle"
    if status["state"] == "pending":
        return "trial"  # activated by somebody else, and held to the same health checks
    if (confirmed and status["inactive_build"] == confirmed) or build in _failed(journal):
        # It never passed here, and nobody watches it: the power failed on the way back from it,
        # or otadata was lost and this slot is what boots without.
        return _on_trial(slot, journal, _subject(slot, journal), reset_cause)
    return "idle"


def _on_trial(slot, journal, trial, reset_cause):
    if trial.get("confirming"):
        slot.settle()  # proven; the power failed before all of it was written down
        _confirmed(journal, trial)
        return "idle"
    boots, wakes = trial.get("boots", 0), trial.get("wakes", 0)
    if reset_cause in (_DEEPSLEEP, _SOFT):
        wakes += 1
    else:
        boots += 1
    if boots > 1 or wakes > _WAKES:
        # A second boot of an image on trial: the bootloader's rollback was not armed. Of soft
        # resets and sleep the bootloader sees nothing.
        try:
            give_up(slot, journal, *_end_of_trial(reset_cause))
        except errors.RollbackError:
            return "idle"
        return "rejected"
    try:
        journal.update(trial=dict(trial, boots=boots, wakes=wakes))
    except errors.SpaceError as exc:
        print("twinslot: boot not counted:", exc)  # the watchdog and the checks matter more
    return "trial"


def _end_of_trial(reset_cause):
    """Reason and weight of a trial that a reset ended."""
    if reset_cause == _PWRON:
        return "power failed during the trial", 1
    weight = 1 if reset_cause in (_UNKNOWN, _DEEPSLEEP, _SOFT) else TRIES
    return "reset before it was confirmed (cause %d)" % reset_cause, weight


def _not_running(journal, trial, status, reset_cause):
    if trial.get("confirming"):
        _fail(journal, trial, "power failed while it was confirmed", 1)
    elif status["boot"] != status["running"]:
        _fail(journal, trial, "the bootloader refused the image", TRIES)
    elif trial.get("boots"):
        _fail(journal, trial, *_end_of_trial(reset_cause))
    elif status["inactive_state"] == "aborted":
        _fail(journal, trial, "the trial ended before the boot guard ran", 1)
    else:
        # In set_boot, or while the bootloader rewrote the entry: it has never run.
        _fail(journal, trial, "power failed before the trial began", 1, "failed")


def _confirmed(journal, trial):
    """Book a confirmed trial. The security floor of an image that was on trial rises
    here and nowhere else."""
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
    journal.add_to_log(version, "confirmed")


def confirm(slot, journal):
    """Keep the running image for good.

    Raises:
        PartitionError: otadata names a slot that does not run; nothing was changed.
        SpaceError: the journal can't be written.
    """
    trial = journal.get("trial")
    build = slot.status()["build"]
    if trial.get("build") == build and slot.is_settled():
        # First the intent: a torn otadata entry can read as valid without anybody's word.
        journal.update(trial=dict(trial, confirming=True))
    slot.confirm()
    if trial.get("build") == build:
        _confirmed(journal, trial)
    else:
        journal.update(confirmed=build)


def _subject(slot, journal):
    """The trial record of the running image, or one made up for it."""
    trial = journal.get("trial")
    status = slot.status()
    if trial.get("build") == status["build"]:
        return trial
    version = journal.get("versions").get(status["build"]) or status["version"]
    return {"build": status["build"], "version": version}


def reject(slot, journal, reason, tries=TRIES):
    """Prepare the way back from the running image and remember that it failed; reset next.

    Raises:
        RollbackError: the other slot holds nothing that boots; nothing was changed.
    """
    slot.reject()
    try:
        _fail(journal, _subject(slot, journal), reason, tries)
    except errors.SpaceError as exc:
        print("twinslot: failure not recorded:", exc)  # the way back matters more


def give_up(slot, journal, reason, tries):
    """Reject an image on trial. Where there is no way back it stays for good: it is better than
    nothing, and while it is on trial the board could not be updated.

    Raises:
        RollbackError: it stays.
    """
    try:
        reject(slot, journal, reason, tries)
    except errors.RollbackError as exc:
        trial = _subject(slot, journal)
        reason = "%s; %s" % (reason, exc.message)
        _fail(journal, trial, reason, tries, "failed", confirmed=trial["build"])
        slot.settle()
        raise
