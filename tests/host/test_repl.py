"""The prompt of the virtual board: mpremote and a person's terminal meet what a board has."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from boards import new_board
from mpremote.transport import TransportExecError
from prompts import Attended

from twinslot_tools.virtual_esp32 import port as ports

MPREMOTE = Path(sys.executable).with_name("mpremote")
LOOP = """
import time
kept = "of main"
print("main runs")
while True:
    time.sleep(1)
"""


def type_in(transport, text, until):
    """Type at the friendly prompt; return what came up to ``until``."""
    transport.serial.write(text.encode())
    shown = transport.read_until(1, until.encode(), timeout=20)
    assert shown.endswith(until.encode()), shown
    return shown.decode()


def test_mpremote_reads_and_writes_files_over_a_socket(tmp_path):
    (tmp_path / "local.txt").write_text("four lines\n" * 4)
    with Attended(new_board(tmp_path, LOOP)) as at:
        at.wait_for_line("main runs")
        command = ["connect", at.url, "cp", "local.txt", ":there.txt", "+", "cat", ":there.txt"]
        done = subprocess.run(
            [MPREMOTE, *command, "+", "exec", "import os; print(os.listdir('/'))"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "four lines\n" * 4 in done.stdout
    assert "['main.py', 'there.txt']" in done.stdout


@pytest.mark.parametrize("kind", ["tcp:0", "pty"])
def test_the_transport_runs_code_by_raw_paste(tmp_path, kind):
    with Attended(new_board(tmp_path, LOOP), kind) as at:
        at.wait_for_line("main runs")
        with at.transport() as transport:
            # Ten windows of flow control, in one literal.
            data = "0123456789" * 130
            assert transport.exec(f"print({data!r})").strip().decode() == data
            assert transport.use_raw_paste
            assert transport.eval("kept") == "of main"  # main.py's namespace
    assert at.port.lost == 0


def test_a_traceback_comes_apart_from_the_output_and_shows_no_frame_of_the_fakes(tmp_path):
    with Attended(new_board(tmp_path, LOOP)) as at:
        at.wait_for_line("main runs")
        with at.transport() as transport, pytest.raises(TransportExecError) as caught:
            transport.exec("print('before')\nimport os\nos.stat('/gone')")
        assert caught.value.status_code == b"before\r\n"
        assert caught.value.error_output.splitlines() == [
            "Traceback (most recent call last):",
            '  File "<stdin>", line 3, in <module>',
            "OSError: [Errno 2] ENOENT",
        ]


LOCKS = "import micropython\nmicropython.heap_lock()\nmicropython.heap_lock()\n1 // 0"


def test_a_program_that_ends_with_the_heap_locked_leaves_a_prompt_that_works(tmp_path):
    """As shared/runtime/pyexec.c does; main.py first, then code typed at the prompt."""
    with Attended(new_board(tmp_path, LOCKS)) as at:
        at.wait_for_line("ZeroDivisionError")
        with at.transport() as transport:
            for _ in range(2):
                with pytest.raises(TransportExecError, match="ZeroDivisionError"):
                    transport.exec(LOCKS)
            assert transport.exec("print(len(bytearray(2000)))").strip() == b"2000"


def test_ctrl_c_ends_a_program_that_waits_for_nothing(tmp_path):
    with Attended(
        new_board(tmp_path, "print('counting')\nn = 0\nwhile True:\n    n += 1\n")
    ) as at:
        at.wait_for_line("counting")
        with at.transport() as transport:
            assert transport.eval("n") > 0
        assert any("KeyboardInterrupt" in line for line in at.console)


def test_ctrl_c_ends_asyncio_and_the_code_of_the_raw_repl(tmp_path):
    main = """
import asyncio

async def beat():
    while True:
        await asyncio.sleep_ms(50)

print("beating")
asyncio.run(beat())
"""
    with Attended(new_board(tmp_path, main)) as at:
        at.wait_for_line("beating")
        with at.transport() as transport:
            transport.exec_raw_no_follow("import time\nprint('asleep')\ntime.sleep(100)")
            transport.read_until(1, b"asleep\r\n")
            transport.serial.write(b"\x03")
            _, error = transport.follow(timeout=20)
            assert b"KeyboardInterrupt" in error
            assert transport.eval("1 + 1") == 2


def test_a_soft_reset_in_raw_mode_runs_boot_but_not_main(tmp_path):
    board = new_board(tmp_path, LOOP, files={"boot.py": "print('boot runs')\nearly = 7\n"})
    with Attended(board) as at:
        at.wait_for_line("main runs")
        with at.transport(soft_reset=True) as transport:
            assert transport.eval("early") == 7
            assert transport.eval("'kept' in globals()") is False
            transport.exec_raw_no_follow("import machine; machine.soft_reset()")
            transport.read_until(1, b"raw REPL; CTRL-B to exit\r\n>", timeout=20)
            transport.serial.write(b"\x02\x04")  # friendly, then Ctrl-D: everything runs
            at.wait(lambda: at.console.count("main runs") == 2)
    result = at.result
    assert [boot.reset_cause for boot in result.boots] == [1, 5, 5, 5]


def test_ctrl_c_during_boot_keeps_main_from_running(tmp_path):
    files = {"boot.py": "import time\nprint('boot waits')\ntime.sleep(60)\n"}
    with Attended(new_board(tmp_path, LOOP, files=files)) as at:
        at.wait_for_line("boot waits")
        with at.transport() as transport:
            assert transport.eval("'kept' in globals()") is False


def test_a_person_types_at_the_friendly_prompt(tmp_path):
    with Attended(new_board(tmp_path, "x = 20\n")) as at, at.transport(raw=False) as transport:
        at.wait_for_line("help()")
        type_in(transport, "\r", ">>> ")
        type_in(transport, "x * 2 + 2\r", "42\r\n>>> ")
        type_in(transport, "xy\x7f + 1\r", "21\r\n>>> ")  # backspace
        type_in(transport, "\x1b[A\r", "21\r\n>>> ")  # the up key
        type_in(transport, "for i in range(3):\r", "\r\n... ")
        type_in(transport, "    print(i * 5)\r", "\r\n... ")
        type_in(transport, "\r", "0\r\n5\r\n10\r\n>>> ")
        type_in(transport, "half a li\x03", "\r\n>>> ")
        type_in(transport, "1/0\r", "ZeroDivisionError: divide by zero\r\n>>> ")
        type_in(transport, "\x05", "paste mode; Ctrl-C to cancel, Ctrl-D to finish\r\n=== ")
        type_in(transport, "if x:\r    print('pasted')\r\x04", "pasted\r\n>>> ")
        type_in(transport, "\x04", "MPY: soft reboot\r\n")
        type_in(transport, "", ">>> ")
        assert "20" in type_in(transport, "x\r", ">>> ")


def test_code_reads_what_is_typed_and_timers_go_on_meanwhile(tmp_path):
    code = """
import machine, select, sys
ticks = []
timer = machine.Timer(0)
timer.init(period=10, mode=machine.Timer.PERIODIC, callback=lambda t: ticks.append(1))
print("ready")
poll = select.poll()
poll.register(sys.stdin, select.POLLIN)
print("empty", poll.poll(30))
print(sys.stdin.buffer.read(5), len(ticks) > 1)
timer.deinit()
"""
    with Attended(new_board(tmp_path, "")) as at, at.transport() as transport:
        transport.exec_raw_no_follow(code)
        transport.read_until(1, b"empty []\r\n")
        time.sleep(0.05)  # the timer's time, no wait for an outcome
        transport.serial.write(b"12345")
        output, error = transport.follow(timeout=20)
    assert (output, error) == (b"b'12345' True\r\n", b"")


def test_what_does_not_fit_the_receive_buffer_is_lost_as_on_a_uart(tmp_path):
    with Attended(new_board(tmp_path, LOOP)) as at:
        at.wait_for_line("main runs")
        with at.transport(raw=False) as transport:
            transport.serial.write(b"x" * 1000)
            at.wait(lambda: at.port.lost == 1000 - ports.RECEIVE_BUFFER)


def test_a_reset_through_the_prompt_is_a_reset(tmp_path):
    with Attended(new_board(tmp_path, LOOP)) as at:
        at.wait_for_line("main runs")
        with at.transport() as transport:
            transport.exec_raw_no_follow("import machine; machine.reset()")
            at.wait(lambda: at.console.count("main runs") == 2)
            # The same port, the same client, another boot.
            transport.enter_raw_repl(soft_reset=False)
            assert transport.eval("__import__('machine').reset_cause()") == 2


def test_a_client_that_leaves_makes_room_for_the_next(tmp_path):
    with Attended(new_board(tmp_path, LOOP)) as at:
        for number in range(3):
            with at.transport() as transport:
                assert transport.eval(f"{number} + 1") == number + 1


def test_the_prompt_costs_user_code_no_heap(tmp_path):
    main = "import gc\ngc.collect()\nprint('free', gc.mem_free())\n"
    quiet = new_board(tmp_path, main).run(max_boots=1)
    with Attended(new_board(tmp_path, main)) as at:
        line = at.wait_for_line("free ")
    free = [int(text.split()[1]) for text in (line, quiet.console)]
    assert abs(free[0] - free[1]) < 512


def test_the_port_refuses_a_kind_it_does_not_know():
    for kind in ("usb", "tcp", "tcp:x", "tcp:70000"):
        with pytest.raises(ports.PortError, match="expected pty or tcp:PORT"):
            ports.open_port(kind)


def test_board_run_names_its_port_first(tmp_path):
    new_board(tmp_path, LOOP)
    twinslot = Path(sys.executable).with_name("twinslot")
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [twinslot, "board", "run", "flash.bin", "--repl", "pty"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        word, path = process.stdout.readline().split()
        assert word == "port"
        command = [MPREMOTE, "connect", path, "resume", "eval", "6*7"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.stdout.strip() == "42", done.stdout + done.stderr
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()
