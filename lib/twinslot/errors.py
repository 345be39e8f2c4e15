"""What can go wrong, one class per cause.

    OtaError                     code          number    retry
      BusyError                  busy          OTA_001
      PolicyError                policy        OTA_002   genuine, but not for this board
        ProductError             product
        HardwareError            hardware
        VersionError             version                 older than, or same as, what runs
        SecurityVersionError     security_version        below the anti-rollback floor
        ExpiredError             expired
        NotYetError              not_yet         yes: issued at a time that is still to come
        KnownBadError            known_bad               failed on this board before
        RefusedError             refused                 the application said no
      SpaceError                 space         OTA_003
      NetworkError               network       OTA_004   yes
        TimeoutError_            timeout                 yes
        TlsError                 tls                     yes
        HttpError                http                    yes, status in .status
        UnreachableError         unreachable   OTA_009   yes
      FormatError                format        OTA_005   malformed bytes
        ImageError               image                   not an ESP image for this chip
        ReleaseError             release                 not a release manifest
      SignatureError             signature     OTA_006
        KeyringError             keyring                 yes: a later keyring may help
      ChecksumError              checksum      OTA_007   yes: the bytes may come right next time
      PartitionError             partition     OTA_008   yes: flash may obey the next time
      RollbackError              rollback      OTA_012   no image to go back to
        HealthError              health                  the trial failed
      ConfigError                config        OTA_014
      ClockError                 clock         OTA_014   yes
      InternalError              internal      OTA_014   yes: a slip of this package's own

``code`` is a stable word for reports; ``number`` is the code of the local API's table.
``retry`` says whether the same release may succeed when tried again later.
Messages carry what was seen and what was expected, never a key or a token.
"""

_REPORT_LEN = 160  # characters of a message; four reports and four failures fit in the journal


class OtaError(Exception):
    """Base of every error that leaves the package.

    Args:
        message: what went wrong, one line.
        seen: what was found there (any value; shown with ``str``).
        expected: what should have been found.
    """

    code = "ota"
    number = "OTA_014"
    retry = False

    def __init__(self, message, seen=None, expected=None):
        if expected is not None:
            message = "%s: saw %s, expected %s" % (message, seen, expected)
        elif seen is not None:
            message = "%s: saw %s" % (message, seen)
        super().__init__(message)
        self.message = message

    def report(self):
        """Return ``{"code", "number", "message"}`` for reports, HTTP answers and the journal.

        A message may quote a server or an application: here it is cut and made printable.
        """
        text = "".join(c if " " <= c <= "~" else "?" for c in self.message[:_REPORT_LEN])
        return {"code": self.code, "number": self.number, "message": text}


class BusyError(OtaError):
    code = "busy"
    number = "OTA_001"
    retry = True


class PolicyError(OtaError):
    code = "policy"
    number = "OTA_002"


class ProductError(PolicyError):
    code = "product"


class HardwareError(PolicyError):
    code = "hardware"


class VersionError(PolicyError):
    code = "version"


class SecurityVersionError(PolicyError):
    code = "security_version"


class ExpiredError(PolicyError):
    code = "expired"


class NotYetError(PolicyError):
    code = "not_yet"
    retry = True


class KnownBadError(PolicyError):
    code = "known_bad"


class RefusedError(PolicyError):
    code = "refused"


class SpaceError(OtaError):
    code = "space"
    number = "OTA_003"


class NetworkError(OtaError):
    code = "network"
    number = "OTA_004"
    retry = True


class TimeoutError_(NetworkError):
    # MicroPython has no TimeoutError to shadow, CPython has: hence the underscore.
    code = "timeout"


class TlsError(NetworkError):
    """No verified connection. ``dates``: the certificates' dates are all that is wrong."""

    code = "tls"
    dates = False


class HttpError(NetworkError):
    """The server answered, with a status or a framing that can't be used.

    ``status`` is the HTTP status (0 where the framing itself was wrong) and ``retry_after``
    the server's wish in seconds, or None.
    """

    code = "http"

    def __init__(self, message, seen=None, expected=None, status=0, retry_after=None):
        super().__init__(message, seen, expected)
        self.status = status
        self.retry_after = retry_after


class UnreachableError(NetworkError):
    code = "unreachable"
    number = "OTA_009"


class FormatError(OtaError):
    code = "format"
    number = "OTA_005"


class ImageError(FormatError):
    code = "image"


class ReleaseError(FormatError):
    code = "release"


class SignatureError(OtaError):
    code = "signature"
    number = "OTA_006"


class KeyringError(SignatureError):
    code = "keyring"
    retry = True


class ChecksumError(OtaError):
    code = "checksum"
    number = "OTA_007"
    retry = True


class PartitionError(OtaError):
    code = "partition"
    number = "OTA_008"
    retry = True


class RollbackError(OtaError):
    code = "rollback"
    number = "OTA_012"


class HealthError(RollbackError):
    code = "health"


class ConfigError(OtaError):
    code = "config"


class ClockError(OtaError):
    code = "clock"
    retry = True


class InternalError(OtaError):
    """An exception that nobody foresaw; its traceback is on the console."""

    code = "internal"
    retry = True
