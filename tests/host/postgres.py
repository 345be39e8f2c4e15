"""PostgreSQL for tests: skipped where it is not installed, but never in CI."""

import os

import pytest

from twinslot_tools import postgres


def database():
    """As ``twinslot_tools.postgres.database``."""
    if postgres.programs() is None and not os.environ.get("CI"):
        pytest.skip("postgresql is missing: apt install postgresql (.ci/run does)")
    return postgres.database()
