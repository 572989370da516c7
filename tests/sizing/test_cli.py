"""The command line of the sizing tool."""

import json
from pathlib import Path

import pytest

from sglang_ext.sizing.cli import main

SMALL = ["--device-tokens", "4000", "--sessions", "4", "--active", "2", "--page-size", "16"]


def test_a_run_prints_writes_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, drawing = tmp_path / "size.json", tmp_path / "size.png"
    options = ["--model", "gpt-oss-20b", "--host-gb", "0", "1", "--policy", "write_back"]
    files = ["--out", str(out), "--plot", str(drawing)]
    assert main([*SMALL, *options, *files]) == 0
    cells = json.loads(out.read_text())["cells"]
    assert [(cell["policy"], cell["host_gb"]) for cell in cells] == [
        ("write_back", 0),
        ("write_back", 1),
    ]
    assert cells[0]["from_host"] == 0 < cells[1]["from_host"]
    assert cells[0]["hit_rate"] < cells[1]["hit_rate"]
    assert f"{cells[1]['hit_rate']:.3f}" in capsys.readouterr().out
    assert drawing.stat().st_size > 1000


def test_policies_are_compared(tmp_path: Path) -> None:
    out = tmp_path / "size.json"
    options = ["--model", "gpt-oss-20b", "--host-gb", "1", "--eviction", "lru", "slru"]
    assert main([*SMALL, *options, "--checkpoint-tokens", "64", "--out", str(out)]) == 0
    cells = json.loads(out.read_text())["cells"]
    assert [cell["policy"] for cell in cells] == ["write_through", "write_through, slru"]


def test_a_trace_is_replayed(tmp_path: Path) -> None:
    trace, out = tmp_path / "trace.jsonl", tmp_path / "size.json"
    line = json.dumps({"input_ids": list(range(100))})
    trace.write_text(f"{line}\n{line}\n")
    model = [
        "--full-layers",
        "1",
        "--swa-layers",
        "1",
        "--window",
        "32",
        "--kv-heads",
        "1",
        "--head-dim",
        "8",
    ]
    assert main([*SMALL, *model, "--trace", str(trace), "--out", str(out), "--host-gb", "0"]) == 0
    (cell,) = json.loads(out.read_text())["cells"]
    assert (cell["prompt"], cell["from_device"]) == (200, 96)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ([], "without --model"),
        (["--full-layers", "1"], "without --model"),
        (["--model", "gpt-oss-20b", "--window", "1"], "window must be at least 2"),
        (["--model", "gpt-oss-20b", "--trace", "nowhere"], "--trace nowhere"),
        (["--model", "gpt-oss-20b", "--page-size", "0"], "--page-size 0"),
        (["--model", "gpt-oss-20b", "--swa-full-tokens-ratio", "2"], "--swa-full-tokens-ratio 2"),
        (["--model", "gpt-oss-20b", "--host-gb", "-1"], "--host-gb -1"),
        (["--model", "gpt-oss-20b", "--checkpoint-tokens", "-1"], "--checkpoint-tokens -1"),
    ],
)
def test_bad_options_are_named(
    options: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(options)
    assert stop.value.code == 2
    assert named in capsys.readouterr().err


def test_a_broken_trace_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text("{}\n")
    assert main(["--model", "gpt-oss-20b", "--trace", str(trace)]) == 1
    assert "trace.jsonl, line 1" in capsys.readouterr().err
