"""Two processes may make a model that both need at the same time."""

from pathlib import Path

import pytest

from launch.models.kept import kept


def test_nobody_sees_half_of_one(tmp_path: Path) -> None:
    out = tmp_path / "model"

    def make(place: Path) -> None:
        place.mkdir()
        (place / "weights").write_text("ours")
        assert not out.exists()
        (place / "tokenizer").write_text("ours")

    assert kept(out, make) == out
    assert sorted(path.name for path in out.iterdir()) == ["tokenizer", "weights"]
    assert list(tmp_path.iterdir()) == [out]
    kept(out, lambda _: pytest.fail("it is there"))


def test_the_first_that_is_ready_stays(tmp_path: Path) -> None:
    """The other one may be in use already."""
    out = tmp_path / "model"

    def make(place: Path) -> None:
        for name, folder in (("theirs", out), ("ours", place)):
            folder.mkdir()
            (folder / "weights").write_text(name)

    kept(out, make)
    assert (out / "weights").read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [out]


def test_one_that_could_not_be_made_is_made_again(tmp_path: Path) -> None:
    out = tmp_path / "model"

    def fail(place: Path) -> None:
        place.mkdir()
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        kept(out, fail)
    assert not out.exists()
    kept(out, lambda place: place.mkdir(exist_ok=True))
    assert out.is_dir()
