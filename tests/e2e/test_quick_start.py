"""The README's quick start, command by command as a reader types it."""

import contextlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import serve
from launch.server import Server, free_port, wait_until_ready
from tests.conftest import ROOT
from tests.fixtures.zygote import Zygote

SECTION = "## A host hit on your own prompt"


def commands() -> list[list[str]]:
    """The modules of the section and their arguments, in order."""
    text = (ROOT / "README.md").read_text().split(SECTION)[1]
    block = text.split("```")[1].replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    return [words[2:] for words in lines if words[:2] == ["python", "-m"]]


def module(words: list[str], *more: str) -> list[str]:
    """A command as this interpreter runs it."""
    return [sys.executable, "-W", "ignore", "-m", *words, *more]


@contextlib.contextmanager
def as_typed(words: list[str], log: Path) -> Iterator[Server]:
    """The process that a reader starts, which imports the engine, as its children do."""
    port = free_port()
    with log.open("wb") as file:
        process = subprocess.Popen(
            module(words, "--port", str(port)),
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(process, port, log)
    try:
        wait_until_ready(server)
        yield server
    finally:
        server.stop()


@pytest.mark.parametrize("kind", ["forked", pytest.param("as typed", marks=pytest.mark.full)])
def test_a_prompt_of_a_reader_comes_back_from_the_host(
    zygote: Zygote, tmp_path: Path, kind: str
) -> None:
    """From a server that is what the second command becomes, or which that command has started."""
    model, start, hit = (
        [word.replace(".models/text", str(tmp_path / "model")) for word in words]
        for words in commands()
    )
    zygote.lines(*model)
    if kind == "forked":
        own, engine = serve.parse_args(start[1:])
        arguments = serve.server_arguments(own, engine)
        running = zygote.running(arguments, tmp_path / "log", serve.server_environment(own))
    else:
        running = as_typed(start, tmp_path / "log")
    with running as server:
        said = subprocess.run(
            module(hit, "--url", server.url),
            cwd=ROOT,
            check=True,
            timeout=300,
            capture_output=True,
            text=True,
        ).stdout
    last = said.splitlines()[-1]
    found = re.search(r"host +(\d+)", last)
    assert found is not None, said
    assert int(found[1]) > 0, said
