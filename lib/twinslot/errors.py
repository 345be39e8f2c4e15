"""What can go wrong, one class per cause, each with what it is raised for in ``errors.pyi``.

``code`` is a stable word for reports; ``number`` is the code of the local API's table.
``retry`` says whether the same release may succeed when tried again later.
Messages carry what was seen and what was expected, never a key or a token.

A class is made when its name is first used, ``from .errors import BusyError`` included: all of
them together are 8 KB of heap on a 64-bit port, and an update that goes well needs next to none.
The package therefore imports none but ``OtaError``, and says ``errors.BusyError`` where it raises
or catches one.
"""

_REPORT_LEN = 160  # characters of a message; four reports and four failures fit in the journal

# Name, base, code; then number and retry, "-" or nothing where they are the base's. Not aligned:
# blanks take heap, too.
_TABLE = """
BusyError OtaError busy OTA_001 retry
PolicyError OtaError policy OTA_002
ProductError PolicyError product
HardwareError PolicyError hardware
VersionError PolicyError version
SecurityVersionError PolicyError security_version
ExpiredError PolicyError expired
NotYetError PolicyError not_yet - retry
KnownBadError PolicyError known_bad
RefusedError PolicyError refused
SpaceError OtaError space OTA_003
NetworkError OtaError network OTA_004 retry
TimeoutError_ NetworkError timeout
TlsError NetworkError tls
HttpError NetworkError http
UnreachableError NetworkError unreachable OTA_009
FormatError OtaError format OTA_005
ImageError FormatError image
ReleaseError FormatError release
SignatureError OtaError signature OTA_006
KeyringError SignatureError keyring - retry
ChecksumError OtaError checksum OTA_007 retry
PartitionError OtaError partition OTA_008 retry
RollbackError OtaError rollback OTA_012
HealthError RollbackError health
ConfigError OtaError config
ClockError OtaError clock - retry
InternalError OtaError internal - retry
"""


class OtaError(Exception):
    """Base of every error that leaves the package.

    Args:
        message: what went wrong, one line.
        seen: what was found there (any value; shown with ``str``).
        expected: what should have been found.
        more: attributes of this one.
    """

    code = "ota"
    number = "OTA_014"
    retry = False
    status = 0
    retry_after = None
    dates = False

    def __init__(self, message, seen=None, expected=None, **more):
        if expected is not None:
            message = "%s: saw %s, expected %s" % (message, seen, expected)
        elif seen is not None:
            message = "%s: saw %s" % (message, seen)
        super().__init__(message)
        self.message = message
        for name, value in more.items():
            setattr(self, name, value)

    def report(self):
        """Return ``{"code", "number", "message"}`` for reports, HTTP answers and the journal.

        A message may quote a server or an application: here it is cut and made printable.
        """
        text = "".join(c if " " <= c <= "~" else "?" for c in self.message[:_REPORT_LEN])
        return {"code": self.code, "number": self.number, "message": text}


def __getattr__(name):
    at = _TABLE.find("\n" + name + " ") + 1
    if not at:
        raise AttributeError(name)
    row = _TABLE[at : _TABLE.find("\n", at)].split()
    members: dict = {"code": row[2]}
    if len(row) > 3 and row[3] != "-":
        members["number"] = row[3]
    if len(row) > 4:
        members["retry"] = True
    base = globals().get(row[1]) or __getattr__(row[1])
    kind = globals()[name] = type(name, (base,), members)
    return kind
