"""The evaluation, with stand-ins that know the answers; ``tests/e2e`` has it with a server."""

import io
import json
import re
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from launch import accuracy
from tests.conftest import ROOT
from tests.fixtures.arithmetic import write_questions
from tests.fixtures.stand_in import Answer

FILLER = "another prompt"


class Engine:
    """Answers sums, and knows where each prompt is.

    Attributes:
        wrong: numbers of questions that are answered wrongly, by where their prompt is.
        silent: those without a number in the answer.
        has: tiers below the device.
        busy: flushes that it refuses before it does one.
    """

    def __init__(self, *has: str) -> None:
        self.has = has
        self.wrong: dict[str, set[int]] = {}
        self.silent: set[int] = set()
        self.busy = 0
        self.asked: list[dict[str, Any]] = []
        self.flushes = 0
        self.fillers = 0
        self._where: dict[str, str] = {}
        self._numbers: dict[str, int] = {}

    def __call__(self, path: str, body: Any) -> tuple[int, bytes]:
        """See ``tests.fixtures.stand_in``."""
        if path == "/server_info":
            return 200, json.dumps({"max_total_num_tokens": 8000}).encode()
        if path == "/flush_cache":
            self.busy -= 1
            if self.busy >= 0:
                return 400, b"busy"
            self.flushes += 1
            below = "storage" if "storage" in self.has else ""
            self._where = dict.fromkeys(self._where, below)
            return 200, b"flushed"
        if "input_ids" in body:
            self.fillers += len(body["input_ids"])
            if self.fillers >= 8000 and "host" in self.has:
                self._where = dict.fromkeys(self._where, "host")
            return self._said("x", [1], len(body["input_ids"]), {})
        self.asked.append(body)
        prompt = body["text"]
        number = self._numbers.setdefault(prompt, len(self._numbers))
        where = self._where.get(prompt, "")
        self._where[prompt] = "device"
        left, right = map(int, re.findall(r"(\d+) days and (\d+) more", prompt)[-1])
        value = left + right + (number in self.wrong.get(where or "cold", ()))
        text = " it is many" if number in self.silent else f" there are 7 and so {value:,}."
        found = dict.fromkeys(("device", "host", *self.has), 0)
        if where:
            found[where] = 90
        return self._said(text, [5, value], 100, found)

    def _said(self, text: str, ids: list[int], prompt: int, found: dict[str, int]) -> Any:
        meta = {
            "prompt_tokens": prompt,
            "cached_tokens_details": found if any(found.values()) else None,
        }
        return 200, json.dumps({"text": text, "output_ids": ids, "meta_info": meta}).encode()


Serve = Callable[[Answer], str]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """14 questions."""
    return write_questions(tmp_path / "data.jsonl", 14)


def evaluate(serve: Serve, engine: Engine, data: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """(exit status, report) of 10 questions, one at a time."""
    out = data.parent / "out" / "accuracy.json"
    known = [
        "--url",
        serve(engine),
        "--data",
        str(data),
        "--shots",
        "4",
        "--parallel",
        "1",
        "--yes",
    ]
    status = accuracy.main([*known, "--out", str(out), *options])
    return status, json.loads(out.read_text())


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("#### 18", "18"),
        ("so 3 and 4 is 7.", "7"),
        ("it is $1,234.50.", "1234.50"),
        ("-5", "-5"),
        ("18.00", "18"),
        ("none", None),
        ("", None),
    ],
)
def test_the_last_number_is_the_answer(text: str, value: str | None) -> None:
    assert accuracy.value_of(text) == (None if value is None else Decimal(value))


def test_prompts_begin_with_the_same_examples(data: Path) -> None:
    questions = accuracy.read_questions(data, shots=4, count=3)
    assert [question.number for question in questions] == [0, 1, 2]
    prefixes = {question.prompt.rpartition("Question: ")[0] for question in questions}
    (prefix,) = prefixes
    assert prefix.count("####") == 4
    assert all(question.prompt.endswith("?\nAnswer:") for question in questions)
    assert len({question.prompt for question in questions}) == 3
    assert len(accuracy.read_questions(data, shots=4, count=None)) == 10


def test_right_wrong_and_invalid_answers_are_counted(serve: Serve, data: Path) -> None:
    engine = Engine("host", "storage")
    engine.wrong = {where: {0, 1, 2} for where in ("cold", "host", "storage")}
    engine.silent = {5}
    status, report = evaluate(serve, engine, data)
    assert status == 0
    assert report["differences"] == []
    assert list(report["passes"]) == ["cold", "host", "storage"]
    for found in report["passes"].values():
        assert found["accuracy"] == 0.6
        assert found["invalid"] == 0.1
        assert found["output_tokens"] == 20
        assert found["output_tokens_per_s"] == pytest.approx(20 / found["latency_s"])
    for body in engine.asked:
        assert body["sampling_params"]["temperature"] == 0


def test_each_pass_has_its_tier(serve: Serve, data: Path, capsys: Any) -> None:
    engine = Engine("host", "storage")
    engine.busy = 2
    status, report = evaluate(serve, engine, data)
    assert status == 0
    found = {name: each["found_tokens"] for name, each in report["passes"].items()}
    assert found["cold"] == {"device": 0, "host": 0, "storage": 0}
    assert found["host"] == {"device": 0, "host": 900, "storage": 0}
    assert found["storage"] == {"device": 0, "host": 0, "storage": 900}
    assert engine.flushes == 2
    assert engine.fillers >= 8000
    said = capsys.readouterr().out
    assert said.count("Accuracy: 1.000\nInvalid: 0.000\nLatency: ") == 3
    assert len(re.findall(r"^Output throughput: [\d.]+ token/s$", said, re.MULTILINE)) == 3
    assert "0 answers differ" in said


def test_every_answer_that_differs_is_named_with_both(
    serve: Serve, data: Path, capsys: Any
) -> None:
    engine = Engine("host", "storage")
    engine.wrong = {"host": {3}, "storage": {3, 7}}
    status, report = evaluate(serve, engine, data)
    assert status == 1
    differing = [(each["question"], each["passes"]) for each in report["differences"]]
    assert differing == [(3, ["cold", "host"]), (3, ["cold", "storage"]), (7, ["cold", "storage"])]
    cold, host = report["differences"][0]["answers"]
    assert accuracy.value_of(host) == accuracy.value_of(cold) + 1  # type: ignore[operator]
    assert f"  host: {host!r}" in capsys.readouterr().out
    assert evaluate(serve, engine, data, "--allow", "3")[0] == 0


def test_the_documented_command_runs(
    serve: Serve, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "benchmarks" / "README.md").read_text()
    (line,) = re.findall(rf"^    python -m {accuracy.__name__} (.*)$", page, re.MULTILINE)
    monkeypatch.chdir(data.parent)
    data.rename("test.jsonl")
    address = serve(Engine("host", "storage"))
    assert accuracy.main(line.replace("http://127.0.0.1:30000", address).split()) == 0
    assert len(json.loads(Path("out/accuracy.json").read_text())["passes"]) == 3


def test_without_storage_there_are_two_passes(serve: Serve, data: Path) -> None:
    status, report = evaluate(serve, Engine("host"), data)
    assert status == 0
    assert list(report["passes"]) == ["cold", "host"]


def test_a_pass_without_its_tier_is_a_fault(serve: Serve, data: Path, capsys: Any) -> None:
    status, report = evaluate(serve, Engine(), data)
    assert status == 3
    assert report["faults"] == ["pass host: no token came from host"]
    assert "FAULT: pass host" in capsys.readouterr().out
    status, report = evaluate(serve, Engine("host"), data, "--passes", "cold", "storage")
    assert status == 3
    assert report["faults"] == ["pass storage: no token came from storage"]
    assert evaluate(serve, Engine(), data, "--passes", "cold")[0] == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "0 lines leave no question"),
        ('{"question": "q", "answer": "#### 1"}', "1 lines leave no question"),
        ("words", "line 1"),
        ('{"question": "q"}', "line 1"),
        ('{"question": "q", "answer": "18"}', "line 1"),
        ('{"question": "q", "answer": "#### 1"}\n[]', "line 2"),
    ],
)
def test_bad_data_is_one_line(tmp_path: Path, text: str, said: str, capsys: Any) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(text)
    assert (
        accuracy.main(["--data", str(file), "--shots", "1", "--url", "http://127.0.0.1:9", "--yes"])
        == 3
    )
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("answer", [(404, b"no"), (200, b"{}"), (200, b"words")])
def test_a_server_of_another_kind_is_one_line(
    serve: Serve, data: Path, answer: tuple[int, bytes], capsys: Any
) -> None:
    address = serve(lambda path, _: (200, b"") if path == "/flush_cache" else answer)
    assert accuracy.main(["--url", address, "--data", str(data), "--yes"]) == 3
    assert capsys.readouterr().err.count("\n") == 1


def test_a_flush_that_is_not_allowed_is_one_line(serve: Serve, data: Path, capsys: Any) -> None:
    """A pass that was not flushed would not be cold."""
    address = serve(lambda *_: (401, b"a key is needed"))
    assert accuracy.main(["--url", address, "--data", str(data), "--yes"]) == 3
    assert "does not flush: status 401: a key is needed" in capsys.readouterr().err


def test_nobody_has_agreed_to_a_flush(
    serve: Serve, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    asked: list[str] = []
    address = serve(lambda path, _: asked.append(path) or (200, b"{}"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with pytest.raises(SystemExit) as stop:
        accuracy.main(["--url", address, "--data", str(data)])
    assert stop.value.code == 2
    assert not asked
    assert "agree, or use --yes" in capsys.readouterr().err


def test_no_server_is_one_line(data: Path, capsys: Any) -> None:
    assert accuracy.main(["--url", "http://127.0.0.1:9", "--data", str(data), "--yes"]) == 3
    assert capsys.readouterr().err.count("\n") == 1
