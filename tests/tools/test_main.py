"""``sglang-ext``: what it offers, and what it does not import before that is needed."""

import json
import subprocess
import sys
import tomllib

import pytest

import sglang_ext
from sglang_ext.__main__ import TOOLS, main
from tests.conftest import ROOT

HEAVY = ("torch", "sglang", "numba", "transformers", "matplotlib")
IMPORTED = """
import contextlib, io, json, sys
from sglang_ext.__main__ import main
found = {}
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        main(words)
    heavy = [name for name in json.loads(sys.argv[2]) if name in sys.modules]
    found[" ".join(words)] = [heavy, len(said.getvalue())]
print(json.dumps(found))
"""


def test_help_imports_nothing_that_it_does_not_need() -> None:
    calls = [["--help"], ["--version"], *([name, "--help"] for name in TOOLS)]
    calls += [["storage", command, "--help"] for command in ("ls", "du", "gc", "check")]
    command = [sys.executable, "-c", IMPORTED, json.dumps(calls), json.dumps(HEAVY)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    for words, (heavy, said) in json.loads(ran.stdout).items():
        assert heavy == [], f"{words} imports {heavy}"
        assert said > 10, words


def test_the_list_of_tools(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for name, (_, use) in TOOLS.items():
        assert name in said
        assert use[:20] in said
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert capsys.readouterr().out == f"sglang-ext {sglang_ext.__version__}\n"


@pytest.mark.parametrize(("words", "named"), [([], "TOOL"), (["nonsense"], "nonsense")])
def test_what_is_no_tool_is_named_in_one_line(
    words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert named in said
    assert said.count("\n") == 1


def test_the_status_of_a_tool_is_that_of_the_command() -> None:
    command = [sys.executable, "-m", "sglang_ext", "storage", "ls", "/no/such/place"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 2


def test_the_console_script_is_this_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"sglang-ext": "sglang_ext.__main__:main"}
