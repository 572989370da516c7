"""Every launch script refuses what it cannot use, in one line and before it begins."""

import importlib
import subprocess
import sys

import pytest

BAD = {
    "launch.bench.hits": [
        "--out .",
        "--seed -1",
        "--seed x",
        "--shapes other",
        "--host-sizes 0",
        "--host-sizes nan",
        "--full-every 1",
        "--cores 4096",
    ],
    "launch.bench.copies": ["--out .", "--mebibytes 0", "--mebibytes -1"],
    "launch.bench.core": ["--out .", "--pages 7", "--cores other", "--parts other", "--before /"],
    "launch.bench.multiturn": [
        "--port 0",
        "--port 65536",
        "--num-clients 0",
        "--num-clients -1",
        "--num-rounds 0",
        "--max-parallel 0",
        "--max-parallel x",
        "--request-length 0",
        "--output-length 0",
        "--sub-question-input-length -1",
        "--request-rate 0",
        "--request-rate -1",
        "--request-rate nan",
        "--seed -1",
        "--log-file .",
        "--log-file /dev/null/log",
    ],
    "launch.bench.pairs": ["--shape other", "--turns 0", "--page 0", "--out ."],
    "launch.demo": [
        "--out /dev/null",
        "--num-clients 0",
        "--num-rounds 0",
        "--request-length 0",
        "--output-length 0",
    ],
    "launch.mooncake": ["--memory-mb 0", "--log ."],
    "launch.bench.plots": ["--out /dev/null", "--data nowhere"],
    "launch.bench.write_traffic": ["--traffic other", "--times 0", "--seed -1", "--out ."],
    "launch.serve": [
        "--stock --device-only",
        "--stock --radix-cache-backend swa_hicache",
        "--stock --radix-cache-backend=swa_hicache",
        "--radix-cache-backend other",
        "--radix-cache-backend=other",
        "--device-only --enable-hierarchical-cache",
    ],
    "tests.soak.server": [
        "--minutes 0",
        "--minutes nan",
        "--minutes-for tp2",
        "--minutes-for tp2=x",
        "--minutes-for tp2=0",
        "--minutes-for other=1",
        "--only other",
        "--clients 0",
        "--conversations 0",
        "--seed x",
        "--cores x",
        "--cores 4096",
        "--cores 1-0",
        "--out .",
    ],
    "tests.soak.storm": ["--minutes 0", "--clients 0", "--conversations 0", "--tp 3", "--out ."],
    "tests.soak.weights_under_load": ["--clients 0", "--updates 0", "--seconds-between -1"],
    "tests.soak.kill": ["--kills 0", "--seed x", "--out ."],
    "tests.soak.waits": ["--policy other", "--out ."],
    "launch.bench.gpu.__main__": [
        "--only other",
        "--device tpu",
        "--limit 0",
        "--logs /dev/null",
        "--out .",
    ],
    "launch.models.tiny": [
        "",
        "--out /dev/null",
        "--out m --size other",
        "--out m --window 0",
        "--out m --full-every 0",
        "--out m --context 0",
        "--out m --layers 0",
    ],
    "sglang_ext.tools.gpu_check": ["--mebibytes 0", "--programs 0", "--out ."],
    "sglang_ext.testing.machine": ["--steps 0", "--processes 0"],
    "sglang_ext.testing.simulation": ["--seeds 0", "--steps 0", "--ranks 0", "--processes 0"],
}
CASES = [(module, options) for module, many in BAD.items() for options in many]


@pytest.mark.parametrize(("module", "options"), CASES)
def test_what_a_script_cannot_use_is_one_line(
    module: str, options: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parse = importlib.import_module(module).parse_args
    with pytest.raises(SystemExit) as stop:
        parse(options.split())
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    for word in options.split():
        if word.startswith("--") and word.partition("=")[0] in said:
            return
    assert module == "launch.models.tiny" and options == "", said


@pytest.mark.parametrize("module", sorted(BAD))
def test_the_defaults_are_allowed(module: str) -> None:
    parse = importlib.import_module(module).parse_args
    parse(
        {
            "launch.models.tiny": ["--out", "m"],
            "launch.bench.plots": ["--data", "."],
            "launch.bench.write_traffic": ["--traffic", "chat"],
        }.get(module, [])
    )


def test_a_run_without_a_server_is_one_line_and_fails() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "launch.bench.multiturn", "--port", "9"]
    run = subprocess.run([*command, "--num-clients", "2"], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.count("\n") == 1, run.stderr
    assert "127.0.0.1:9: ConnectionRefusedError" in run.stderr
