"""Join the network that ``ota.json`` names, and stay in it.

    "wifi": {"ssid": "...", "password": "...", "ap_password": "...", "ap_after": 600}

With ``ap_password`` (8 characters or more) a board that has had no network for ``ap_after``
seconds opens an access point of its own, ``twinslot-`` and the end of its MAC address, until it is
back in. Applications that manage the network themselves leave ``wifi`` out.

Source: MicroPython ports/esp32/network_wlan.c.
"""

import asyncio
import time

_TRY_S = 20  # one attempt to join
_LOOK_S = 5


async def keep(wifi, device_id):
    """Keep the board in its network, for ever.

    Args:
        wifi: the ``wifi`` member of the configuration.
        device_id: names the access point.
    """
    import network

    station = network.WLAN(network.STA_IF)
    station.active(True)
    point = None
    lost = time.ticks_ms()
    while True:
        if station.isconnected():
            lost = time.ticks_ms()
            if point:
                point.active(False)
                point = None
        else:
            await _join(station, wifi)
            away_s = time.ticks_diff(time.ticks_ms(), lost) // 1000
            if not point and wifi.get("ap_password") and away_s >= wifi.get("ap_after", 600):
                point = _open_point(network, wifi, device_id)
        await asyncio.sleep(_LOOK_S)


async def _join(station, wifi):
    print("twinslot: joining", wifi["ssid"])
    try:
        station.disconnect()
        station.connect(wifi["ssid"], wifi.get("password") or None)
    except OSError as exc:
        print("twinslot: no network:", exc)
        return
    for _ in range(_TRY_S * 5):
        if station.isconnected():
            return
        await asyncio.sleep_ms(200)


def _open_point(network, wifi, device_id):
    point = network.WLAN(network.AP_IF)
    point.active(True)
    name = "twinslot-" + device_id[-6:]
    point.config(ssid=name, password=wifi["ap_password"], security=3)  # WPA2-PSK
    print("twinslot: no network; access point", name)
    return point
