"""Every ``sglang-ext`` command of the documents runs as it is written."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_ext.__main__ import TOOLS
from tests.conftest import ROOT
from tests.fixtures.zygote import Zygote
from tests.planning.models import GPT_OSS, saved
from tests.tools.report_texts import later, text
from tests.tools.test_status import TEXT
from tests.tools.test_verify import engine

BLOCK = re.compile(r"^```\n(.*?)^```", re.MULTILINE | re.DOTALL)
URL, PAGES, MODEL = "http://127.0.0.1:30000", "/tmp/hicache", "openai/gpt-oss-120b"
FOR_A_GPU, ENDLESS = ("gpu-check",), ("status", "--url", URL)
FAULTS = "doctor"
"""Finds some on a machine that is not the one in the document."""


def commands() -> Iterator[tuple[str, ...]]:
    """Words behind ``sglang-ext``, each command once."""
    found = {}
    for page in (ROOT / "README.md", ROOT / "docs" / "cli.md"):
        for block in BLOCK.findall(page.read_text()):
            for line in block.replace("\\\n", " ").splitlines():
                words = tuple(shlex.split(line, comments=True))
                if words[:1] == ("sglang-ext",) and words[1] not in FOR_A_GPU:
                    found[words[1:]] = None
    yield from found


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A cache of the hub with the model of the documents."""
    model = tmp_path / "hub" / f"models--{MODEL.replace('/', '--')}"
    saved(model / "snapshots" / "1", GPT_OSS)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("1")
    return tmp_path / "hub"


def test_the_documents_show_every_tool() -> None:
    shown = {words[0] for words in commands()}
    assert shown | {*FOR_A_GPU} == set(TOOLS)


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_a_command_runs(
    zygote: Zygote,
    hub: Path,
    tmp_path: Path,
    words: tuple[str, ...],
    tell,  # noqa: ANN001
    serve,  # noqa: ANN001
) -> None:
    server = ""
    if words[0] == "status":
        # the second screen has no more than the page of somebody else's server
        texts = (TEXT, "") if words == ENDLESS else (TEXT,)
        server = tell(*texts)
    elif words[0] == "report":
        server = tell(text(), later())
    elif words[0] == "verify":
        server = serve(engine(storage=True))
    (tmp_path / "pages").mkdir()
    here = [word.replace(URL, server).replace(PAGES, str(tmp_path / "pages")) for word in words]
    if words == ENDLESS:
        here += ["--every", "0.01"]
    if words[0] == "report":
        here += ["--out", str(tmp_path / "report.html")]
        here += ["--seconds", "0.04", "--every", "0.02"] if server else []
    if words[0] == "size":
        here += ["--out", str(tmp_path / "size.json")]
    if words[0] == FAULTS:  # it imports the engine, the others do not
        run = zygote.run("-m", "sglang_ext", *here)
    else:
        command = [sys.executable, "-W", "ignore", "-m", "sglang_ext", *here]
        environment = {**os.environ, "HF_HUB_CACHE": str(hub)}
        run = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
    assert "Traceback" not in run.stderr, run.stderr
    assert run.stdout.strip(), run.stderr
    if words == ENDLESS or (words[0] == FAULTS and "--" in words):
        assert run.returncode == 1, run.stdout
    else:
        assert run.returncode == 0, run.stdout + run.stderr
    if words[0] == "report":
        assert "</html>" in (tmp_path / "report.html").read_text()
    if words[0] == "size":
        assert json.loads((tmp_path / "size.json").read_text())["cells"]
