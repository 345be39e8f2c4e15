"""No sequence of releases, offers and pushes makes a board run something older or unfit.

Thousands of random steps against the device's own judge, slot, health and journal, over the
bootloader model: releases that are genuine but do not suit (older, other product, hardware or
chip, below the floor, expired, failed before), replays, pushes with force, crashes on trial,
power cuts at random flash operations. A few lines of model say what may run.
"""

import hashlib
import json
import random
from dataclasses import dataclass
from functools import cache

import pytest
from onhost import OnHost, run
from trust import PRODUCT, jwk, sign

from twinslot import health, jws, keyset, release, semver
from twinslot.errors import OtaError, PolicyError
from twinslot_tools.virtual_esp32 import bootloader
from twinslot_tools.virtual_esp32.chip.flash import Fault, PowerCut
from twinslot_tools.virtual_esp32.firmware import make_firmware

KEYS = keyset.load({"keys": [jwk("release")]})
NOW = release.parse_time("2026-12-01T00:00:00Z")
TAILS = ["", "", "", "-rc.1", "-rc.2"]
HARDWARE = "ESP32_GENERIC"
SEEDS = 100


@cache
def image(version: str, seed: int, chip: str = "esp32") -> bytes:
    return make_firmware(None, chip=chip, version=version, project="p", size=6_000, seed=seed)


@dataclass(frozen=True)
class Made:
    """A release that somebody has signed."""

    token: bytes
    version: str
    security: int
    downgrade: bool
    image: bytes
    odd: str | None  # what is wrong with it for this board

    @property
    def build(self) -> str:
        return self.image[-32:].hex()


def make(rng: random.Random, age: int = 8) -> Made:
    """A random release; the older the world, the higher its versions may be."""
    version = f"{rng.randrange(1 + age // 8)}.{rng.randrange(12)}.{rng.randrange(2)}"
    version += rng.choice(TAILS)
    security = rng.randrange(1 + age // 12)
    odd = rng.choice([None] * 8 + ["product", "hardware", "chip", "signer", "expired", "not_yet"])
    downgrade = rng.random() < 0.15
    content = image(version, rng.randrange(3), "esp32s3" if odd == "chip" else "esp32")
    manifest = {
        "schema": 1,
        "product": "other" if odd == "product" else PRODUCT,
        "version": version,
        "hardware": ["OTHER"] if odd == "hardware" else [HARDWARE, "OTHER"],
        "security_version": security,
        "downgrade": downgrade,
        "issued": "2027-01-01T00:00:00Z" if odd == "not_yet" else "2026-11-20T09:00:00Z",
        "expires": "2026-11-30T00:00:00Z" if odd == "expired" else "2027-11-20T09:00:00Z",
        "images": [
            {
                "slot": "firmware",
                "chip_id": 9 if odd == "chip" else 0,
                "size": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
                "build": content[-32:].hex(),
                "payloads": [{"url": "x", "encoding": "identity", "size": len(content)}],
            }
        ],
    }
    token = sign(manifest, "stranger" if odd == "signer" else "release", typ=release.TYPE)
    return Made(token, version, security, downgrade, content, odd)


class Device:
    """What the agent does with an offer, step for step, and what a boot does."""

    def __init__(self):
        self.board = OnHost(image("1.0.0", 9))
        self.verdict = "idle"

    def version(self, journal, status):
        return journal.get("versions").get(status["build"]) or status["version"] or "0.0.0"

    def update(self, offered: Made, force: bool, now: int | None) -> None:
        """One poll; raises OtaError where the agent would."""
        journal, slot = self.board.journal(), self.board.slot()
        status = slot.status()
        manifest = release.parse(jws.verify(offered.token, KEYS, release.TYPE))
        if manifest.firmware.build == status["build"]:
            return
        board = release.Board(
            PRODUCT,
            HARDWARE,
            slot.chip_id,
            self.version(journal, status),
            status["build"],
            journal.get("floor", int),
            now,
            () if force else health.failed_builds(journal),
            slot.size,
        )
        release.judge(manifest, board)
        run(self.install(slot, manifest, offered.image))
        own = status["build"]
        journal.update(
            confirmed=own,
            versions={own: self.version(journal, status)},
            trial={
                "build": offered.build,
                "version": manifest.version,
                "security": manifest.security_version,
                "back": own,
            },
        )
        slot.activate()

    @staticmethod
    async def install(slot, manifest, content):
        offset = await slot.begin(manifest.firmware)
        for at in range(offset, len(content), 4096):
            slot.write(content[at : at + 4096])
        await slot.finish()

    def boot(self, cause=bootloader.HARD_RESET):
        for _ in range(5):
            self.board.boot(cause)
            self.verdict = health.reconcile(self.board.slot(), self.board.journal(), cause)
            if self.verdict not in ("rejected", "armed"):
                return
            cause = bootloader.HARD_RESET
        raise AssertionError("it resets for ever")

    @property
    def running(self) -> str:
        return self.board.slot().status()["build"]


class Model:
    """What is known to be confirmed, and what may run beside it."""

    def __init__(self, device: Device):
        self.signed = {image("1.0.0", 9)[-32:].hex(): [(0, "1.0.0", False)]}
        self.confirmed = device.running
        self.version = "1.0.0"
        self.floor = 0
        self.installed = 0

    def offer(self, made: Made, now: int | None) -> None:
        # Without a clock that can be trusted, expiry is not judged.
        if made.odd is None or (made.odd in ("expired", "not_yet") and now is None):
            known = self.signed.setdefault(made.build, [])
            known.append((made.security, made.version, made.downgrade))

    def check(self, device: Device) -> None:
        build = device.running
        journal = device.board.journal()
        assert build in self.signed, "runs what nobody signed for it"
        assert journal.get("floor", int) >= self.floor, "the floor fell"
        claims = self.signed[build]
        if build != self.confirmed:
            assert any(security >= self.floor for security, _, _ in claims)
            assert any(
                downgrade or semver.compare(version, self.version) >= 0
                for _, version, downgrade in claims
            ), "older than what was confirmed"
        self.floor = journal.get("floor", int)

    def confirmed_now(self, device: Device) -> None:
        before = self.version
        self.confirmed = device.running
        status = device.board.slot().status()
        self.version = device.version(device.board.journal(), status)
        self.installed += self.version != before


def live(device: Device, model: Model, rng: random.Random, pool: list[Made]) -> set[str]:
    """One step of a board's life; returns what happened, for the statistics."""
    happened = set()
    if device.verdict == "trial":
        fate = rng.choice(["confirm", "confirm", "reject", "crash", "power"])
        slot, journal = device.board.slot(), device.board.journal()
        if fate == "confirm":
            health.confirm(slot, journal)
            model.confirmed_now(device)
            device.verdict = "idle"
        elif fate == "reject":
            health.give_up(slot, journal, "a check failed", health.TRIES)
            device.boot()
        else:
            power = fate == "power"
            device.boot(bootloader.PWRON_RESET if power else bootloader.WDT_RESET)
        happened.add(fate)
        model.check(device)
        return happened
    if rng.random() < 0.6 or not pool:
        pool.append(make(rng, len(pool)))
    offered, now = rng.choice(pool), rng.choice([NOW, NOW, None])
    model.offer(offered, now)
    if rng.random() < 0.15:
        ahead = rng.randrange(1, 14)
        device.board.board.fault = Fault(device.board.board.stats.ops + ahead, "torn", None, 7)
    cause = bootloader.HARD_RESET
    try:
        device.update(offered, rng.random() < 0.2, now)
        happened.add("activated")
    except PolicyError as exc:
        happened.add(exc.code)
    except OtaError as exc:
        happened.add(exc.code)
    except PowerCut:
        happened.add("cut")
        cause = bootloader.PWRON_RESET
    finally:
        device.board.board.fault = None
    model.check(device)
    if "activated" in happened or "cut" in happened or rng.random() < 0.2:
        device.boot(cause)
        model.check(device)
    return happened


@pytest.mark.parametrize("seed", range(SEEDS))
def test_F76_F82_F83_no_sequence_makes_a_board_run_older_or_unfit_software(seed):
    rng = random.Random(seed)
    device, pool, seen = Device(), [], set()
    model = Model(device)
    for _ in range(100):
        seen |= live(device, model, rng, pool)
    SEEN.update(seen)
    INSTALLED.append(model.installed)


SEEN: set[str] = set()
INSTALLED: list[int] = []


def test_the_sequences_meet_every_refusal_and_really_install():
    """A property that holds because nothing happens proves nothing."""
    if len(INSTALLED) < SEEDS:
        pytest.skip("needs the sequences above")
    assert {"product", "hardware", "version", "security_version", "known_bad", "not_yet"} <= SEEN
    assert {"signature", "activated", "confirm", "reject", "crash", "power", "cut"} <= SEEN
    assert sum(INSTALLED) > 200


def test_I10_F83_the_floor_rises_with_the_confirmation_and_not_before():
    rng = random.Random(1)
    device = Device()
    offered = next(
        made
        for made in iter(lambda: make(rng, 40), None)
        if not made.odd and made.security and made.version > "2"
    )
    device.update(offered, False, NOW)
    assert device.board.journal().get("floor", int) == 0
    device.boot()
    assert device.verdict == "trial" and device.board.journal().get("floor", int) == 0
    health.confirm(device.board.slot(), device.board.journal())
    assert device.board.journal().get("floor", int) == offered.security


def test_I15_F80_firmware_for_another_model_is_refused_whatever_else_fits():
    manifest = json.loads(jws.b64url_decode(make(random.Random(3)).token.split(b".")[1]))
    manifest |= {"product": PRODUCT, "hardware": ["MODEL_7000i"], "version": "99.0.0"}
    board = release.Board(PRODUCT, "MODEL_6000i", 0, "1.0.0", "", 0, NOW, (), 1 << 20)
    with pytest.raises(PolicyError) as refused:
        release.judge(release.parse(json.dumps(manifest).encode()), board)
    assert refused.value.code == "hardware"
