"""Read ``ota.json``: what a board is, where its updates come from, whom it trusts.

    {"product": "sensor-node", "hardware": "ESP32_GENERIC", "channel": "stable",
     "url": "https://updates.example.org/", "source": "static",
     "ca": "/ota/ca.pem", "keys": "/ota/keys.json"}

Required: ``product``, ``url``, ``keys`` (a JWK set), and for https one of ``ca`` (PEM or DER
file) and ``fingerprint`` (SHA-256 of the server's certificate in hex). The rest has defaults,
below. Times are in seconds.
"""

import json
import sys

from .errors import ConfigError

DEFAULTS = {
    "source": "static",  # or "server"
    "channel": "stable",
    "hardware": "",  # board name; by default that of the MicroPython build
    "version": "",  # of the image flashed by cable, until the first update
    "token": "",
    "ca": "",
    "fingerprint": "",
    "labels": [],
    "poll": 21600,
    "timeout": 30,  # of one network wait
    "ntp": "pool.ntp.org",  # host or host:port, "" for none
    "stable": 30,  # the trial: seconds the application must run
    "deadline": 300,  # the trial: after this a failing check ends it
    "hang": 120,  # the trial: longest time the event loop may stand still
    "wdt": 0,  # hardware watchdog, 0 for none
}
_REQUIRED = ("product", "url", "keys")


def check(config):
    """Return ``config`` (dict) completed with defaults.

    Raises:
        ConfigError: names the member, what was seen and what is expected.
    """
    if not isinstance(config, dict):
        raise ConfigError("configuration", type(config).__name__, "a JSON object")
    full = dict(DEFAULTS)
    for name, value in config.items():
        if name in _REQUIRED:
            kind = str
        elif name in DEFAULTS:
            kind = type(DEFAULTS[name])
        else:
            known = ", ".join(sorted(list(DEFAULTS) + list(_REQUIRED)))
            raise ConfigError("configuration member", name, "one of " + known)
        if type(value) is not kind or (kind is int and value < 0):
            raise ConfigError("configuration member " + name, value, kind.__name__)
        full[name] = value
    for name in _REQUIRED:
        if not full.get(name):
            raise ConfigError("configuration member " + name, "nothing", "a value")
    if full["source"] not in ("static", "server"):
        raise ConfigError("configuration member source", full["source"], "static or server")
    if not full["hardware"]:
        full["hardware"] = getattr(sys.implementation, "_build", "")
        if not full["hardware"]:
            raise ConfigError("configuration member hardware", "nothing", "the board's name")
    if not full["url"].endswith("/"):
        full["url"] += "/"
    return full


def load(path):
    """Read and check a configuration file.

    Raises:
        ConfigError: absent, not JSON, or not a configuration.
    """
    try:
        with open(path) as f:
            return check(json.load(f))
    except OSError as exc:
        raise ConfigError("configuration %s can't be read: %s" % (path, exc))
    except ValueError:
        raise ConfigError("configuration %s is not JSON" % path)


def read(path):
    """Return the bytes of a file that the configuration names.

    Raises:
        ConfigError: it can't be read.
    """
    try:
        with open(path, "rb") as f:
            return f.read()
    except OSError as exc:
        raise ConfigError("file %s can't be read: %s" % (path, exc))
