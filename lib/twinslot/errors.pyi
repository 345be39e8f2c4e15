# The classes of errors.py for type checkers and readers; codes and numbers are in its table.

from typing import Any

class OtaError(Exception):
    code: str
    number: str
    retry: bool
    message: str
    status: int
    retry_after: int | None
    dates: bool

    def __init__(self, message: str, seen: Any = None, expected: Any = None) -> None: ...
    def report(self) -> dict[str, str]: ...

class BusyError(OtaError):
    """Something else has to end first."""

class PolicyError(OtaError):
    """Genuine, but not for this board."""

class ProductError(PolicyError): ...
class HardwareError(PolicyError): ...

class VersionError(PolicyError):
    """Older than what runs, or another build by the same version."""

class SecurityVersionError(PolicyError):
    """Below the anti-rollback floor."""

class ExpiredError(PolicyError): ...

class NotYetError(PolicyError):
    """Issued at a time that is still to come."""

class KnownBadError(PolicyError):
    """Failed on this board before."""

class RefusedError(PolicyError):
    """The application said no."""

class SpaceError(OtaError): ...
class NetworkError(OtaError): ...

# MicroPython has no TimeoutError to shadow, CPython has: hence the underscore.
class TimeoutError_(NetworkError): ...

class TlsError(NetworkError):
    """No verified connection. ``dates``: the certificates' dates are all that is wrong."""

class HttpError(NetworkError):
    """The server answered, with a status or a framing that can't be used.

    ``status`` is the HTTP status (0 where the framing itself was wrong) and ``retry_after``
    the server's wish in seconds, or None.
    """

    def __init__(
        self,
        message: str,
        seen: Any = None,
        expected: Any = None,
        *,
        status: int = 0,
        retry_after: int | None = None,
    ) -> None: ...

class UnreachableError(NetworkError): ...

class FormatError(OtaError):
    """Malformed bytes."""

class ImageError(FormatError):
    """Not an ESP image for this chip."""

class ReleaseError(FormatError):
    """Not a release manifest."""

class SignatureError(OtaError): ...

class KeyringError(SignatureError):
    """A later keyring may help."""

class ChecksumError(OtaError):
    """The bytes may come right next time."""

class PartitionError(OtaError):
    """Flash may obey the next time."""

class RollbackError(OtaError):
    """No image to go back to."""

class HealthError(RollbackError):
    """The trial failed."""

class ConfigError(OtaError): ...
class ClockError(OtaError): ...

class InternalError(OtaError):
    """An exception that nobody foresaw; its traceback is on the console."""
