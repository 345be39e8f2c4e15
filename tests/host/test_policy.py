"""No sequence of releases, offers and pushes makes a board run something older or unfit.

Thousands of random steps of the agent and of push, their own code, with guard, judge, slot,
health and journal, over the bootloader model: releases that are genuine but do not suit (older,
other product, hardware or chip, below the floor, expired, failed before), the build that runs by
another version or security number, replays, pushes with force, crashes on trial, power cuts at
random flash operations. A few lines of model say what may run. Each line of it is shown to fail
where the software has the slip that it is there for.
"""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import FunctionType

import pytest
from onboard import BASE, Cut, Device, installed
from trust import PRODUCT, jwk, kid, sign

from twinslot import base64url, release
from twinslot.errors import OtaError, PolicyError
from twinslot_tools.virtual_esp32 import bootloader
from twinslot_tools.virtual_esp32.firmware import make_firmware

NOW = release.parse_time("2026-12-01T00:00:00Z")
TAILS = ["", "", "", "-rc.1", "-rc.2"]
HARDWARE = "ESP32_GENERIC"
SEEDS = 30
STEPS = 60


@cache
def image(version: str, seed: int, chip: str = "esp32") -> bytes:
    return make_firmware(None, chip=chip, version=version, project="p", size=6_000, seed=seed)


FIRST = image("1.0.0", 9)


def order(version: str) -> tuple[int, ...]:
    """What sorts versions; ours have three numbers and perhaps an rc."""
    core, _, candidate = version.partition("-rc.")
    return (*map(int, core.split(".")), int(candidate or 1000))


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

    @property
    def blob(self) -> str:
        return f"blobs/{self.image[-8:].hex()}"

    def suits(self, dated: bool) -> bool:
        """Whether this board may take it, its version and number apart."""
        return self.odd is None or (self.odd in ("expired", "not_yet") and not dated)


def make(rng: random.Random, age: int = 8, than="0.0.0", again: Made | None = None) -> Made:
    """A random release; the older the world, the higher its security version may be.

    Args:
        than: the version that its own is near.
        again: release the image of this one anew.
    """
    major, minor, patch = order(than)[:3]
    version = f"{max(0, major + rng.randrange(-1, 2))}.{rng.randrange(minor + 2)}.{patch}"
    version += rng.choice(TAILS)
    security = rng.randrange(1 + age // 8)
    odds = ["product", "hardware", "chip", "signer", "tampered", "expired", "not_yet"]
    odd = rng.choice([None] * 9 + odds)
    downgrade = rng.random() < 0.15
    content = image(version, rng.randrange(3), "esp32s3" if odd == "chip" else "esp32")
    content = again.image if again else content
    chip_id = content[12] | content[13] << 8
    odd = "chip" if chip_id else None if odd == "chip" else odd
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
                "chip_id": chip_id,
                "size": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
                "build": content[-32:].hex(),
                "payloads": [
                    {
                        "url": f"blobs/{content[-8:].hex()}",
                        "encoding": "identity",
                        "size": len(content),
                    }
                ],
            }
        ],
    }
    signer = "stranger" if odd == "signer" else "release"
    token = sign(manifest, signer, typ=release.TYPE)
    if odd == "tampered":  # the release's key named, another's signature
        token = sign(manifest, "stranger", typ=release.TYPE, kid=kid("release"))
    return Made(token, version, security, downgrade, content, odd)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("board")
    (folder / "keys.json").write_text(json.dumps({"keys": [jwk("release")]}))
    (folder / "ota.json").write_text(
        json.dumps(
            {
                "product": PRODUCT,
                "hardware": HARDWARE,
                "url": BASE,
                "allow_http": True,
                "keys": str(folder / "keys.json"),
                "ntp": "",
                "stable": 0,
                "deadline": 0,
            }
        )
    )
    with installed():
        yield str(folder / "ota.json")


class Life:
    """A board, what is done to it, and what is known of it."""

    def __init__(self, config: str, rng: random.Random):
        self.device = Device(FIRST, config)
        self.rng = rng
        self.pool: list[Made] = []
        self.seen: Counter[str] = Counter()
        # The model: what may run.
        self.signed: dict[str, list[Made]] = {}  # what this board was offered and may take
        self.confirmed = FIRST[-32:].hex()
        self.version = "1.0.0"
        self.floor = 0
        self.tried: dict[str, list[Made]] = {}  # what was activated, or perhaps
        self.bad = ""  # build that failed its health check last

    # -- steps

    def step(self) -> None:
        if self.device.verdict == "trial" and self.rng.random() < 0.25:
            self.seen["crash"] += 1
            self.boot(self.rng.choice([bootloader.PWRON_RESET, bootloader.WDT_RESET]))
            return
        made, name = self.choose(), f"r/{self.rng.randrange(1000)}.jws"
        self.device.documents = {name: made.token, made.blob: made.image}
        self.device.healthy = self.rng.random() < 0.8
        if self.rng.random() < 0.15:
            self.device.cut_after(self.rng.randrange(1, 14))
        force = self.rng.random() < 0.2
        before = self.device.on.board.data
        was_on_trial = self.device.verdict == "trial"
        how = self.push if self.rng.random() < 0.3 else self.poll
        try:
            code = how(made, name, force)
        except Cut:
            code = "cut"
        self.device.cut_after(None)
        self.seen[code] += 1
        # What runs is not touched, and of a release that is refused nothing at all is written.
        part = self.device.on.board.part(self.device.on.running)
        after = self.device.on.board.data
        running = slice(part.offset, part.offset + part.size)
        assert after[running] == before[running], "the running slot was written to"
        if code in REFUSALS and not was_on_trial:
            assert after == before, "flash was written for a release that was refused"
        if code == "reset":
            assert made.build != self.bad or force, "a build that failed here, unasked"
        if code in ("reset", "cut"):
            self.tried.setdefault(made.build, []).append(made)
        self.check(made)
        if code in ("reset", "cut", "rolledback") or how == self.push or self.rng.random() < 0.2:
            self.boot(bootloader.PWRON_RESET if code == "cut" else bootloader.HARD_RESET)

    def choose(self) -> Made:
        if self.rng.random() < 0.6 or not self.pool:
            again = self.rng.choice(self.pool) if self.pool and self.rng.random() < 0.2 else None
            if self.tried and self.rng.random() < 0.2:
                again = self.rng.choice(list(self.tried.values()))[-1]  # what runs, or has run
            self.pool.append(make(self.rng, len(self.pool), self.version, again))
            return self.pool[-1]
        return self.rng.choice(self.pool)

    def poll(self, made: Made, name: str, force: bool) -> str:
        now = self.rng.choice([NOW, NOW, None])
        on_trial = self.device.verdict == "trial"
        install_s = 3600 if self.rng.random() < 0.1 else 0
        try:
            path = None if on_trial and self.rng.random() < 0.5 else name
            self.learn(made, now)
            reset = self.device.poll(path, force, now, install_s)
        except PolicyError as exc:
            return exc.code
        except OtaError as exc:
            return exc.code
        if reset and "rolledback" in [event[0] for event in self.device.events]:
            self.bad = self.device.on.slot().status()["build"]
            return "rolledback"
        return "reset" if reset else "idle"

    def push(self, made: Made, name: str, force: bool) -> str:
        self.learn(made, None)  # no clock is asked at the prompt
        return self.device.push(name, force)

    def boot(self, cause: int) -> None:
        self.device.boot(cause)
        self.check(None)

    # -- the model

    def learn(self, made: Made, now: int | None) -> None:
        dated = now is not None and self.device.agent._clock._is_plausible(now)
        if made.suits(dated):
            self.signed.setdefault(made.build, []).append(made)

    def check(self, made: Made | None) -> None:
        """Compare the board with the model.

        Args:
            made: the release that was just shown to it.
        """
        device = self.device
        for event, floor, version in device.events:
            if event == "confirmed":
                self.confirm(floor, version)
        device.events.clear()
        build = device.running
        if device.journal.get("confirmed", str) == build != self.confirmed:
            self.confirm(device.floor, device.version)  # proven before the power failed
        floor = device.floor
        if floor != self.floor:
            assert self.is_shown_again(made), "the floor without a proof"
            assert floor == max(self.floor, made.security), "the floor"
            self.floor = floor
        if build != self.confirmed:
            self.check_trial(self.signed.get(build, []))
        elif device.version != self.version:
            assert self.is_shown_again(made) and device.version == made.version, "its version"
            assert order(device.version) > order(self.version), "the version fell"
            self.version = device.version

    def is_shown_again(self, made: Made | None) -> bool:
        """True for a genuine release of what runs and is confirmed."""
        if made is None or not made.build == self.device.running == self.confirmed:
            return False
        return made.odd not in ("signer", "tampered", "product")

    def check_trial(self, offers: list[Made]) -> None:
        """Something runs that is not confirmed."""
        assert offers, "runs what nobody signed for it"
        offers = [it for it in offers if it.security >= self.floor]
        assert offers, "below the floor"
        now, offers = order(self.version), [(order(it.version), it.downgrade) for it in offers]
        assert any(new > now or (down and new != now) for new, down in offers), "older"

    def confirm(self, floor: int, version: str) -> None:
        """A trial was proven."""
        assert self.device.healthy, "confirmed though a check failed"
        build = self.device.running
        offers = [it for it in self.tried[build] if it.version == version]
        assert floor in [max(self.floor, it.security) for it in offers], "the floor at the proof"
        self.seen["raised"] += floor > self.floor
        self.seen["confirmed"] += 1
        self.confirmed, self.version, self.floor = build, version, floor
        if self.bad == build:
            self.bad = ""


REFUSALS = {"product", "hardware", "version", "security_version", "expired", "not_yet"}
REFUSALS |= {"known_bad", "signature", "busy"}
SEEN: Counter[str] = Counter()


def live(config: str, seed: int) -> Life:
    life = Life(config, random.Random(seed))
    for _ in range(STEPS):
        life.step()
    return life


@pytest.mark.parametrize("seed", range(SEEDS))
def test_F76_F82_F83_no_sequence_makes_a_board_run_older_or_unfit_software(config, seed):
    SEEN.update(live(config, seed).seen)


def test_no_sequence_is_idle_they_meet_every_refusal_and_really_install():
    """A property that holds because nothing happens proves nothing."""
    if sum(SEEN.values()) < SEEDS * STEPS:
        pytest.skip("needs the sequences above")
    assert set(SEEN) >= REFUSALS | {"same", "idle", "reset", "crash", "rolledback", "cut"}
    assert SEEN["confirmed"] > 2 * SEEDS and SEEN["raised"] > SEEDS // 2
    assert "internal" not in SEEN


EARLY = "        waiting=None,\n        floor=manifest.security_version,\n"
# Planted slips: the module, the check, what stands there instead. The model has to notice each.
SLIPS = {
    "older versions": ("release", "order < 0 and not release.downgrade", "False"),
    "another build of one version": ("release", "order == 0 and image.build", "False and image"),
    "below the floor": ("release", "release.security_version < board.floor", "False"),
    "another product": ("release", "release.product != board.product", "False"),
    "other hardware": ("release", "board.hardware not in release.hardware", "False"),
    "expired": ("release", "earliest >= release.expires", "False"),
    "not yet": ("release", "release.issued - now > _AHEAD_S", "False"),
    "failed before": ("release", "image.build in board.failed", "False"),
    "a wrong signature": ("jws", "not _pss_holds(", "None is _pss_holds("),
    "the floor rises too early": ("plan", "        waiting=None,\n", EARLY),
    "the floor never rises": ("health", 'trial.get("security", 0)),', "0),"),
    "the floor falls": ("plan", 'max(agent._journal.get("floor", int), ', "max(0, "),
    "the floor by another product": (
        "plan",
        'manifest.product == agent._settings["product"]',
        "1",
    ),
    "the version falls": ("plan", "manifest.version, agent.version()) > 0", "'2.0.0', '1.0.0')"),
    "the running slot written": ("slot", "self._running.get_next_update()", "self._running"),
    "confirmed unasked": ("trial", "if complaint is None:", "if True:"),
}


def functions(members, file: str) -> list[FunctionType]:
    """The functions and methods of a module, in order."""
    found = []
    for value in members.values():
        made = getattr(value, "__func__", value)
        if isinstance(made, FunctionType) and made.__code__.co_filename == file:
            found.append(made)
        elif isinstance(made, type):
            found += functions(vars(made), file)
    return found


@pytest.mark.parametrize("name", SLIPS)
def test_no_sequence_hides_a_slip(config, name, monkeypatch):
    where, check, instead = SLIPS[name]
    module = import_module("twinslot." + where)
    file = module.__file__
    source = Path(file).read_text()
    assert source.count(check) == 1
    slipped = dict(vars(module))
    exec(compile(source.replace(check, instead), file, "exec"), slipped)
    for before, after in zip(functions(vars(module), file), functions(slipped, file), strict=True):
        if before.__code__.co_code != after.__code__.co_code:
            monkeypatch.setattr(before, "__code__", after.__code__)
    with pytest.raises(AssertionError):
        for seed in range(SEEDS):
            live(config, seed)


def test_I10_F83_the_floor_rises_with_the_confirmation_and_not_before(config):
    rng = random.Random(1)
    device = Device(FIRST, config)
    offered = next(
        made
        for made in iter(lambda: make(rng, 40, "5.0.0"), None)
        if not made.odd and made.security
    )
    device.documents = {
        "r/1.jws": offered.token,
        offered.blob: offered.image,
    }
    assert device.poll("r/1.jws", now=NOW)
    assert device.floor == 0
    device.boot()
    assert device.verdict == "trial" and device.floor == 0
    assert not device.poll()
    assert device.floor == offered.security


def test_I15_F80_firmware_for_another_model_is_refused_whatever_else_fits():
    manifest = json.loads(base64url.b64url_decode(make(random.Random(3)).token.split(b".")[1]))
    manifest |= {"product": PRODUCT, "hardware": ["MODEL_7000i"], "version": "99.0.0"}
    board = release.Board(PRODUCT, "MODEL_6000i", 0, "1.0.0", "", 0, NOW, (), 1 << 20)
    with pytest.raises(PolicyError) as refused:
        release.judge(release.parse(json.dumps(manifest).encode()), board)
    assert refused.value.code == "hardware"
