"""Calls on a server's cache, from stand-ins of a server; tests/e2e/test_cache_control.py has a real
one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sglang_ext.tools import cache

Answer = Callable[[str, Any], tuple[int, bytes]]
FOUND = {"tokens": 40, "found": 32, "device": 16, "host": 32, "storage": None, "pinned": 0}
FOUND |= {"namespace_bytes": 2_000_000, "quota_bytes": None}


def test_a_call_sends_what_it_is_about(
    serve: Callable[[Answer], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def answer(path: str, body: Any) -> tuple[int, bytes]:
        asked.append((path, body))
        return 200, json.dumps(FOUND).encode()

    address = serve(answer)
    ids = tmp_path / "ids"
    ids.write_text("[1, 2, 3]\n")
    text = tmp_path / "text"
    text.write_text("two words\n")
    for words in (
        ["--ids", "1,2,3"],
        ["--ids-file", str(ids), "--extra-key", "a"],
        ["--text-file", str(text), "--cache-salt", "b"],
        ["--text", "word"],
    ):
        assert cache.main(["lookup", "--url", address, *words]) == 0
    assert [body for _, body in asked] == [
        {"input_ids": [1, 2, 3]},
        {"input_ids": [1, 2, 3], "extra_key": "a"},
        {"text": "two words\n", "cache_salt": "b"},
        {"text": "word"},
    ]
    assert {path for path, _ in asked} == {"/sglang_ext/cache/lookup"}
    assert capsys.readouterr().out.splitlines()[0] == (
        "40 tokens: a request finds 32; 16 are on the device, 32 on the host, none in storage; "
        "0 are pinned; their namespace has 2.00 MB of the host"
    )


def test_the_whole_answer(tell: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    address = tell(json.dumps({"unpinned": 48, "ranks": []}))
    assert cache.main(["unpin", "--url", address, "--all", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"unpinned": 48, "ranks": []}


def test_a_quota(serve: Callable[[Answer], str], capsys: pytest.CaptureFixture[str]) -> None:
    asked = []
    key = {"extra_key": "a", "cache_salt": None}
    answers: list[dict[str, Any]] = [
        {"bound": 20_000_000_000, "used": 5_000_000},
        {"bound": 0, "used": 0},
        {"cleared": 1, "used": 5_000_000},
        {"cleared": 0, "used": 0},
        {
            "host": 40_000_000_000,
            "more": 3,
            "namespaces": [
                {**key, "used": 5_000_000, "bound": 20_000_000_000},
                {"extra_key": None, "cache_salt": "b", "used": 1_000_000, "bound": None},
            ],
        },
    ]

    def answer(path: str, body: Any) -> tuple[int, bytes]:
        asked.append(body)
        return 200, json.dumps(answers[len(asked) - 1]).encode()

    address = serve(answer)
    words = [["--set", "a=b=20GB"], ["--set", "=0%"], ["--clear", "a"], ["--clear", ""], ["--list"]]
    done = [cache.main(["quota", "--url", address, *more]) for more in words]
    assert done == [0, 0, 0, 1, 0]
    assert asked == [
        {"extra_key": "a=b", "size": "20GB"},
        {"size": "0%"},
        {"extra_key": "a", "clear": True},
        {"clear": True},
        {"list": True},
    ]
    assert capsys.readouterr().out.splitlines() == [
        "it has 5.00 MB of the host, and may have 20.00 GB",
        "it has 0.00 kB of the host, and may have 0.00 kB",
        "it has 5.00 MB of the host, and may have all of it",
        "it had no quota; it has 0.00 kB of the host",
        "a                               5.00 MB, may have 20.00 GB",
        "requests without a key, salt b  1.00 MB",
        "all                             40.00 GB",
        "                                3 more namespaces without a quota have some of it",
    ]


@pytest.mark.parametrize(
    "words", [["--set", "a"], ["--set", "a=20"], ["--set", "a=1%", "--list"], []]
)
def test_a_bad_quota_ends_it(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cache.main(["quota", "--url", "http://127.0.0.1:9", *words])
    assert ended.value.code == 2


def test_nothing_to_pin_is_no_success(tell: Callable[..., str]) -> None:
    address = tell(json.dumps({"pinned": 0}))
    assert cache.main(["pin", "--url", address, "--ids", "1"]) == 1


@pytest.mark.parametrize(
    ("code", "text", "said"),
    [
        (400, '{"error": "unpin something"}', "sglang-ext cache: unpin something"),
        (401, '{"error": "Unauthorized"}', "sglang-ext cache: Unauthorized"),
        (404, "{}", "SGLANG_EXT_SWA_HICACHE=1"),
        (500, "oops", "answered with status 500: 'oops'"),
        (200, "<html>", "answered with status 200: '<html>'"),
        (200, "[]", "answered with status 200"),
        (200, '{"done": true}', "answered with status 200"),
    ],
)
def test_a_refusal_is_one_line(
    tell: Callable[..., str], capsys: pytest.CaptureFixture[str], code: int, text: str, said: str
) -> None:
    assert cache.main(["drop", "--url", tell(text, code=code), "--extra-key", "a"]) == 1
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    "words", [["--ids", "1,x"], ["--ids", "-1"], ["--ids", "1", "--text", "a"], []]
)
def test_a_bad_prompt_ends_it(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cache.main(["pin", "--url", "http://127.0.0.1:9", *words])
    assert ended.value.code == 2


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert cache.main(["unpin", "--url", "http://127.0.0.1:9", "--all"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
