"""Error classes: made when their names are used, as their stub says."""

import ast
from pathlib import Path

import pytest

from twinslot import errors

STUB = Path(errors.__file__).with_suffix(".pyi")


def bases() -> dict[str, str]:
    """{class: base} as a type checker sees it."""
    found = [node for node in ast.parse(STUB.read_text()).body if isinstance(node, ast.ClassDef)]
    return {node.name: ast.unparse(node.bases[0]) for node in found}


def kinds() -> list[type[errors.OtaError]]:
    """All error classes."""
    return [getattr(errors, name) for name in bases()]


def test_the_stub_and_the_table_name_the_same_classes_with_the_same_bases():
    table = {"OtaError": "Exception"}
    table |= {row.split()[0]: row.split()[1] for row in errors._TABLE.strip().splitlines()}
    assert bases() == table
    assert {kind.__name__: kind.__base__.__name__ for kind in kinds()} == table


def test_a_class_is_one_and_the_same_wherever_it_is_used():
    from twinslot.errors import HttpError, NetworkError

    assert HttpError is errors.HttpError and issubclass(HttpError, NetworkError)
    with pytest.raises(errors.NetworkError):
        raise HttpError("channel", 503, 200, status=503)


def test_each_has_a_code_of_its_own_and_the_number_of_its_base():
    assert len({kind.code for kind in kinds()}) == len(kinds())
    for kind in kinds():
        assert kind("what", 1, 2).report() == {
            "code": kind.code,
            "number": kind.number,
            "message": "what: saw 1, expected 2",
        }
    assert errors.KeyringError.number == errors.SignatureError.number != errors.OtaError.number
    assert errors.KeyringError.retry and not errors.SignatureError.retry


def test_what_only_some_errors_carry_is_nothing_in_the_others():
    refused = errors.HttpError("channel", status=503, retry_after=60)
    assert (refused.status, refused.retry_after, refused.dates) == (503, 60, False)
    assert (errors.BusyError("busy").status, errors.BusyError("busy").retry_after) == (0, None)


@pytest.mark.parametrize("name", ["", "Busy", "busy", "OTA_001", "retry"])
def test_there_is_no_class_by_another_name(name):
    with pytest.raises(AttributeError):
        getattr(errors, name)
