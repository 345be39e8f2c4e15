"""``twinslot publish --from fleet``: build deltas from what the boards of a fleet run.

The server is asked which builds its accepted boards report; a build is looked for among the
releases of the site, whose plain images a delta can be made from.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from . import images, payloads, publish
from .fleet_base import query
from .fleet_http import Api

FLEET = "fleet"  # the word after --from
_PAGE = 1000  # boards of one answer, the API's own bound


@dataclass(frozen=True)
class Running:
    """A build that boards run; ``taken`` says whether a delta is made from it."""

    version: str
    build: str
    boards: int
    taken: bool = False
    why: str = ""  # not

    def __str__(self) -> str:
        boards = "1 board" if self.boards == 1 else f"{self.boards} boards"
        return f"{self.version} (build {self.build[:12]}, {boards})"


def find(
    api: Api, site: Path, product: str, new: images.Firmware, others: int = 0
) -> list[Running]:
    """Say what boards run, most of them first, and from which of it a delta to ``new`` is made.

    ``others`` bases are named already; a release holds so many deltas and no more.

    Raises:
        ApiError: the server refused, or did not answer.
        ReleaseError: a file of the site is no release.
    """
    here = publish.plain_images(site, product, new.chip_id)
    room = payloads.DELTAS_MAX - others
    found = []
    for (said, build), boards in reported(api, product).most_common():
        if build == new.build:
            continue
        why = ""
        if build not in here:
            why = f"no image of it for this chip in {site / product}"
        elif room <= 0:
            why = f"a release holds {payloads.DELTAS_MAX} deltas at most"
        else:
            room -= 1
        found.append(Running(here.get(build, said), build, boards, not why, why))
    return found


def reported(api: Api, product: str) -> Counter[tuple[str, str]]:
    """How many accepted boards of a product run a version and build; none is '?'."""
    boards: Counter[tuple[str, str]] = Counter()
    after = ""
    while after is not None:
        wanted = query(product=product, enrolment="accepted", limit=_PAGE, after=after)
        page = api.call("GET", f"devices?{wanted}")
        boards.update(
            (row["current_version"] or "?", row["current_build"])
            for row in page["devices"]
            if row["current_build"]
        )
        after = page["next"]
    return boards
