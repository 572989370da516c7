"""The engine's storage backends behind our port: what they leave behind, and who is told."""

from pathlib import Path

import pytest

from sglang_ext.adapter.file_backend import FileBackend
from tests.adapter.file_tier import Rank, backend
from tests.core.storage_ranks import tokens


def test_a_clear_that_leaves_pages_behind_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As Mooncake does, which says nothing."""
    rank = Rank(backend(tmp_path))
    rank.serve(tokens(20))
    assert rank.resume(tokens(20)) == 20
    with monkeypatch.context() as leased:
        leased.setattr(FileBackend, "clear", lambda self: None)
        assert not rank.tier.clear()
    assert "a clear left pages behind" in caplog.text
    assert rank.tier.clear()
    assert rank.reach(tokens(20)) == 0


def test_an_empty_storage_is_cleared(tmp_path: Path) -> None:
    assert Rank(backend(tmp_path)).tier.clear()
