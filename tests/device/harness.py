"""Run the test functions of one file on the board and tell the host the verdict of each.

The host (`tests/conftest.py`) writes a main.py that calls `run`. What it reads is lines that hold
MARK and a JSON object: {"start": name}, {"verdict": "passed" | "failed" | "skipped", "name",
"text"}, {"broken": traceback} when the file can't be imported, {"done": count} at the end.
A test without a verdict has failed, so nothing is lost when the board dies in the middle.

    import harness

    def test_nothing_to_see():
        raise harness.Skip("no LED on this board")

    async def test_something():
        await ...
"""

import asyncio
import gc
import io
import json
import sys

MARK = "@@test "


class Skip(Exception):
    """Raise it with a reason: this test can't run here."""


def raises(kind, function, *args, **kw):
    """Call the function, which must raise `kind`; return the exception."""
    try:
        result = function(*args, **kw)
    except kind as e:
        return e
    raise AssertionError("returned %r, expected %s" % (result, kind.__name__))


def run(module, tests):
    """Run tests: a list of (name, is_async); a method's name is Class.method."""
    try:
        module = __import__(module)
    except BaseException as e:
        _say({"broken": _traceback(e)})
        return
    for name, is_async in tests:
        _say({"start": name})
        verdict, text = _run_one(module, name, is_async)
        _say({"verdict": verdict, "name": name, "text": text})
        gc.collect()
    _say({"done": len(tests)})


def _run_one(module, name, is_async):
    try:
        function = module
        for part in name.split("."):
            if function is not module:
                function = function()  # a test class: a new instance for each test
            function = getattr(function, part)
        result = function()
        if is_async:
            asyncio.run(result)
        elif result is not None:
            return "failed", "returned %r: a test that must be awaited is declared async" % result
    except Skip as e:
        return "skipped", str(e)
    except BaseException as e:
        return "failed", _traceback(e)
    finally:
        if is_async:
            asyncio.new_event_loop()
    return "passed", ""


def _traceback(error):
    text = io.StringIO()
    sys.print_exception(error, text)
    return text.getvalue()


def _say(what):
    print(MARK + json.dumps(what))
