"""The tool that checks a running server, against none and against stand-ins."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from sglang_ext.tools import verify
from tests.fixtures.stand_in import Answer


def engine(*, storage: bool, wrong: bool = False, kept: int = 0) -> Answer:
    """As an engine answers: everything is in storage after a flush, if it has one.

    Args:
        wrong: it answers something else with what it reads there.
        kept: tokens that a flush leaves on the device.
    """
    known: dict[str, str] = {}

    def answer(path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        if path == "/flush_cache":
            known.update(dict.fromkeys(known, "storage"))
            return 200, b"Cache flushed."
        prompt = str(body["input_ids"])
        details = {"device": 0, "host": 0, **({"storage": 0} if storage else {})}
        where = known.get(prompt)
        if where == "device" or (where == "storage" and storage):
            details[where] = len(body["input_ids"]) - 1
        if where == "storage":
            details["device"] += kept
        known[prompt] = "device"
        tokens = [1, 2, 4 if wrong and where == "storage" else 3]
        meta = {"cached_tokens_details": details}
        return 200, json.dumps({"output_ids": tokens, "meta_info": meta}).encode()

    return answer


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ([], "--url"),
        (["--url", "127.0.0.1:30000"], "--url '127.0.0.1:30000'"),
        (["--url", "ftp://host"], "--url 'ftp://host'"),
        (["--url", "http://"], "--url 'http://'"),
        (["--url", "http://host:port"], "--url 'http://host:port'"),
        (["--url", "http://host:99999"], "--url 'http://host:99999'"),
        (["--url", "http://a host"], "--url 'http://a host'"),
        *(
            (["--url", "http://127.0.0.1:9", option, value], f"{option} {shown}")
            for option, value, shown in (
                ("--prompts", "0", "0"),
                ("--prompts", "-1", "-1"),
                ("--prompts", "many", "'many'"),
                ("--tokens", "0", "0"),
                ("--answer", "0", "0"),
                ("--timeout", "0", "0"),
                ("--timeout", "nan", "nan"),
                ("--timeout", "inf", "inf"),
            )
        ),
    ],
)
def test_bad_options_are_named_in_one_line(
    options: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        verify.main(options)
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert named in said.err
    assert said.err.count("\n") == 1
    assert "OK" not in said.out


def said_in_one_line(url: str, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The one line with which the check of a server fails."""
    assert verify.main(["--url", url, "--yes", "--tokens", "64", *options]) == 1
    said = capsys.readouterr()
    assert "OK" not in said.out
    assert said.err.count("\n") == 1
    return said.err


def test_no_server_and_a_wrong_address(capsys: pytest.CaptureFixture[str]) -> None:
    assert "http://127.0.0.1:9" in said_in_one_line("http://127.0.0.1:9", capsys)
    assert "nowhere.invalid" in said_in_one_line("http://nowhere.invalid", capsys)


@pytest.mark.parametrize(
    ("status", "body", "named"),
    [
        (500, b"it broke", "500"),
        (404, b"not here", "404"),
        (401, b"who are you", "401"),
        (400, b'{"error": {"message": "too long"}}', "too long"),
        (200, b"<html>", "did not answer as"),
        (200, b"[]", "did not answer as"),
        (200, b"7", "did not answer as"),
        (200, b"{}", "did not answer as"),
        (200, b'{"output_ids": [1], "meta_info": []}', "did not answer as"),
        (200, b"\xff\xfe", "did not answer as"),
    ],
)
def test_a_server_that_answers_something_else(
    serve: Callable[[Answer], str],
    status: int,
    body: bytes,
    named: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert named in said_in_one_line(serve(lambda *_: (status, body)), capsys)


def test_a_server_that_breaks_off(
    serve: Callable[[Answer], str], capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        raise ConnectionAbortedError

    assert "did not answer" in said_in_one_line(serve(answer), capsys)


def test_a_key_that_may_not_flush(
    serve: Callable[[Answer], str], capsys: pytest.CaptureFixture[str]
) -> None:
    good = engine(storage=True)

    def answer(path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        return (401, b"admin only") if path == "/flush_cache" else good(path, body)

    assert "/flush_cache" in said_in_one_line(serve(answer), capsys, "--prompts", "1")


def test_a_server_without_storage(
    serve: Callable[[Answer], str], capsys: pytest.CaptureFixture[str]
) -> None:
    said = said_in_one_line(serve(engine(storage=False)), capsys, "--prompts", "2")
    assert "--hicache-storage-backend" in said


def test_wrong_tokens_and_what_a_flush_leaves(
    serve: Callable[[Answer], str], capsys: pytest.CaptureFixture[str]
) -> None:
    said = said_in_one_line(serve(engine(storage=True, wrong=True)), capsys, "--prompts", "2")
    assert "another one" in said
    assert "the flush left" in said_in_one_line(serve(engine(storage=True, kept=5)), capsys)


def test_a_good_server(serve: Callable[[Answer], str], capsys: pytest.CaptureFixture[str]) -> None:
    url = serve(engine(storage=True))
    assert verify.main(["--url", url + "/", "--yes", "--prompts", "3", "--tokens", "64"]) == 0
    said = capsys.readouterr().out
    assert said.count("63 from storage") == 3
    assert "OK" in said


def test_the_command_line_returns_the_status() -> None:
    command = [sys.executable, "-m", "sglang_ext", "verify", "--url", "http://127.0.0.1:9"]
    command.append("--yes")
    none = subprocess.run([*command, "--prompts", "0"], capture_output=True, text=True, timeout=180)
    assert (none.returncode, none.stdout) == (2, "")
    down = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert down.returncode == 1
    assert "Traceback" not in down.stderr


@pytest.mark.parametrize(("typed", "flushed"), [("y", True), ("", False), ("n", False)])
def test_it_asks_before_it_takes_the_cache_of_others(
    serve: Callable[[Answer], str],
    typed: str,
    flushed: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked, good = [], engine(storage=True)

    def answer(path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        asked.append(path)
        return good(path, body)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal(f"{typed}\n"))
    command = ["--url", serve(answer), "--prompts", "1", "--tokens", "64"]
    if flushed:
        assert verify.main(command) == 0
        assert "/flush_cache" in asked
        return
    with pytest.raises(SystemExit) as stop:
        verify.main(command)
    assert stop.value.code == 2
    assert not asked
    assert "--yes" in capsys.readouterr().err


def test_nobody_at_the_terminal_has_not_agreed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with pytest.raises(SystemExit) as stop:
        verify.main(["--url", "http://127.0.0.1:9"])
    assert stop.value.code == 2
    assert "nothing was done" in capsys.readouterr().err
