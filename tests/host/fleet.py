"""A fleet server in this process, over a real database, and boards that talk to it."""

import asyncio
import contextlib
import itertools
import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import servers

from twinslot import keyset
from twinslot_server import releases, tokens
from twinslot_server.app import create_app
from twinslot_server.auth import People
from twinslot_server.desk import Desk
from twinslot_server.http import Parts
from twinslot_server.limits import Limits
from twinslot_server.settings import Settings
from twinslot_server.site import Site
from twinslot_server.store import Store
from twinslot_tools import keys

FLEET, ADMIN = "fleet-token-0123456789", "admin-token-0123456789"

# What shows something to whom has logged in, where a board b1, a rollout and an update are.
PAGES = [
    f"/-/{name}"
    for name in (
        "",
        "devices",
        "devices/b1",
        "releases",
        "rollouts",
        "rollouts/1",
        "updates",
        "updates/1",
        "rules",
        "people",
        "logs",
    )
]


class Client:
    """httpx over ASGI, without the async."""

    def __init__(self, app: Any):
        self.runner = asyncio.Runner()
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        self._client = httpx.AsyncClient(transport=transport, base_url="http://fleet")
        self.cookies = self._client.cookies

    def request(self, method: str, url: str, **options: Any) -> httpx.Response:
        return self.runner.run(self._client.request(method, url, **options))

    def get(self, url: str, **options: Any) -> httpx.Response:
        return self.request("GET", url, **options)

    def post(self, url: str, **options: Any) -> httpx.Response:
        return self.request("POST", url, **options)

    def together(self, *requests: tuple[str, str, dict[str, Any]]) -> list[httpx.Response]:
        """Ask all at once; each is method, URL and options."""

        async def ask() -> list[httpx.Response]:
            return await asyncio.gather(
                *(self._client.request(m, url, **options) for m, url, options in requests)
            )

        return self.runner.run(ask())

    def close(self) -> None:
        self.runner.run(self._client.aclose())
        self.runner.close()


class Fleet:
    """The application without its process; ``api`` speaks as an admin."""

    def __init__(self, folder: Path, url: str | None = None, **settings: Any):
        self.site_folder = folder / "site"
        self.site_folder.mkdir(parents=True, exist_ok=True)
        self.data = folder / "data"
        self.data.mkdir(exist_ok=True)
        self.settings = Settings.model_validate(settings)
        self.limits = Limits()
        self.store = Store(url or f"sqlite:///{folder / 'data' / 'server.sqlite3'}", 5)
        trusted = keyset.load(json.loads(keys.public_set(servers.signing_key())))
        self.site = Site(self.site_folder, trusted)
        device, operator = tokens.checked(FLEET, "test"), tokens.checked(ADMIN, "test")
        self.desk = Desk(self.site, self.store, self.limits, self.settings)
        self.parts = Parts(
            self.site,
            self.store,
            device,
            operator,
            self.limits,
            self.settings,
            self.desk,
            People(self.store, operator),
        )
        self.app = create_app(self.parts)
        self.client = Client(self.app)

    def close(self) -> None:
        self.client.close()
        self.store.close()

    def api(
        self, method: str, path: str, body: Any = None, token: str = ADMIN, **options: Any
    ) -> Any:
        """Call the API; return its JSON, with the status in ``.status`` for refusals."""
        if body is not None:
            options["json"] = body
        response = self.client.request(
            method, f"/api/v1/{path}", headers={"Authorization": f"Bearer {token}"}, **options
        )
        assert response.status_code < 500, response.text
        return response.json()

    def status(self, method: str, path: str, body: Any = None, token: str = ADMIN) -> int:
        options = {} if body is None else {"json": body}
        headers = {"Authorization": f"Bearer {token}"}
        response = self.client.request(method, f"/api/v1/{path}", headers=headers, **options)
        return response.status_code

    def publish(self, version: str, **spec: Any) -> None:
        """Put a release into the tree and its channel, as ``twinslot publish`` does."""
        servers.publish_version(self.site_folder, version, **spec)
        self.store.write(lambda c: releases.scan(c, self.site))

    def upload(self, folder: Path, version: str, **spec: Any) -> Any:
        """Publish elsewhere, then upload what came of it."""
        site = folder / f"made-{version}-{secrets.token_hex(3)}" / "site"
        site.mkdir(parents=True)
        published = servers.publish_version(site, version, **spec)
        return self.client.post(
            "/api/v1/firmware/upload",
            headers={"Authorization": f"Bearer {ADMIN}"},
            files=upload_files(site, published),
        )

    def told(self) -> list[tuple[str, dict[str, Any]]]:
        """What webhooks are told, in order: event and data."""
        bodies = self.store.read(
            lambda c: c.exec_driver_sql("SELECT body FROM deliveries ORDER BY id").scalars().all()
        )
        said = map(json.loads, bodies)
        return [(one["event"], one["data"]) for one in said]

    def release(self, version: str) -> dict[str, Any]:
        found = self.api("GET", "firmware")["firmware"]
        return next(row for row in found if row["version"] == version)


class Remote(Fleet):
    """The calls of a fleet, to a server process."""

    def __init__(self, server, admin=None):
        self.server = server
        self.client = server.client(timeout=20)
        self.admin = admin or server.token("operator")

    def api(self, method, path, body=None, **options):
        options = options if body is None else {**options, "json": body}
        headers = {"Authorization": f"Bearer {self.admin}"}
        return self.client.request(method, f"/api/v1/{path}", headers=headers, **options).json()


def upload_files(site: Path, published: Any) -> list:
    files = [("release", ("r.jws", (site / published.release).read_bytes()))]
    for payload in published.manifest["images"][0]["payloads"]:
        blob = site / published.release.partition("/")[0] / payload["url"]
        files.append(("file", (blob.name, blob.read_bytes())))
    return files


def build_of(version: str) -> str:
    return servers.firmware(version)[-32:].hex()


class Board:
    """A board at protocol level; what it runs is what its attributes say."""

    _numbers = itertools.count(1)

    def __init__(self, fleet: Fleet, device_id: str, version: str = "1.0.0", **facts: Any):
        self.fleet = fleet
        self.device_id = device_id
        self.version = version
        self.facts = facts
        self.token = FLEET
        self.attempt = ""

    def poll(self) -> dict[str, Any]:
        answer = self.fleet.client.post(
            "/api/v1/check-update",
            headers={"Authorization": f"Bearer {self.token}"},
            json={
                "device_id": self.device_id,
                "product": servers.PRODUCT,
                "channel": "stable",
                "hardware": servers.HARDWARE,
                "chip_id": 0,
                "current_version": self.version,
                "current_build": build_of(self.version),
                "labels": [],
                **self.facts,
            },
        )
        assert answer.status_code == 200, answer.text
        return answer.json()

    def report(self, status: str, version: str, error: dict | None = None) -> dict[str, Any]:
        answer = self.fleet.client.post(
            "/api/v1/report-status",
            headers={"Authorization": f"Bearer {self.token}"},
            json={
                "device_id": self.device_id,
                "attempt": self.attempt,
                "status": status,
                "version": version,
                "build": build_of(version),
                "error": error,
                "current_version": self.version,
            },
        )
        assert answer.status_code == 200, answer.text
        return answer.json()

    def fetch(self) -> str | None:
        """Poll and stage what is offered; return its version."""
        answer = self.poll()
        if not answer["update_available"]:
            return None
        version = answer["release"].rpartition("/")[2].removesuffix(".jws")
        self.attempt = f"a{next(self._numbers)}"
        self.report("staging", version)
        self.report("staged", version)
        return version

    def update(self, good: bool = True, silent: bool = False) -> str | None:
        """Take an offer through to its end, as the agent does; return the version offered."""
        version = self.fetch()
        if version is None:
            return None
        before, self.version = self.version, version
        self.poll()  # on trial: the health check asks the server
        if not good:
            self.version = before
            self.poll()
            if not silent:
                self.report("rolledback", version, {"code": "health", "message": "no sensor"})
        elif not silent:
            self.report("confirmed", version)
        return version

    def attempts(self) -> list[dict[str, Any]]:
        return self.fleet.api("GET", f"devices/{self.device_id}")["attempts"]


@contextlib.contextmanager
def running(folder: Path, **settings: Any) -> Iterator[Fleet]:
    fleet = Fleet(folder, **settings)
    try:
        yield fleet
    finally:
        fleet.close()
