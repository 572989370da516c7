"""The command line of the sizing tool."""

import json
from pathlib import Path

import pytest

from sglang_ext.sizing import cli
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
    for cell in cells:
        assert 0 < cell["lru_bound"] <= cell["min_bound"]
        assert cell["of_min"] == cell["hit_rate"] / cell["min_bound"]
    assert cells[1]["room"] == 4000 + 10**9 // (2 * 12 * 8 * 64 * 2)
    printed = capsys.readouterr().out
    assert f"{cells[1]['hit_rate']:.3f}" in printed
    assert f"{cells[1]['min_bound']:.3f}" in printed
    assert drawing.stat().st_size > 1000


def test_deepseek_v4_is_replayed_in_its_own_pages(tmp_path: Path) -> None:
    out = tmp_path / "size.json"
    options = ["--model", "deepseek-v4-flash", "--device-tokens", "20480", "--host-gb", "0", "1"]
    traffic = ["--chunked-prefill-size", "1024", "--sessions", "16", "--active", "16"]
    assert main([*options, *traffic, "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["settings"]["swa_full_tokens_ratio"] == 0.1, "the engine's for this model"
    alone, with_host = report["cells"]
    assert alone["hit_rate"] < with_host["hit_rate"]
    full = 21 * (37_440 + 64 * 132) + 20 * 1728
    assert with_host["room"] == 20_480 + int(1e9 / (full / 256))


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


GPT = ["--model", "gpt-oss-20b"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ([], "without --model"),
        (["--full-layers", "1"], "without --model"),
        ([*GPT, "--window", "1"], "window must be at least 2"),
        ([*GPT, "--dtype-bytes", "0"], "dtype_bytes must be at least 1"),
        (["--model", "deepseek-v4-flash", "--kv-heads", "2"], "deepseek-v4-flash has no kv_heads"),
        ([*GPT, "--swa-kv-heads", "-1"], "swa_kv_heads must be at least 0"),
        ([*GPT, "--swa-head-dim", "-8"], "swa_head_dim must be at least 0"),
        ([*GPT, "--trace", "nowhere"], "--trace nowhere"),
        ([*GPT, "--page-size", "0"], "--page-size 0"),
        ([*GPT, "--chunked-prefill-size", "0"], "--chunked-prefill-size 0"),
        ([*GPT, "--device-tokens", "-5"], "--device-tokens -5"),
        ([*GPT, "--device-tokens", "63"], "--device-tokens 63"),
        ([*GPT, "--device-tokens", "128", "--swa-full-tokens-ratio", "0.4"], "-ratio 0.4"),
        ([*GPT, "--swa-full-tokens-ratio", "2"], "--swa-full-tokens-ratio 2"),
        ([*GPT, "--swa-full-tokens-ratio", "nan"], "--swa-full-tokens-ratio nan"),
        ([*GPT, "--host-gb", "-1"], "--host-gb -1"),
        ([*GPT, "--host-gb", "nan"], "--host-gb nan"),
        ([*GPT, "--host-gb", "1", "inf"], "--host-gb inf"),
        ([*GPT, "--host-gb=-inf"], "--host-gb -inf"),
        ([*GPT, "--host-gb", "1e300"], "--host-gb 1e300"),
        ([*GPT, "--host-gb", "much"], "--host-gb much"),
        ([*GPT, "--checkpoint-tokens", "-1"], "--checkpoint-tokens -1"),
        ([*GPT, "--sessions", "-3"], "--sessions -3"),
        ([*GPT, "--sessions", "0"], "--sessions 0"),
        ([*GPT, "--active", "0"], "--active 0"),
        ([*GPT, "--seed", "-1"], "--seed -1"),
        ([*GPT, "--block-size", "0"], "--block-size 0"),
        ([*GPT, "--out", "."], "--out '.'"),
        ([*GPT, "--out", "/dev/null/size.json"], "--out /dev/null/size.json"),
        ([*GPT, "--plot", "."], "--plot '.'"),
        ([*GPT, "--plot", "x.docx"], "--plot x.docx"),
        ([*GPT, "--plot", "x"], "--plot x"),
        ([*GPT, "--traffic", "nonsense"], "--traffic"),
        (["--model", "nonsense"], "--model"),
    ],
)
def test_bad_options_are_named_in_one_line_before_anything_is_replayed(
    options: list[str],
    named: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli, "replay_all", lambda _: pytest.fail("it was replayed"))
    with pytest.raises(SystemExit) as stop:
        main(options)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert named in said
    assert said.count("\n") == 1


def test_more_pages_than_can_be_replayed_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Small pages, and a host of a terabyte of them: a table for those would take all memory."""
    tiny = ["--kv-heads", "1", "--head-dim", "1", "--swa-kv-heads", "1", "--swa-head-dim", "1"]
    with pytest.raises(SystemExit) as stop:
        main([*GPT, *tiny, "--page-size", "16", "--host-gb", "1000"])
    assert stop.value.code == 2
    assert "--host-gb 1000" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "named"),
    [("", "no request"), ("\n \n", "no request"), ('{"input_ids": [1]}\n{}\n', "line 2")],
)
def test_a_trace_of_no_use_is_named_before_anything_is_replayed(
    text: str,
    named: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli, "replay_all", lambda _: pytest.fail("it was replayed"))
    trace = tmp_path / "trace.jsonl"
    trace.write_text(text)
    with pytest.raises(SystemExit) as stop:
        main([*GPT, "--trace", str(trace)])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "trace.jsonl" in said
    assert named in said
    assert said.count("\n") == 1


def test_blocks_of_16_tokens_are_replayed(tmp_path: Path) -> None:
    """Ids from 2**55 on, as hashes are, that differ by one."""
    trace, out = tmp_path / "trace.jsonl", tmp_path / "size.json"
    high = 2**63
    lines = [
        {"input_length": 160, "output_length": 1, "hash_ids": [high + n for n in range(10)]},
        {"input_length": 160, "output_length": 1, "hash_ids": [high - 1 - n for n in range(10)]},
        {"input_length": 160, "output_length": 1, "hash_ids": [high + n for n in range(10)]},
    ]
    trace.write_text("\n".join(map(json.dumps, lines)))
    options = ["--trace", str(trace), "--block-size", "16", "--host-gb", "0", "--out", str(out)]
    assert main([*SMALL, *GPT, *options]) == 0
    (cell,) = json.loads(out.read_text())["cells"]
    # one token must be left to compute, so nine of ten pages are found, and once only
    assert (cell["prompt"], cell["from_device"]) == (480, 144)
    assert cell["min_bound"] == cell["lru_bound"] == 144 / 480
    assert cell["of_min"] == 1


def test_what_did_not_fit_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device-tokens", "400", "--sessions", "1", "--page-size", "16", "--host-gb", "0"]
    assert main([*GPT, *options, "--out", str(tmp_path / "size.json")]) == 0
    assert "did not fit" in capsys.readouterr().err


def test_a_rank_has_a_part_of_the_heads(tmp_path: Path) -> None:
    """Twice the host memory for two ranks' heads is the same room in tokens."""
    out = tmp_path / "size.json"

    def room(*options: str) -> int:
        assert main([*SMALL, *GPT, *options, "--out", str(out)]) == 0
        return json.loads(out.read_text())["cells"][0]["room"]

    assert room("--host-gb", "0.1") == room("--tp", "2", "--host-gb", "0.05")
    assert room("--host-gb", "0.1", "--v-head-dim", "32") > room("--host-gb", "0.1")
