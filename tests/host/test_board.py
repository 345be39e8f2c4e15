"""Boots, resets, watchdog, power cuts: what a program on the board lives through."""

import os
import sys
import threading
import time
from pathlib import Path

import pytest
from boards import SIZE, firmware, flash_file, new_board, stock

from twinslot_tools.virtual_esp32 import layout, process, show, vfs
from twinslot_tools.virtual_esp32.board import Board, BoardError
from twinslot_tools.virtual_esp32.chip.flash import Fault, flip_bits


def outcomes(result):
    return [(b.partition, b.reset_cause, b.outcome) for b in result.boots]


# ---- what runs


def test_files_run_on_a_firmware_without_a_tree(tmp_path):
    result = new_board(tmp_path, "print('hello from', __name__)").run()
    assert outcomes(result) == [("ota_0", 1, "idle")]
    assert result.console == "hello from __main__\n"


def test_boot_py_and_main_py_share_their_names(tmp_path):
    files = {"boot.py": "import machine\nready = True\n"}
    result = new_board(tmp_path, "print(ready, machine.reset_cause())", files=files).run()
    assert result.console == "True 1\n"


def test_main_py_does_not_run_after_a_boot_py_that_failed(tmp_path):
    result = new_board(tmp_path, "print('main')", files={"boot.py": "1/0"}).run()
    assert "ZeroDivisionError" in result.boots[0].error
    assert "main\n" not in result.console


def test_frozen_main_wins_over_the_file_and_finds_its_modules(tmp_path):
    image = firmware(
        tmp_path / "tree",
        {"main.py": "import app.core\nprint(__name__, app.core.NAME)", "app/core.py": "NAME = 7"},
    )
    board = new_board(tmp_path, "print('file')", slots={"ota_0": image})
    assert board.run().console == "__main__ 7\n"


def test_a_file_hides_a_frozen_module_and_lib_comes_last(tmp_path):
    tree = {"main.py": "import a, b\nprint(a.WHERE, b.WHERE)"}
    tree.update({"a.py": "WHERE = 'frozen'", "b.py": "WHERE = 'frozen'"})
    image = firmware(tmp_path / "tree", tree)
    files = {"a.py": "WHERE = 'root'", "lib/b.py": "WHERE = 'lib'"}
    board = new_board(tmp_path, files=files, slots={"ota_0": image})
    assert board.run().console == "root frozen\n"


def test_user_modules_may_have_the_names_of_the_simulator(tmp_path):
    names = ("flash", "table", "image", "nvs", "otadata", "soc", "start", "shim_time", "volume")
    files = {f"{name}.py": f"print('mine: {name}')" for name in names}
    main = "".join(f"import {name}\n" for name in names)
    result = new_board(tmp_path, main, files=files).run()
    assert result.console == "".join(f"mine: {name}\n" for name in names)


def test_the_program_sees_only_the_boards_files(tmp_path):
    main = """
import os, sys
print(os.listdir("/"), [e[0] for e in os.ilistdir()])
print(sys.platform, sys.path[0], sys.argv, hasattr(os, "system"))
try:
    open("/etc/passwd")
except OSError as e:
    print(e.errno)
"""
    result = new_board(tmp_path, main).run()
    assert result.console == "['main.py'] ['main.py']\nesp32  [] False\n2\n"


@pytest.mark.parametrize(
    ("chip", "size", "build_name"),
    [
        ("esp32", 4, "ESP32_GENERIC"),
        ("esp32s3", 8, "ESP32_GENERIC_S3"),
        ("esp32c3", 4, "ESP32_GENERIC_C3"),
        ("esp32c5", 4, "ESP32_GENERIC_C5"),
        ("esp32s3", 16, "ESP32_GENERIC_S3"),
    ],
)
def test_chips_and_flash_sizes(tmp_path, chip, size, build_name):
    main = "import sys, esp, os\nprint(sys.implementation._build, esp.flash_size(), os.uname()[0])"
    path = flash_file(tmp_path / "f.bin", {"main.py": main}, chip=chip, size=size << 20)
    assert Board(path).run().console == f"{build_name} {size << 20} {chip}\n"


# ---- the volume


def test_a_blank_volume_is_formatted_with_a_stub_boot_py(tmp_path):
    board = new_board(tmp_path)
    assert board.run().console == "Performing initial setup\n"
    assert list(vfs.read_files(board.path)) == ["/boot.py"]
    assert board.run().console == ""


def test_a_corrupt_volume_is_reported_and_left_alone(tmp_path):
    board = new_board(tmp_path, "print('hello')")
    partitions = show.describe(board.path.read_bytes())["partitions"]
    where = next(p for p in partitions if p["label"] == "vfs")
    with board.path.open("r+b") as f:
        for block in range(2):
            flip_bits(f, where["offset"] + block * 4096, b"\x5a" * 4096)
    before = board.path.read_bytes()[where["offset"] :]
    result = board.run()
    assert "filesystem appears to be corrupted" in result.boots[0].error
    assert board.path.read_bytes()[where["offset"] :] == before


def test_without_a_vfs_row_the_rest_of_flash_is_the_volume(tmp_path):
    table = [p for p in layout.load_layout("4MiB", SIZE) if p.label != "vfs"]
    main = "from esp32 import Partition\nprint(Partition('vfs').info())"
    board = Board(flash_file(tmp_path / "f.bin", {"main.py": main}, table=table))
    assert board.run().console == "(1, 129, 3735552, 458752, 'vfs', False)\n"


def test_files_survive_the_way_in_and_out(tmp_path):
    board = new_board(tmp_path)
    files = {"/a/b/c.bin": bytes(range(256)) * 40, "/empty": b"", "/x.txt": b"x"}
    vfs.write_files(board.path, files)
    assert vfs.read_files(board.path) == files
    vfs.write_files(board.path, {"/x.txt": b"y"}, remove=["/a"])
    assert vfs.read_files(board.path) == {"/empty": b"", "/x.txt": b"y"}


def test_a_full_volume_is_an_error_of_one_line(tmp_path):
    board = new_board(tmp_path)
    with pytest.raises(vfs.VolumeError, match="no space left"):
        vfs.write_files(board.path, {"/big": bytes(600_000)})


# ---- resets and their causes

STEPS = """
import machine, time
rtc = machine.RTC()
step = rtc.memory()
print(machine.reset_cause(), step, time.time() >= 1000)
if step == b"":
    rtc.memory(b"1")
    rtc.datetime((2000, 1, 1, 0, 0, 16, 40, 0))
    machine.reset()
if step == b"1":
    rtc.memory(b"2")
    machine.soft_reset()
if step == b"2":
    rtc.memory(b"3")
    machine.deepsleep(60_000)
if step == b"3":
    rtc.memory(b"4")
    import sys
    sys.exit()
"""


def test_reset_causes_and_what_the_rtc_keeps(tmp_path):
    board = new_board(tmp_path, STEPS)
    result = board.run(timeout=20)
    assert [b.outcome for b in result.boots] == [
        "reset",
        "soft-reset",
        "deepsleep",
        "soft-reset",
        "idle",
    ]
    assert result.console.splitlines() == [
        "1 b'' False",
        "2 b'1' True",
        "MPY: soft reboot",
        "5 b'2' True",
        "4 b'3' True",
        "MPY: soft reboot",
        "5 b'4' True",
    ]
    assert result.boots[2].seconds < 5  # deep sleep isn't slept
    assert board.run(max_boots=1).console == "1 b'' False\n"  # power lost between two runs


def test_deep_sleep_puts_the_clock_forward(tmp_path):
    main = """
import machine, time
if machine.reset_cause() == machine.DEEPSLEEP_RESET:
    print(3600 <= time.time() < 3660, machine.wake_reason() == machine.TIMER_WAKE)
else:
    machine.deepsleep(3_600_000)
"""
    assert new_board(tmp_path, main).run().console == "True True\n"


def test_deep_sleep_without_a_time_ends_the_run(tmp_path):
    result = new_board(tmp_path, "import machine\nmachine.deepsleep()").run()
    assert outcomes(result) == [("ota_0", 1, "deepsleep")]


def test_the_clock_is_unset_at_power_on_or_the_hosts(tmp_path):
    main = "import time\nprint(time.gmtime()[:3], len(time.gmtime()), type(time.time()))"
    result = new_board(tmp_path, main).run()
    assert result.console == "(2000, 1, 1) 8 <class 'int'>\n"
    today = tuple(time.gmtime()[:3])
    assert new_board(tmp_path, main, clock="host").run().console.startswith(str(today))


def test_nothing_runs_on_after_a_reset(tmp_path):
    main = """
import machine, esp32
if machine.reset_cause() == 1:
    try:
        machine.reset()
    except:
        print("caught")
    finally:
        print("finally")
    print("went on")
print("second boot")
"""
    assert new_board(tmp_path, main).run().console == "second boot\n"


def test_an_uncaught_exception_leaves_the_board_at_its_prompt(tmp_path):
    main = "def f():\n    raise ValueError('broken')\nf()\n"
    result = new_board(tmp_path, main).run()
    boot = result.boots[0]
    assert boot.outcome == "idle"
    assert boot.error == boot.console
    assert boot.error.splitlines()[-1] == "ValueError: broken"
    assert 'File "main.py", line 2, in f' in boot.error


def test_threads_go_on_at_the_prompt_and_the_run_ends_with_the_last_one(tmp_path):
    main = """
import _thread, time
def work(n):
    time.sleep_ms(n)
    print("done", n)
for n in (150, 50):
    _thread.start_new_thread(work, (n,))
print("prompt")
"""
    result = new_board(tmp_path, main).run(timeout=10)
    assert result.console == "prompt\ndone 50\ndone 150\n"
    assert result.outcome == "idle" and result.boots[0].seconds < 2


def test_a_one_shot_timer_at_the_prompt_ends_the_run(tmp_path):
    main = """
from machine import Timer
Timer(-1).init(mode=Timer.ONE_SHOT, period=100, callback=lambda t: print("once"))
"""
    result = new_board(tmp_path, main).run(timeout=10)
    assert (result.console, result.outcome) == ("once\n", "idle")


def test_max_boots_ends_a_reset_loop(tmp_path):
    result = new_board(tmp_path, "import machine\nmachine.reset()").run(max_boots=4)
    assert [b.reset_cause for b in result.boots] == [1, 2, 2, 2]


def test_timeout_ends_an_endless_program(tmp_path):
    started = time.monotonic()
    result = new_board(tmp_path, "while True: pass").run(timeout=0.5)
    assert result.outcome == "timeout"
    assert time.monotonic() - started < 3


# ---- protection


@pytest.mark.parametrize(
    "write",
    [
        "Partition(Partition.RUNNING).writeblocks(0, bytes(4096))",
        "Partition(Partition.RUNNING).writeblocks(5, b'x', 0)",
        "Partition(Partition.RUNNING).ioctl(6, 3)",
        "esp.flash_write(0x8000, b'x')",
        "esp.flash_erase(1)",
    ],
)
def test_writing_the_running_slot_or_the_bootloader_aborts_the_chip(tmp_path, write):
    main = f"""
import machine, esp
from esp32 import Partition
if machine.reset_cause() == 1:
    try:
        {write}
    except:
        print("caught")
print("cause", machine.reset_cause())
"""
    board = new_board(tmp_path, main)
    slot = board.path.read_bytes()[:0x1D0000]
    result = board.run()
    assert [b.outcome for b in result.boots] == ["panic", "idle"]
    assert result.boots[1].console == "cause 2\n"
    after = board.path.read_bytes()
    assert after[:0x9000] == slot[:0x9000] and after[0x10000:0x1D0000] == slot[0x10000:]


def test_readonly_partitions_refuse_writes(tmp_path):
    table = [
        p._replace(flags=2) if p.label == "phy_init" else p for p in layout.load_layout("4MiB")
    ]
    main = """
from esp32 import Partition
p = Partition("phy_init")
for write in (lambda: p.writeblocks(0, bytes(4096)), lambda: p.writeblocks(0, b"x", 0),
              lambda: p.ioctl(6, 0)):
    try:
        write()
    except OSError as e:
        print(e.args)
"""
    board = Board(flash_file(tmp_path / "f.bin", {"main.py": main}, table=table))
    assert board.run().console == "(-269, 'ESP_ERR_NOT_ALLOWED')\n" * 3


def test_strict_flash_refuses_what_lenient_flash_ands(tmp_path):
    main = """
from esp32 import Partition
p = Partition("ota_1")
p.ioctl(6, 0)
p.writeblocks(0, b"\\x0f", 0)
try:
    p.writeblocks(0, b"\\xfe", 0)
except Exception as e:
    print("refused")
buf = bytearray(1)
p.readblocks(0, buf)
print(buf[0])
"""
    assert new_board(tmp_path, main).run().console == "refused\n15\n"
    assert new_board(tmp_path, main, strict=False).run().console == "14\n"


# ---- tables without OTA

FACTORY = """
nvs,      data, nvs,     0x9000,  0x6000
phy_init, data, phy,     0xf000,  0x1000
factory,  app,  factory, 0x10000, 0x1f0000
"""


def test_a_factory_layout_has_no_ota(tmp_path):
    main = """
from esp32 import Partition
print(Partition(Partition.RUNNING).info()[4])
for call in (lambda: Partition(Partition.BOOT), Partition.mark_app_valid_cancel_rollback,
             Partition(1).set_boot, Partition(1).get_next_update):
    try:
        print(call())
    except OSError as e:
        print(e.args)
"""
    board = Board(
        flash_file(tmp_path / "f.bin", {"main.py": main}, table=layout.parse_csv(FACTORY, SIZE))
    )
    assert board.run().console.splitlines() == [
        "factory",
        "(2,)",
        "(-261, 'ESP_ERR_NOT_FOUND')",
        "(-261, 'ESP_ERR_NOT_FOUND')",
        "(2,)",
    ]


def test_confirming_while_factory_runs_fails(tmp_path):
    table = layout.load_layout("4MiB", SIZE)
    factory = table[4]._replace(label="factory", subtype=0)
    main = """
from esp32 import Partition
try:
    Partition.mark_app_valid_cancel_rollback()
except OSError as e:
    print(Partition(1).info()[4], e.args)
"""
    path = flash_file(
        tmp_path / "f.bin", {"main.py": main}, table=[*table[:4], factory, *table[5:]]
    )
    assert Board(path).run().console == "factory (1, 'ESP_FAIL')\n"


# ---- watchdog


def test_watchdog_resets_a_program_that_hangs(tmp_path):
    main = """
import machine, time
print("cause", machine.reset_cause())
if machine.reset_cause() == machine.PWRON_RESET:
    wdt = machine.WDT(timeout=400)
    for i in range(10):
        time.sleep_ms(100)
        wdt.feed()
    print("fed for a second")
    while True:
        pass
"""
    result = new_board(tmp_path, main).run(timeout=20)
    assert result.console == "cause 1\nfed for a second\ncause 3\n"
    assert outcomes(result) == [("ota_0", 1, "wdt"), ("ota_0", 3, "idle")]
    assert 1.2 < result.boots[0].seconds < 5


def test_watchdog_counts_on_at_the_prompt_and_over_a_soft_reset(tmp_path):
    main = """
import machine
cause = machine.reset_cause()
if cause == 1:
    machine.WDT(0, 300)
    machine.soft_reset()
"""
    result = new_board(tmp_path, main).run(timeout=20)
    assert [b.outcome for b in result.boots] == ["soft-reset", "wdt", "idle"]


def test_constructing_the_watchdog_again_only_changes_the_timeout(tmp_path):
    main = """
import machine, time
if machine.reset_cause() == 1:
    machine.WDT(timeout=200)
    machine.WDT(timeout=60_000)
    time.sleep_ms(500)
    print("alive")
    machine.reset()
"""
    assert new_board(tmp_path, main).run(timeout=20).console == "alive\n"


# ---- timers


def test_a_software_watchdog_ends_a_hanging_main_loop(tmp_path):
    main = """
import machine, time
if machine.reset_cause() == 1:
    timer = machine.Timer(0)
    timer.init(mode=machine.Timer.ONE_SHOT, period=200, callback=lambda t: machine.reset())
    {hang}
print("second boot")
"""
    for hang in (
        "while True: pass",
        "time.sleep(100)",
        "import asyncio; asyncio.run(asyncio.Event().wait())",
        "import select; select.poll().poll(100_000)",
    ):
        result = new_board(tmp_path, main.replace("{hang}", hang)).run(timeout=10)
        assert [b.outcome for b in result.boots] == ["reset", "idle"], hang
        assert result.boots[0].seconds < 2


def test_a_timer_goes_on_at_the_prompt(tmp_path):
    main = """
import machine
left = 5
def tick(timer):
    global left
    left -= 1
    print("tick", left)
    if not left:
        machine.reset()
if machine.reset_cause() == 1:
    machine.Timer(-1).init(period=20, callback=tick)
"""
    result = new_board(tmp_path, main).run(timeout=10)
    assert result.boots[0].console == "".join(f"tick {n}\n" for n in (4, 3, 2, 1, 0))


# ---- power cuts

COUNT = """
from esp32 import NVS
nvs = NVS("app")
try:
    n = nvs.get_i32("n")
except OSError:
    n = 0
print("n is", n)
for i in range(n, 10):
    nvs.set_i32("n", i + 1)
"""


def test_power_cut_at_a_flash_operation_and_on_again(tmp_path):
    whole = new_board(tmp_path, COUNT).run()
    assert whole.outcome == "idle"
    result = new_board(tmp_path, COUNT).run(fault=Fault(12, "before", None, 0))
    assert [b.outcome for b in result.boots] == ["power-cut", "idle"]
    assert [b.reset_cause for b in result.boots] == [1, 1]
    first, second = (int(b.console.split()[-1]) for b in result.boots)
    assert first == 0 and 0 < second < 10
    assert result.flash["ops"] > whole.flash["ops"]


def test_power_cuts_are_numbered_over_boots_bootloader_included(tmp_path):
    main = """
import machine
from esp32 import Partition
if machine.reset_cause() == 1:
    Partition("ota_1").set_boot()
    machine.reset()
print(Partition(1).info()[4])
"""
    trace = new_board(tmp_path, main).run()
    # Seed: erase and write; set_boot: two; new -> pending: two.
    assert trace.flash["ops"] == 6
    assert trace.console == "ota_1\n"
    cut = new_board(tmp_path, main).run(fault=Fault(6, "before", None, 0), max_boots=2)
    assert outcomes(cut) == [("ota_0", 1, "reset"), (None, 2, "power-cut")]


def test_a_cut_inside_littlefs_is_no_io_error(tmp_path):
    main = """
try:
    with open("big", "wb") as f:
        for i in range(40):
            f.write(bytes(1000))
except OSError:
    print("an error the program could see")
"""
    whole = new_board(tmp_path, main).run()
    result = new_board(tmp_path, main).run(
        fault=Fault(whole.flash["ops"] // 2, "torn", "bits", 1), max_boots=1
    )
    assert result.outcome == "power-cut"
    assert result.console == ""


REWRITE = """
import os
{how}
"""


@pytest.mark.parametrize(
    ("how", "allowed"),
    [
        (  # the pattern for state: the rename is one commit
            "with open('state.tmp', 'w') as f: f.write('new' * 500)\n"
            "os.rename('state.tmp', 'state')",
            ("old" * 500, "new" * 500),
        ),
        ("with open('state', 'w') as f: f.write('new' * 500)", ("old" * 500, "new" * 500)),
        # A new name is committed when the file is opened: it may be found empty.
        ("with open('fresh', 'w') as f: f.write('new' * 500)", (None, "", "new" * 500)),
    ],
    ids=["rename", "overwrite", "new-file"],
)
def test_power_cut_at_every_operation_of_a_file_write(tmp_path, how, allowed):
    name = "/fresh" if "fresh" in how else "/state"
    board = new_board(tmp_path, REWRITE.format(how=how), files={"state": "old" * 500})
    flash = board.path.read_bytes()
    ops = board.run().flash["ops"]
    seen = set()
    for op in range(3, ops + 1):  # 1 and 2 are the bootloader's
        for mode, shape in (("after", None), ("torn", "bits")):
            board.path.write_bytes(flash)
            fault = Fault(op, mode, shape, op)
            assert board.run(max_boots=1, fault=fault).outcome == "power-cut"
            data = vfs.read_files(board.path).get(name)
            seen.add(data if data is None else data.decode())
    assert seen == set(allowed)


def test_counters_tell_erases_and_bytes(tmp_path):
    main = """
from esp32 import Partition
p = Partition("ota_1")
p.writeblocks(0, bytes(65536))
p.writeblocks(17, bytes(4096))
"""
    flash = new_board(tmp_path, main).run().flash
    assert flash["block_erases"] == 1
    assert flash["sector_erases"] == 2  # with the seed of otadata
    assert flash["bytes_programmed"] == 65536 + 4096 + 32
    assert flash["page_programs"] == 256 + 16 + 1
    assert flash["busy_us"] > 150_000


# ---- buttons and hooks


def test_reset_button_and_power_from_another_thread(tmp_path):
    main = "import machine, time\nprint(machine.reset_cause())\nwhile True: time.sleep_ms(10)"
    board = new_board(tmp_path, main)
    presses = [board.press_reset, board.cut_power, board.stop]

    def on_console(line):
        threading.Timer(0.05, presses[len(seen)]).start()
        seen.append(line)

    seen = []
    result = board.run(timeout=20, on_console=on_console)
    assert [b.outcome for b in result.boots] == ["reset", "power-cut", "stopped"]
    assert seen == ["1", "1", "1"]


def test_until_stops_the_run(tmp_path):
    main = "import time\nfor i in range(1000):\n    print('line', i)\n    time.sleep_ms(5)"
    result = new_board(tmp_path, main).run(until=lambda e: e.get("line") == "line 3")
    assert result.outcome == "stopped"
    assert "line 3\n" in result.console and "line 900" not in result.console


def test_pins_are_reported_when_they_change(tmp_path):
    main = """
from machine import Pin
led = Pin(2, Pin.OUT, value=0)
led.on(); led.on(); led.toggle(); led.value(1); led.off()
"""
    events = []
    new_board(tmp_path, main).run(on_event=events.append)
    assert [e["value"] for e in events if e["event"] == "pin"] == [0, 1, 0, 1, 0]


# ---- heap


@pytest.mark.parametrize("heap", ["64K", "128K", "1M"])
def test_heap_is_what_the_program_gets_in_one_piece(tmp_path, heap):
    board = new_board(tmp_path, "import gc\ngc.collect()\nprint(gc.mem_free())", heap=heap)
    result = board.run()
    assert board.heap - 2048 < int(result.console) < board.heap + 4096
    assert result.heap["fakes"] > 50_000
    big = f"x = bytearray({board.heap - 8192})\nprint(len(x))"
    assert new_board(tmp_path, big, heap=heap).run().console == f"{board.heap - 8192}\n"
    more = new_board(tmp_path, f"x = bytearray({board.heap + 1})", heap=heap).run()
    assert "MemoryError" in more.boots[0].error


def test_a_firmwares_tree_is_not_paid_from_the_programs_heap(tmp_path):
    main = "import gc\ngc.collect()\nprint(gc.mem_free())"
    tree = {"main.py": main, "data.txt": "x" * 300_000}
    board = new_board(tmp_path, slots={"ota_0": firmware(tmp_path / "tree", tree)}, heap="128K")
    vfs.write_files(board.path, {"/x": b""})
    assert 126 * 1024 < int(board.run().console) < 136 * 1024


def test_heap_is_the_same_where_the_fakes_can_not_be_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "chip_modules", lambda interpreter: process.CHIP_FOLDER)
    main = f"x = bytearray({112 * 1024})\nimport gc\ngc.collect()\nprint(gc.mem_free() + len(x))"
    result = new_board(tmp_path, main, heap="128K").run()
    assert 126 * 1024 < int(result.console) < 134 * 1024


# ---- trouble


def test_a_crashing_interpreter_is_an_outcome_of_its_own(tmp_path):
    main = "@micropython.viper\ndef f():\n    ptr32(0)[0] = 1\nf()"
    result = new_board(tmp_path, "import micropython\n" + main).run()
    assert result.outcome == "crash"
    assert "status -11" in result.boots[0].why


def test_nothing_to_boot(tmp_path):
    result = new_board(tmp_path, slots={}).run()
    assert result.outcome == "no-boot"
    assert "ota_0 is not bootable" in result.boots[0].why


def test_a_file_that_is_no_flash(tmp_path):
    (tmp_path / "x.bin").write_bytes(bytes(4096))
    with pytest.raises(BoardError, match="no bootloader of a known chip"):
        Board(tmp_path / "x.bin")
    with pytest.raises(BoardError, match="no flash file"):
        Board(tmp_path / "y.bin")
    with pytest.raises(BoardError, match="size '12 cows'"):
        new_board(tmp_path, heap="12 cows")


def test_the_other_slot_runs_when_the_first_is_damaged(tmp_path):
    main = "from esp32 import Partition as P\nprint(P(0).info()[4], P(1).info()[4])"
    board = new_board(tmp_path, main)
    board.run()
    with board.path.open("r+b") as f:
        flip_bits(f, 0x10000 + 1500, b"\x01")
    assert board.run().console == "ota_0 ota_1\n"


def test_set_boot_of_the_active_slot_keeps_the_other_record_with_idf_6(tmp_path):
    main = """
from esp32 import Partition
Partition("ota_1").set_boot()
Partition("ota_1").set_boot()
"""
    states = {}
    for idf6 in (False, True):
        board = new_board(tmp_path, main, idf6=idf6)
        board.run()
        entries = show.describe(board.path.read_bytes())["otadata"]
        states[idf6] = [(e["seq"], e["state"].lower()) for e in entries]
    assert states == {False: [(2, "new"), (2, "new")], True: [(1, "valid"), (2, "new")]}


# ---- the reference sequence of an upgrade

UPGRADE = """
# A program that knows esp32.Partition only; its step is kept in a file.
import machine
from esp32 import Partition

running = Partition(Partition.RUNNING)
passive = running.get_next_update()

def step():
    try:
        with open("step") as f:
            return int(f.read())
    except OSError:
        return 0

def go(next_step):
    with open("step", "w") as f:
        f.write(str(next_step))
    machine.reset()

def copy():
    buf = bytearray(4096)
    for block in range(passive.ioctl(4, None)):
        running.readblocks(block, buf)
        passive.writeblocks(block, buf)

n = step()
print("step", n, "on", running.info()[4])
if n == 0:
    copy()
    passive.set_boot()
    go(1)
elif n == 1:  # the copy runs; it does not confirm
    go(2)
elif n == 2:  # so the old one is back
    passive.set_boot()
    go(3)
elif n == 3:
    Partition.mark_app_valid_cancel_rollback()
    go(4)
elif n == 4:  # confirmed: it stays
    passive.set_boot()
    go(5)
elif n == 5:
    Partition.mark_app_valid_cancel_rollback()
    go(6)
"""


def test_reference_upgrade_sequence_of_a_program_that_knows_partition_only(tmp_path):
    board = new_board(tmp_path, UPGRADE, slots={"ota_0": stock()})
    result = board.run(timeout=60)
    assert result.console.splitlines() == [
        "step 0 on ota_0",
        "step 1 on ota_1",
        "step 2 on ota_0",
        "step 3 on ota_1",
        "step 4 on ota_1",
        "step 5 on ota_0",
        "step 6 on ota_0",
    ]
    described = show.describe(board.path.read_bytes())
    assert [(e["seq"], e["state"].lower()) for e in described["otadata"]] == [
        (3, "valid"),
        (2, "valid"),
    ]


def test_soft_reset_does_not_consume_the_trial_a_deep_sleep_wake_neither(tmp_path):
    main = """
import machine
from esp32 import Partition
rtc = machine.RTC()
n = len(rtc.memory())
print(n, Partition(1).info()[4])
rtc.memory(bytes(n + 1))
if n == 0:
    Partition("ota_1").set_boot()
    machine.reset()
elif n == 1:
    machine.soft_reset()
elif n == 2:
    machine.deepsleep(10)
elif n == 3:
    machine.reset()
"""
    result = new_board(tmp_path, main).run(timeout=20)
    boots = [boot.console.splitlines()[0] for boot in result.boots]
    assert boots == ["0 ota_0", "1 ota_1", "2 ota_1", "3 ota_1", "4 ota_0"]


def test_deep_sleep_right_after_set_boot_wakes_the_old_image(tmp_path):
    main = """
import machine
from esp32 import Partition
print(machine.reset_cause(), Partition(1).info()[4])
if machine.reset_cause() == 1:
    Partition("ota_1").set_boot()
    machine.deepsleep(10)
"""
    assert new_board(tmp_path, main).run().console == "1 ota_0\n4 ota_0\n"


# ---- an upgrade and the power

CONVERGE = """
# Decides from facts alone, as C.5 of the platform notes asks: which slot runs.
import machine
from esp32 import Partition

running = Partition(Partition.RUNNING).info()[4]
if running == "ota_0":
    Partition("ota_1").set_boot()
    machine.reset()
if Partition(Partition.BOOT).info()[4] == running:
    Partition.mark_app_valid_cancel_rollback()
print("done on", running)
"""


@pytest.fixture(scope="module")
def upgrade_trace(tmp_path_factory):
    """A board about to upgrade, and the number of flash operations that takes."""
    board = new_board(tmp_path_factory.mktemp("upgrade"), CONVERGE)
    flash = board.path.read_bytes()
    result = board.run(timeout=20)
    assert result.console == "done on ota_1\n"
    return flash, result.flash["ops"]


@pytest.mark.parametrize(
    ("mode", "shape"),
    [("before", None), ("after", None), ("torn", "prefix"), ("torn", "suffix"), ("torn", "bits")],
)
def test_power_cut_at_every_operation_of_an_upgrade(tmp_path, upgrade_trace, mode, shape):
    """F5, F6, F7: in set_boot, in the bootloader's marking, in the confirmation. The board always
    boots, and a program that tries again ends on the new slot, confirmed."""
    flash, ops = upgrade_trace
    assert ops == 8  # seed, set_boot, new -> pending, confirm: an erase and a write each
    for op in range(1, ops + 1):
        path = tmp_path / f"{op}.bin"
        path.write_bytes(flash)
        result = Board(path).run(max_boots=6, timeout=20, fault=Fault(op, mode, shape, op * 7 + 3))
        assert [b.outcome for b in result.boots].count("power-cut") == 1
        assert result.outcome == "idle", (op, outcomes(result))
        assert result.console.splitlines()[-1] == "done on ota_1", (op, outcomes(result))
        entries = show.describe(path.read_bytes())["otadata"]
        states = [e["state"].lower() for e in entries if e["slot"] == "ota_1" and e["crc_ok"]]
        assert states == ["valid"], (op, entries)


def test_an_interpreter_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MICROPYTHON", "no-such-micropython")
    with pytest.raises(BoardError, match=r"no-such-micropython: no such program"):
        new_board(tmp_path, "print(1)")


def test_an_interpreter_is_found_by_its_name_too(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.setenv("MICROPYTHON", "micropython")
    assert new_board(tmp_path, "print(1)").run(1, 20).outcome == "idle"
