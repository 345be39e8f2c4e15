"""Refusals in one shape: application/problem+json (RFC 9457) with a stable ``code``."""

from collections.abc import Mapping
from http import HTTPStatus

from fastapi import HTTPException


class Problem(HTTPException):
    """A refusal.

    Args:
        status: HTTP status.
        code: one stable word; ``type`` is made of it.
        detail: what was seen and what was expected, one line, nothing secret.
    """

    def __init__(
        self, status: int, code: str, detail: str, headers: Mapping[str, str] | None = None
    ):
        super().__init__(status, detail, dict(headers) if headers else None)
        self.code = code

    def body(self) -> dict:
        """The JSON members of RFC 9457 section 3.1, and ``code``."""
        return {
            "type": f"urn:twinslot:problem:{self.code}",
            "title": HTTPStatus(self.status_code).phrase,
            "status": self.status_code,
            "code": self.code,
            "detail": self.detail,
        }
