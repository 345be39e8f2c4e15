"""What has happened on a board of `station.py` before the update, or the trial, that is tried."""

from __future__ import annotations

from network_cases import BLOB, CHECKPOINT
from servers import PRODUCT, signing_key
from station import PARTITIONS, Station

from twinslot_tools import keyrings, keys, log_cli
from twinslot_tools.signing import signer_of
from twinslot_tools.virtual_esp32 import bootloader, show
from twinslot_tools.virtual_esp32.chip import otadata

ROOT, BEFORE = 1, 2  # keys, beside the one that signs releases now
FORGET = """
import json, os
for name in ("keyring.jws", "keyring.jws.new"):
    try:
        os.remove("/" + name)
    except OSError:
        pass
with open("/rooted.json", "w") as f:
    json.dump(%r, f)
"""
RECORD = """
from twinslot.journal import Journal
own = agent._running["build"]
trial = {"build": own, "version": "1.2.3", "attempt": "a", "security": 4, "back": %r, "hang": 60}
Journal.shared().update(confirmed=%r, versions={%r: "2.0.1"}, trial=trial)
result = own
"""


def plain(station: Station) -> None:
    """Nothing."""
    station.proxy.plan({})
    station.fresh(station.settings("http"))


def resumed(station: Station) -> None:
    """A download was cut behind its checkpoint, and the board started anew."""
    cut = {"on": BLOB, "at": CHECKPOINT + 2000, "do": "reset"}
    station.proxy.plan({"connections": [{"edits": [cut]}]})
    settings = station.settings("http")
    station.fresh(settings)
    assert station.update()["code"] in ("network", "timeout")
    station.reboot(settings)


def mirrored(station: Station) -> None:
    """The server takes no connection; a mirror has the tree."""
    station.proxy.plan({"connections": [{"accept": "reset"}]})
    copy = f"http://127.0.0.1:{station.proxy.ports['http']}/"
    station.fresh(station.settings("http", mirrors=[copy]))


def renewed(station: Station) -> None:
    """The release is signed by a key that only a keyring brings, which is fetched first."""
    channel = station.site / PRODUCT / "renewed.json"
    if not channel.exists():
        offer = channel.with_name("stable.json")
        before = offer.read_bytes()
        key = keys.public_jwk(signing_key())
        keyrings.update(station.site, PRODUCT, signer_of(signing_key(ROOT)), add=[key])
        channel.write_bytes(offer.read_bytes())
        offer.write_bytes(before)
    held = {
        "root": [keys.public_jwk(signing_key(ROOT))],
        "keys": [keys.public_jwk(signing_key(BEFORE))],
    }
    station.ask("evaluate", code=FORGET % (held,))
    station.proxy.plan({})
    station.fresh(station.settings("http", keys="/rooted.json", channel="renewed"))


class OnTrial:
    """A board whose running image is on trial, with the new one as its way back."""

    def __init__(self, station: Station, well: bool):
        self.station = station
        self.well = well
        # A channel without a release: what is proven stays. On a machine that is busy the source
        # may be late to say that it is there: then it is asked again.
        wait = 60 if well else 0
        self.settings = station.settings("http", channel="none", stable=0, deadline=wait)

    def begin(self) -> None:
        station = self.station
        station.proxy.plan({})
        station.fresh(self.settings)
        entries = [otadata.entry(2, otadata.VALID), otadata.entry(3, otadata.PENDING_VERIFY)]
        with station.flash.open("r+b", buffering=0) as f:
            for i, entry in enumerate(entries):
                f.seek(PARTITIONS["otadata"].offset + i * otadata.SECTOR)
                f.write(otadata.pack(entry))
            f.seek(PARTITIONS["ota_1"].offset)
            f.write(station.image)
        back = station.image[-32:].hex()
        self.build = station.ask("evaluate", code=RECORD % (back, back, back))

    def end_it(self, hog: int = 0) -> str:
        """Start anew until the trial is over, the first time with ``hog`` bytes of the heap
        taken away. How it ended."""
        codes: list[str] = []
        while not (codes and self.end()) and len(codes) < 5:
            codes.append(self._boot(0 if codes else hog))
            assert codes[-1] != "LEAKED", codes
            self.station.check()
        ended, self.starts = self.end(), len(codes)
        assert ended, codes
        assert self.well or ended == "back", "confirmed, and not well"
        floor = log_cli.read(self.station.flash.read_bytes()).journal.get("floor", 0)
        assert floor == (4 if ended == "confirmed" else 0)
        return ended

    def _boot(self, hog: int) -> str:
        if not self.station.ask("boot", settings=self.settings, well=self.well, hog=hog):
            return "no agent"
        return self.station.update()["code"]

    def end(self) -> str:
        """ "confirmed", "back", or "" while neither is so."""
        flash = self.station.flash.read_bytes()
        journal = log_cli.read(flash).journal
        boots = bootloader.predict(flash, "esp32").partition
        assert boots, "nothing boots"
        if "trial" in journal:
            return ""
        if boots.label == "ota_1":
            return "back" if self.build != journal.get("confirmed") else ""
        states = {slot["label"]: slot["state"] for slot in show.describe(flash)["slots"]}
        confirmed = journal.get("confirmed") == self.build and states["ota_0"] == "VALID"
        return "confirmed" if confirmed else ""
