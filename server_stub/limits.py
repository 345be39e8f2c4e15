"""Every bound of the server in one place, with its unit."""

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds on what one client, or all of them together, may take."""

    body_bytes: int = 8192
    """A request's body, where nothing else is said."""

    report_bytes: int = 65536
    """A report's: each of a log's 4,096 characters can take 12 bytes as JSON writes it."""

    body_timeout_s: float = 10.0
    """From the end of the headers until the whole body is here."""

    upload_timeout_s: float = 300.0
    """The same for an upload of a release."""

    header_timeout_s: float = 10.0
    """From the end of the TLS handshake (asyncio allows that one 60 s) until a request's headers
    are here; and again from the first byte of each further request."""

    header_bytes: int = 16384
    """Request line and headers together."""

    keep_alive_s: int = 60
    """An idle connection between two requests: pointer, release and payload share one."""

    send_timeout_s: float = 60.0
    """A reader that takes nothing for so long is dropped. Erasing flash stalls a board for
    seconds, never for a minute."""

    requests: int = 1024
    """Requests worked on at once, a second of polls; the next one is told to come back."""

    polls: int = 512
    """Of these, polls that wait for the database: a batch of it that is under way, and the next.
    One more is answered without it, and told when to ask again."""

    downloads: int = 64
    """Of these, blobs being sent: polls and reports are answered while downloads wait."""

    retry_after_s: int = 10
    """Told to a client that was turned away, plus up to as much again, so that they spread."""

    goodbye_s: float = 0.5
    """At a clean exit, an idle connection's TLS goodbye is awaited so long."""

    shutdown_s: int = 5
    """A clean exit waits for running downloads so long and no longer."""

    database_wait_s: float = 5.0
    """For another process that holds the database (a backup), then 503."""

    devices: int = 100_000
    """Rows of the registry: with one shared token, anybody who holds it can add some."""

    reports_per_device: int = 500
    """Older reports of a device are dropped first."""

    logs_per_device: int = 32
    """Of these, so many newest ones keep their log: of some eight attempts, 16 KiB each."""

    downloads_kept: int = 100_000
    """Lines of the download log; older ones are dropped first."""

    def come_back_s(self) -> int:
        """When one client that was turned away may try again, in seconds."""
        return self.retry_after_s + random.randint(0, self.retry_after_s)
