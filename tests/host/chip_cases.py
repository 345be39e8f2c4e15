"""Run under MicroPython and CPython by the tests, which compare what it prints.

micropython chip_cases.py flash|otadata|image WORK_FOLDER CHIP_FOLDER
"""

import hashlib
import sys

case, work, chip_folder = sys.argv[1:]
sys.path.insert(0, chip_folder)

import flash as nor  # noqa: E402
import image  # noqa: E402
import otadata  # noqa: E402
import table  # noqa: E402

UNBUFFERED = {} if sys.implementation.name == "micropython" else {"buffering": 0}


class Dice:
    """The same numbers on every Python."""

    def __init__(self, seed):
        self.state = seed

    def below(self, n):
        self.state = (self.state * 1103515245 + 12345) & 0x7FFFFFFF
        return (self.state >> 8) % n

    def data(self, n):
        return bytes([self.below(256) for _ in range(n)])


def new_file(name, data, times=1):
    path = work + "/" + name
    with open(path, "wb") as f:
        for _ in range(times):
            f.write(data)
    return open(path, "r+b", **UNBUFFERED)


def digest_of(file):
    sha = hashlib.sha256()
    file.seek(0)
    while True:
        data = file.read(4096)
        if not data:
            return sha.digest()
        sha.update(data)


def flash_case():
    size = 0x40000
    shapes = [None] + list(nor.SHAPES)  # noqa: RUF005
    for fault in [None] + [nor.Fault(90, "torn", shape, 7) for shape in shapes]:
        file = new_file("flash.bin", b"\xff" * 4096, size // 4096)
        stats_file = new_file("stats.bin", b"")
        stats = nor.Stats(stats_file, size)
        chip = nor.Flash(file, size, stats=stats, strict=False, fault=fault)
        dice = Dice(5)
        try:
            for _ in range(60):
                if dice.below(3):
                    data = dice.data(dice.below(700))
                    chip.program(dice.below(size - len(data)), data)
                else:
                    sector = dice.below(size // 4096)
                    chip.erase(sector * 4096, 4096 * (1 + dice.below(size // 4096 - sector)))
            back = bytearray(1000)
            chip.read(5000, back)
            print(hashlib.sha256(back).digest())
        except nor.PowerCut as e:
            print(e, chip.dead)
        print(fault, digest_of(file), digest_of(stats_file), stats.ops)
    for shape in shapes:
        for seed in range(12):
            print(shape, seed, nor.torn(b"\xff" * 40, bytes(range(40)), shape, seed))
    file = new_file("flash.bin", b"\xa5" * size)
    strict = nor.Flash(file, size)
    for at, data in ((3, b"\xa5\x05\x5a"), (300, b"\x00\x80\xa4"), (0, b"\xff"), (size, b"x")):
        try:
            strict.program(at, data)
            print("done")
        except nor.FlashError as e:
            print(e)


def otadata_case():
    seqs = (0, 1, 2, 3, 7, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFC, 0xFFFFFFFE, 0xFFFFFFFF)
    for a in seqs:
        for b in seqs:
            for state in (0, 1, 2, 3, 4, 5, 0xFFFFFFFF):
                pair = [otadata.entry(a, state), otadata.entry(b, otadata.VALID)]
                row = [otadata.active(pair)]
                for n in (1, 2, 3, 16):
                    row.append(otadata.boot_slot(pair, n))
                    row.append(otadata.slot_state(pair, n - 1, n))
                    try:
                        i, e = otadata.next_entry(pair, n - 1, n)
                        row.append((i, otadata.pack(e)))
                    except otadata.OtadataError as e:
                        row.append(str(e))
                print(a, b, state, row)
    parts = [table.Partition("nvs", 1, 2, 0x9000, 0x4000, 0)]
    raw = table.build(parts)
    print(raw, table.parse(raw, chip_size=4 << 20), table.parse(raw, require_md5=True))
    try:
        table.parse(b"\x12\x34" + raw)
    except table.TableError as e:
        print(e)


def image_case():
    with open(work + "/image.bin", "rb") as f:
        size = f.seek(0, 2)

        def read(at, buf):
            f.seek(at)
            f.readinto(buf)

        info = image.verify(read, size, "esp32", 0x10000, in_bootloader=True)
        print(info.segments, info.length, info.digest, info.desc)
        print(image.read_desc(read, info)[:3], image.find_tree(read, info))
        for at in (0, 12, 40, size // 2, size - 40, size - 1):

            def read(at, buf, bad=at):
                f.seek(at)
                f.readinto(buf)
                if at <= bad < at + len(buf):
                    buf[bad - at] ^= 0x40

            try:
                image.verify(read, size, "esp32", 0x10000)
                print("accepted")
            except image.ImageError as e:
                print(at, e)


{"flash": flash_case, "otadata": otadata_case, "image": image_case}[case]()
