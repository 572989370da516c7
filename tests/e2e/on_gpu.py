"""The oracle on a GPU, by hand: every token of servers with our cache beside one without any.

    python -m tests.e2e.on_gpu --out out/gpu.json

All servers share the GPU and run side by side, on the reference platform with its tensors there.
With ``--device cpu`` the same runs on a CPU. Exit status 1 if a token
differs, a server dies or fails a check, or nothing comes from below the device.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from launch.models import step as step_model
from launch.models.tiny import ready_made
from launch.server import CPU, OURS, STRICT_CHECKS, ServerError, running
from launch.traffic import Traffic
from sglang_ext.arguments import Parser, output_file, output_folder, whole
from tests.e2e import test_step, test_window_only
from tests.e2e.conftest import COMMON, assert_idle_and_alive
from tests.e2e.conversations import Answer, Conversations, differences, hit_rates
from tests.e2e.test_storage import TRAFFIC as STORED_TRAFFIC
from tests.e2e.test_storage import stop_gracefully, stored_in

WINDOW = 128
NO_CACHE = ("--disable-radix-cache", "--max-total-tokens", "16384")
TIER = (*OURS, "--enable-hierarchical-cache", "--hicache-ratio", "4")
CHUNK = ("--chunked-prefill-size", "256")


@dataclasses.dataclass(frozen=True)
class Model:
    """Weights, and what its servers are asked."""

    path: Callable[[], Path]
    traffic: Traffic
    checks: Mapping[str, str] = dataclasses.field(default_factory=lambda: STRICT_CHECKS)


@dataclasses.dataclass(frozen=True)
class Cell:
    """A server with our cache.

    Attributes:
        copies: ``SGLANG_EXT_COPIES``.
        restarts: it keeps pages in files, and is started anew before the last round.
    """

    options: tuple[str, ...]
    model: str = "hybrid"
    copies: str = "kernels"
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    restarts: bool = False


def _step() -> Path:
    path = ready_made(WINDOW).parent / "step-100"
    return path if (path / "model.safetensors").exists() else step_model.make(path, window=100)


MODELS = {
    "hybrid": Model(lambda: ready_made(WINDOW), Traffic(conversations=12, rounds=6)),
    "stored": Model(lambda: ready_made(WINDOW), STORED_TRAFFIC),
    "step": Model(_step, test_step.TRAFFIC),
    "windows alone": Model(
        lambda: ready_made(100, 99), test_window_only.TRAFFIC, test_window_only.CHECKS
    ),
}


def _cell(page: int, policy: str, *options: str, tokens: int = 3072, **fields: Any) -> Cell:
    sizes = ("--page-size", str(page), "--max-total-tokens", str(tokens))
    return Cell((*sizes, "--hicache-write-policy", policy, *options), **fields)


# the engine's copies that are compiled where they are used
_ENGINES = ("--hicache-io-backend", "kernel", "--hicache-mem-layout", "page_first")
CELLS = {
    "write_through, page 16": _cell(16, "write_through", *CHUNK),
    "write_through, page 64": _cell(64, "write_through", *CHUNK),
    "write_through, page 1": _cell(1, "write_through", *CHUNK),
    "write_back, page 16": _cell(16, "write_back"),
    "write_back, page_head": _cell(16, "write_back", "--hicache-mem-layout", "page_head"),
    "selective, page 64": _cell(64, "write_through_selective"),
    "page_first_direct": _cell(
        16, "write_through", "--hicache-mem-layout", "page_first_direct", *CHUNK
    ),
    "engine's copies, write_through, page 16": _cell(
        16, "write_through", *_ENGINES, *CHUNK, copies="engine"
    ),
    "engine's copies, write_back, page 1": _cell(1, "write_back", *_ENGINES, copies="engine"),
    "engine's copies, selective, page 64": _cell(
        64, "write_through_selective", *_ENGINES, copies="engine"
    ),
    # every fifth step a request is retracted even though there is room
    "retraction": _cell(
        16, "write_through", *CHUNK,
        environment={"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "5"},
    ),
    "step": _cell(16, "write_through", tokens=2048, model="step"),
    "windows alone": _cell(1, "write_through", *CHUNK, tokens=1024, model="windows alone"),
    "files, started anew": _cell(
        64, "write_through", tokens=8192, model="stored", restarts=True
    ),
}  # fmt: skip


def _arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="*", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--option", action="append", default=[], help="for every server")
    parser.add_argument("--parallel", type=whole(1), default=18, help="servers at a time")
    parser.add_argument("--logs", type=output_folder, default=Path("out/gpu"))
    parser.add_argument("--out", type=output_file)
    return parser.parse_args()


class _Servers:
    """Starts servers and has the conversations with them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args

    def without_cache(self, name: str) -> list[Answer] | str:
        """What is expected of a model."""
        return self._ask(f"no cache {name}", MODELS[name], Cell(NO_CACHE, name))

    def with_cache(self, name: str) -> list[Answer] | str:
        """What a server with our cache answers, or why it does not."""
        cell = CELLS[name]
        model = MODELS[cell.model]
        if not cell.restarts:
            return self._ask(name, model, dataclasses.replace(cell, options=(*TIER, *cell.options)))
        with TemporaryDirectory() as directory:
            stored = (*stored_in(Path(directory)), *cell.options)
            return self._ask(name, model, dataclasses.replace(cell, options=stored))

    def _ask(self, name: str, model: Model, cell: Cell) -> list[Answer] | str:
        conversations = Conversations(model.traffic)
        rounds = [model.traffic.rounds - cell.restarts, int(cell.restarts)]
        answers: list[Answer] = []
        for number, some in enumerate(filter(None, rounds)):
            log = (
                self._args.logs / f"{''.join(c if c.isalnum() else '_' for c in name)}{number}.log"
            )
            try:
                answers += self._serve(model, cell, conversations, some, log)
            except (ServerError, OSError, httpx.HTTPError, AssertionError) as error:
                end = log.read_text(errors="replace").splitlines()[-12:] if log.exists() else []
                return "\n".join([repr(error)[:300], *(line[:200] for line in end)])
        return answers

    def _serve(
        self, model: Model, cell: Cell, conversations: Conversations, rounds: int, log: Path
    ) -> list[Answer]:
        options = ["--model-path", str(model.path()), *COMMON, *self._args.option, *cell.options]
        variables = {**CPU, **model.checks, **cell.environment}
        variables |= {"SGLANG_EXT_COPIES": cell.copies, "EXT_CPU_DEVICE": self._args.device}
        with running(options, log, variables) as server:
            answers = conversations.hold(server, rounds)
            assert_idle_and_alive(server)
            if cell.restarts:
                stop_gracefully(server)
        return answers


def _result(answers: list[Answer] | str, expected: list[Answer] | str) -> dict[str, Any]:
    """Of one server, for the report."""
    if isinstance(answers, str):
        return {"failed": answers}
    counts = {"answers": len(answers), **hit_rates(answers)}
    counts["storage_tokens"] = sum(answer.storage_tokens for answer in answers)
    if isinstance(expected, str):
        return {**counts, "failed": f"no cache: {expected}"}
    return {**counts, "different": len(differences(expected, answers))}


def _is_good(result: dict[str, Any]) -> bool:
    if result.get("different") != 0:
        return False
    below = result["host_tokens"] + result["storage_tokens"]
    return bool(below > 0.1 * (below + result["device_tokens"]))


def main() -> int:
    """Run the servers and compare."""
    args = _arguments()
    used = sorted({CELLS[name].model for name in args.only})
    for name in used:
        MODELS[name].path()
    servers = _Servers(args)
    with ThreadPoolExecutor(args.parallel) as pool:
        expected = {name: pool.submit(servers.without_cache, name) for name in used}
        runs = {name: pool.submit(servers.with_cache, name) for name in args.only}
    report = {
        name: _result(run.result(), expected[CELLS[name].model].result())
        for name, run in runs.items()
    }
    for name, result in report.items():
        print("ok" if _is_good(result) else "WRONG", name, json.dumps(result)[:400])
        print(result.get("failed", ""), end="")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1))
    return 0 if all(map(_is_good, report.values())) else 1


if __name__ == "__main__":
    sys.exit(main())
