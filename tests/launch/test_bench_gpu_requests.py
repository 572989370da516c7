"""Requests that decode beside others, against a stand-in for the server."""

import http.server
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.bench.gpu import requests
from launch.bench.gpu.requests import Decoding, Load
from launch.server import Server

LOAD = Load(decoding=2, answer=500, longest=100_000, prefix=32, prefixes=3, asks=3)
MEANWHILE = 3
"""Tokens that each of those that decode gets while one is asked."""


class Handler(http.server.BaseHTTPRequestHandler):
    """Streams tokens until the caller hangs up; answers what is not streamed at once."""

    hung_up = threading.Semaphore(0)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()
        length = body["sampling_params"]["max_new_tokens"]
        if not body.get("stream"):
            time.sleep(0.02)
            tiers = {"device": 16, "host": len(body["input_ids"]) - 16}
            answer = {"output_ids": [1], "meta_info": {"cached_tokens_details": tiers}}
            self.wfile.write(json.dumps(answer).encode())
            return
        try:
            for _ in range(length):
                time.sleep(0.002)
                self.wfile.write(b'data: {"output_ids": [1]}\n\n')
                self.wfile.flush()
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            self.hung_up.release()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as stub:
        thread = threading.Thread(target=stub.serve_forever)
        thread.start()
        process: Any = None
        yield Server(process, stub.server_address[1], Path("no.log"))
        stub.shutdown()
        thread.join()


@pytest.fixture
def asked_beside_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is answered before all that decode have got some tokens meanwhile."""
    streams: list[Decoding] = []

    class Watched(Decoding):
        def __init__(self, *of: Any) -> None:
            super().__init__(*of)
            streams.append(self)

    def generate(*of: Any) -> Any:
        before = [(stream, len(stream._arrived)) for stream in streams if stream._thread.is_alive()]
        answer = ask(*of)
        for stream, count in before:
            while len(stream._arrived) < count + MEANWHILE:
                assert stream._thread.is_alive(), "it decodes no more"
                time.sleep(0.001)
        return answer

    ask = requests.generate
    monkeypatch.setattr(requests, "Decoding", Watched)
    monkeypatch.setattr(requests, "generate", generate)


@pytest.mark.usefixtures("asked_beside_tokens")
def test_tokens_are_timed_while_others_are_asked_and_not_longer(server: Server) -> None:
    found = requests.measure(server, LOAD)
    assert list(found) == ["alone", "host", "device", "new"]
    # from when all of them decode
    assert LOAD.decoding < found["alone"]["tokens"] <= LOAD.decoding * (LOAD.answer - 1)
    assert (found["alone"]["device"], found["alone"]["host"]) == (0, 0)
    for phase, asks in (("host", 3), ("device", 3), ("new", 1)):
        assert found[phase]["tokens"] >= LOAD.decoding * (MEANWHILE - 1) * asks
        assert found[phase]["device"] == 16 * asks
        assert found[phase]["itl_s"]["p99"] > 0
    # what decodes beside others is ended by hanging up
    assert all(Handler.hung_up.acquire(timeout=120) for _ in range(3 * LOAD.decoding))
