"""Plans against what can be worked out by hand."""

from pathlib import Path

import pytest

from sglang_ext.planning import cli
from sglang_ext.planning.draft import DraftShape
from sglang_ext.planning.launch_line import LaunchLine, parse, take_apart
from sglang_ext.planning.model import COMPRESSED, PRESETS
from sglang_ext.planning.plan import DevicePools, Plan, PlanError
from tests.planning.models import EAGLE3, saved

GPT = PRESETS["gpt-oss-120b"]
TOKEN = 36_864
"""Bytes of full attention, and of windows: 2 x 18 layers x 8 heads x 64 x 2 bytes."""


def plan(words: str, **more: float) -> Plan:
    return Plan.of("gpt-oss", GPT, parse(words.split(), "test"), **more)


def said(plan: Plan) -> dict[str, str]:
    return dict(plan.rows())


def test_a_line_for_several_ranks() -> None:
    found = plan("--tp 2 --hicache-size 200 --page-size 64")
    assert found.line.ranks == found.line.sharing == 2
    assert found.host.bytes == pytest.approx(200e9, rel=0.01)
    assert found.host.token_bytes == TOKEN / 2
    assert found.host.tokens == pytest.approx(200e9 / (TOKEN / 2), rel=0.01)
    assert (found.host.window_pages, found.host.window_bytes) == (2, 128 * TOKEN / 2)
    assert found.host.windows == pytest.approx(200e9 / (128 * TOKEN / 2), rel=0.01)
    assert "399.79 GB" in said(found)["host memory"]
    assert "on all 2 ranks" in said(found)["host memory"]
    assert said(found)["a GB of host"].startswith("54,253 tokens or 423.9 windows")
    # 32,768 tokens and a window
    assert said(found)["PCIe, loads"].startswith("606.34 MB")
    assert "12.1 ms at 50 GB/s" in said(found)["PCIe, loads"]
    recommended = found.recommended()
    assert recommended[:2] == [
        "SGLANG_EXT_SWA_HICACHE=1", "SGLANG_HICACHE_HOST_PARALLEL_ALLOC_THREADS=16",
    ]  # fmt: skip
    assert recommended[recommended.index("--hicache-size") + 1] == "200"


@pytest.mark.parametrize(
    ("words", "ranks", "sharing"),
    [
        ("", 1, 1),
        ("--tp 8", 8, 8),
        ("--tp 8 --dp 2", 16, 8),
        ("--tp-size 8 --dp-size 2 --enable-dp-attention", 8, 4),
        ("--tensor-parallel-size=4 --data-parallel-size=4 --enable-dp-attention", 4, 1),
    ],
)
def test_ranks(words: str, ranks: int, sharing: int) -> None:
    line = parse(words.split(), "test")
    assert (line.ranks, line.sharing) == (ranks, sharing)


def test_the_ratio_is_of_the_device_pools() -> None:
    found = plan("--max-total-tokens 100000 --page-size 64 --hicache-ratio 3")
    assert found.pools == DevicePools(99_968, 79_936)
    assert found.host.bytes == pytest.approx(3 * (99_968 + 79_936) * TOKEN, rel=0.01)
    by_bytes = plan("--page-size 64", device_bytes=100_000 * 1.8 * TOKEN)
    assert by_bytes.pools == found.pools
    assert "99,968 tokens of full attention and 79,936 of windows" in said(found)["device"]


def test_windows_inside_prompts_follow_the_variable() -> None:
    line = "--hicache-size 10"
    assert plan(line, checkpoint_tokens=0).host.interval == 0
    assert plan(line, checkpoint_tokens=1000).host.interval == 1008
    assert "1,000 new tokens" in said(plan(line, checkpoint_tokens=0))["PCIe, writes"]


def test_what_cannot_be_planned_is_named() -> None:
    with pytest.raises(PlanError, match="--hicache-size is not given"):
        plan("--tp 2")
    with pytest.raises(PlanError, match="too little; at least"):
        plan("--hicache-size 0.0001")
    assert "drafts" in said(plan("--hicache-size 1 --speculative-algorithm EAGLE"))["not counted"]


def test_a_draft_is_part_of_a_token_of_full_attention() -> None:
    draft = DraftShape(1, 8, 64, 64)
    alone, with_draft = (
        plan("--tp 2 --max-total-tokens 100000 --page-size 64", draft=of) for of in (None, draft)
    )
    # K and V, 8 heads on two ranks, their width, bytes
    own = 2 * 4 * 64 * 2
    assert with_draft.host.token_bytes == alone.host.token_bytes + own
    assert with_draft.host.window_bytes == alone.host.window_bytes
    assert with_draft.pools == alone.pools
    assert with_draft.host.bytes == pytest.approx(alone.host.bytes + 2 * 99_968 * own, rel=0.01)
    assert said(with_draft)["draft"].startswith("1.02 kB of a token of full attention on a rank")
    room = plan("--page-size 64", device_bytes=100_000 * (1.8 * TOKEN + 2 * own), draft=draft)
    assert room.pools == DevicePools(99_968, 79_936)


def test_a_whole_command_is_a_launch_line() -> None:
    words = "A=1 B=x=y python -m sglang.launch_server --model-path m --tp 2 --host 0.0.0.0 --port=1"
    variables, options = take_apart(words.split())
    assert variables == {"A": "1", "B": "x=y"}
    line = parse(options, "test")
    assert line == LaunchLine(model="m", tp=2, others=("--host", "--port"))


def test_a_preset_is_a_line_and_its_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--preset", "gpt-oss-120b", "--link-gb-s", "20"]) == 0
    line, _, rows = capsys.readouterr().out.partition("\n\n")
    words = line.replace("\\\n", " ").split()
    assert words[:2] == [
        "SGLANG_HICACHE_HOST_PARALLEL_ALLOC_THREADS=16", "SGLANG_EXT_SWA_HICACHE=1",
    ]  # fmt: skip
    assert take_apart(words)[1][:4] == ["--model-path", "openai/gpt-oss-120b", "--tp", "2"]
    assert "199.90 GB a rank (--hicache-size 200), 399.79 GB on all 2 ranks" in rows
    assert "at 20 GB/s" in rows


def test_options_behind_a_preset_count(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--preset", "gpt-oss-120b", "--hicache-size", "50", "--port", "1"]) == 0
    said = capsys.readouterr().out
    assert "a rank (--hicache-size 50)" in said
    assert said.partition("\n\n")[0].endswith("--hicache-size 50 --port 1")


def test_a_ratio_of_a_preset_is_of_the_device_that_it_assumes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = ["--preset", "gemma-4-31b-issue-24869"]
    cli.main(name)
    assumed = capsys.readouterr().out
    assert "1 bytes an element" in assumed, "fp8"
    assert "35.98 GB a rank" in assumed
    cli.main([*name, "--device-gb", "20"])
    assert (
        "20.00 GB a rank"
        in capsys.readouterr().out.partition("device")[2].partition("host memory")[0]
    )


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model-path", str(saved(tmp_path))]
    assert cli.main([*model, "--hicache-size", "1", "--port", "1"]) == 0
    printed = capsys.readouterr()
    assert "a rank (--hicache-size 1)" in printed.out
    assert printed.err == "not looked at: --port\n"
    assert cli.main(["--config", str(tmp_path), "--device-gb", "1"]) == 0
    draft = ["--speculative-draft-model-path", str(saved(tmp_path / "draft", EAGLE3))]
    drafts = ["--speculative-algorithm", "EAGLE3", *draft]
    capsys.readouterr()
    assert cli.main([*model, "--hicache-size", "1", *drafts]) == 0
    assert "2.05 kB of a token" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("", "--config, --model-path or --preset"),
        ("--preset gpt-oss-7b", "--preset"),
        ("--model-path nobody/nothing --hicache-size 1", "'nobody/nothing' has no config.json"),
        ("--config {model}", "--hicache-size is not given"),
        ("--config {model} --hicache-size 0.0001", "too little"),
        ("--config {model} --tp 0", "--tp 0 is not allowed"),
        ("--config {model} --kv-cache-dtype nvfp4", "--kv-cache-dtype"),
        (
            "--config {model} --speculative-algorithm EAGLE3 --speculative-draft-model no/draft",
            "'no/draft' has no config.json",
        ),
        ("--config {model} --device-gb 0", "--device-gb 0 is not allowed"),
    ],
)
def test_bad_options_are_named_in_one_line(
    words: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main(words.format(model=tmp_path).split())
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1


def test_deepseek_v4_by_its_own_pages() -> None:
    model = COMPRESSED["deepseek-v4-flash"]
    line = parse(["--tp", "8", "--hicache-size", "100", "--max-total-tokens", "1000000"], "test")
    found = Plan.of("v4", model, line)
    assert found.pools == DevicePools(999_936, 99_840), (
        "pages of 256, one token in ten has a window"
    )
    assert found.host.bytes == pytest.approx(100e9, rel=0.01)
    assert found.host.tokens == pytest.approx(100e9 / model.full_token_bytes, rel=0.01)
    assert (found.host.window_pages, found.host.window_tokens) == (1, 256)
    assert "each has all KV" in said(found)["ranks"]
    recommended = found.recommended()
    assert recommended[recommended.index("--page-size") + 1] == "256"
