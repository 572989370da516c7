"""The tool that lists and removes pages."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sglang_ext.storage.cli import main
from tests.storage.test_page_files import files, get, put

DAY = 86400.0


def make(base: Path) -> tuple[Path, Path]:
    """An old page and a young one; their files."""
    pages = files(base)
    put(pages, 1)
    put(pages, 2)
    old, young = (pages.path(f"{n * 2654435761 % 2**32:08x}") for n in (1, 2))
    before = time.time() - 10 * DAY
    os.utime(old, (before, before))
    return old, young


def test_ls_says_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path)
    (tmp_path / "notes.txt").write_text("not a page")
    assert main(["ls", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[1].split() == ["0.000", "2", "0.0h", "model"]
    assert lines[2].split() == ["0.000", "2", "in", "all"]


def test_gc_removes_what_was_not_used_for_a_while(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, young = make(tmp_path)
    (tmp_path / "model" / "0-of-1" / "ab" / "notes.txt").write_text("not a page")
    assert main(["gc", str(tmp_path), "--unused-for", "7d", "--dry-run"]) == 0
    assert "1 pages, 0.000 GB would be removed" in capsys.readouterr().out
    assert old.exists()
    assert main(["gc", str(tmp_path), "--unused-for", "7d"]) == 0
    assert "1 pages, 0.000 GB removed" in capsys.readouterr().out
    assert not old.exists()
    assert young.exists()
    assert (tmp_path / "model" / "0-of-1" / "ab" / "notes.txt").exists()
    assert get(files(tmp_path), 2) is not None


def test_gc_removes_directories_without_pages(tmp_path: Path) -> None:
    old, young = make(tmp_path)
    young.unlink()
    before = time.time() - 10 * DAY
    os.utime(tmp_path / "model" / "0-of-1", (before, before))
    assert main(["gc", str(tmp_path), "--unused-for", "7d"]) == 0
    assert not old.exists()
    assert not (tmp_path / "model").exists()


def test_gc_says_what_it_could_not_remove(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path)

    def refuse(_: Path, *, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    assert main(["gc", str(tmp_path), "--unused-for", "7d"]) == 1
    said = capsys.readouterr()
    assert "0 pages" in said.out
    assert "was not removed: Permission denied" in said.err


def test_du_has_ranks_and_windows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, young = make(tmp_path)
    window = young.with_name(f"{young.name}.swa")
    window.write_bytes(b"\0" * 3_000_000)
    assert main(["du", str(tmp_path)]) == 0
    _, rank, whole, free = capsys.readouterr().out.splitlines()
    assert rank.split() == ["0.003", "0.003", "3", "model/0-of-1"]
    assert whole.split() == ["0.003", "3", "in", "all"]
    assert float(free.split()[0]) > 0
    assert old.exists()


@pytest.mark.parametrize(
    ("bug", "said"),
    [
        (lambda page: page[:-1] + bytes([page[-1] ^ 1]), "another checksum"),
        (lambda page: page[:-1], "instead of"),
        (lambda page: page + b"x", "instead of"),
        (lambda page: page[:30], "shorter than a header"),
        (lambda page: b"XXXX" + page[4:], "not a page"),
        (lambda page: page[:4] + b"\x63\0" + page[6:], "of format 99"),
    ],
)
def test_check_finds_what_is_damaged(
    bug: Callable[[bytes], bytes],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    old, young = make(tmp_path)
    assert main(["check", str(tmp_path)]) == 0
    assert "2 pages, 0.000 GB read; 0 are damaged" in capsys.readouterr().out
    old.write_bytes(bug(old.read_bytes()))
    assert main(["check", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert f"{old}: " in printed.err
    assert said in printed.err
    assert "1 are damaged" in printed.out
    assert old.exists()
    assert main(["check", str(tmp_path), "--remove"]) == 0
    assert "1 were removed" in capsys.readouterr().out
    assert not old.exists()
    assert young.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ls", "/no/such/place"], "'/no/such/place' is not allowed; use a folder"),
        (
            ["gc", "/tmp", "--unused-for", "week"],
            "'week' is not allowed; use a number of hours or days",
        ),
        (["gc", "/tmp", "--unused-for", "-1d"], "expected one argument"),
        (["gc", "/tmp"], "--unused-for"),
        (["rm", "/tmp"], "invalid choice"),
        ([], "command"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_help_needs_no_engine() -> None:
    code = (
        "import sys; sys.modules['sglang'] = sys.modules['torch'] = None\n"
        "from sglang_ext.storage.cli import main\n"
        "main(['gc', '--help'])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--unused-for" in ran.stdout
