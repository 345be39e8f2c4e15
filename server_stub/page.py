"""The page (placeholder until its own commit)."""

from fastapi import FastAPI

from .http import Parts


def add_routes(app: FastAPI, parts: Parts) -> None:
    """Add nothing yet."""
