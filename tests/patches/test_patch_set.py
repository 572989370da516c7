"""``sglang-ext patches`` on copies of the engine's files."""

import os
import stat
from pathlib import Path

import pytest

from sglang_ext.patches import cli
from sglang_ext.patches.patch_set import Patch, series
from tests.conftest import ROOT
from tests.patches.trees import TOUCHED, contents, copy_touched, installed

NAMES = [patch.name for patch in series()]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return copy_touched(tmp_path / "engine")


def run(command: str, root: Path, *names: str) -> int:
    return cli.main([command, *names, "--root", str(root)])


def differing(some: dict[str, bytes], others: dict[str, bytes]) -> list[str]:
    """Files whose contents are not the same."""
    return sorted(path for path in some if some[path] != others[path])


def test_all_apply_and_revert_byte_for_byte(root: Path, capsys: pytest.CaptureFixture) -> None:
    pristine = contents(root)
    assert run("apply", root) == 0
    assert capsys.readouterr().out.splitlines() == [f"{name} is applied now" for name in NAMES]
    patched = contents(root)
    assert differing(pristine, patched) == TOUCHED
    assert patched.keys() == pristine.keys(), "temporary files are left"
    assert run("revert", root) == 0
    assert capsys.readouterr().out.splitlines() == [f"{name} is taken back now" for name in NAMES]
    assert contents(root) == pristine


@pytest.mark.parametrize("patch", series(), ids=NAMES)
def test_each_goes_alone(patch: Patch, root: Path) -> None:
    """And comes back alone, by its number or its name."""
    files = sorted(file.path for file in patch.files)
    pristine = contents(root)
    assert run("apply", root, patch.name[:4]) == 0
    assert differing(pristine, contents(root)) == files
    assert run("apply", root) == 0
    assert run("revert", root, patch.name) == 0
    assert differing(pristine, contents(root)) == sorted({*TOUCHED} - {*files})


@pytest.mark.parametrize("command", ["apply", "revert"])
def test_again_is_no_harm_and_is_said(
    command: str, root: Path, capsys: pytest.CaptureFixture
) -> None:
    run(command, root)
    before = {path: as_written(root / path) for path in TOUCHED}
    capsys.readouterr()
    assert run(command, root) == 0
    said = "is applied already" if command == "apply" else "is not applied"
    assert capsys.readouterr().out.splitlines() == [f"{name} {said}" for name in NAMES]
    assert {path: as_written(root / path) for path in TOUCHED} == before


def as_written(path: Path) -> tuple[int, int, int, int]:
    """What a write would change of a file; to be read changes when it was read last."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size, found.st_mode


def test_check_and_list_write_nothing(root: Path, capsys: pytest.CaptureFixture) -> None:
    run("apply", root, NAMES[1])
    before = contents(root)
    capsys.readouterr()
    assert run("check", root) == 0
    said = capsys.readouterr().out.splitlines()
    there = [name for line in said for name in NAMES if line == f"{name} is applied already"]
    assert there == [NAMES[1]]
    assert sum(line.endswith("can be applied") for line in said) == len(NAMES) - 1
    assert run("list", root) == 0
    listed = capsys.readouterr().out
    assert all(f"{name}  not applied\n" in listed for name in NAMES if name != NAMES[1])
    assert f"{NAMES[1]}  applied\n" in listed
    assert contents(root) == before


@pytest.mark.parametrize("command", ["list", "check", "apply", "revert"])
@pytest.mark.parametrize("version", ["0.5.22", "0.5.23.post1", "0.5.230", None])
def test_another_version_is_refused(
    command: str, version: str | None, root: Path, capsys: pytest.CaptureFixture
) -> None:
    """Even if every file is as it should be."""
    file = root / "sglang" / "_version.py"
    text = file.read_text()
    file.write_text("" if version is None else text.replace("'0.5.23'", repr(version)))
    before = contents(root)
    assert run(command, root) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{root} has {version or 'an unknown version'}; nothing was changed" in error
    assert contents(root) == before


def test_a_folder_without_the_engine_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run("apply", tmp_path) == 1
    assert "no version of sglang can be read" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("apply", tmp_path / "nothing")
    assert "use a folder that can be read" in capsys.readouterr().err


@pytest.mark.parametrize("path", TOUCHED)
@pytest.mark.parametrize("command", ["check", "apply", "revert"])
def test_one_changed_file_stops_all(
    command: str, path: str, root: Path, capsys: pytest.CaptureFixture
) -> None:
    """Far from every hunk, in a tree where other patches could be applied or taken back."""
    if command == "revert":
        run("apply", root)
        capsys.readouterr()
    with (root / path).open("ab") as file:
        file.write(b"# ours\n")
    before = contents(root)
    assert run(command, root) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert f"{root / path} differs from sglang 0.5.23, patched or not" in output.err
    assert contents(root) == before


def test_a_missing_file_stops_all(root: Path, capsys: pytest.CaptureFixture) -> None:
    (root / TOUCHED[-1]).unlink()
    before = contents(root)
    assert run("apply", root) == 1
    assert f"{root / TOUCHED[-1]} cannot be read" in capsys.readouterr().err
    assert contents(root) == before


@pytest.mark.parametrize("good", range(len(TOUCHED)))
def test_a_write_that_fails_leaves_nothing_behind(
    good: int, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Whichever file it is."""
    before, replace, calls = contents(root), Path.replace, []

    def fail_once(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == good + 1:
            raise OSError(28, "No space left on device", str(self), None, str(target))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail_once)
    assert run("apply", root) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert f"{calls[good]} cannot be written: No space left on device" in output.err
    assert len(calls) == 2 * good + 1
    assert contents(root) == before


def test_files_that_others_share_are_not_written_into(root: Path, tmp_path: Path) -> None:
    """Package managers link one file into many environments."""
    shared = tmp_path / "cache"
    for number, path in enumerate(TOUCHED):
        (root / path).chmod(0o640)
        shared.mkdir(exist_ok=True)
        os.link(root / path, shared / str(number))
    before = contents(shared)
    run("apply", root)
    assert contents(shared) == before
    assert all(stat.S_IMODE((root / path).stat().st_mode) == 0o640 for path in TOUCHED)


def test_an_unknown_name_is_one_line(root: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("apply", root, "0001", "0099")
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "'0099' is not allowed; use one of 0001-" in error


def test_the_installed_engine_is_the_default(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["check"]) == 0
    assert all(name in capsys.readouterr().out for name in NAMES[:1])
    assert cli._installed() == installed()


def test_the_series() -> None:
    """Numbers without gaps, and no file in two patches: so each goes alone."""
    assert [name[:5] for name in NAMES] == [f"{n:04}-" for n in range(1, len(NAMES) + 1)]
    assert len(set(TOUCHED)) == len(TOUCHED)
    assert all(path.startswith("sglang/srt/") and ".." not in path for path in TOUCHED)
    assert (ROOT / "sglang_ext/patches/series").resolve() == ROOT / "patches"
    readme = (ROOT / "patches" / "README.md").read_text()
    assert all(f"| `{name}` |" in readme for name in NAMES)
