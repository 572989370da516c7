"""Models and servers for end-to-end tests."""

from collections.abc import Callable
from pathlib import Path

import pytest

from launch.models.tiny import ready_made
from launch.server import CPU, OURS, STRICT_CHECKS, Server, running
from launch.traffic import Traffic
from tests.e2e.conversations import Answer, converse
from tests.fixtures.zygote import Zygote

COMMON = (
    *("--dtype", "float32", "--mem-fraction-static", "0.5", "--max-running-requests", "8"),
    *("--skip-server-warmup", "--hicache-io-backend", "direct"),
)


@pytest.fixture(scope="session")
def model() -> Callable[[int], Path]:
    """Tiny model by window size; kept between runs."""
    return ready_made


@pytest.fixture(scope="session")
def serve(
    model: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory, zygote: Zygote
) -> Callable[..., "running"]:
    """A strict server: ``with serve(window, *options) as server``."""

    def start(
        window: int,
        *options: str,
        tokens: int = 3072,
        fresh: bool = False,
        **environment: str,
    ) -> "running":
        """``fresh``: an interpreter of its own, for variables that the engine reads when it is
        imported."""
        log = tmp_path_factory.mktemp("server") / "server.log"
        arguments = ["--model-path", str(model(window)), "--max-total-tokens", str(tokens)]
        start_one = running if fresh else zygote.running
        return start_one(
            [*arguments, *COMMON, *options], log, {**CPU, **STRICT_CHECKS, **environment}
        )

    return start


@pytest.fixture(scope="session")
def reference(serve) -> Callable[[int, Traffic], list[Answer]]:  # noqa: ANN001
    """Answers of a server without any prefix cache."""
    known: dict[tuple[int, Traffic], list[Answer]] = {}

    def answers(window: int, traffic: Traffic) -> list[Answer]:
        if (window, traffic) not in known:
            with serve(window, "--disable-radix-cache", tokens=16384) as server:
                known[window, traffic] = converse(server, traffic)
        return known[window, traffic]

    return answers


def beside_no_cache(
    model: Path, logs: Path, traffic: Traffic, page: int, tier: list[str], checks: dict[str, str]
) -> tuple[list[Answer], list[Answer]]:
    """(answers with our host tier, those of a server without a prefix cache) of one model.

    Args:
        tier: further options of the server with the host tier.
    """
    options = ["--model-path", str(model), *COMMON, "--page-size", str(page)]
    environment = {**CPU, **checks}
    without = [*options, "--disable-radix-cache", "--max-total-tokens", "16384"]
    with running(without, logs / "reference.log", environment) as server:
        expected = converse(server, traffic)
    tiered = [*options, *OURS, "--enable-hierarchical-cache", "--hicache-ratio", "2", *tier]
    with running(tiered, logs / "ours.log", environment) as server:
        answers = converse(server, traffic)
        assert_idle_and_alive(server)
    return answers, expected


def assert_idle_and_alive(server: Server) -> None:
    """The server passed its strict checks at idle and still answers."""
    assert server.healthy(), server.tail()
    assert "memory leak detected" not in server.log.read_text(errors="replace")
