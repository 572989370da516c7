"""What a server refused, or complained of, is told where a test or a bench fails."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from launch.server import Server, explained_by


def server_at(address: str, log: Path) -> Server:
    process: Any = SimpleNamespace(poll=lambda: None)
    return Server(process, urlsplit(address).port or 0, log)


def test_a_refusal_tells_why(tell: Callable[..., str], tmp_path: Path) -> None:
    server = server_at(tell("the session is not alive", code=500), tmp_path / "log")
    with pytest.raises(httpx.HTTPStatusError, match=r"500 .*/generate: the session is not alive"):
        server.post("/generate", {})
    with pytest.raises(httpx.HTTPStatusError, match=r"500 .*/health: the session is not alive"):
        server.get("/health")


def test_complaints_of_a_server_are_told(tell: Callable[..., str], tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text("\n".join(["Lost connection 1", *(f"Failed {n}" for n in range(8)), "served"]))
    with pytest.raises(KeyError) as raised, explained_by(server_at(tell("{}"), log)):
        raise KeyError("a test's own")
    (note,) = raised.value.__notes__
    assert note.splitlines() == ["server.log, complaints:", *(f"Failed {n}" for n in range(8))]
