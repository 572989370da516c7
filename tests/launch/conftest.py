"""Tests here have a stand-in for a running server."""

from tests.fixtures.stand_in import serve, tell

__all__ = ["serve", "tell"]
