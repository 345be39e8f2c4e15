"""The `network` module of the virtual board: a WLAN that reaches the host's loopback.

connect() succeeds as long as the parent says that a network is in reach. Sockets are the host's
own and do not ask this module. The parent hears the event "wlan" when an interface is switched on
or off, or an access point is configured. Not there: LAN, PPP, ESP-NOW.

Source: MicroPython ports/esp32/network_wlan.c, extmod/modnetwork.c.
"""

import soc

STA_IF = 0
AP_IF = 1

STAT_IDLE = 1000
STAT_CONNECTING = 1001
STAT_GOT_IP = 1010
STAT_NO_AP_FOUND = 201
STAT_WRONG_PASSWORD = 202
STAT_BEACON_TIMEOUT = 200
STAT_ASSOC_FAIL = 203
STAT_HANDSHAKE_TIMEOUT = 204

AUTH_OPEN = 0
AUTH_WPA2_PSK = 3

_HOSTNAME_MAX = 32

_hostname = None
_country = "XX"


def hostname(name=None):
    global _hostname
    if name is None:
        return _hostname or "mpy-" + soc.config["chip"]
    if len(name) > _HOSTNAME_MAX:
        raise ValueError
    _hostname = name


def country(code=None):
    global _country
    if code is None:
        return _country
    if len(code) != 2:
        raise ValueError
    _country = code


class WLAN:
    """One of the two interfaces; constructing it again gives the same one."""

    IF_STA = STA_IF
    IF_AP = AP_IF
    PM_NONE = 0
    PM_PERFORMANCE = 1
    PM_POWERSAVE = 2

    _made = {}

    def __new__(cls, interface=STA_IF):
        if interface not in (STA_IF, AP_IF):
            raise ValueError("invalid WLAN interface identifier")
        made = WLAN._made.get(interface)
        if made is None:
            made = WLAN._made[interface] = super().__new__(cls)
            made._id = interface
            made._active = False
            made._tried = False
            made._settings = {"pm": cls.PM_PERFORMANCE, "channel": 1, "ssid": "", "reconnects": -1}
            made._ip = ("127.0.0.1", "255.0.0.0", "127.0.0.1", "127.0.0.1")
        return made

    def __init__(self, interface=STA_IF):
        pass

    def active(self, on=None):
        if on is not None:
            self._active = bool(on)
            self._tried = self._tried and self._active
            self._tell()
        return self._active

    def connect(self, ssid=None, key=None, *, bssid=None):
        if not self._active:
            raise OSError("Wifi Not Started")
        self._tried = True
        if ssid is not None:
            self._settings["ssid"] = ssid

    def disconnect(self):
        self._tried = False

    def isconnected(self):
        if self._id == AP_IF:
            return False
        return self._active and self._tried and soc.in_reach()

    def status(self, what=None):
        if what == "rssi":
            return -50
        if what == "stations":
            return []
        if self.isconnected():
            return STAT_GOT_IP
        return STAT_CONNECTING if self._tried else STAT_IDLE

    def ifconfig(self, value=None):
        if value is not None:
            if value != "dhcp":
                self._ip = tuple(value)
            return None
        return self._ip if self.isconnected() else ("0.0.0.0",) * 4

    def ipconfig(self, name=None, **settings):
        if name == "addr4":
            return self.ifconfig()[:2]
        if name == "gw4":
            return self.ifconfig()[2]
        if name is not None:
            raise ValueError("unknown config param")

    def config(self, *names, **settings):
        if names:
            return self._setting(names[0])
        for name, value in settings.items():
            if name in ("hostname", "dhcp_hostname"):
                hostname(value)
            else:
                self._settings["ssid" if name == "essid" else name] = value
        if settings and self._id == AP_IF:
            self._tell()

    def _tell(self):
        s = self._settings
        security = s.get("security", s.get("authmode", AUTH_OPEN))
        name = "ap" if self._id == AP_IF else "station"
        soc.event("wlan", interface=name, active=self._active, ssid=s["ssid"], security=security)

    def _setting(self, name):
        if name == "mac":
            mac = bytearray(soc.config["mac"])
            mac[5] = (mac[5] + self._id) & 0xFF
            return bytes(mac)
        if name in ("hostname", "dhcp_hostname"):
            return hostname()
        if name == "essid":
            name = "ssid"
        if name not in self._settings:
            raise ValueError("unknown config param")
        return self._settings[name]

    def scan(self):
        if not self._active:
            raise OSError("STA must be active")
        if not soc.in_reach():
            return []
        return [(b"loopback", b"\x02\0\0\0\0\x01", 1, -50, 3, False)]
