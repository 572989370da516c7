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
        "0 are pinned"
    )


def test_the_whole_answer(tell: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    address = tell(json.dumps({"unpinned": 48, "ranks": []}))
    assert cache.main(["unpin", "--url", address, "--all", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"unpinned": 48, "ranks": []}


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
