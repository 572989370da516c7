"""Every command of the documents is run by a test, or taken apart by what would run it.

``sglang-ext`` runs in ``tests/tools/test_documented_commands.py``, calls of a server in
``tests/e2e/test_operations.py``, containers and charts in ``tests/launch/test_deployment.py``.
"""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from launch import serve
from launch.mooncake import environment
from sglang_ext.adapter.engine_contract import ENGINE_VERSION
from tests.conftest import ROOT
from tests.contract.test_operations import engine_routes
from tests.fixtures.calls import Call
from tests.fixtures.documents import begins, commands
from tests.fixtures.launch_lines import problems
from tests.fixtures.zygote import Zygote

Words = tuple[str, ...]
ENGINE = ("sglang.launch_server", "--", "launch.serve")
RUN_ELSEWHERE = {
    "sglang-ext": "tests/tools/test_documented_commands.py",
    "docker": "tests/launch/test_deployment.py",
    "helm": "tests/launch/test_deployment.py",
    "curl": "tests/e2e/test_operations.py",
}


def all_of(*kinds: str) -> list[Words]:
    """Commands that begin so."""
    return [words for words in commands() if begins(words) in kinds]


def modules() -> list[Words]:
    """Commands of ours that take options of their own."""
    own = re.compile(r"(launch|sglang_ext|tests)\.")
    return [w for w in commands() if own.match(begins(w)) and begins(w) not in ENGINE]


def has_options(words: Words, text: str) -> None:
    """Options of a command are in a text of help."""
    for word in words:
        if word.startswith("-"):
            assert re.search(rf"(?<![\w-])-?{re.escape(word)}(?![\w-])", text), f"no {word}"


def makefile(words: Words) -> None:
    """Targets of the Makefile."""
    for target in words[1:]:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def environment_of_the_makefile(words: Words) -> None:
    """The Makefile makes what is activated."""
    assert words == ("source", ".venv/bin/activate")
    assert "-m venv .venv" in (ROOT / "Makefile").read_text()


def pip(words: Words) -> None:
    """A pinned engine, and options that pip has."""
    run = [sys.executable, "-m", "pip", words[1], "--help"]
    has_options(words, subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    pins = [word.split("==") for word in words if "==" in word]
    assert all(pin == ["sglang", ENGINE_VERSION] for pin in pins)


def files_of_tests(words: Words) -> None:
    """Tests that are there."""
    assert words[3:]
    assert all((ROOT / path).exists() for path in words[3:]), words


def mooncake(words: Words) -> None:
    """Options of the store's master."""
    command = [str(Path(sys.executable).parent / words[0]), "--help"]
    run = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    has_options(tuple(word.removeprefix("-") for word in words), run.stdout + run.stderr)


BY_KIND: dict[str, Callable[[Words], None]] = {
    "make": makefile,
    "source": environment_of_the_makefile,
    "pip": pip,
    "pytest": files_of_tests,
    "mooncake_master": mooncake,
}


def test_no_command_is_left_out() -> None:
    known = {*ENGINE, *BY_KIND, *RUN_ELSEWHERE, *(begins(words) for words in modules())}
    left_out = {words: page for words, page in commands().items() if begins(words) not in known}
    assert not left_out
    assert len(commands()) > 60
    for kind, file in RUN_ELSEWHERE.items():
        assert f'"{kind}"' in (ROOT / file).read_text(), f"{file} does not run {kind}"


@pytest.mark.parametrize("words", all_of(*BY_KIND), ids=" ".join)
def test_a_command_is_one_that_there_is(words: Words) -> None:
    BY_KIND[begins(words)](words)


def test_launch_lines_are_taken_by_the_engine_and_by_this_cache(zygote: Zygote) -> None:
    lines = []
    for words in all_of(*ENGINE):
        line = list(words)
        if begins(words) == "launch.serve":
            _, options = serve.parse_args(words[3:])
            line = [*options, "--radix-cache-backend", "swa_hicache"]
        elif begins(words) == "--":  # a part of one
            line = ["SGLANG_EXT_SWA_HICACHE=1", *words]
        if "--model-path" not in line:
            line += ["--model-path", "openai/gpt-oss-120b"]
        lines.append(line)
    wrong = dict(zip(map(" ".join, lines), problems(zygote, lines), strict=True))
    assert len(wrong) > 10
    assert not {line: found for line, found in wrong.items() if found}


def test_settings_in_launch_lines_are_json() -> None:
    settings = [word for words in all_of(*ENGINE) for word in words if word.startswith("{")]
    assert len(settings) > 3
    assert all(isinstance(json.loads(text), dict) for text in settings)


@pytest.mark.parametrize("words", modules(), ids=" ".join)
def test_a_module_has_the_options_that_it_is_given(zygote: Zygote, words: Words) -> None:
    run = zygote.run("-m", begins(words), "--help")
    assert run.returncode == 0, run.stderr[-2000:]
    has_options(words[3:], run.stdout)


def request_fields(name: str) -> set[str]:
    """Fields of one of the engine's requests and of those that it is derived from."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    source = Path(spec.submodule_search_locations[0]) / "srt" / "managers" / "io_struct.py"
    classes = {n.name: n for n in ast.parse(source.read_text()).body if isinstance(n, ast.ClassDef)}
    fields = [n.target for n in classes[name].body if isinstance(n, ast.AnnAssign)]
    bases = [base.id for base in classes[name].bases if isinstance(base, ast.Name)]
    own = {field.id for field in fields if isinstance(field, ast.Name)}
    return own.union(*(request_fields(base) for base in bases if base in classes))


REQUESTS = {
    "/generate": "GenerateReqInput",
    "/pause_generation": "PauseGenerationReqInput",
    "/continue_generation": "ContinueGenerationReqInput",
}


@pytest.mark.parametrize("words", all_of("curl"), ids=lambda words: words[-1])
def test_a_call_is_one_that_the_engine_answers(words: Words) -> None:
    call = Call.of(words)
    assert urlsplit(call.path).path in engine_routes()
    if call.body is not None:
        assert call.body.keys() <= request_fields(REQUESTS[call.path])
