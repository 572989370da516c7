"""A short soak: a pool so tight that requests are retracted, late copies, clients that go."""

import json
from pathlib import Path

from launch import soak


def test_a_tight_server_serves_every_request_and_every_token(tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    options = ["--only", "tight-late", "--minutes", "0.75", "--conversations", "12"]
    status = soak.main([*options, "--clients", "16", "--out", str(out)])
    (result,) = json.loads(out.read_text())["configurations"]
    assert status == 0, result
    assert result["requests"]["completed"] > 50, result
    assert result["requests"]["aborted"] > 0, result
    assert result["cache_events"]["loaded_window_pages"] > 0, result
