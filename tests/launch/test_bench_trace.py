"""The bench of recorded traces: what it counts, and that it looks at the KV it finds."""

import json
from pathlib import Path

import pytest

from launch.bench import trace
from launch.bench.call_times import CallTimes
from launch.bench.trace import Cell
from tests.fixtures.zygote import Zygote

BLOCK, TURNS, CONVERSATIONS = 64, 4, 12


def conversations(path: Path) -> Path:
    """All talk in turns; each turn goes on where the last one's prompt ended."""
    lines = []
    for turn in range(1, TURNS + 1):
        for talk in range(CONVERSATIONS):
            ids = [1000 * talk + block for block in range(turn * (8 + talk))]
            length = BLOCK * len(ids) - talk
            lines.append({"input_length": length, "output_length": 5 * talk, "hash_ids": ids})
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_a_trace_is_replayed_and_its_kv_is_looked_at(zygote: Zygote, tmp_path: Path) -> None:
    printed = zygote.lines("tests.launch.trace_replays", str(conversations(tmp_path / "t.jsonl")))
    cell, bounds, *overwritten = map(json.loads, printed[-4:])
    counted = cell["counted"]
    assert counted["requests"] == TURNS * CONVERSATIONS
    assert counted["rejected"] == 0
    assert counted["verified"] >= counted["from_device"] + counted["from_host"]
    assert cell["host_hit_rate"] > 0
    assert 0 < cell["hit_rate"] <= bounds[1]["min"]
    assert bounds[0]["min"] < bounds[1]["min"]
    for direction in ("to_host_bytes", "to_device_bytes"):
        assert cell[direction]["full"] > cell[direction]["window"] > 0
    # in bytes of the model; what lacked nothing but its window was not loaded
    assert cell["to_device_bytes"]["full"] <= counted["from_host"] * 36_864
    assert cell["to_device_bytes"]["full"] % (64 * 36_864) == 0
    assert 0 < cell["cache_ms_per_request"] < cell["scheduler_ms_per_request"]
    for kind in ("match", "insert", "evict", "check_hicache_events"):
        assert cell["calls"][kind]["largest_ms"] > 0
    used, there = map(sum, zip(*cell["host_pages"].values(), strict=True))
    assert 0 < used <= there
    assert [said.rpartition(": ")[2] for said in overwritten] == ["full attention", "the window"]


def test_pages_of_bytes_beside_the_same_bytes_of_stock(zygote: Zygote, tmp_path: Path) -> None:
    path = str(conversations(tmp_path / "t.jsonl"))
    printed = zygote.lines("tests.launch.trace_replays", path, trace.PAGES_OF_BYTES)
    ours, stock = map(json.loads, printed[-2:])
    for cell in (ours, stock):
        assert cell["counted"]["requests"] == TURNS * CONVERSATIONS
        assert cell["counted"]["rejected"] == 0
        for kind in ("full", "window"):
            assert cell["to_host_bytes"][kind] > 0
    assert ours["to_device_bytes"]["window"] > 0
    assert ours["hit_rate"] > stock["hit_rate"] > 0
    # either host has as many bytes of the model
    shape = trace.MODELS[trace.PAGES_OF_BYTES]
    pages = {kind: there for kind, (_, there) in stock["host_pages"].items()}
    (full,), (window,) = shape.page_planes(256)
    assert 4.5e8 < pages["full"] * full + pages["window"] * window <= 5e8
    assert 4.5e8 < ours["host_pages"]["full"][1] * full <= 5e8


def options(path: Path, *more: str) -> list[str]:
    return ["--trace", str(path), "--block-size", str(BLOCK), *more]


def test_stock_without_a_host_is_one_cell(tmp_path: Path) -> None:
    path = conversations(tmp_path / "t.jsonl")
    args = trace.parse_args(options(path, "--host-gb", "50", "0"))
    assert trace.cells(args) == [
        Cell("ours", 0),
        Cell("ours", 50),
        Cell("ours-lru", 0),
        Cell("ours-lru", 50),
        Cell("stock-no-host", 0),
        Cell("stock", 50),
    ]


def test_bounds_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = conversations(tmp_path / "t.jsonl"), tmp_path / "trace.json"
    line = options(path, "--system", "--requests", "13", "--out", str(out))
    monkeypatch.setattr("sys.argv", ["trace", *line])
    trace.main()
    report = json.loads(out.read_text())
    assert report["cells"] == []
    assert report["versions"]["numpy"]
    assert [row["tokens"] for row in report["bounds"]] == [1_000_000, 2_356_336, 6_425_347]
    # all blocks of a first turn are found, in whole pages
    prompt = sum(BLOCK * (8 + talk) - talk for talk in range(CONVERSATIONS)) + BLOCK * 16
    assert report["bounds"][0]["min"] == BLOCK * 8 / prompt
    assert f"{report['bounds'][0]['min']:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (["--requests", "0"], "--requests 0"),
        (["--requests", "8", "--warm", "8"], "--warm 8"),
        (["--host-gb", "-1"], "--host-gb -1"),
        (["--system", "theirs"], "--system"),
        (["--block-size", "512"], "line 1"),
        (["--trace", "nowhere"], "--trace nowhere"),
        (["--model", trace.PAGES_OF_BYTES, "--verify"], "--verify"),
    ],
)
def test_bad_options_are_named_in_one_line(
    line: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        trace.parse_args(options(conversations(tmp_path / "t.jsonl"), *line))
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert named in said
    assert said.count("\n") == 1


class Clock:
    """CPU time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("time.process_time", lambda: self.now)


def test_calls_inside_calls_and_copies_are_not_counted_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, times = Clock(monkeypatch), CallTimes()

    class Owner:
        def outer(self, seconds: float) -> None:
            clock.now += seconds
            self.inner()

        def inner(self) -> None:
            clock.now += 1.0
            with times.copying():
                clock.now += 10.0

    owner = Owner()
    times.watch(owner, {"out": ("outer", "no such method"), "in": ("inner",)})
    for times.request, seconds in enumerate((2.0, 5.0, 3.0)):
        owner.outer(seconds)
    owner.inner()
    assert times.copies == 40.0
    assert times.seconds == 14.0
    told = times.as_dict(requests=2)
    times.clear()
    assert times.seconds == times.copies == 0.0
    assert not times.as_dict(1)["out"]["largest_ms"]
    assert told["out"] == {
        "calls": 3,
        "ms_per_request": 6500.0,
        "largest_ms": 6000.0,
        "largest_in_request": 1,
    }
    assert (told["in"]["calls"], told["in"]["ms_per_request"]) == (1, 500.0)
