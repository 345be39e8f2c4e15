"""What time it is, or at least how late: certificates have dates, and so have releases.

    clock = Clock(ntp="pool.ntp.org", last=journal_time)
    state = await clock.ensure()          # "known", "at_least" or "unknown"
    client = Client(..., on_date=clock.observe)
    if clock.trusted and clock.now() > expires: ...

All times are Unix seconds (since 1970), whatever the epoch of the port. The clock itself is the
RTC, which mbedTLS reads too: it is set whenever something better is learnt, and survives resets,
not a loss of power (then it stands at 2000-01-01).

Where the time comes from, the best first, and what it is good for:

    source   what says it                                 trusted   may be stored for the next boot
    user     the application: observe(unix, "user")       yes       yes
    date     Date of an answer over verified TLS          yes       yes
    ntp      an NTP server; anybody on the way can lie    yes       no
    rtc      the RTC as found at boot; who set it?        no (*)    no
    bound    the latest of: build date, newest signed     no        -
             date seen, time stored by an earlier boot

(*) unless ``trust_rtc=True``, for boards with a battery-backed clock set by the application.

*Trusted* times may judge whether a release has expired, and so may the newest signed date of what
was installed. Others never do: they only let a TLS handshake get past "not valid before".

A clock that is wrong, by accident or by attack, must not stay wrong for ever:
- Nothing earlier than the bound is believed, and nothing later than 20 years after it.
- A time from NTP is stored nowhere, and asked for anew after a day, or after doubt() (call it when
  TLS fails on dates); the next answer may set the clock back, though never before the bound.
- A Date over verified TLS overrules NTP when they differ by more than 5 minutes.
- What lasting() gives to store, and what ``last`` brings back, counts only up to a year after the
  newest signed date: a server that shows the year 2099 once does not make it stick.
- A signed date later than a trusted clock is not taken: the signer's clock was wrong.

How NTP is asked: `twinslot.ntp`.

Source: MicroPython ports/esp32/machine_rtc.c.
"""

import time

from micropython import const

from . import errors
from .errors import OtaError

BUILD_FLOOR = 1767225600  # 2026-01-01; raised with each release of this package

_YEAR = const(31622400)
_WINDOW = const(632448000)  # 20 years
_TOLERANCE = const(300)
_ASK_AGAIN = const(86400)
_KISS_PAUSE = const(3600)
_NTP_PORT = const(123)
_RANK = {None: 0, "rtc": 0, "ntp": 1, "date": 2, "user": 3}


def _epoch():
    return 946684800 if time.gmtime(0)[0] == 2000 else 0


def _read_rtc():
    return int(time.time()) + _epoch()


def _set_rtc(unix):
    try:
        from machine import RTC
    except ImportError:
        return  # the unix port: the host keeps its own clock
    t = time.gmtime(unix - _epoch())
    RTC().datetime((t[0], t[1], t[2], t[6], t[3], t[4], t[5], 0))


class Clock:
    """The board's clock and how far to trust it.

    Args:
        ntp: "host", "host:port", or "" for no NTP.
        last: time stored by an earlier boot (from lasting()), or 0.
        floor: no earlier time is possible. Kept, and may be changed.
        trust_rtc: the RTC as found at boot was set by somebody who knew.
        read, set_rtc: functions to read and set the RTC, in Unix seconds.

    Raises:
        ConfigError: ``ntp`` is malformed.
    """

    def __init__(
        self,
        ntp="pool.ntp.org",
        last=0,
        floor=BUILD_FLOOR,
        trust_rtc=False,
        read=None,
        set_rtc=None,
    ):
        self.problem = None  # why NTP gave nothing, for a person
        from .digits import decimal

        host, colon, port = (ntp or "").partition(":")
        number = decimal(port.encode(), 65535) if colon else _NTP_PORT
        if not number or (colon and not host):
            raise errors.ConfigError("ntp", ntp, "host or host:port")
        self._ntp = host
        self._ntp_port = number
        self._read = read or _read_rtc
        self._set_rtc = set_rtc or _set_rtc
        self._offset = 0  # what the RTC lacks, where it can't be set
        self.floor = self._signed = floor
        self._bound = max(floor, min(last, floor + _YEAR))
        self._source = None
        self._asked = 0  # RTC reading when NTP last answered
        self._kissed = None  # RTC reading when a server last declined
        if trust_rtc and self._is_plausible(self._time()):
            self._source = "rtc"

    # -- what it says --------------------------------------------------------------------------

    @property
    def trusted(self):
        """True where now() may judge the expiry of a release."""
        return self._source is not None

    @property
    def source(self):
        """ "user", "date", "ntp", "rtc", or None where not trusted."""
        return self._source

    @property
    def state(self):
        """ "known", "at_least" (now() is a lower bound that runs), or "unknown"."""
        if self._source:
            return "known"
        return "at_least" if self._is_plausible(self._time()) else "unknown"

    def now(self):
        """Return the time in Unix seconds, or None where it is unknown."""
        return None if self.state == "unknown" else self._time()

    @property
    def earliest(self):
        """Unix seconds that have passed: the time where it is trusted, else ``floor``. What
        expired before them has expired."""
        return self._time() if self._source else self.floor

    def lasting(self):
        """Return the time that may be stored as ``last`` for the next boot, or None."""
        if self._source not in ("date", "user"):
            return None
        return min(self._time(), self._signed + _YEAR)

    # -- what it is told -----------------------------------------------------------------------

    def at_least(self, unix):
        """Take a date out of a document whose signature holds: it is later than that now."""
        if self._source and unix > self._time() + _TOLERANCE:
            return
        self._signed = max(self._signed, unix)
        self._bound = max(self._bound, unix)
        self._raise_rtc()

    def observe(self, unix, source="date"):
        """Take the time from the Date of an answer over *verified* TLS, or from the user.

        Returns:
            True where it is believed (the clock is set, or was right already).
        """
        if not self._is_plausible(unix):
            return False
        if _RANK[source] < _RANK[self._source]:
            return abs(self._time() - unix) <= _TOLERANCE
        # A Date has crossed a network: it corrects the clock, it does not fine-tune it.
        if not self._source or source != "date" or abs(self._time() - unix) > _TOLERANCE:
            self._set(unix)
        self._source = source
        return True

    def doubt(self):
        """Trust the clock no longer: it goes on, and ensure() asks again."""
        self._source = None

    async def ensure(self, timeout_ms=2000):
        """Make the clock good enough for TLS, and trusted if possible. Never raises.

        Args:
            timeout_ms: for each of two NTP requests.

        Returns:
            ``state``
        """
        now = self._time()
        stale = self._source == "ntp" and not 0 <= now - self._asked < _ASK_AGAIN
        if self._ntp and (not self._source or stale):
            if self._kissed is None or not 0 <= now - self._kissed < _KISS_PAUSE:
                try:
                    await self._ask(timeout_ms)
                    self.problem = None
                except OtaError as e:
                    self.problem = str(e)
        self._raise_rtc()
        return self.state

    # -- within --------------------------------------------------------------------------------

    def _time(self):
        return self._read() + self._offset

    def _is_plausible(self, unix):
        return self._bound <= unix <= self._bound + _WINDOW

    def _set(self, unix):
        self._set_rtc(unix)
        off = unix - self._read()
        self._offset = 0 if -1 <= off <= 1 else off

    def _raise_rtc(self):
        if not self._source and not self._is_plausible(self._time()):
            self._set(self._bound)

    async def _ask(self, timeout_ms):
        """Set the clock by NTP. Raises OtaError."""
        from . import ntp

        try:
            unix = await ntp.ask(self._ntp, self._ntp_port, timeout_ms)
        except ntp.KissError:
            self._kissed = self._time()
            raise
        if not self._is_plausible(unix):
            raise errors.ClockError(
                "ntp: time from %s" % self._ntp,
                unix,
                "%d to %d" % (self._bound, self._bound + _WINDOW),
            )
        self._set(unix)
        self._source = "ntp"
        self._asked = self._time()
