"""What a server runs with is what its starter says, whatever the caller has exported."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import serve, server
from launch.server import CPU, OURS

EXPORTED = {
    "SGLANG_EXT_SWA_HICACHE": "1",
    "SGLANG_EXT_CHECKPOINT_TOKENS": "64",
    "SGLANG_EXT_COPIES": "kernels",
    "SGLANG_PLUGINS": "__none__",
}


@pytest.fixture(autouse=True)
def exported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in EXPORTED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SOMETHING_ELSE", "kept")


def started(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """(command, environment) that ``launch.serve`` becomes."""
    became: list[Any] = []
    monkeypatch.setattr(sys, "argv", ["serve", *arguments])
    monkeypatch.setattr(os, "execve", lambda _, *rest: became.extend(rest))
    serve.main()
    return became[0], became[1]


def test_stock_is_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    command, environment = started(monkeypatch, "--stock", "--model-path", "m")
    assert not [name for name in environment if name.startswith("SGLANG_EXT_")]
    assert environment["SOMETHING_ELSE"] == "kept"
    assert command[3:] == ["--model-path", "m"]
    monkeypatch.delenv("SGLANG_PLUGINS")
    _, on_cpu = started(monkeypatch, "--stock", "--cpu", "--model-path", "m")
    assert on_cpu.items() >= CPU.items()


def test_ours_keeps_its_settings_but_the_options_select(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_PLUGINS")
    command, environment = started(monkeypatch, "--device-only", "--model-path", "m")
    assert "SGLANG_EXT_SWA_HICACHE" not in environment, "it would switch the host tier on"
    assert environment["SGLANG_EXT_CHECKPOINT_TOKENS"] == "64"
    assert command[3:] == ["--model-path", "m", *OURS]
    command, _ = started(monkeypatch, "--model-path", "m")
    assert command[3:] == ["--model-path", "m", *OURS, "--enable-hierarchical-cache"]


def test_plugins_that_keep_ours_out_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"SGLANG_PLUGINS=__none__ .* swa_hicache"):
        started(monkeypatch, "--model-path", "m")
    with pytest.raises(SystemExit, match=r"SGLANG_PLUGINS=__none__ .* ext_cpu_fixes"):
        started(monkeypatch, "--stock", "--cpu", "--model-path", "m")


def test_servers_that_are_compared_get_nothing_of_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What demo, benchmarks, soak and tests start: a stand-in for Python writes what it got."""
    fake = tmp_path / "python"
    fake.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "print(json.dumps([sys.argv[1:], dict(os.environ)]))\n"
    )
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    one = server.start(["--x"], tmp_path / "log", {**CPU, "SGLANG_EXT_COPIES": "engine"})
    assert one.process.wait(timeout=180) == 0
    arguments, environment = json.loads(one.log.read_text())
    assert arguments[-1] == "--x"
    assert {k: v for k, v in environment.items() if k.startswith("SGLANG_EXT_")} == {
        "SGLANG_EXT_COPIES": "engine"
    }, "only what the starter says"
    assert "SGLANG_PLUGINS" not in environment
    assert environment["SOMETHING_ELSE"] == "kept"


def test_a_zygote_hands_nothing_of_the_caller_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.fixtures import zygote

    given: dict[str, str] = {}

    class Popen:
        def __init__(self, *_: Any, env: dict[str, str], **__: Any) -> None:
            given.update(env)

    monkeypatch.setattr(zygote.subprocess, "Popen", Popen)
    zygote.Zygote()
    assert given["SOMETHING_ELSE"] == "kept"
    assert not given.keys() & EXPORTED.keys()
