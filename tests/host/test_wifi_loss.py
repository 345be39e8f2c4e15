"""A board whose Wi-Fi comes and goes at each step of an update (fault F64)."""

import contextlib
import select
import socket
import struct
import threading

import pytest

from twinslot_tools.lab import Lab

SIZE = 400_000
BLOCK = 64 << 10
# Bytes to the board at which its network goes away: in its handshake, in what it is told to take,
# in the payload.
STEPS = (700, 6_000, 130_000)


class Link:
    """The way between a board and its server, which can be lost.

    Args:
        aborts: connections end at the loss, as lwIP does when the address goes; else nothing
            passes any more, and they end when the network is back with another address.
    """

    def __init__(self, aborts):
        self.aborts = aborts
        self.target = 0
        self.passed = 0  # bytes to the board
        self.steps = list(STEPS)
        self.lost = threading.Event()
        self._up = threading.Event()
        self._boards = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def up(self):
        self.lost.clear()
        end(list(self._boards))
        self._up.set()

    def down(self):
        self._up.clear()
        if self.aborts:
            end(list(self._boards))
        self.lost.set()

    def close(self):
        self._listener.close()
        self.up()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                board, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(board,), daemon=True).start()

    def _serve(self, board):
        pair = [board]
        self._boards.add(board)
        with contextlib.suppress(OSError, ValueError):
            if self._up.is_set() or not self.aborts:
                pair.append(socket.create_connection(("127.0.0.1", self.target)))
                self._relay(*pair)
        end(pair)
        self._boards.discard(board)

    def _relay(self, board, server):
        while self._up.wait():
            for source in select.select((board, server), (), (), 0.05)[0]:
                if not (data := source.recv(1024)):
                    return
                if source is server:
                    self._count(data)
                if self._up.is_set():  # what is on its way is lost with the link
                    (board if source is server else server).sendall(data)

    def _count(self, data):
        self.passed += len(data)
        if self.steps and self.passed >= self.steps[0]:
            self.steps.pop(0)
            self.down()


def end(sockets):
    for each in sockets:
        with contextlib.suppress(OSError):
            each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
        each.close()


def come_back(lab, link):
    """Let the board be away from its network until it has noticed."""
    seen = len(lab.events)
    lab.board.set_network(False)
    lab.wait(lambda e: e.name == "joining", start=seen)
    link.up()
    lab.board.set_network(True)


@pytest.mark.parametrize("loss", ["silent", "aborted"])
def test_F64_wifi_lost_at_each_step_costs_time_and_a_block_and_nothing_else(tmp_path, loss):
    link = Link(aborts=loss == "aborted")
    settings = {
        "url": f"https://127.0.0.1:{link.port}/",
        "wifi": {"ssid": "home", "password": "secret"},
        "timeout": 10,
        "deadline": 300,
        "hang": 60,
    }
    with (
        contextlib.closing(link),
        Lab(tmp_path, settings=settings, network=False, speed=10) as lab,
    ):
        link.target = int(lab.url.rstrip("/").rpartition(":")[2])
        lab.publish(lab.firmware("1.1.0", size=SIZE), "1.1.0")
        lab.power_on()
        come_back(lab, link)  # the first time: DHCP is slow
        for _ in STEPS:
            assert link.lost.wait(60), lab.console[-20:]
            come_back(lab, link)
        lab.wait(lambda e: e.name == "trial")
        link.down()  # and once more while the new image proves itself
        come_back(lab, link)
        lab.wait(lambda e: e.name == "confirmed")
        assert lab.wait_for_server(lambda row: row["current_version"] == "1.1.0")
        lab.power_off()
        assert lab.describe()["boots"] == "ota_1"
    assert link.steps == []
    assert link.passed < SIZE + len(STEPS) * (BLOCK + 10_000)
