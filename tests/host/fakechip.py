"""An ESP32 in download mode on a TCP port: what esptool meets there, over a flash in memory.

The ROM's loader, then, once esptool has loaded its stub, the stub: as far as `twinslot flash`
goes. It checks what a chip checks (checksums, sequence, sector borders) and answers errors.

Source: Espressif's esptool docs/en/advanced-topics/serial-protocol.rst; W25Q32 data sheet (id).
"""

import hashlib
import socket
import struct
import threading
import zlib

import serial
from serial import rfc2217

_REQUEST = struct.Struct("<BBHI")
_MAGIC_REG, _MAGIC = 0x40001000, 0x00F01D83
_SPI = 0x3FF42000
_SPI_USR2, _SPI_W0 = _SPI + 0x24, _SPI + 0x80
_EFUSE = 0x3FF5A000
_FLASH_IDS = {2 << 20: 0x1540EF, 4 << 20: 0x1640EF, 8 << 20: 0x1740EF, 16 << 20: 0x1840EF}
_SFDP = 0x50444653
_FAILED, _UNKNOWN, _BAD_CHECKSUM = b"\x01\x06", b"\x01\x05", b"\x01\x07"
_OK = b"\0\0"
SECTOR = 4096


class FakeChip(threading.Thread):
    """Serves one connection at a time on ``self.port`` until closed.

    Args:
        flash: bytearray, the whole flash.
        fail_at: flash offset whose programming silently goes wrong (a worn cell).
        efuses: {word: value} of block 0.
    """

    def __init__(self, flash, fail_at=None, efuses=None):
        super().__init__(daemon=True)
        self.flash = flash
        self.fail_at = fail_at
        self.efuses = efuses or {}
        self.ops = []  # (operation, flash offset, size)
        self.resets = 0
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self.url = f"socket://127.0.0.1:{self.port}"

    def run(self):
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                try:
                    self._serve(connection)
                except (ConnectionError, EOFError):
                    pass

    def close(self):
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.close()

    # ---- frames

    def _serve(self, connection):
        self._connection = connection
        self._buffer = b""
        self._registers = {}
        self._stub = False
        while True:
            frame = self._receive()
            if len(frame) < 8 or frame[0] != 0:
                continue
            _, op, length, check = _REQUEST.unpack(frame[:8])
            data = frame[8:]
            assert len(data) == length
            handler = getattr(self, f"_op_{op:02x}", None)
            if handler is None or (op >= 0xD0 and not self._stub):
                self._answer(op, status=_UNKNOWN)
                continue
            handler(op, data, check)

    def _receive(self):
        while True:
            if b"\xc0" in self._buffer:
                frame, _, self._buffer = self._buffer.partition(b"\xc0")
                if frame:
                    return frame.replace(b"\xdb\xdc", b"\xc0").replace(b"\xdb\xdd", b"\xdb")
                continue
            more = self._connection.recv(65536)
            if not more:
                raise EOFError
            self._buffer += more

    def _send(self, frame):
        frame = frame.replace(b"\xdb", b"\xdb\xdd").replace(b"\xc0", b"\xdb\xdc")
        self._connection.sendall(b"\xc0" + frame + b"\xc0")

    def _answer(self, op, value=0, data=b"", status=_OK):
        data += status if self._stub else status + b"\0\0"
        self._send(_REQUEST.pack(1, op, len(data), value) + data)

    # ---- ROM and stub

    def _op_08(self, op, data, _):  # SYNC
        for _ in range(8):
            self._answer(op, 0x20120707)

    def _op_0a(self, op, data, _):  # READ_REG
        self._answer(op, self._read_register(struct.unpack("<I", data)[0]))

    def _read_register(self, address):
        if address == _MAGIC_REG:
            return _MAGIC
        if address == _SPI_W0:
            command = self._registers.get(_SPI_USR2, 0) & 0xFF
            return {0x9F: _FLASH_IDS[len(self.flash)], 0x5A: _SFDP}.get(command, 0)
        if address == _SPI:
            return 0  # the command is done
        if _EFUSE <= address < _EFUSE + 0x1C:
            return self.efuses.get((address - _EFUSE) // 4, 0)
        return self._registers.get(address, 0)

    def _op_09(self, op, data, _):  # WRITE_REG
        address, value = struct.unpack_from("<II", data)
        self._registers[address] = value
        self._answer(op)

    def _op_05(self, op, data, _):  # MEM_BEGIN
        self._answer(op)

    def _op_07(self, op, data, check):  # MEM_DATA
        self._answer(op, status=_OK if _checksum(data[16:]) == check else _BAD_CHECKSUM)

    def _op_06(self, op, data, _):  # MEM_END: runs what was loaded
        self._answer(op)
        self._stub = True
        self._send(b"OHAI")

    def _op_0b(self, op, data, _):  # SPI_SET_PARAMS
        self._answer(op)

    _op_0d = _op_0f = _op_0b  # SPI_ATTACH, CHANGE_BAUDRATE

    def _op_02(self, op, data, _):  # FLASH_BEGIN
        size, _, _, offset = struct.unpack_from("<IIII", data)
        self._begin(op, offset, size, inflate=None)

    def _op_10(self, op, data, _):  # FLASH_DEFL_BEGIN
        size, _, _, offset = struct.unpack_from("<IIII", data)
        self._begin(op, offset, size, inflate=zlib.decompressobj())

    def _begin(self, op, offset, size, inflate):
        if offset % SECTOR or offset + size > len(self.flash):
            self._answer(op, status=_FAILED)
            return
        self.ops.append(("write", offset, size))
        self._erase(offset, -(-size // SECTOR) * SECTOR)
        self._at, self._end, self._inflate, self._sequence = offset, offset + size, inflate, 0
        self._answer(op)

    def _op_03(self, op, data, check):  # FLASH_DATA
        length, sequence = struct.unpack_from("<II", data)
        block = data[16:]
        if _checksum(block) != check or length != len(block) or sequence != self._sequence:
            self._answer(op, status=_BAD_CHECKSUM)
            return
        self._sequence += 1
        plain = self._inflate.decompress(block) if self._inflate else block
        plain = plain[: self._end - self._at]
        for i, byte in enumerate(plain, self._at):
            self.flash[i] &= byte
        if self.fail_at is not None and self._at <= self.fail_at < self._at + len(plain):
            self.flash[self.fail_at] = 0
        self._at += len(plain)
        self._answer(op)

    _op_11 = _op_03  # FLASH_DEFL_DATA

    def _op_04(self, op, data, _):  # FLASH_END
        self._answer(op)

    _op_12 = _op_04  # FLASH_DEFL_END

    def _op_13(self, op, data, _):  # SPI_FLASH_MD5
        offset, size = struct.unpack_from("<II", data)
        self._answer(op, data=hashlib.md5(self.flash[offset : offset + size]).digest())

    # ---- the stub alone

    def _op_d1(self, op, data, _):  # ERASE_REGION
        offset, size = struct.unpack("<II", data)
        if offset % SECTOR or size % SECTOR:
            self._answer(op, status=_FAILED)
            return
        self.ops.append(("erase", offset, size))
        self._erase(offset, size)
        self._answer(op)

    def _op_d2(self, op, data, _):  # READ_FLASH
        offset, size, block, _ = struct.unpack("<IIII", data)
        self._answer(op)
        content = bytes(self.flash[offset : offset + size])
        for i in range(0, size, block):
            self._send(content[i : i + block])
            self._receive()
        self._send(hashlib.md5(content).digest())

    def _erase(self, offset, size):
        self.flash[offset : offset + size] = b"\xff" * size


def _checksum(data):
    check = 0xEF
    for byte in data:
        check ^= byte
    return check


class Rfc2217Bridge(threading.Thread):
    """A terminal server before a FakeChip: RFC 2217 outside, plain TCP inside. One client."""

    def __init__(self, chip):
        super().__init__(daemon=True)
        self._chip = chip
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"rfc2217://127.0.0.1:{self._server.getsockname()[1]}"

    def run(self):
        connection, _ = self._server.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        serial_port = serial.serial_for_url(self._chip.url, timeout=0)
        with connection, serial_port:
            lock = threading.Lock()

            class Wire:
                def write(self, data):
                    with lock:
                        connection.sendall(data)

            manager = rfc2217.PortManager(serial_port, Wire())
            done = threading.Event()

            def back():
                while not done.is_set():
                    data = serial_port.read(4096)
                    if data:
                        Wire().write(b"".join(manager.escape(data)))
                    else:
                        done.wait(0.002)

            threading.Thread(target=back, daemon=True).start()
            while data := connection.recv(4096):
                serial_port.write(b"".join(manager.filter(data)))
            done.set()

    def close(self):
        self._server.close()
