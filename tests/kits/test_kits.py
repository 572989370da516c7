"""SGLang's kits against servers with our cache."""

import unittest
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.models.text import ready_made_text
from launch.server import CPU, STRICT_CHECKS, Server, wait_until_ready
from tests.e2e.conftest import assert_idle_and_alive
from tests.fixtures.zygote import Zygote
from tests.kits.cells import Cell
from tests.kits.registry import Kit

COMMON = (
    *("--dtype", "float32", "--mem-fraction-static", "0.5", "--max-running-requests", "16"),
    *("--skip-server-warmup", "--hicache-io-backend", "direct"),
)


class Servers:
    """The server that the last test asked for; a test that asks for another one replaces it."""

    def __init__(self, zygote: Zygote, folder: Path) -> None:
        self._zygote = zygote
        self._folder = folder
        self._running: tuple[tuple[object, ...], Server] | None = None
        self._count = 0

    def of(self, cell: Cell, kit: Kit) -> tuple[Server, Path]:
        """A healthy server and a folder of its own."""
        key = (cell, kit.options, kit.environment)
        if self._running is None or self._running[0] != key or not self._running[1].is_alive():
            self.stop()
            self._count += 1
            self._running = key, self._start(cell, kit)
            wait_until_ready(self._running[1])
        return self._running[1], self._scratch

    @property
    def _scratch(self) -> Path:
        return self._folder / str(self._count)

    def _start(self, cell: Cell, kit: Kit) -> Server:
        options = ["--model-path", str(ready_made_text()), *COMMON]
        options += [*cell.options(self._scratch / "storage"), *kit.options]
        environment = {**CPU, **STRICT_CHECKS, **dict(kit.environment)}
        return self._zygote.start(options, self._scratch / "log", environment)

    def stop(self) -> None:
        """Stop it, if there is one."""
        if self._running is not None:
            self._running[1].kill()
            self._running = None


@pytest.fixture(scope="module")
def servers(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """One server at a time."""
    running = Servers(zygote, tmp_path_factory.mktemp("kits"))
    yield running
    running.stop()


def test_kit(servers: Servers, cell: Cell, kit: Kit, test: str) -> None:
    server, scratch = servers.of(cell, kit)
    # they import the engine
    from tests.kits import absent_datasets, classes  # noqa: F401

    kind = getattr(classes, kit.name).on(server, cell, scratch)
    result = unittest.TestResult()
    unittest.TestSuite([kind(test)]).run(result)
    problems = [text for _, text in (*result.failures, *result.errors, *result.skipped)]
    assert result.testsRun == 1
    assert not problems, problems[0]
    assert_idle_and_alive(server)
