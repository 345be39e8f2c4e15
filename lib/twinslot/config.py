"""Read ``ota.json``: what a board is, where its updates come from, whom it trusts.

    {"product": "sensor-node", "hardware": "ESP32_GENERIC", "channel": "stable",
     "url": "https://updates.example.org/", "source": "static",
     "ca": "/ota/ca.pem", "keys": "/ota/keys.json"}

Required: ``product``, ``url``, ``keys`` (a JWK set), and for https one of ``ca`` (PEM or DER
file) and ``fingerprint`` (SHA-256 of the server's certificate in hex). The rest has defaults,
below. Times are in seconds. ``http://`` needs ``allow_http``, and never carries a ``token``.
"""

import json
import sys

from . import errors

DEFAULTS = {
    "source": "static",  # or "server"
    "channel": "stable",
    "hardware": "",  # board name; by default that of the MicroPython build
    "version": "",  # of the image flashed by cable, until the first update
    "token": "",
    "ca": "",
    "fingerprint": "",
    "client_cert": "",  # files, for a server that asks for a certificate of the board
    "client_key": "",
    "allow_http": False,  # an http:// url; then nobody can be kept from reading, or withholding
    "demo": False,  # take sample keys
    "labels": [],
    "mirrors": [],  # base URLs of copies of the tree, asked in turn where the network fails
    "allow_hosts": [],  # that payloads may be redirected to: "cdn.example", "cdn.example:8443"
    "budget": 0,  # bytes of payload a day, 0 for no limit
    "wifi": {},  # ssid, password, ap_password, ap_after: see wifi; empty: the application's matter
    "poll": 21600,
    "timeout": 30,  # of one network wait
    "ntp": "pool.ntp.org",  # host or host:port, "" for none
    "stable": 30,  # the trial: seconds the application must run
    "deadline": 300,  # the trial: after this a failing check ends it
    "hang": 120,  # longest time the event loop may stand still before a reset, 0 for ever
    "wdt": 0,  # hardware watchdog, 0 for none
}
FILES = ("keys", "ca", "client_cert", "client_key")  # members that name one
_REQUIRED = ("product", "url", "keys")


def check(config):
    """Return ``config`` (dict) completed with defaults.

    Raises:
        ConfigError: names the member, what was seen and what is expected.
    """
    if not isinstance(config, dict):
        raise errors.ConfigError("configuration", type(config).__name__, "a JSON object")
    full = dict(DEFAULTS)
    for name, value in config.items():
        if name in _REQUIRED:
            kind = str
        elif name in DEFAULTS:
            kind = type(DEFAULTS[name])
        else:
            known = ", ".join(sorted(list(DEFAULTS) + list(_REQUIRED)))
            raise errors.ConfigError("configuration member", name, "one of " + known)
        if type(value) is not kind:  # not the value: it may be a secret
            raise errors.ConfigError(
                "configuration member " + name, type(value).__name__, kind.__name__
            )
        if kind is int and value < 0:
            raise errors.ConfigError("configuration member " + name, value, "0 or more")
        full[name] = value
    for name in _REQUIRED:
        if not full.get(name):
            raise errors.ConfigError("configuration member " + name, "nothing", "a value")
    if full["source"] not in ("static", "server"):
        raise errors.ConfigError("configuration member source", full["source"], "static or server")
    if not full["hardware"]:
        full["hardware"] = getattr(sys.implementation, "_build", "")
        if not full["hardware"]:
            raise errors.ConfigError(
                "configuration member hardware", "nothing", "the board's name"
            )
    _check_watchdogs(full)
    _check_wifi(full["wifi"])
    _check_hosts(full["allow_hosts"])
    full["url"] = _base(full["url"])
    full["mirrors"] = [_base(mirror) for mirror in full["mirrors"]]
    _check_transport(full)
    return full


def _base(url):
    if type(url) is not str or not url:
        raise errors.ConfigError("a base URL", url, "text")
    return url if url.endswith("/") else url + "/"


def _check_watchdogs(full):
    # Fed once a second; the hardware one also has to wait for set_boot, which hashes an image.
    for name, least in (("hang", 3), ("wdt", 10)):
        if full[name] and full[name] < least:
            raise errors.ConfigError(
                "configuration member " + name, full[name], "0, or %d and more" % least
            )


def _check_wifi(wifi):
    for name, value in wifi.items():
        kind = {"ssid": str, "password": str, "ap_password": str, "ap_after": int}.get(name)
        if kind is None:
            raise errors.ConfigError(
                "member of wifi", name, "one of ssid, password, ap_password, ap_after"
            )
        if type(value) is not kind:
            raise errors.ConfigError(
                "member of wifi: " + name, type(value).__name__, kind.__name__
            )
    if wifi and not wifi.get("ssid"):
        raise errors.ConfigError("member of wifi: ssid", "nothing", "the network's name")
    if wifi.get("ap_password") and len(wifi["ap_password"]) < 8:
        raise errors.ConfigError(
            "member of wifi: ap_password",
            "%d characters" % len(wifi["ap_password"]),
            "8 or more, as WPA2 wants",
        )


def _check_hosts(hosts):
    for host in hosts:
        if type(host) is not str or not host or "/" in host or host != host.lower():
            raise errors.ConfigError(
                "member of allow_hosts", host, "a host as in cdn.example:8443"
            )


def _check_transport(full):
    for url in [full["url"]] + full["mirrors"]:
        scheme = url.split(":")[0]
        if scheme == "http":
            if not full["allow_http"]:
                raise errors.ConfigError("url", "http://", "https://, or allow_http set to true")
            if full["token"] and url == full["url"]:
                raise errors.ConfigError("a token never goes over http: use an https:// url")
        elif scheme != "https":
            raise errors.ConfigError("url", url[:64], "https://...")
        elif not full["ca"] and not full["fingerprint"]:
            raise errors.ConfigError("https needs a certificate (ca) or its SHA-256 (fingerprint)")
    if bool(full["client_cert"]) != bool(full["client_key"]):
        raise errors.ConfigError("client_cert and client_key go together")


def load(path):
    """Read and check a configuration file; where it is damaged, the last one that worked. So with
    the files it names: where one of them is damaged, the copy is named.

    Raises:
        ConfigError: absent, not JSON, or not a configuration, and no copy of a good one.
    """
    from .lastgood import GOOD, is_whole

    try:
        found = _load(path)
    except errors.ConfigError as exc:
        try:
            found = _load(path + GOOD)
        except errors.ConfigError:
            raise exc
        print("twinslot: %s; using the last one that worked" % exc)
    for name in FILES:
        file = found[name]
        if file and not is_whole(name, file) and is_whole(name, file + GOOD):
            print("twinslot: file %s is damaged; using the last one that worked" % file)
            found[name] = file + GOOD
    return found


def _load(path):
    try:
        with open(path) as f:
            return check(json.load(f))
    except OSError as exc:
        raise errors.ConfigError("configuration %s can't be read: %s" % (path, exc))
    except ValueError:
        raise errors.ConfigError("configuration %s is not JSON" % path)
