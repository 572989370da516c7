"""Benchmarks are run from a checkout."""

import subprocess
import sys
from pathlib import Path

import pytest

from sglang_ext.tools import bench
from tests.conftest import ROOT


def test_a_benchmark_of_the_checkout_runs_with_its_own_options() -> None:
    command = [sys.executable, "-m", "sglang_ext", "bench", "plots", "--help"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert "--data" in ran.stdout


def test_a_console_script_finds_them(tmp_path: Path) -> None:
    """It has the package alone on its path, and may be called anywhere."""
    code = "import sys; from sglang_ext.__main__ import main\n"
    code += "sys.exit(main(['bench', 'plots', '--help']))"
    command = [sys.executable, "-I", "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "--data" in ran.stdout


def test_what_is_no_benchmark_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main(["machine"])
    assert ended.value.code == 2
    assert "'multiturn'" in capsys.readouterr().err


def test_without_a_checkout_one_line_says_so(tmp_path: Path) -> None:
    """Of the package alone, as it is installed."""
    (tmp_path / "sglang_ext").symlink_to(ROOT / "sglang_ext")
    code = "import sys; sys.path.insert(0, '.'); from sglang_ext.tools.bench import main\n"
    code += "sys.exit(main(['hits']))"
    command = [sys.executable, "-I", "-S", "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ran.returncode == 1
    assert ran.stderr == "sglang-ext bench: runs in a checkout of the repository only\n"
