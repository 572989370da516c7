"""A prefill server and a decode server, which answer as one."""

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from launch.server import Server, free_port

OVER_TCP = {"MOONCAKE_PROTOCOL": "tcp", "MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER": "65535"}
"""Variables with which Mooncake moves KV between processes of one machine. Servers with other
numbers of ranks send each token of each layer by itself, and what does not fit into the queue
fails with its request: its 1,024 places are too few beside other work."""


def role(mode: str, bootstrap: int) -> list[str]:
    """Options of one of the two servers.

    Args:
        mode: ``prefill`` or ``decode``.
        bootstrap: port on which the prefill server is asked for its addresses.
    """
    return [
        *("--disaggregation-mode", mode, "--disaggregation-transfer-backend", "mooncake_tcp"),
        *("--disaggregation-bootstrap-port", str(bootstrap)),
    ]


class Pair:
    """Two servers with the interface of one, as far as conversations need it. Cached tokens are
    those of the prefill server, all else is what the decode server says."""

    def __init__(self, prefill: Server, decode: Server, bootstrap: int) -> None:
        self.prefill = prefill
        self.decode = decode
        self._bootstrap = bootstrap
        self._rooms = itertools.count(1)
        self._threads = ThreadPoolExecutor(32)

    def meeting(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """A request with what both servers know it by."""
        room = {"bootstrap_port": self._bootstrap, "bootstrap_room": next(self._rooms)}
        return {**body, "bootstrap_host": "127.0.0.1", **room}

    def post(self, path: str, body: Mapping[str, Any], timeout_s: float = 600.0) -> Any:
        """One request, to both; raises what ``Server.post`` raises."""
        body = self.meeting(body)
        prefilled = self._threads.submit(self.prefill.post, path, body, timeout_s)
        try:
            answer = self.decode.post(path, body, timeout_s)
        finally:
            found = prefilled.result()
        for name in ("cached_tokens", "cached_tokens_details"):
            answer["meta_info"][name] = found["meta_info"][name]
        return answer


@contextlib.contextmanager
def disaggregated(
    serve: Any,
    window: int,
    prefill: list[str],
    decode: list[str],
    *,
    tokens: int,
    **environment: str,
) -> Iterator[Pair]:
    """A pair whose decode server has no prefix cache.

    Args:
        serve: the fixture.
        prefill, decode: options of each.
        tokens: of the prefill server's device.
        environment: variables of both servers.
    """
    port = free_port()
    variables = {**OVER_TCP, **environment}
    with (
        serve(window, *role("prefill", port), *prefill, tokens=tokens, **variables) as first,
        serve(window, *role("decode", port), *decode, tokens=16384, **variables) as second,
    ):
        yield Pair(first, second, port)
