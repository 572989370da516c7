"""The quick start of the README against a stand-in for the server."""

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import host_hit
from launch.server import free_port

OTHERS = ["--others", "3", "--tokens", "20"]


class Stub(http.server.BaseHTTPRequestHandler):
    """A server whose device has room for one prompt, and whose host has room for all."""

    keeps = True
    device: str | None = None
    host: set[str]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        kind = type(self)
        if self.path != "/generate" or body["sampling_params"]["temperature"] != 0:
            self.send_error(400)
            return
        prompt = body.get("text") or str(body["input_ids"])
        details = {"device": 0, "host": 0}
        if prompt == kind.device:
            details["device"] = 90
        elif prompt in kind.host:
            details["host"] = 80
        kind.device = prompt
        if kind.keeps:
            kind.host.add(prompt)
        meta = {"prompt_tokens": 100, "cached_tokens_details": details}
        text = json.dumps({"text": "an answer", "meta_info": meta}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[type[Stub], str]]:
    kind = type("OneStub", (Stub,), {"host": set()})
    port = free_port()
    with http.server.HTTPServer(("127.0.0.1", port), kind) as listener:
        thread = threading.Thread(target=listener.serve_forever)
        thread.start()
        yield kind, f"http://127.0.0.1:{port}"
        listener.shutdown()
        thread.join()


@pytest.fixture
def prompt(tmp_path: Path) -> str:
    file = tmp_path / "prompt.txt"
    file.write_text("tell me a story " * 50)
    return str(file)


def test_the_prompt_comes_from_the_host(server, prompt, capsys) -> None:  # noqa: ANN001
    assert host_hit.main(["--url", server[1], "--file", prompt, *OTHERS]) == 0
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    said = [[part.strip() for part in line if part.strip()][:-1] for line in lines]
    assert [" ".join(" ".join(line).split()) for line in said] == [
        "first device 0 host 0 computed 100",
        "again device 90 host 0 computed 10",
        "after the others device 0 host 80 computed 20",
    ]


def test_a_server_without_a_host_tier_is_told_apart(server, prompt, capsys) -> None:  # noqa: ANN001
    server[0].keeps = False
    assert host_hit.main(["--url", server[1], "--file", prompt, *OTHERS]) == 1
    assert "no token came from the host" in capsys.readouterr().out


def test_no_server_is_one_line(prompt, capsys) -> None:  # noqa: ANN001
    address = f"http://127.0.0.1:{free_port()}"
    assert host_hit.main(["--url", address, "--file", prompt]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
