"""A stand-in for a running server."""

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

Answer = Callable[[str, Any], tuple[int, bytes]]
"""(status, text) for a path and what was posted there; None for a GET."""


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], str]]:
    """An HTTP server that answers as it is told: its address."""
    servers: list[http.server.ThreadingHTTPServer] = []

    def start(answer: Answer) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.say(None)

            def do_POST(self) -> None:
                self.say(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def say(self, body: Any) -> None:
                status, said = answer(self.path, body)
                self.send_response(status)
                self.send_header("Content-Length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)

            def log_message(self, *_: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def tell(serve: Callable[[Answer], str]) -> Callable[..., str]:
    """A server that answers with a status and, request after request, these texts."""

    def start(*texts: str, code: int = 200) -> str:
        left = list(texts)
        return serve(lambda *_: (code, (left.pop(0) if len(left) > 1 else left[0]).encode()))

    return start
