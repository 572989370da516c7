"""The README's quick start, command by command as a reader types it."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

from launch.server import Server, free_port, wait_until_healthy
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


def test_a_prompt_of_a_reader_comes_back_from_the_host(zygote: Zygote, tmp_path: Path) -> None:
    model, serve, hit = (
        [word.replace(".models/text", str(tmp_path / "model")) for word in words]
        for words in commands()
    )
    zygote.lines(*model)
    port, log = free_port(), tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            module(serve, "--port", str(port)),
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(process, port, log)
    try:
        wait_until_healthy(server)
        said = subprocess.run(
            module(hit, "--url", server.url),
            cwd=ROOT,
            check=True,
            timeout=300,
            capture_output=True,
            text=True,
        ).stdout
    finally:
        server.stop()
    last = said.splitlines()[-1]
    found = re.search(r"host +(\d+)", last)
    assert found is not None, said
    assert int(found[1]) > 0, said
