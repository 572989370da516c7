"""Models and servers for end-to-end tests."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from launch.models.tiny import ready_made
from launch.server import CPU, OURS, STRICT_CHECKS, Server
from launch.traffic import Traffic
from tests.e2e.conversations import Answer, converse
from tests.fixtures.zygote import Zygote

COMMON = (
    *("--dtype", "float32", "--mem-fraction-static", "0.5", "--max-running-requests", "8"),
    *("--skip-server-warmup", "--hicache-io-backend", "direct"),
    # who has nothing to do must not spin where others compute; servers of kits and of soaks do
    "--sleep-on-idle",
)
RANKS = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
"""One core for each of two ranks: the engine wants one NUMA node for each otherwise."""


@pytest.fixture(scope="session")
def model() -> Callable[[int], Path]:
    """Tiny model by window size; kept between runs."""
    return ready_made


@pytest.fixture(scope="session")
def serve(
    model: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory, zygote: Zygote
) -> Callable[..., contextlib.AbstractContextManager[Server]]:
    """A strict server: ``with serve(window, *options) as server``."""

    @contextlib.contextmanager
    def start(
        window: int, *options: str, tokens: int = 3072, **environment: str
    ) -> Iterator[Server]:
        log = tmp_path_factory.mktemp("server") / "server.log"
        arguments = ["--model-path", str(model(window)), "--max-total-tokens", str(tokens)]
        variables = {**CPU, **STRICT_CHECKS, **environment}
        with zygote.running([*arguments, *COMMON, *options], log, variables) as server:
            yield server

    return start


@pytest.fixture(scope="session")
def reference(serve) -> Iterator[Callable[[int, Traffic], list[Answer]]]:  # noqa: ANN001
    """Answers of a server without any prefix cache, which waits for the next traffic as long as
    that has the same window."""
    known: dict[tuple[int, Traffic], list[Answer]] = {}
    waiting: dict[int, Server] = {}
    with contextlib.ExitStack() as up:

        def server_of(window: int) -> Server:
            if window not in waiting:
                up.close()
                waiting.clear()
                without = serve(window, "--disable-radix-cache", tokens=16384)
                waiting[window] = up.enter_context(without)
            return waiting[window]

        def answers(window: int, traffic: Traffic) -> list[Answer]:
            if (window, traffic) not in known:
                known[window, traffic] = converse(server_of(window), traffic)
            return known[window, traffic]

        yield answers


def without_cache(
    zygote: Zygote,
    model: Path,
    logs: Path,
    traffic: Traffic,
    *options: str,
    **checks: str,
) -> list[Answer]:
    """Answers of a server that computes every prompt as a whole."""
    arguments = ["--model-path", str(model), *COMMON, "--disable-radix-cache"]
    arguments += ["--max-total-tokens", "16384", *options]
    with zygote.running(arguments, logs / "reference.log", checks) as server:
        return converse(server, traffic)


def with_host_tier(
    zygote: Zygote,
    model: Path,
    logs: Path,
    traffic: Traffic,
    *options: str,
    look: Callable[[Server], None] = lambda _: None,
    **checks: str,
) -> list[Answer]:
    """Answers of a server with our cache and a host tier.

    Args:
        look: looks at the server when the answers are there.
        checks: variables that differ from those of the strict checks.
    """
    arguments = ["--model-path", str(model), *COMMON, *OURS, "--enable-hierarchical-cache"]
    arguments += ["--hicache-ratio", "2", *options]
    with zygote.running(arguments, logs / "ours.log", checks) as server:
        answers = converse(server, traffic)
        look(server)
        assert_idle_and_alive(server)
    return answers


def beside_no_cache(
    zygote: Zygote,
    model: Path,
    logs: Path,
    traffic: Traffic,
    page: int,
    tier: list[str],
    *,
    both: Sequence[str] = (),
    look: Callable[[Server], None] = lambda _: None,
    **checks: str,
) -> tuple[list[Answer], list[Answer]]:
    """(answers with our host tier, those of a server without a prefix cache) of one model.

    Args:
        tier: further options of the server with the host tier.
        both: further options of both servers.
    """
    options = ("--page-size", str(page), *both)
    expected = without_cache(zygote, model, logs, traffic, *options, **checks)
    answers = with_host_tier(zygote, model, logs, traffic, *options, *tier, look=look, **checks)
    return answers, expected


def assert_idle_and_alive(server: Server) -> None:
    """The server passed its strict checks at idle and still answers.

    A scheduler that is asked something while nothing runs makes these checks behind its answer, and
    does not answer any more if one fails. Copies that are on their way may put them off.
    """
    for _ in range(3):
        server.get("/server_info")
        time.sleep(0.1)
    server.get("/server_info")  # behind the last check
    assert server.is_alive(), server.tail()
    assert "memory leak detected" not in server.log.read_text(errors="replace")
