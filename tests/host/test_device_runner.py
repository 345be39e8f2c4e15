"""The runner of device tests reports failures as failures: none gets lost on the board."""

import importlib.util
import sys
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

# The hooks of the real conftest.py, in a folder of their own; loaded once, for what it compiles,
# which stays until all of these tests have ended.
_spec = importlib.util.spec_from_file_location(
    "device_runner", Path(__file__).parent.parent / "conftest.py"
)
_module = importlib.util.module_from_spec(_spec)
sys.modules["device_runner"] = _module
_spec.loader.exec_module(_module)
CONFTEST = """
from device_runner import *
del pytest_unconfigure
"""


@pytest.fixture(scope="module", autouse=True)
def _tidy():
    yield
    _module.pytest_unconfigure()


@pytest.fixture
def run(pytester):
    """Return a function that runs {file name: source} as device tests."""

    def run_files(*args, **files):
        pytester.makeconftest(CONFTEST)
        folder = pytester.mkdir("device")
        for name, source in files.items():
            (folder / f"{name}.py").write_text(source)
        return pytester.runpytest_inprocess("-v", "-rs", "--tb=short", *args, "device")

    return run_files


def test_each_function_is_reported_on_its_own(run):
    source = """
import asyncio, harness, sys

def test_good():
    assert sys.platform == "esp32"

async def test_good_async():
    await asyncio.sleep_ms(1)

def test_bad():
    print("what the test printed")
    assert 1 == 2, "one is not two"

async def test_bad_async():
    await asyncio.sleep_ms(1)
    raise ValueError("in the loop")

def test_skipped():
    raise harness.Skip("no antenna")

class TestThings:
    def test_method(self):
        self.x = 1

    async def test_async_method(self):
        assert not hasattr(self, "x")

def helper():
    raise RuntimeError
"""
    result = run(test_a=source)
    result.assert_outcomes(passed=4, failed=2, skipped=1)
    result.stdout.fnmatch_lines(
        [
            "*::test_good PASSED*",
            "*::test_good_async PASSED*",
            "*::test_bad FAILED*",
            "*::TestThings::test_async_method PASSED*",
            "*AssertionError: one is not two*",
            "*what the test printed*",
            "*ValueError: in the loop*",
            "*no antenna*",
        ]
    )


def test_a_board_that_dies_fails_that_test_and_runs_the_rest(run):
    source = """
import machine, sys, esp32

def test_first():
    pass

def test_resets():
    machine.reset()

def test_between():
    pass

def test_panics():
    esp32.Partition(1).ioctl(6, 0)

def test_exits():
    sys.exit()

@micropython.viper
def crash():
    ptr32(0)[0] = 1

def test_crashes():
    crash()

def test_last():
    pass
"""
    result = run(test_a="import micropython\n" + source)
    result.assert_outcomes(passed=3, failed=4)
    result.stdout.fnmatch_lines(
        [
            "*::test_last PASSED*",
            "*outcome is 'reset'*",
            "*outcome is 'panic'*",
            "*SystemExit*",
            "*outcome is 'crash'*",
        ]
    )


def test_a_test_that_hangs_fails_by_timeout(run):
    source = "TIMEOUT = 1\ndef test_hangs():\n    while True: pass\ndef test_fine(): pass\n"
    result = run(test_a=source)
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*outcome is 'timeout'*"])


def test_a_coroutine_that_nobody_awaits_fails(run):
    source = """
import asyncio

async def work():
    pass

def test_forgot_to_await():
    return work()

test_lambda = lambda: 1
"""
    result = run(test_a=source)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*a test that must be awaited is declared async*"])


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("import nosuchmodule\ndef test_x(): pass\n", "*no module named 'nosuchmodule'*"),
        ("def test_x(): pass\n1/0\n", "*ZeroDivisionError*"),
        ("def test_x(): pass\ndel test_x\n", "*AttributeError*"),
    ],
)
def test_a_file_that_does_not_load_fails_its_tests(run, source, text):
    result = run(test_a=source)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([text])


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("x = 1\n", "*test_a.py: no tests*"),
        ("def test_x(): pass\ndef test_x(): pass\n", "*defined twice: test_x*"),
        ("def test_x(:\n", "*SyntaxError*"),
    ],
)
def test_a_file_without_usable_tests_is_an_error(run, source, text):
    result = run(test_a=source)
    result.assert_outcomes(errors=1)
    assert result.ret != 0
    result.stdout.fnmatch_lines([text])


def test_tests_can_be_chosen_and_files_do_not_share_a_board(run):
    one = "def test_writes():\n    open('/left', 'w').close()\ndef test_never(): 1/0\n"
    two = "import os\ndef test_looks():\n    assert 'left' not in os.listdir('/')\n"
    run("-k", "writes or looks", test_a=one, test_b=two).assert_outcomes(passed=2, deselected=1)


def test_settings_of_a_file(run):
    source = """
HEAP = "64K"
BOARD = {"chip": "esp32s3", "flash": "8MiB", "clock": "host"}
import esp, gc, os, time

def test_board():
    assert os.uname()[0] == "esp32s3"
    assert esp.flash_size() == 8 << 20
    assert time.gmtime()[0] > 2024
    gc.collect()
    assert gc.mem_free() < 66 * 1024
"""
    run(test_a=source).assert_outcomes(passed=1)
