"""The server keeps to its own OpenAPI document, whatever it is sent. More: make fuzz-api."""

import importlib.util
import sys
from pathlib import Path

_spec = importlib.util.spec_from_file_location(
    "fuzz_api", Path(__file__).parents[1] / "fuzz" / "api.py"
)
api = importlib.util.module_from_spec(_spec)
sys.modules["fuzz_api"] = api
_spec.loader.exec_module(api)


def test_no_answer_is_a_5xx_or_other_than_the_document_says(tmp_path):
    for one in api.run(tmp_path, 1):
        assert one.passed, one.output
        assert one.cases > 20, one.output
