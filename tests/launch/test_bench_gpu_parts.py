"""Parts of the bench for a GPU from beginning to end, with stand-ins for their servers."""

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch.bench.gpu import copies, exact, part, requests, served, steps
from launch.bench.gpu.setting import Setting
from launch.bench.pairs import OURS_HOST, STOCK, STOCK_HOST

Report = dict[str, Any]
Ran = Callable[..., Report]


class Server:
    """Answers with a function of the prompt; the process is nobody's.

    Args:
        wrong: what its tokens are off by.
        dies: behind so many answers.
        hangs: a load never ends.
    """

    def __init__(self, log: Path, wrong: int = 0, dies: int = 10_000, hangs: bool = False) -> None:
        self.log, self._wrong, self._left, self.hangs = log, wrong, dies, hangs
        self.process = SimpleNamespace(pid=0)
        log.write_text("host pool: 512 tokens\nhost pool: 256 tokens\ndecode CUDA graph end\n")

    def post(self, path: str, body: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        self._left -= 1
        if self._left < 0:
            raise ConnectionError("nobody is there")
        prompt = list(body["input_ids"])
        length = body["sampling_params"]["max_new_tokens"]
        tokens = [(sum(prompt) + n + self._wrong) % 512 for n in range(length)]
        return {
            "output_ids": tokens,
            "meta_info": {
                "prompt_tokens": len(prompt),
                "cached_tokens_details": {"device": 16, "host": 32},
                "num_retractions": 1,
                "output_token_logprobs": [[-1.0, token, None] for token in tokens],
            },
        }

    def healthy(self) -> bool:
        return self._left >= 0

    def tail(self, lines: int = 40) -> str:
        return "its log"


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ran:
    """Runs a part with such servers: its report.

    ``servers``: arguments of those that are not like the others, by name; None does not start.
    """
    monkeypatch.setattr(exact.Numbers, "path", lambda _: tmp_path)

    def run(name: str, servers: Mapping[str, Any], limit_s: float = 600.0) -> Report:
        setting = Setting("cpu", small=True, logs=tmp_path, limit_s=limit_s)

        def up(stack: Any, wanted: Mapping[str, Any], common: Any) -> Any:
            made = {
                each: Server(tmp_path / f"{number}.log", **servers.get(each, {}))
                for number, each in enumerate(wanted)
                if servers.get(each, {}) is not None
            }
            return made, {each: "why not" for each in wanted if each not in made}

        monkeypatch.setattr(setting, "up", up)
        part.work(name, setting)
        report: Report = json.loads(setting.report.read_text())
        return report

    return run


FIRST, SECOND, THIRD = exact.SMALL


def test_equal_answers_pass(ran: Ran) -> None:
    report = ran("exact", {})
    assert report["ok"], report
    assert {name: found["verdict"] for name, found in report["cells"].items()} == dict.fromkeys(
        exact.SMALL, "equal"
    )
    assert all(found["deterministic"] for found in report["cells"].values())
    assert report["left_out"] == []
    answers = exact.SMALL_TRAFFIC.conversations * exact.SMALL_TRAFFIC.rounds
    assert {found["answers"] for found in report["cells"].values()} == {answers}


def test_an_answer_that_differs_fails_the_part_and_not_the_other_cells(
    ran: Ran, capsys: pytest.CaptureFixture[str]
) -> None:
    report = ran("exact", {SECOND: {"wrong": 1}})
    assert not report["ok"]
    assert [report["cells"][name]["verdict"] for name in exact.SMALL] == [
        "equal",
        "different",
        "equal",
    ]
    said = capsys.readouterr().out
    assert f"{SECOND}: answers that are not those of no cache" in said
    assert said.count("MISSED") == 1


@pytest.mark.parametrize("server", [None, {"dies": 5}])
def test_a_server_that_does_not_start_or_dies_is_a_cell_that_is_not_measured(
    ran: Ran, server: Any
) -> None:
    report = ran("exact", {THIRD: server})
    assert not report["ok"]
    assert report["cells"][THIRD]["verdict"] == "failed"
    assert [row["verdict"] for row in report["checks"]].count("NOT MEASURED") == 1
    assert report["cells"][FIRST]["verdict"] == "equal"


@pytest.mark.parametrize("missing", [0, 1])
def test_without_both_servers_that_have_no_cache_nothing_is_shown(ran: Ran, missing: int) -> None:
    report = ran("exact", {exact._pair("float32")[missing]: None})
    assert not report["ok"]
    assert {found["verdict"] for found in report["cells"].values()} == {"failed"}
    assert {row["verdict"] for row in report["checks"]} == {"NOT MEASURED"}


def test_a_server_without_a_cache_that_dies_fails_its_cells(ran: Ran) -> None:
    report = ran("exact", {exact._pair("float32")[0]: {"dies": 3}})
    assert not report["ok"]
    for found in report["cells"].values():
        assert found["failed"].startswith("no cache: ConnectionError")


def test_what_does_not_start_in_deterministic_mode_is_tried_without(
    ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = exact._wanted

    def refuses(cells: Any, setting: Setting, more: Any) -> Any:
        found = wanted(cells, setting, more)
        return {n: w for n, w in found.items() if n != THIRD or exact.DETERMINISTIC[0] not in more}

    monkeypatch.setattr(exact, "_wanted", refuses)
    report = ran("exact", {})
    assert report["ok"]
    modes = {name: found["deterministic"] for name, found in report["cells"].items()}
    assert modes == {FIRST: True, SECOND: True, THIRD: False}


def test_rounds_without_time_are_left_out(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()
    # of the script all rounds; of what follows it, some
    monkeypatch.setattr(Setting, "left_s", lambda _: 5.0 - next(calls))
    report = ran("exact", {})
    assert report["left_out"]
    for text in report["left_out"]:
        assert text.partition(":")[0] in exact.SMALL
        assert text.endswith(f"of {exact.SMALL_TRAFFIC.rounds} rounds")


def turn(throughput: float) -> dict[str, float]:
    """What ``served.measure`` finds."""
    keys = [f"ttft_{key}_s" for key in ("mean", "p50", "p99")]
    keys += [f"hit_rate_{tier}" for tier in ("total", "device", "host")]
    keys += ["itl_p50_s", "itl_p99_s", "output_tokens_per_s", "wall_s", *served.BYTES]
    return {**dict.fromkeys(keys, 0.5), served.THROUGHPUT: throughput}


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Turns that servers took, of one second each: (server, clients)."""
    taken: list[tuple[str, int]] = []
    speeds = {STOCK: 100.0, STOCK_HOST: 120.0, OURS_HOST: 190.0}
    now = [0.0]

    def measure(
        server: Any, load: Mapping[str, int], path: Path, seed: int, limit_s: float
    ) -> dict[str, float]:
        name = list(served.CACHES)[int(server.log.stem)]
        taken.append((name, load["num-clients"]))
        if server.hangs:
            now[0] += limit_s
            raise TimeoutError
        now[0] += 1.0
        server.post("", {"input_ids": [1], "sampling_params": {"max_new_tokens": 1}}, 1.0)
        return turn(speeds[name])

    def end_of(setting: Setting) -> float:
        return 60.0 - now[0]

    monkeypatch.setattr(served, "measure", measure)
    monkeypatch.setattr(served, "model", lambda size: Path())
    monkeypatch.setattr(served, "host_bytes", lambda server, size: 1e6)
    monkeypatch.setattr(served.os, "killpg", lambda *_: None)
    monkeypatch.setattr(served.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Setting, "left_s", end_of)
    return taken


def test_turns_are_compared(ran: Ran, loads: list[tuple[str, int]]) -> None:
    report = ran("served", {})
    found = report["loads"][served.REUSE]
    assert len(found["turns"]) == served.SMALL.turns[served.REUSE]
    assert found["ours_to"][STOCK][served.THROUGHPUT] == pytest.approx(1.9)
    assert found["ours_to"][STOCK_HOST][served.THROUGHPUT] == pytest.approx(190 / 120)
    # half of the load before it counts, and the other way round next time
    assert loads[:6] == [
        *((name, 4) for name in [*served.CACHES][::-1]),
        *((name, 8) for name in served.CACHES),
    ]
    assert report["ok"]


def test_a_server_that_dies_in_a_turn_is_not_compared_any_more(
    ran: Ran, loads: list[tuple[str, int]]
) -> None:
    report = ran("served", {STOCK_HOST: {"dies": 1}})
    found = report["loads"][served.REUSE]
    assert "nobody is there" in found["failed"][STOCK_HOST]
    assert found["ours_to"].keys() == {STOCK}
    assert STOCK_HOST not in report["loads"][served.NO_REUSE]["median"]
    assert report["loads"][served.NO_REUSE]["failed"] == {}


def test_a_server_that_answers_no_more_leaves_time_to_the_others(
    ran: Ran, loads: list[tuple[str, int]]
) -> None:
    report = ran("served", {STOCK_HOST: {"hangs": True}})
    found = report["loads"][served.REUSE]
    assert "TimeoutError" in found["failed"][STOCK_HOST]
    assert found["ours_to"].keys() == {STOCK}
    assert [name for name, _ in loads].count(STOCK_HOST) == 1
    assert report["loads"][served.NO_REUSE]["ours_to"].keys() == {STOCK}


def test_without_ours_there_is_nothing_to_compare(ran: Ran, loads: list[tuple[str, int]]) -> None:
    report = ran("served", {OURS_HOST: None})
    assert not report["ok"]
    assert "nothing to compare" in report["failed"]
    assert report["failed_servers"] == {OURS_HOST: "why not"}
    assert loads == []


def test_turns_without_time_are_left_out(
    ran: Ran, loads: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = served.dataclasses.replace(served.SMALL, turns={served.REUSE: 50, served.NO_REUSE: 50})
    monkeypatch.setattr(served, "SMALL", size)
    report = ran("served", {})
    count = {name: len(found["turns"]) for name, found in report["loads"].items()}
    # a quarter of what was left is kept for the second load
    assert 10 <= count[served.REUSE] <= 14
    assert 2 <= count[served.NO_REUSE] <= 6
    assert report["left_out"] == [
        f"{name}: {50 - done} of 50 turns" for name, done in count.items()
    ]


def test_copies_beside_requests_are_measured_server_by_server(
    ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = {"itl_s": {"mean": 1.0, "p50": 1.0, "p99": 1.0}, "device": 1, "host": 1}

    def measure(server: Any, load: Any) -> dict[str, Any]:
        server.post("", {"input_ids": [1], "sampling_params": {"max_new_tokens": 1}}, 1.0)
        return dict.fromkeys(("alone", "host", "device", "new"), phase)

    monkeypatch.setattr(requests, "measure", measure)
    monkeypatch.setattr(served, "model", lambda size: Path())
    monkeypatch.setattr(steps, "BACKENDS", ())
    report = ran("copies", {})
    assert report["ok"], report["checks"]
    assert report["requests"].keys() == {STOCK, copies.KERNEL}
    report = ran("copies", {STOCK: {"dies": 0}})
    assert report["requests"].keys() == {copies.KERNEL}
    assert "nobody is there" in report["failed_servers"][STOCK]
    assert report["ok"], "what is said of backups is about speed, which is not judged here"
