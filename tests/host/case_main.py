# main.py of the board of `station.py`: does what the host tells it, many updates in one boot.
#
# Commands are JSON lines over TCP, each is answered by one. The agent, its slot, journal and
# client are the real ones; `machine.reset` alone is caught, and told as the end of an update.

import asyncio
import gc
import json
import socket
import sys
import time

import machine
from esp32 import NVS

import twinslot
from twinslot import guard
from twinslot.errors import OtaError

Journal = __import__("twinslot.journal", None, None, ("x",))


class Reset(BaseException):
    pass


ENDS = Exception, Reset  # where there may be no memory for a tuple


class Machine:
    """`machine` as the agent sees it."""

    unique_id = machine.unique_id
    reset_cause = machine.reset_cause
    Timer = machine.Timer
    WDT = machine.WDT

    @staticmethod
    def reset():
        raise Reset


class Names:
    """`socket` with a name service of our own."""

    def __init__(self):
        self.script = []

    def __getattr__(self, name):
        return getattr(socket, name)

    def getaddrinfo(self, host, port, *rest):
        if self.script:
            said = self.script.pop(0)
            if said == "unknown":
                raise OSError(-2)
            if said == "later":
                raise OSError(-3)
            if said == "empty":
                return []
            if said == "dead":  # two addresses where nobody listens, then the good one
                good = socket.getaddrinfo(host, port, *rest)
                bad = socket.getaddrinfo("127.0.0.1", 9, *rest)
                return bad + bad + good
            if said == "wrong":
                return socket.getaddrinfo("127.0.0.1", 9, *rest)
        return socket.getaddrinfo(host, port, *rest)


names = Names()
sys.modules["socket"] = names  # for what is loaded from here on, to look up a name
agent = None
held = None  # of the heap
events = []


def fresh(settings, dns=(), **more):
    """Forget all that was ever downloaded; the host has put the slot in order."""
    nvs = NVS("twinslot")
    for key in ("journal", "spare", "checkpoint", "log", "starts", "fetch"):
        try:
            nvs.erase_key(key)
        except OSError:
            pass
    names.script = list(dns)  # a reboot does not mend a name service
    return begin(settings, **more)


def begin(settings, jump=None):
    """What a reboot does: a new agent, which knows what flash holds."""
    global agent  # noqa: PLW0603
    Journal._shared = None
    agent = twinslot.Agent(settings)
    agent._machine = Machine
    agent.on_event(lambda name, data: events.append(name))
    if jump:
        agent.on_event(lambda name, data: jumped(jump.pop(0)) if jump else None)
    guard.stop()
    return {"version": agent.version()}


def boot(settings, well=True, hog=0):
    """What a reset does, guard and all; the agent's one check says ``well``. Returns False where
    there is no agent: it could not be made, or the guard has reset the board. ``hog`` bytes of
    the heap are taken away, until the next update has ended."""
    global held  # noqa: PLW0603
    gc.collect()
    held = take(hog)
    Journal._shared = None
    guard._verdict = None
    guard.machine = Machine
    try:
        begin(settings)
        unlock()
        agent.check("well", lambda: well)
        return True
    except ENDS as exc:
        unlock()
        held = None
        print("boot:", repr(exc))
        return False
    finally:
        unlock()
        guard.machine = machine


def unlock():
    """Give the heap back that a statement was to find locked. True if it was so until now: no
    statement of the package has run since, so what failed meanwhile was not the package."""
    stumble = sys.modules.get("twinslot.stumble")
    if stumble and stumble.locked is not None:
        stumble.unlock()
        return True
    return False


def jumped(seconds):
    rtc = machine.RTC()
    t = time.gmtime(max(0, time.time() + seconds))
    rtc.datetime((t[0], t[1], t[2], 0, t[3], t[4], t[5], 0))


def take(size):
    """Take so many bytes of the heap, in pieces, as a full heap is."""
    pieces = None
    try:
        while size > 0:
            pieces = (bytearray(480), pieces)
            size -= 560
    except MemoryError:
        pass
    return pieces


def update(force=False, hog=0, run=False):
    """One poll, with ``hog`` bytes of the heap taken away; or with ``run`` the agent's own polls,
    for five minutes at most."""
    global held
    events.clear()
    gc.collect()
    hog, held = held or take(hog), None
    began = time.ticks_ms()
    out = {"code": "idle"}
    failed = None
    try:
        asyncio.run(asyncio.wait_for(agent.run(), 300) if run else agent.update_now(force))
    except Reset:
        out["code"] = "installed"
    except Exception as exc:
        failed = exc
    outside = unlock()
    stumble = sys.modules.get("twinslot.stumble")
    if stumble:
        stumble.target = None  # what follows is not the agent's own doing
        stumble.counting = False
    del hog
    gc.collect()
    if isinstance(failed, OtaError):
        out["code"] = failed.code
        out["message"] = str(failed)
        out["retry"] = failed.retry
    elif failed:
        out["code"] = "outside" if outside else "LEAKED"
        out["message"] = repr(failed)
        sys.print_exception(failed)
    out["events"] = list(events)
    out["ms"] = time.ticks_diff(time.ticks_ms(), began)
    out["retry_after"] = agent._retry_after
    out["delay_ms"] = agent._delay_ms()
    try:
        asyncio.run(agent._client.close())
    except OtaError:
        pass
    asyncio.new_event_loop()
    gc.collect()
    out["heap"] = gc.mem_alloc()
    return out


def log():
    return Journal.Journal.shared().log()


def evaluate(code):
    """For what only one test wants: run code, give back `result`."""
    space = {"agent": agent, "result": None}
    exec(code, space)
    return space["result"]


DO = {f.__name__: f for f in (fresh, begin, boot, update, log, evaluate)}


def serve():
    with open("/station.json") as f:
        port = json.load(f)["port"]
    host = socket.socket()
    host.connect(socket.getaddrinfo("127.0.0.1", port)[0][-1])
    while True:
        line = host.readline()
        if not line:
            return
        command = json.loads(line)
        answer = DO[command.pop("do")](**command)
        host.write(json.dumps(answer) + "\n")


serve()
