"""Soak of the real server: concurrent clients, aborts, retractions, every token checked.

Each configuration runs on a fresh server with all of the engine's strict checks. The
clients draw from a pool of requests whose answers a server without prefix cache has
given; whatever completes must be the same, token by token.

    python -m tests.soak.server --minutes 10 --out out/soak.json
    python -m tests.soak.server --minutes 10 --only tight-late --drafts mimo-v2

With ``--drafts`` the server drafts tokens. The one that gives the expected answers does not.
"""

import argparse
import contextlib
import dataclasses
import fnmatch
import importlib.metadata
import json
import os
import platform
import re
import signal
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx

from launch.models.tiny import ready_made
from launch.server import CPU, OURS, STRICT_CHECKS, Server, ServerError, running
from launch.traffic import Traffic, generate
from sglang_ext.arguments import Parser, core, number, output_file, refusal, whole
from tests.e2e.drafts import KINDS, Drafting
from tests.soak.traffic import SOAK, Job, Picker, Pool, ask, load, pool_path, save

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "out" / "soak"
"""Expected answers. Logs of the servers are beside the report, for ``soak.json`` here too."""
COMMON = (
    *("--dtype", "float32", "--mem-fraction-static", "0.5", "--skip-server-warmup"),
    *("--hicache-io-backend", "direct", "--chunked-prefill-size", "512"),
    *("--max-running-requests", "24", "--enable-metrics"),
    # admit more than fits, so that requests are retracted
    *("--schedule-conservativeness", "0.1"),
)
REQUEST_TIMEOUT_S = 180.0
"""A request that takes longer hangs."""
SAMPLE_S = 5.0
WARM_UP = 0.2
"""Part of the time after which memory is expected to be flat."""
IDLE_S = 4.0
"""How long the server gets to notice that it is idle and to check its pools."""
KEPT = 5
"""Messages of a kind that the report keeps."""
PATIENCE_S = 900.0
"""So much longer than asked for a run lasts, if it has to come to something first."""
Start = Callable[[Sequence[str], Path, Mapping[str, str]], AbstractContextManager[Server]]
"""Starts a server for the length of a with-block: options, log, variables."""


@dataclasses.dataclass(frozen=True)
class Configuration:
    """Window of the tiny model, options on top of `COMMON`, and variables of the server."""

    window: int
    options: tuple[str, ...]
    environment: dict[str, str]


def configuration(
    policy: str = "write_through",
    page: int = 1,
    swa: float = 0.8,
    ratio: float = 2.0,
    tokens: int = 6144,
    window: int = 128,
    more: Sequence[str] = (),
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Configuration:
    """A configuration with host tier. ``swa`` and ``ratio`` are the sizes of the
    sliding-window pool and of the host pool relative to the full device pool."""
    options = {
        "--hicache-write-policy": policy,
        "--page-size": page,
        "--swa-full-tokens-ratio": swa,
        "--hicache-ratio": ratio,
        "--max-total-tokens": tokens,
    }
    listed = [str(item) for pair in options.items() for item in pair]
    return Configuration(window, ("--enable-hierarchical-cache", *listed, *more), dict(environment))


LATE = {"SGLANG_EXT_TEST_REPORT_DELAY_MS": "100"}
"""Copies are reported late, as they are on a busy bus."""
# a small sliding-window pool must still hold one chunk and a window
DEVICE_TOKENS = {0.1: 8192, 0.8: 4096}
MATRIX = {
    **{
        f"{policy}-page{page}-swa{swa}": configuration(policy, page, swa, tokens=tokens)
        for policy in ("write_through", "write_through_selective", "write_back")
        for page in (1, 64)
        for swa, tokens in DEVICE_TOKENS.items()
    },
    # one core for each rank: the engine wants one NUMA node for each otherwise
    "tp2": configuration(
        page=16, more=("--tp", "2"), environment={"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    ),
    # every fifth step a request is retracted even though there is room
    "retract": configuration(
        page=16, environment={"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "5"}
    ),
    # the engine's own cache does not survive these three
    "tight-selective": configuration("write_through_selective", swa=0.12, ratio=1, window=100),
    "window700-late": configuration(page=16, ratio=1.5, window=700, environment=LATE),
    "tight-late": configuration(swa=0.12, window=100, environment=LATE),
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--minutes", type=number(above=0), default=10.0, help="for each configuration"
    )
    parser.add_argument(
        "--minutes-for",
        type=_minutes_for,
        action="append",
        default=[],
        metavar="NAME=M",
        help="for one of them",
    )
    parser.add_argument(
        "--least", type=whole(0), default=0, help="requests to complete, however long it takes"
    )
    parser.add_argument("--only", nargs="+", default=["*"], metavar="NAME", help="glob patterns")
    parser.add_argument("--list", action="store_true", help="print the names and exit")
    parser.add_argument("--stock", action="store_true", help="the engine's own cache, to compare")
    parser.add_argument("--drafts", choices=KINDS, help="draft, with a model made for that")
    parser.add_argument("--clients", type=whole(1), default=32)
    parser.add_argument("--conversations", type=whole(1), default=SOAK.conversations)
    parser.add_argument("--seed", type=int, default=1, help="order of requests and aborts")
    parser.add_argument("--cores", type=_cores, default=None, help="run on these only, as 0,2-3")
    parser.add_argument("--option", action="append", default=[], help="for every server")
    parser.add_argument("--out", type=output_file, default=ROOT / "out" / "soak.json")
    args = parser.parse_args(argv)
    args.names = [n for n in MATRIX if any(fnmatch.fnmatch(n, p) for p in args.only)]
    if not args.names:
        parser.error(f"--only {args.only} matches nothing")
    args.minutes_for = dict(args.minutes_for)
    return args


def _minutes_for(text: str) -> tuple[str, float]:
    name, _, minutes = text.partition("=")
    if name not in MATRIX:
        raise refusal(text, "NAME=MINUTES; --list has the names")
    return name, number(above=0)(minutes)


def _cores(text: str) -> set[int]:
    chosen: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        chosen |= set(range(core(first), core(last or first) + 1))
    if not chosen:
        raise refusal(text, "cores like 0,2-3")
    return chosen


def pin(cores: set[int]) -> dict[str, str]:
    """Keep this process and its children on some cores; returns variables for the servers.

    Servers that share a core wait for each other's OpenMP threads, which spin.
    """
    os.sched_setaffinity(0, cores)
    return {"OMP_NUM_THREADS": str(len(cores))}


def resident_mb(session: int) -> float:
    """Resident memory of all processes of a session, MB."""
    pages = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended while we were looking
            # the name, in parentheses, may contain anything
            fields = stat.read_text().rpartition(")")[2].split()
            pages += int(fields[21]) * (int(fields[3]) == session)
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


class Tally:
    """What became of the requests; filled by all clients."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter(completed=0, aborted=0, failed=0, different=0)
        self.tokens: Counter[str] = Counter(prompt=0, device=0, host=0)
        self.drafts: Counter[str] = Counter(proposals=0, accepted=0)
        self.failures: list[str] = []
        self.differences: list[str] = []
        self._lock = threading.Lock()

    def fail(self, job: Job, message: str) -> None:
        """A request came to nothing though its client waited for it."""
        with self._lock:
            self.counts["failed"] += 1
            self.failures.append(f"{job.rid} {job.request.name}: {message[:400]}")

    def abort(self) -> None:
        """A request ended with an error because its client gave up."""
        with self._lock:
            self.counts["aborted"] += 1

    def judge(self, job: Job, result: dict[str, Any]) -> None:
        """An answer arrived: compare its tokens, which an abort may have cut short."""
        meta, output = result["meta_info"], result.get("output_ids") or []
        reason = meta["finish_reason"] or {}
        aborted = reason.get("type") == "abort"
        if aborted and job.abort_at is None:
            self.fail(job, f"aborted by the server: {reason}")
            return
        expected = job.request.answer
        with self._lock:
            self.counts["aborted" if aborted else "completed"] += 1
            if aborted:
                # in the step that ends a request the engine does not cut off drafts that stand
                # beyond its length: ``findings/sglang-abort-exceeds-max-new-tokens.sh``
                expected, output = expected[: len(output)], output[: len(expected)]
            if output != expected:
                self.counts["different"] += 1
                self.differences.append(f"{job.rid} {job.request.name}: {output} != {expected}")
            if not aborted:
                tiers = meta.get("cached_tokens_details") or {}
                self.tokens["prompt"] += meta["prompt_tokens"]
                self.tokens["device"] += tiers.get("device", 0)
                self.tokens["host"] += tiers.get("host", 0)
                self.drafts["proposals"] += meta.get("spec_verify_ct", 0)
                self.drafts["accepted"] += meta.get("spec_num_correct_drafts", 0)

    def came_to(self, least: int) -> bool:
        """Whether so many requests were completed, and one was aborted and one found tokens on the
        host. Nothing is asked of none."""
        with self._lock:
            seen = self.counts["aborted"] > 0 and self.tokens["host"] > 0
            return not least or (self.counts["completed"] >= least and seen)

    def report(self) -> dict[str, Any]:
        """Counts, the first messages of each kind and the hit rate."""
        cached = self.tokens["device"] + self.tokens["host"]
        return {
            "requests": dict(self.counts),
            "failures": self.failures[:KEPT],
            "differences": self.differences[:KEPT],
            "tokens": dict(self.tokens),
            "hit_rate": cached / max(1, self.tokens["prompt"]),
            "host_share": self.tokens["host"] / max(1, cached),
            "drafts": dict(self.drafts),
        }


class Soak:
    """Clients that keep one server busy."""

    def __init__(self, server: Server, pool: Pool, seed: int) -> None:
        self.tally = Tally()
        self.memory: list[tuple[float, float]] = []
        """Samples: minutes since the start, MB."""
        self._server = server
        self._picker = Picker(pool, seed)
        self._stop = threading.Event()

    def run(self, clients: int, minutes: float, least: int = 0) -> None:
        """Send requests for so long and until they came to something, see ``Tally.came_to``; or
        until the server dies."""
        start = time.monotonic()
        enough = start + 60 * minutes
        with ThreadPoolExecutor(clients) as threads:
            running_clients = [threads.submit(self._client) for _ in range(clients)]
            try:
                while self._server.is_alive() and (
                    (now := time.monotonic()) < enough
                    or (now < enough + PATIENCE_S and not self.tally.came_to(least))
                ):
                    self.memory.append(
                        ((time.monotonic() - start) / 60, resident_mb(self._server.process.pid))
                    )
                    self._stop.wait(SAMPLE_S)
            finally:
                self._stop.set()
        for client in running_clients:
            client.result()  # raises what the client raised

    def _client(self) -> None:
        latency = 1.0
        while not self._stop.is_set():
            start = time.monotonic()
            self._send(self._picker.pick(), latency)
            latency = time.monotonic() - start

    def _send(self, job: Job, latency: float) -> None:
        if job.abort_at is not None:
            threading.Timer(job.abort_at * latency, self._abort, (job.rid,)).start()
        request = job.request
        try:
            result = generate(
                self._server,
                request.prompt,
                len(request.answer),
                timeout_s=REQUEST_TIMEOUT_S,
                rid=job.rid,
            )
        except httpx.HTTPStatusError as error:
            message = error.response.text
            if job.abort_at is not None and "abort" in message.lower():
                self.tally.abort()
            else:
                self.tally.fail(job, f"HTTP {error.response.status_code}: {message}")
        except httpx.HTTPError as error:
            if self._dies():
                self._stop.set()
            else:
                self.tally.fail(job, repr(error))
        else:
            self.tally.judge(job, result)

    def _abort(self, rid: str) -> None:
        with contextlib.suppress(httpx.HTTPError):  # then the request itself tells
            self._server.post("/abort_request", {"rid": rid}, timeout_s=30.0)

    def _dies(self) -> bool:
        """Whether a broken connection means the end; connections break a moment before it."""
        deadline = time.monotonic() + 10
        while self._server.is_alive() and time.monotonic() < deadline:
            time.sleep(0.2)
        return not self._server.is_alive()


def memory_report(samples: Sequence[tuple[float, float]], minutes: float) -> dict[str, float]:
    """Resident memory after the warm-up and at the end, MB, and its slope, MB per minute."""
    steady = [(at, mb) for at, mb in samples if at >= WARM_UP * minutes]
    if len(steady) < 2:
        return {}
    times, values = zip(*steady, strict=True)
    slope = statistics.linear_regression(times, values).slope
    return {"warm_mb": values[0], "end_mb": values[-1], "slope_mb_per_min": slope}


def cache_events(metrics: str) -> dict[str, float]:
    """Our counters in the server's metrics, summed over its ranks: tokens of each component, like
    ``loaded swa``, and what else happened."""
    events: dict[str, float] = {}
    found = re.findall(
        r"^sglang_ext:(?:kv_tokens|cache_events|declined)_total\{(.*)\} (\S+)$",
        metrics,
        re.MULTILINE,
    )
    for text, value in found:
        labels = dict(re.findall(r'(\w+)="(\w*)"', text))
        names = (labels.get(label) for label in ("event", "reason", "component"))
        event = " ".join(filter(None, names))
        events[event] = events.get(event, 0.0) + float(value)
    return events


def log_report(log: str) -> dict[str, Any]:
    """Retracted requests and bad signs in a server's log."""
    # while it starts the engine logs the traceback of a call to itself that comes too early
    _, ready, served = log.partition("ready to roll!")
    lines = (served if ready else log).splitlines()
    signs = ("memory leak detected", "Traceback")
    return {
        "retracted": sum(map(int, re.findall(r"#retracted_reqs: (\d+)", log))),
        "bad_lines": [line[:400] for line in lines if any(s in line for s in signs)][:KEPT],
    }


def served(window: int, drafts: str | None = None) -> Drafting:
    """The tiny model with this window, or the one that is drafted for; made if missing."""
    return Drafting(lambda: ready_made(window), ()) if drafts is None else KINDS[drafts]


def reference(
    model: Drafting,
    traffic: Traffic,
    more: Sequence[str],
    environment: dict[str, str],
    start: Start = running,
) -> Pool:
    """Requests and the answers of a server without prefix cache and drafts; kept between runs."""
    path = pool_path(FOLDER, traffic, model.model())
    if not path.exists():
        print(f"computing {path}", flush=True)
        options = [*COMMON, "--disable-radix-cache", "--max-total-tokens", "32768", *more]
        variables = {**CPU, **STRICT_CHECKS, **environment}
        with start([*model.without(), *options], path.with_suffix(".log"), variables) as server:
            save(ask(server, traffic), path)
    return load(path)


def soak(
    name: str,
    minutes: float,
    args: argparse.Namespace,
    environment: dict[str, str],
    start: Start = running,
) -> dict[str, Any]:
    """One configuration on a fresh server, for ``minutes`` and until ``args.least`` requests were
    completed."""
    chosen = MATRIX[name]
    traffic = dataclasses.replace(SOAK, conversations=args.conversations)
    model = served(chosen.window, args.drafts)
    pool = reference(model, traffic, args.option, environment, start)
    options = [*(() if args.stock else OURS), *chosen.options, *args.option]
    parts = ["stock" if args.stock else None, args.drafts, name]
    log = args.out.with_suffix("") / f"{'-'.join(filter(None, parts))}.log"
    result: dict[str, Any] = {
        "name": name,
        "model": model.model().name,
        "options": options,
        "environment": chosen.environment,
        "minutes": minutes,
        "crashed": True,
    }
    variables = {**CPU, **STRICT_CHECKS, **environment, **chosen.environment}
    try:
        with start([*model.arguments(), *COMMON, *options], log, variables) as server:
            driver = Soak(server, pool, args.seed)
            driver.run(args.clients, minutes, args.least)
            time.sleep(IDLE_S)
            result |= driver.tally.report()
            result["minutes_lived"] = driver.memory[-1][0]
            result["crashed"] = not (server.is_alive() and server.healthy(REQUEST_TIMEOUT_S))
            if not result["crashed"]:
                result["memory"] = memory_report(driver.memory, minutes)
                result["cache_events"] = cache_events(server.get("/metrics"))
            # read before the stop, which may log a traceback of its own
            result |= log_report(log.read_text(errors="replace"))
            if result["crashed"]:
                result["log_tail"] = server.tail()
    except ServerError as error:
        result["log_tail"] = str(error)
    return result


def passed(result: dict[str, Any]) -> bool:
    """Whether nothing went wrong."""
    return not (
        result["crashed"]
        or result["requests"]["failed"]
        or result["requests"]["different"]
        or result["bad_lines"]
    )


def line(result: dict[str, Any]) -> str:
    """A configuration in one line."""
    verdict = "ok    " if passed(result) else "CRASH " if result["crashed"] else "FAILED"
    if "requests" not in result:
        reason = result["log_tail"].splitlines()[-1:]
        return f"{verdict} {result['name']}: did not start {reason}"
    requests, drafts = (
        ", ".join(f"{count} {what}" for what, count in result[counted].items())
        for counted in ("requests", "drafts")
    )
    slope = result.get("memory", {}).get("slope_mb_per_min", float("nan"))
    return (
        f"{verdict} {result['name']}: {requests}, {result['retracted']} retracted, "
        f"hit rate {result['hit_rate']:.3f} (host share {result['host_share']:.3f}), "
        f"drafts: {drafts}, memory {slope:+.1f} MB/min"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chosen configurations; returns 1 if one of them failed."""
    args = parse_args(argv)
    if args.list:
        print("\n".join(args.names))
        return 0
    # a server is in a session of its own and would survive us
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    environment = pin(args.cores) if args.cores else {}
    packages = ("sglang", "torch", "sglang-ext")
    versions = {name: importlib.metadata.version(name) for name in packages}
    report: dict[str, Any] = {
        "versions": {"python": platform.python_version(), **versions},
        "cache": "stock" if args.stock else "ours",
        "drafts": args.drafts,
        "clients": args.clients,
        "seed": args.seed,
        "traffic": dataclasses.asdict(dataclasses.replace(SOAK, conversations=args.conversations)),
        "configurations": [],
    }
    for name in args.names:
        result = soak(name, args.minutes_for.get(name, args.minutes), args, environment)
        print(line(result), flush=True)
        report["configurations"].append(result)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1))
    return 0 if all(map(passed, report["configurations"])) else 1


if __name__ == "__main__":
    sys.exit(main())
