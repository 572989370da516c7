"""Every ``sglang-ext`` command of the documents runs as it is written."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_ext.__main__ import TOOLS
from sglang_ext.tools import gpu_check
from tests.conftest import ROOT
from tests.fixtures import documents
from tests.fixtures.zygote import Zygote
from tests.patches.trees import copy_touched
from tests.planning.models import GPT_OSS, saved
from tests.tools.report_texts import later, text
from tests.tools.test_status import TEXT
from tests.tools.test_verify import engine

URL, PAGES, MODEL = "http://127.0.0.1:30000", "/tmp/hicache", "openai/gpt-oss-120b"
ENDLESS, FOR_A_GPU = ("status", "--url", URL), "gpu-check"
ANSWER = dict.fromkeys(("tokens", "found", "device", "host", "pinned", "unpinned"), 16)
ANSWER |= dict.fromkeys(("storage", "dropped", "held", "read", "used", "bound"), 32)
ANSWER |= {
    "cleared": 1,
    "namespaces": [{"extra_key": "a", "cache_salt": None, "used": 1, "bound": 2}],
}
"""To any call on the cache."""
FAULTS = "doctor"
"""Finds some on a machine that is not the one in the document."""
PROMPT = "prompt.json"
FORK = "~/sglang/python"
"""Folder of an engine that may be changed."""


def commands() -> Iterator[tuple[str, ...]]:
    """Words behind ``sglang-ext``, each command once."""
    for words in documents.commands():
        if documents.begins(words) == "sglang-ext":
            yield words[1:]


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
    assert shown == set(TOOLS)


@pytest.mark.parametrize("words", [w for w in commands() if w[0] == FOR_A_GPU], ids=" ".join)
def test_a_command_for_a_gpu_has_these_options(words: tuple[str, ...]) -> None:
    gpu_check.parse_args(words[1:])


def adapted(words: tuple[str, ...], server: str, folder: Path) -> list[str]:
    """A command with the server, the files and the time that it has here."""
    here = [word.replace(URL, server).replace(PAGES, str(folder / "pages")) for word in words]
    if words == ENDLESS:
        here += ["--every", "0.01"]
    if words[0] == "report":
        here += ["--out", str(folder / "report.html")]
        here += ["--seconds", "0.04", "--every", "0.02"] if server else []
    if words[0] == "size":
        here += ["--out", str(folder / "size.json")]
    if words[0] == "cache":
        here = [word.replace(PROMPT, str(folder / PROMPT)) for word in here]
    if words[0] == "patches":
        fork = str(copy_touched(folder / "fork"))
        here = [word.replace(FORK, fork) for word in here]
        here += [] if fork in here else ["--root", fork]
    return here


@pytest.mark.parametrize("words", [w for w in commands() if w[0] != FOR_A_GPU], ids=" ".join)
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
    elif words[0] == "cache":
        server = tell(json.dumps(ANSWER))
    elif words[0] == "report":
        server = tell(text(), later())
    elif words[0] == "verify":
        server = serve(engine(storage=True))
    (tmp_path / "pages").mkdir()
    (tmp_path / PROMPT).write_text("[5, 17, 4]")
    here = adapted(words, server, tmp_path)
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
