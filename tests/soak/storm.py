"""A storm of everything that an operator may call, beside clients whose every token is checked.

One operator draws calls from the seed: flush, attach, detach and clear storage, pause in each mode
and continue, release and resume memory, update the weights (to the same ones, so that answers stay
comparable), abort everything, change and read internal state, look up, pin, drop and preload
prompts of the clients. A call must end within its time limit with success or with a refusal that is
known for it.

    python -m tests.soak.storm --minutes 20 --seed 1 --tp 1 --out out/storm.json

With ``--dp 2`` the ranks are DP ranks (DP attention), and half of the time one of them has no
requests.
"""

import argparse
import dataclasses
import json
import random
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from launch.server import CPU, OURS, STRICT_CHECKS, Server, ServerError, dp_attention, running
from launch.traffic import generate
from sglang_ext.arguments import Parser, number, output_file, whole
from tests.soak.server import (
    COMMON,
    KEPT,
    PATIENCE_S,
    ROOT,
    cache_events,
    log_report,
    reference,
    served,
)
from tests.soak.traffic import SOAK, Pool, Request
from tests.soak.weights_under_load import NOT_FLUSHED

KEY = "storm"
WINDOW = 128
REQUEST_TIMEOUT_S = 300.0
"""A request that takes longer hangs, pauses included."""
IDLE_S = 4.0
TURN_S = 10.0
"""So long DP ranks have requests, all of them or one alone."""
OPTIONS = (
    *(*OURS, "--enable-hierarchical-cache", "--hicache-ratio", "2", "--page-size", "16"),
    *("--max-total-tokens", "6144", "--admin-api-key", KEY),
)
LATE = {"SGLANG_EXT_TEST_REPORT_DELAY_MS": "100"}
"""Copies are reported late, as they are on a busy bus."""
BUSY = ("not idle", "Flush cache failed", "Timed out waiting", "Another flush_cache")


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of the operator.

    Attributes:
        limit_s: a call that takes longer hangs.
        refusals: what the server may say instead of doing it.
    """

    name: str
    path: str
    body: dict[str, Any] = dataclasses.field(default_factory=dict)
    method: str = "POST"
    limit_s: float = 60.0
    refusals: tuple[str, ...] = ()


def flush(timeout_s: float) -> Call:
    """Flush, at once or as soon as the server is idle."""
    path = f"/flush_cache?timeout={timeout_s:g}" if timeout_s else "/flush_cache"
    # it waits for what is in flight beyond its timeout
    return Call("flush", path, limit_s=120.0 + timeout_s, refusals=BUSY)


def attach(directory: Path, policy: str) -> Call:
    """Attach a directory of pages."""
    body = {
        "hicache_storage_backend": "file",
        "hicache_storage_prefetch_policy": policy,
        "hicache_storage_backend_extra_config_json": json.dumps(
            {"file_storage_path": str(directory), "prefetch_threshold": 16}
        ),
    }
    return Call("attach", "/hicache/storage-backend", body, "PUT", refusals=BUSY)


DETACH = Call(
    "detach",
    "/hicache/storage-backend",
    method="DELETE",
    # the cache itself waits for transfers, twice for ten seconds, and for storage, for sixty
    limit_s=120.0,
    refusals=BUSY,
)
CLEAR = Call("clear", "/hicache/storage-backend/clear")
CONTINUE = Call("continue", "/continue_generation")
RELEASE = Call("release", "/release_memory_occupation", refusals=("memory was not released",))
RESUME = Call("resume", "/resume_memory_occupation")
ABORT = Call("abort all", "/abort_request", {"abort_all": True})
READS = (
    Call("weights checksum", "/weights_checker", {"action": "checksum"}),
    Call("server info", "/server_info", method="GET"),
    Call("internal state", "/set_internal_state", {"server_args": {"pp_max_micro_batch_size": 8}}),
    Call("freeze gc", "/freeze_gc"),
    Call("loads", "/v1/loads", method="GET"),
)


CACHE = {
    "lookup": (),
    "pin": ("too many", "no room", "dropped before", "left the device"),
    "unpin": (),
    "drop": (),
    "preload": ("no storage",),
}
"""Calls on the cache about one prompt, and what the server may say instead of doing them."""


def cache(name: str, prompt: list[int]) -> Call:
    """Look up, pin, unpin, drop or preload a prompt."""
    body = {"input_ids": prompt}
    return Call(f"cache {name}", f"/sglang_ext/cache/{name}", body, refusals=CACHE[name])


def pause(mode: str) -> Call:
    """Pause generation."""
    return Call(f"pause {mode}", "/pause_generation", {"mode": mode}, limit_s=120.0)


class Operator:
    """Decides what is called next: the same sequence for the same seed.

    Args:
        prompts: of the clients.
    """

    def __init__(self, seed: int, directory: Path, model: str, prompts: list[list[int]]) -> None:
        self._rng = random.Random(seed)
        self._prompts = prompts
        self._directory = directory
        # without a pause the server first waits for the requests that run
        self._update = Call(
            "update weights",
            "/update_weights_from_disk",
            {"model_path": model},
            limit_s=240.0,
            refusals=(NOT_FLUSHED,),
        )

    def calls(self) -> Iterator[Call]:
        """Calls without end; every pause is ended before the next one."""
        rng = self._rng
        while True:
            if rng.random() < 0.5:
                yield from self._in_a_pause(rng.choice(("retract", "retract", "in_place", "abort")))
            else:
                calls = [flush(0), flush(2), self._attach(), DETACH, CLEAR, ABORT, RELEASE, RESUME]
                yield rng.choice([*calls, self._update, *READS])
                for _ in range(rng.randrange(4)):
                    yield cache(rng.choice(list(CACHE)), rng.choice(self._prompts))

    def _in_a_pause(self, mode: str) -> Iterator[Call]:
        rng = self._rng
        yield pause(mode)
        for _ in range(rng.randrange(5)):
            on_cache = cache(rng.choice(list(CACHE)), rng.choice(self._prompts))
            calls = flush(0), flush(5), self._attach(), DETACH, CLEAR, RELEASE, self._update, ABORT
            call = rng.choice((*calls, on_cache))
            yield call
            if call is RELEASE:
                # in between, the memory is not there
                yield RESUME
        yield CONTINUE

    def _attach(self) -> Call:
        rng = self._rng
        folder = self._directory / str(rng.randrange(2))
        return attach(folder, rng.choice(("best_effort", "wait_complete", "timeout")))


class Storm:
    """An operator and clients on one server.

    Args:
        dp: DP ranks.
    """

    def __init__(
        self, server: Server, pool: Pool, operator: Operator, seed: int, *, dp: int = 1
    ) -> None:
        self._dp, self._start = dp, time.monotonic()
        self.requests: Counter[str] = Counter(completed=0, aborted=0, failed=0, different=0)
        self.calls: Counter[str] = Counter()
        self.longest_s: dict[str, float] = {}
        self.problems: list[str] = []
        self.tokens: Counter[str] = Counter(prompt=0, device=0, host=0, storage=0)
        self._server, self._pool, self._operator = server, pool, operator
        self._rng = random.Random(seed + 1)
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def run(self, clients: int, minutes: float, least: int = 0) -> None:
        """Storm for so long and until so many calls were made and requests completed, or until the
        server dies; then ask for every answer once more."""
        enough = time.monotonic() + 60 * minutes
        with ThreadPoolExecutor(clients) as threads:
            futures = [threads.submit(self._client) for _ in range(clients)]
            try:
                paused = False
                for call in self._operator.calls():
                    now, seen = time.monotonic(), self._came_to(least)
                    is_over = now > enough and (seen or now > enough + PATIENCE_S)
                    if is_over or not self._server.is_alive():
                        break
                    self._make(call)
                    paused = call is not CONTINUE and (paused or call.name.startswith("pause"))
                    self._stop.wait(self._rng.uniform(0.0, 0.6))
                if paused:
                    self._make(CONTINUE)
                self._make(RESUME)
            finally:
                self._stop.set()
        for future in futures:
            future.result()  # raises what the client raised
        if self._server.is_alive():
            for conversation in self._pool:
                self._ask(conversation[-1], "at the end")

    def _came_to(self, least: int) -> bool:
        with self._lock:
            return min(self.requests["completed"], sum(self.calls.values())) >= least

    def _make(self, call: Call) -> None:
        start = time.monotonic()
        outcome = self._outcome(call)
        took = time.monotonic() - start
        with self._lock:
            self.calls[f"{call.name}: {outcome}"] += 1
            self.longest_s[call.name] = max(took, self.longest_s.get(call.name, 0.0))
            if outcome not in ("done", "refused"):
                self.problems.append(f"{call.name} {call.body}: {outcome}")

    def _outcome(self, call: Call) -> str:
        try:
            self._server.post(call.path, call.body, call.limit_s, call.method)
        except httpx.HTTPStatusError as error:
            status, said = error.response.status_code, error.response.text
            known = status == 400 and any(text in said for text in call.refusals)
            return "refused" if known else f"HTTP {status} {said[:300]}"
        except httpx.TimeoutException:
            return "hung"
        except httpx.HTTPError as error:
            return repr(error)
        return "done"

    def _client(self) -> None:
        while not self._stop.is_set() and self._server.is_alive():
            with self._lock:
                request = self._rng.choice(self._rng.choice(self._pool))
            self._ask(request, "in the storm")

    def _ask(self, request: Request, when: str) -> None:
        try:
            result = generate(
                self._server,
                request.prompt,
                len(request.answer),
                timeout_s=REQUEST_TIMEOUT_S,
                **self._route(),
            )
        except httpx.HTTPStatusError as error:
            said = error.response.text
            self._count("aborted" if "abort" in said.lower() else "failed", request, said[:300])
        except httpx.HTTPError as error:
            self._count("failed", request, repr(error))
        else:
            self._judge(request, result, when)

    def _route(self) -> dict[str, int]:
        """Which DP rank a request goes to: in every other turn to one, the others are idle."""
        turn, alone = divmod(int((time.monotonic() - self._start) / TURN_S), 2)
        return {"routed_dp_rank": turn % self._dp} if alone and self._dp > 1 else {}

    def _judge(self, request: Request, result: dict[str, Any], when: str) -> None:
        output, meta = result.get("output_ids") or [], result["meta_info"]
        aborted = (meta["finish_reason"] or {}).get("type") == "abort"
        expected = request.answer[: len(output)] if aborted else request.answer
        details = meta.get("cached_tokens_details") or {}
        with self._lock:
            self.tokens["prompt"] += meta.get("prompt_tokens", 0)
            for tier in ("device", "host", "storage"):
                self.tokens[tier] += details.get(tier, 0)
        self._count("aborted" if aborted else "completed", request, "")
        if output != expected:
            self._count("different", request, f"{when}: {output} != {expected}, {details}")

    def _count(self, what: str, request: Request, message: str) -> None:
        with self._lock:
            self.requests[what] += 1
            if what in ("failed", "different"):
                self.problems.append(f"{what} {request.name}: {message}")

    def report(self) -> dict[str, Any]:
        """What happened."""
        return {
            "requests": dict(self.requests),
            "calls": dict(sorted(self.calls.items())),
            "longest_s": {name: round(s, 1) for name, s in sorted(self.longest_s.items())},
            "tokens": dict(self.tokens),
            "problems": self.problems[: 4 * KEPT],
        }


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=number(above=0), default=20.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tp", type=int, choices=(1, 2), default=1)
    parser.add_argument("--dp", type=int, choices=(1, 2), default=1, help="DP attention")
    parser.add_argument("--clients", type=whole(1), default=16)
    parser.add_argument("--conversations", type=whole(1), default=16)
    parser.add_argument("--out", type=output_file, default=ROOT / "out" / "storm.json")
    return parser.parse_args(argv)


def storm(
    start: Callable[[], Any],
    pool: Pool,
    seed: int,
    clients: int,
    minutes: float,
    *,
    dp: int = 1,
    least: int = 0,
) -> dict[str, Any]:
    """A storm on a fresh server.

    Args:
        start: gives a running server for the length of a with-block.
        dp: its DP ranks.
        least: calls that are made and requests that are completed, however long it takes.
    """
    result: dict[str, Any] = {"crashed": True, "problems": []}
    try:
        with start() as server, tempfile.TemporaryDirectory() as directory:
            server.key = KEY
            model = json.loads(server.get("/model_info"))["model_path"]
            prompts = [request.prompt for requests in pool for request in requests]
            operator = Operator(seed, Path(directory), model, prompts)
            driver = Storm(server, pool, operator, seed, dp=dp)
            driver.run(clients, minutes, least)
            time.sleep(IDLE_S)
            result |= driver.report()
            result["crashed"] = not (server.is_alive() and server.healthy(REQUEST_TIMEOUT_S))
            log = server.log.read_text(errors="replace")
            result |= log_report(log)
            result["leaks"] = len(re.findall("memory leak detected", log))
            if result["crashed"]:
                result["log_tail"] = server.tail(80)
            else:
                result["cache_events"] = cache_events(server.get("/metrics"))
    except ServerError as error:
        result["log_tail"] = str(error)
    return result


def passed(result: dict[str, Any]) -> bool:
    """Whether nothing went wrong."""
    return not (result["crashed"] or result["problems"] or result["bad_lines"] or result["leaks"])


def main(argv: Sequence[str] | None = None) -> int:
    """Storm one server; returns 1 if anything went wrong."""
    args = parse_args(argv)
    traffic = dataclasses.replace(SOAK, conversations=args.conversations)
    model = served(WINDOW)
    pool = reference(model, traffic, (), {})
    ranks = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"} if 2 in (args.tp, args.dp) else {}
    several = dp_attention(args.dp) if args.dp > 1 else ["--tp", str(args.tp)]
    options = [*model.arguments(), *COMMON, *OPTIONS, *several]
    log = args.out.with_suffix(".log")
    variables = {**CPU, **STRICT_CHECKS, **LATE, **ranks}
    result = storm(
        lambda: running(options, log, variables),
        pool,
        args.seed,
        args.clients,
        args.minutes,
        dp=args.dp,
    )
    given = ("minutes", "seed", "tp", "dp", "clients")
    report = {name: getattr(args, name) for name in given}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({**report, **result}, indent=1))
    print(json.dumps({**report, **result}, indent=1))
    return 0 if passed(result) else 1


if __name__ == "__main__":
    sys.exit(main())
