"""In-process time of tree operations: ours against stock's Rust and Python cores.

All three run on the same allocator of SGLang, with the same keys, through the calls
that the scheduler makes: ``match_prefix``, insert of computed slots, lock and unlock,
``evict``. The cache is full, and every prompt comes in turns, so a path has as many nodes in
stock's tree. Each core runs in a process of its own. All that are compared are up at once, on the
same CPU, and pass a token around: one runs, for a fraction of a second as a rule, while the others
wait, so what the machine does otherwise hits all of them. Medians over processes of medians, in
microseconds. Evictions are what it costs to free 1,024 tokens: stock takes whole nodes, so most of
its calls find the work done. Growth is the time with a million pages beside that with ten thousand.

    python -m launch.bench.core --out out/core.json
    python -m launch.bench.core --before ../checkout --cores ours --out out/core.json

The second one compares with another checkout of the project, which runs its own bench.
"""

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from launch.server import CPU, inherited
from sglang_ext.arguments import Parser, output_file, refusal

CORES = ("ours", "rust", "python")
BEFORE = "before"
"""Ours, from another checkout."""
BENCHES = ("launch/bench/core.py", "launch/bench_core.py")
"""Where a checkout has this bench; the last one is from before it was moved."""
PLATFORMS = ("launch/platform", "cpu_platform")
"""The same for the reference platform."""
PARTS = ("table", "growth")
Cell = tuple[int, int, int]
"""Page size, pages, prompt tokens."""
Times = dict[str, float]
"""Median microseconds of each operation."""
PAGE_SIZES = (64, 1)
PAGES = (1_000, 10_000, 100_000, 1_000_000)
PROMPTS = (2_048, 32_768, 131_072)
TURNS = 8
WINDOW = 127
EVICTED_TOKENS = 1_024
EVICTION_ROUNDS = 5
ROUNDS_IN_SMALL = 25
"""Up to ``GROWTH[0]`` pages: a round is a few calls there."""
EVICTION_SHARE = 8
EVICTION_SECONDS = 0.5
REPEATS = 15
LOOKUPS = 105
"""Matches and locks; with few, an interpreter that has not warmed up is measured."""
IN_A_ROW = 5
"""Inserts or lookups before the token goes on."""
PROCESSES = 5
MOST_PAGES = {"python": 100_000}
"""Cells with more pages are left out,"""
ONCE_ABOVE = {"ours": 100_000, BEFORE: 100_000, "rust": 100_000, "python": 1_000}
"""or measured in one process: minutes pass until so many pages are there."""
GROWTH = (10_000, 1_000_000)
_UNLIMITED = 1 << 30
_WAITS = "waits for the token"


def checkout(text: str) -> Path:
    """A checkout of the project."""
    path = Path(text).absolute()
    if not any((path / file).is_file() for file in BENCHES):
        raise refusal(text, f"a checkout of this project, with {BENCHES[0]}")
    return path


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=output_file, default=Path("out/core.json"))
    parser.add_argument("--quick", action="store_true", help="the smallest cell only")
    parser.add_argument("--cores", nargs="+", choices=CORES, default=CORES, help="to measure")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="to measure")
    parser.add_argument(
        "--pages", nargs="+", type=int, choices=PAGES, default=PAGES, help="of a cache"
    )
    parser.add_argument("--before", type=checkout, help="checkout to compare with")
    parser.add_argument("--core", choices=CORES, help=argparse.SUPPRESS)
    parser.add_argument("--cell", type=int, nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--cpu", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.before:
        args.cores = (*args.cores, BEFORE)
    return args


def cells(*, quick: bool) -> list[Cell]:
    """Those in which at least four prompts fit."""
    every = [
        (page, pages, prompt)
        for pages in PAGES
        for page in PAGE_SIZES
        for prompt in PROMPTS
        if 4 * prompt <= page * pages
    ]
    return every[:1] if quick else every


# ---- one cell, in a child process -------------------------------------------------


class Rig:
    """A cache over a real allocator with pools of one byte a token."""

    def __init__(self, core: str, page: int, pages: int) -> None:
        import torch
        from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
        from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

        size = page * pages
        pool = SWAKVPool(
            size=size,
            size_swa=size,
            page_size=page,
            dtype=torch.float16,
            head_num=1,
            head_dim=1,
            swa_attention_layer_ids=[0],
            full_attention_layer_ids=[1],
            device="cpu",
        )
        self.allocator = SWATokenToKVPoolAllocator(
            size, size, page, torch.float16, "cpu", pool, need_sort=False
        )
        params = CacheInitParams(
            disable=False,
            req_to_token_pool=ReqToTokenPool(1, 8, "cpu", enable_memory_saver=False),
            token_to_kv_pool_allocator=self.allocator,
            page_size=page,
            sliding_window_size=WINDOW,
        )
        self._insert: Callable[[Any, Any, int], None]
        if core == "ours":
            self._build_ours(params)
        else:
            self._build_stock(params)

    def _build_ours(self, params: Any) -> None:
        from sglang_ext.adapter.admission import Admission
        from sglang_ext.adapter.device_pool import EngineDevicePool
        from sglang_ext.adapter.inside import InsidePages
        from sglang_ext.adapter.prefix_cache import SwaHiCache
        from sglang_ext.core.cache import PrefixCache
        from sglang_ext.core.device.victims import Spare
        from sglang_ext.core.table.geometry import Geometry

        geometry = Geometry(params.page_size, WINDOW)
        pool = EngineDevicePool(self.allocator, geometry)
        rows = self.allocator.size_full // geometry.page_tokens
        spare = Spare.for_device(rows, rows, has_host=False)
        index = PrefixCache(geometry, rows, pool, spare=spare)
        admission = Admission(_UNLIMITED, geometry.retained_tokens, params.page_size, None)
        inside = InsidePages(index, pool, None) if geometry.resumes_inside else None
        self.cache = cache = SwaHiCache(params, index, pool, admission, inside=inside)
        requests = itertools.count()

        def insert(key: Any, tokens: Any, owned: int) -> None:
            pages, namespace, _ = cache.keys.of(key)
            first = owned // geometry.page_tokens
            full, swa = pool.owned_slots(tokens[owned : pages.size], 0)
            index.insert(pages, namespace, first, full, swa, next(requests))

        self._insert = insert

    def _build_stock(self, params: Any) -> None:
        from sglang.srt.mem_cache.base_prefix_cache import InsertParams
        from sglang.srt.mem_cache.unified_cache.components import ComponentType
        from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

        params.tree_components = (ComponentType.FULL, ComponentType.SWA)
        self.cache = cache = UnifiedRadixCache(params)

        def insert(key: Any, tokens: Any, owned: int) -> None:
            cache.insert(InsertParams(key=key, value=tokens, prev_prefix_len=owned))

        self._insert = insert

    def key(self, tokens: array) -> Any:
        """A radix key."""
        from sglang.srt.mem_cache.radix_cache import RadixKey

        return RadixKey(tokens)

    def allocate(self, count: int) -> Any:
        """Slots of a computed prompt, evicting first if need be."""
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        allocator = self.allocator
        full = max(0, count - allocator.full_available_size())
        swa = max(0, count - allocator.swa_available_size())
        if full or swa:
            self.cache.evict(EvictParams(num_tokens=full, swa_num_tokens=swa))
        tokens = allocator.full_attn_allocator.alloc(count)
        peers = allocator.swa_attn_allocator.alloc(count)
        allocator.set_full_to_swa_mapping(tokens, peers)
        return tokens

    def insert(self, tokens: array) -> float:
        """Insert a prompt that was just computed; the time of the insert alone."""
        slots = self.allocate(len(tokens))
        return timed(lambda: self._insert(self.key(tokens), slots, 0))

    def insert_in_turns(self, tokens: array) -> list[float]:
        """Insert a conversation, turn by turn; the time of each."""
        import torch

        times, slots = [], self.allocate(0)
        for turn in range(TURNS):
            owned, end = (len(tokens) * n // TURNS for n in (turn, turn + 1))
            slots = torch.cat((slots, self.allocate(end - owned)))
            key = self.key(tokens[:end])
            times.append(
                timed(lambda key=key, owned=owned, slots=slots: self._insert(key, slots, owned))
            )
        return times

    def fill(self, length: int, prompt: Callable[[], array]) -> None:
        """Insert prompts until less than one is free of either component."""
        room = max(self.allocator.full_available_size(), self.allocator.swa_available_size())
        for _ in range(room // length):
            self.insert_in_turns(prompt())

    def match(self, tokens: array) -> Any:
        """Match a prompt."""
        from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams

        return self.cache.match_prefix(MatchPrefixParams(key=self.key(tokens)))

    def lock_and_unlock(self, node: Any) -> None:
        """What a request does around its life."""
        self.cache.unlock(self.cache.lock(node))

    def evict(self, full: int, swa: int) -> Any:
        """Evict so many tokens."""
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        return self.cache.evict(EvictParams(num_tokens=full, swa_num_tokens=swa))

    def cost_of_eviction(self, *, swa: bool) -> float:
        """Microseconds for 1,024 tokens: the mean over an eighth of what there is, or over what
        is done in ``EVICTION_SECONDS``."""
        size = self.cache.swa_evictable_size if swa else self.cache.full_evictable_size
        before = size()
        wanted, spent = max(EVICTED_TOKENS, before // EVICTION_SHARE), 0.0
        # a call asks for what the next step would lack
        while (freed := before - size()) < wanted and spent < EVICTION_SECONDS * 1e6:
            missing = min(EVICTED_TOKENS, wanted - freed)
            tokens = (0, missing) if swa else (missing, 0)
            spent += timed(lambda tokens=tokens: self.evict(*tokens))
        return spent * EVICTED_TOKENS / freed


def timed(operation: Callable[[], Any]) -> float:
    """Microseconds of one call."""
    start = time.perf_counter()
    operation()
    return (time.perf_counter() - start) * 1e6


def measure(core: str, cpu: int, page: int, pages: int, length: int) -> Times:
    """Median microseconds of each operation in one cell."""
    import numpy as np

    rig = Rig(core, page, pages)
    # two CPUs of a virtual machine can differ by a factor of two, and a process stays on one
    os.sched_setaffinity(0, {cpu})
    rng = np.random.default_rng(1)

    def prompt() -> array:
        return array("q", rng.integers(2, 100_000, length).tobytes())

    count = page * pages // length
    pass_token()
    for _ in range(count - REPEATS):
        rig.insert_in_turns(prompt())
    recent = [prompt() for _ in range(min(count, REPEATS))]
    turns = [rig.insert_in_turns(tokens)[-1] for tokens in in_turns(recent)]
    # as many as the smallest cell has: what a lookup reads is as much in the CPU's caches in all
    recent = recent[-2:]
    times: dict[str, list[float]] = {
        name: [] for name in ("match hit", "match half", "match miss", "lock + unlock")
    }
    for repeat in in_turns(range(LOOKUPS)):
        tokens = recent[repeat % len(recent)]
        times["match hit"].append(timed(lambda tokens=tokens: rig.match(tokens)))
        half = tokens[: length // 2] + prompt()[length // 2 :]
        times["match half"].append(timed(lambda half=half: rig.match(half)))
        other = prompt()
        times["match miss"].append(timed(lambda other=other: rig.match(other)))
        node = rig.match(tokens).last_device_node
        times["lock + unlock"].append(timed(lambda node=node: rig.lock_and_unlock(node)))
    times["insert turn"] = turns
    times["insert"] = [rig.insert(prompt()) for _ in in_turns(range(REPEATS))]
    again = prompt()
    rig.insert(again)
    times["insert again"] = [rig.insert(again) for _ in in_turns(range(REPEATS))]
    rounds = ROUNDS_IN_SMALL if pages <= GROWTH[0] else EVICTION_ROUNDS
    for name in ("evict swa", "evict full"):
        times[name] = []
        for _ in range(rounds):
            pass_token()
            rig.fill(length, prompt)
            times[name].append(rig.cost_of_eviction(swa=name == "evict swa"))
    return {name: statistics.median(values) for name, values in times.items()}


def in_turns(items: Iterable[Any]) -> Iterator[Any]:
    """Iterate, and let the other cores run after every few items."""
    for place, item in enumerate(items):
        if place % IN_A_ROW == 0:
            pass_token()
        yield item


def pass_token() -> None:
    """Let the other cores run, and wait for the token."""
    print(_WAITS, flush=True)
    sys.stdin.readline()


# ---- the table ----------------------------------------------------------------


class Child:
    """A process that measures one core in one cell while it has the token."""

    def __init__(self, core: str, cell: Cell, cpu: int, before: Path | None) -> None:
        environment = {**inherited(), **CPU}
        folder = before if core == BEFORE else None
        module = "launch.bench.core"
        if folder is not None:
            bench = next(file for file in BENCHES if (folder / file).is_file())
            module = bench.removesuffix(".py").replace("/", ".")
            paths = (folder, *(folder / platform for platform in PLATFORMS))
            environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
            core = "ours"
        if core != "ours":
            environment["SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND"] = core
        command = [sys.executable, "-W", "ignore", "-m", module, "--core", core]
        self._process = subprocess.Popen(
            [*command, "--cell", *map(str, cell), "--cpu", str(cpu)],
            env=environment,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self) -> Times | None:
        """Give it the token, until it comes back; the result if that was the last time."""
        assert self._process.stdin is not None
        print(file=self._process.stdin, flush=True)
        return self.wait()

    def wait(self) -> Times | None:
        """Until it has the token no more; at start, until it could take it."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.rstrip() == _WAITS:
                return None
            if line.startswith("{"):
                self._process.wait()
                return json.loads(line)
        raise RuntimeError(f"a process ended early: {self._process.args}")

    def end(self) -> None:
        """End the process, if it has not ended."""
        self._process.kill()
        self._process.wait()


def run_in_turns(
    contestants: Iterable[tuple[str, Cell]], cpu: int, before: Path | None
) -> dict[tuple[str, Cell], Times]:
    """Measure cores in cells, each in a process of its own, in turns on one CPU."""
    results: dict[tuple[str, Cell], Times] = {}
    with contextlib.ExitStack() as stack:
        children = {}
        for core, cell in contestants:
            child = children[core, cell] = Child(core, cell, cpu, before)
            stack.callback(child.end)
        for child in children.values():
            child.wait()
        while children:
            for contestant, child in list(children.items()):
                result = child.run()
                if result is not None:
                    results[contestant] = result
                    del children[contestant]
    return results


def processes(core: str, pages: int) -> int:
    """In how many processes a core is measured; 0: it is left out."""
    if pages > MOST_PAGES.get(core, pages):
        return 0
    return 1 if pages > ONCE_ABOVE[core] else PROCESSES


def compare(
    processes_of: Mapping[str, int],
    page: int,
    sizes: Sequence[int],
    prompt: int,
    before: Path | None = None,
) -> dict[tuple[str, int], Times]:
    """Medians over so many processes of each core with caches of so many pages, all of them side
    by side; by core and pages."""
    cpus = sorted(os.sched_getaffinity(0))
    runs: dict[tuple[str, int], list[Times]] = {}
    for turn in range(max(processes_of.values())):
        contestants = [
            (core, (page, pages, prompt))
            for core, count in processes_of.items()
            if turn < count
            for pages in sizes
        ]
        cpu = cpus[turn % len(cpus)]
        for (core, cell), times in run_in_turns(contestants, cpu, before).items():
            runs.setdefault((core, cell[1]), []).append(times)
    return {
        contestant: {name: statistics.median(run[name] for run in some) for name in some[0]}
        for contestant, some in runs.items()
    }


def table_rows(
    cores: Sequence[str], page: int, pages: int, prompt: int, before: Path | None
) -> list[dict[str, Any]]:
    """Rows of the table: the operations in one cell."""
    counts = {core: processes(core, pages) for core in cores if processes(core, pages)}
    times = compare(counts, page, [pages], prompt, before)
    return [
        {
            "page": page,
            "pages": pages,
            "prompt": prompt,
            "operation": operation,
            "us": {core: times[core, pages][operation] for core in counts},
            "processes": counts,
        }
        for operation in times[cores[0], pages]
    ]


def growth_rows(page: int, prompt: int) -> list[dict[str, Any]]:
    """What our operations cost with many pages beside what they cost with few."""
    times = compare({"ours": PROCESSES}, page, GROWTH, prompt)
    few, many = (times["ours", pages] for pages in GROWTH)
    return [
        {
            "page": page,
            "prompt": prompt,
            "operation": operation,
            "us": [few[operation], many[operation]],
            "growth": many[operation] / few[operation],
        }
        for operation in few
    ]


def print_table(rows: list[dict[str, Any]]) -> None:
    """Microseconds of each core, and ours as a ratio."""
    cores = list(rows[0]["us"])
    head = f"{'page':>5}{'pages':>8}{'prompt':>8}  {'operation':14}"
    others = "".join(f"{'/ ' + core:>9}" for core in cores[1:])
    print(head + "".join(f"{core:>10}" for core in cores) + others)
    for row in rows:
        us = row["us"]
        cell = f"{row['page']:>5}{row['pages']:>8}{row['prompt']:>8}  {row['operation']:14}"
        times = "".join(f"{us[core]:>10.0f}" for core in cores if core in us)
        ratios = "".join(f"{us['ours'] / us[core]:>9.2f}" for core in cores[1:] if core in us)
        print(cell + times + ratios)


def print_growth(rows: list[dict[str, Any]]) -> None:
    """Microseconds with few and with many pages, and their ratio."""
    print(f"growth from {GROWTH[0]} to {GROWTH[1]} pages")
    for row in rows:
        few, many = row["us"]
        cell = f"{row['page']:>5}{row['prompt']:>8}  {row['operation']:14}"
        print(f"{cell}{few:>10.0f}{many:>10.0f}{row['growth']:>9.2f}")


def main() -> None:
    """Parent: run every cell with every core. Child: measure one when it has the token."""
    args = parse_args()
    if args.core:
        print(json.dumps(measure(args.core, args.cpu, *args.cell)))
        return
    versions = {name: importlib.metadata.version(name) for name in ("sglang", "numpy", "torch")}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"versions": versions, "rows": [], "growth": []}
    every = [cell for cell in cells(quick=args.quick) if cell[1] in args.pages]
    for page, pages, prompt in tqdm(every, desc="cells"):
        if "table" in args.parts:
            report["rows"] += table_rows(args.cores, page, pages, prompt, args.before)
        if "growth" in args.parts and pages == GROWTH[0]:
            report["growth"] += growth_rows(page, prompt)
        # after every cell: an interrupted run keeps what it has measured
        args.out.write_text(json.dumps(report, indent=1))
    if report["rows"]:
        print_table(report["rows"])
    print_growth(report["growth"])
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
