"""Whether answers from the cache are those of a server without one, in the numbers of a GPU.

A server without a cache answers conversations; what it was asked, and what it said, is the script
for all others: one wrong token does not change what they are asked next. First all servers run in
the engine's deterministic mode, and every token has to be equal. Where that mode does not
start, the difference of log-probabilities from the script is held beside that of a second server
without a cache, which gets the same prompts in other batches: this is what rounding does.
"""

import contextlib
import dataclasses
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from launch.bench.gpu.checks import Check
from launch.bench.gpu.record import Record
from launch.bench.gpu.setting import ROOT, Setting, Wanted, reason
from launch.models import architectures, tiny
from launch.server import OURS, STRICT_CHECKS, Server
from launch.traffic import Traffic, generate, hold_conversation

WINDOW = 128
COMMON = (
    *("--mem-fraction-static", "0.5", "--max-running-requests", "8", "--skip-server-warmup"),
    *("--sleep-on-idle", "--disable-prefill-cuda-graph"),
)
WITHOUT = ("--disable-radix-cache", "--max-total-tokens", "16384")
TIER = (*OURS, "--enable-hierarchical-cache", "--hicache-ratio", "4")
DETERMINISTIC = ("--enable-deterministic-inference",)
RETRACTED = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "5"}
"""Every fifth step a request is retracted even though there is room."""
CHUNKS = ("--chunked-prefill-size", "256")
OF_NOISE = 2.0
"""A difference that is so many times that of two servers without a cache is no rounding. A page
of another prefix makes one that is larger by orders."""
AGAIN_S = 50.0
"""Servers that did not start are tried in another mode if so much of the part's time is left."""
GOOD = ("equal", "rounding")


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Model and data types: servers with the same ones are compared."""

    model: str
    options: tuple[str, ...]

    def path(self) -> Path:
        """The model, made unless it is there."""
        if self.model == "tiny":
            return tiny.ready_made(WINDOW)
        if self.model != "small":
            return architectures.ready_made(self.model)
        # its rows of K and V are multiples of 128 bytes in one byte a number too: the engine's
        # copies that are compiled where they run take no others
        out = ROOT / ".models" / f"small-{WINDOW}"
        if not (out / "model.safetensors").exists():
            options = ["--out", str(out), "--size", "small", "--window", str(WINDOW)]
            tiny.make_model(tiny.parse_args(options))
        return out


@dataclasses.dataclass(frozen=True)
class Cell:
    """A server with our cache."""

    numbers: str
    options: tuple[str, ...]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


def _cell(numbers: str, page: int, *options: str, **environment: str) -> Cell:
    sizes = ("--page-size", str(page), "--max-total-tokens", "3072")
    return Cell(numbers, (*sizes, "--hicache-write-policy", "write_through", *options), environment)


_BF16 = ("--dtype", "bfloat16")
NUMBERS = {
    "bf16": Numbers("small", _BF16),
    # its experts are computed one after the other here, which no graph can hold
    "bf16, gpt-oss": Numbers("gpt-oss", (*_BF16, "--disable-cuda-graph")),
    "fp8 KV": Numbers("small", (*_BF16, "--kv-cache-dtype", "fp8_e4m3")),
    "float32": Numbers("tiny", ("--dtype", "float32")),
}
CELLS = {
    "bf16, page 1": _cell("bf16", 1, *CHUNKS),
    "bf16, page 16": _cell("bf16", 16),
    "bf16, page 64, chunks": _cell("bf16", 64, *CHUNKS),
    "bf16, page 16, our kernel": _cell("bf16", 16, *CHUNKS, SGLANG_EXT_COPIES="kernels"),
    "bf16, page 16, retraction": _cell("bf16", 16, *CHUNKS, **RETRACTED),
    # the host evicts too
    "bf16, page 16, host as the device": _cell("bf16", 16, *CHUNKS, "--hicache-ratio", "1"),
    "bf16, page 16, no overlap": _cell("bf16", 16, "--disable-overlap-schedule"),
    "bf16, gpt-oss, page 16": _cell("bf16, gpt-oss", 16, *CHUNKS),
    "fp8 KV, page 1": _cell("fp8 KV", 1, *CHUNKS),
    "fp8 KV, page 16": _cell("fp8 KV", 16, *CHUNKS),
    "fp8 KV, page 64": _cell("fp8 KV", 64),
}
COMPILED = {
    "bf16, page 64, engine's direct copies": _cell(
        "bf16", 64, "--hicache-io-backend", "direct", "--hicache-mem-layout", "page_first_direct"
    ),
    "bf16, page 16, engine's page_head": _cell("bf16", 16, "--hicache-mem-layout", "page_head"),
}
"""With copies of ``sgl_kernel``, where there is one (see ``sglang_ext_cpu.gpu_copies``)."""
# the interpreter's bfloat16 and fp8 are not those of a GPU
SMALL = {
    "float32, page 16, chunks, retraction": _cell("float32", 16, *CHUNKS, **RETRACTED),
    "float32, page 1": _cell("float32", 1),
    "float32, page 64, no overlap": _cell("float32", 64, *CHUNKS, "--disable-overlap-schedule"),
}
TRAFFIC = Traffic(conversations=12, rounds=6)
SMALL_TRAFFIC = Traffic(
    conversations=4, rounds=3, first=(140, 200), question=(20, 40), answer=(4, 6), shared=64
)
# in deterministic mode a decode step has a program for each 256 tokens of the longest context
SHORT = ("--context-length", "2048")
SMALL_POOL = ("--max-total-tokens", "640")


@dataclasses.dataclass(frozen=True)
class Said:
    """An answer: its tokens, and the log-probability of each."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Asked:
    """One request of a script, and what the server without a cache said."""

    prompt: tuple[int, ...]
    length: int
    said: Said


Script = list[list[Asked]]
"""Requests of each round."""
GoesOn = Callable[[], bool]
"""Whether there is time for another round."""


def _always() -> bool:
    return True


def differences(script: Sequence[Asked], answers: Sequence[Said]) -> dict[str, float]:
    """How far answers are from a script's.

    Returns:
        Answers, those with another token, and the mean and largest difference of the
        log-probability of what was said, of all tokens up to the first other one of an answer:
        there both took the likeliest, and what follows had another beginning.
    """
    apart, different = [0.0], 0
    for asked, said in zip(script, answers, strict=True):
        pairs = zip(asked.said.tokens, said.tokens, strict=True)
        other = next((n for n, (a, b) in enumerate(pairs) if a != b), None)
        different += other is not None
        until = len(said.tokens) if other is None else other + 1
        both = zip(asked.said.logprobs[:until], said.logprobs[:until], strict=True)
        apart += [abs(a - b) for a, b in both]
    return {
        "answers": len(answers),
        "different": different,
        "logprob_mean": statistics.fmean(apart),
        "logprob_largest": max(apart),
    }


def is_rounding(found: Mapping[str, float], noise: Mapping[str, float]) -> bool:
    """Whether differences are those that two servers without a cache have."""
    return all(found[key] <= OF_NOISE * noise[key] for key in ("logprob_mean", "logprob_largest"))


def _said(result: Mapping[str, Any]) -> Said:
    logprobs = tuple(entry[0] for entry in result["meta_info"]["output_token_logprobs"])
    return Said(tuple(result["output_ids"]), logprobs)


def write_script(server: Server, traffic: Traffic, goes_on: GoesOn = _always) -> Script:
    """Hold conversations with a server without a cache; no new round when it is not to go on."""
    sessions = [
        hold_conversation(server, traffic, number, return_logprob=True)
        for number in range(traffic.conversations)
    ]
    script: Script = []
    with ThreadPoolExecutor(traffic.parallel) as pool:
        for _ in range(traffic.rounds):
            if not goes_on():
                break
            turns = pool.map(next, sessions)
            script.append(
                [
                    Asked(tuple(prompt), len(result["output_ids"]), _said(result))
                    for _, prompt, result in turns
                ]
            )
    return script


def follow(
    server: Server, script: Script, parallel: int, goes_on: GoesOn = _always
) -> dict[str, float]:
    """Ask a server what the script says; how far its answers are, where KV came from, and how many
    rounds it was asked."""
    told = {"rounds": 0, "device": 0, "host": 0, "prompt": 0, "retractions": 0}
    order = random.Random(1)
    asked: list[Asked] = []
    answers: list[Said] = []

    def ask(each: Asked) -> dict[str, Any]:
        return generate(server, each.prompt, each.length, return_logprob=True)

    with ThreadPoolExecutor(parallel) as pool:
        for turns in script:
            if not goes_on():
                break
            told["rounds"] += 1
            now = order.sample(turns, len(turns))
            asked += now
            for result in pool.map(ask, now):
                answers.append(_said(result))
                meta = result["meta_info"]
                tiers = meta.get("cached_tokens_details") or {}
                told["prompt"] += meta["prompt_tokens"]
                told["retractions"] += meta.get("num_retractions", 0)
                for tier in ("device", "host"):
                    told[tier] += tiers.get(tier, 0)
    return {**differences(asked, answers), **told}


def verdict(
    found: Mapping[str, float],
    noise: Mapping[str, float],
    *,
    deterministic: bool,
    retracts: bool = False,
) -> str:
    """``equal``, ``rounding``, or what is wrong.

    Args:
        found: of a server with our cache.
        noise: of the second server without one.
        deterministic: whether both ran in the engine's deterministic mode.
        retracts: whether requests of that server are retracted.
    """
    if not found["host"]:
        return "nothing came from the host"
    if retracts and not found["retractions"]:
        return "no request was retracted"
    if found["different"] == 0:
        return "equal"
    if not deterministic and is_rounding(found, noise):
        return "rounding"
    return "different"


def _assert_sound(server: Server) -> None:
    if not server.healthy() or "memory leak detected" in server.log.read_text(errors="replace"):
        raise RuntimeError(f"the server failed its checks:\n{server.tail(12)}")


def _followed(server: Server, script: Script, parallel: int, goes_on: GoesOn) -> dict[str, Any]:
    """``follow``, or why not."""
    try:
        found = follow(server, script, parallel, goes_on)
        _assert_sound(server)
    except Exception as error:  # noqa: BLE001 - one server's end is not that of the others
        return {"failed": f"{error!r}"[:300] + "\n" + server.tail(12)}
    return found


def _pair(numbers: str) -> tuple[str, str]:
    """Names of the two servers without a cache that have these numbers."""
    return f"no cache, {numbers}", f"no cache, {numbers}, again"


def _wanted(cells: Mapping[str, Cell], setting: Setting, more: Sequence[str]) -> dict[str, Wanted]:
    wanted = {}
    for name in {cell.numbers for cell in cells.values()}:
        numbers = NUMBERS[name]
        model = ("--model-path", str(numbers.path()), *numbers.options, *more)
        if setting.small:
            model = (*model, *SHORT)
        for without in _pair(name):
            wanted[without] = Wanted((*model, *WITHOUT), STRICT_CHECKS)
        wanted |= {
            cell_name: Wanted(
                (*model, *TIER, *cell.options, *(SMALL_POOL if setting.small else ())),
                {**STRICT_CHECKS, **cell.environment},
            )
            for cell_name, cell in cells.items()
            if cell.numbers == name
        }
    return wanted


@dataclasses.dataclass(frozen=True)
class Mode:
    """How all servers run."""

    deterministic: bool
    graphs: bool

    def options(self) -> tuple[str, ...]:
        """Of the engine."""
        one = DETERMINISTIC if self.deterministic else ()
        return one if self.graphs else (*one, "--disable-cuda-graph")


def _compare(
    setting: Setting, mode: Mode, cells: Mapping[str, Cell], record: Record
) -> dict[str, Cell]:
    """Cells in one mode, into the record; those that no server ran for, which may in another."""
    numbers = sorted({cell.numbers for cell in cells.values()})
    with contextlib.ExitStack() as stack:
        wanted = _wanted(cells, setting, mode.options())
        servers, failed = setting.up(stack, wanted, COMMON)
        for name, cell in cells.items():
            needed = (name, *_pair(cell.numbers))
            why = next((failed[each] for each in needed if each in failed), None)
            if why is not None:
                record.put({"verdict": "failed", "failed": why}, "cells", name)
        used = [name for name in numbers if servers.keys() >= {*_pair(name)}]
        ready = {n: c for n, c in cells.items() if c.numbers in used and n in servers}

        def all_of(numbers: str) -> None:
            mine = {name: cell for name, cell in ready.items() if cell.numbers == numbers}
            try:
                _follow_all(setting, mode, mine, numbers, servers, record)
            except Exception as error:  # noqa: BLE001 - other numbers have other servers
                for name in mine:
                    found = {"verdict": "failed", "failed": f"no cache: {error!r}"[:300]}
                    record.put(found, "cells", name)

        with ThreadPoolExecutor(max(1, len(used))) as pool:
            list(pool.map(all_of, used))
    return {name: cell for name, cell in cells.items() if name not in ready}


def _follow_all(
    setting: Setting,
    mode: Mode,
    cells: Mapping[str, Cell],
    numbers: str,
    servers: Mapping[str, Server],
    record: Record,
) -> None:
    """Cells of the same numbers: a script, and all their servers by it."""
    traffic = SMALL_TRAFFIC if setting.small else TRAFFIC

    def goes_on() -> bool:
        return setting.left_s() > 0

    without, again = (servers[name] for name in _pair(numbers))
    script = write_script(without, traffic, goes_on)
    with ThreadPoolExecutor(len(cells) + 1) as pool:
        other = pool.submit(_followed, again, script, 1, goes_on)
        runs = {
            pool.submit(_followed, servers[name], script, traffic.parallel, goes_on): name
            for name in cells
        }
        noise = other.result()
        record.put(noise, "noise", _pair(numbers)[1])
        for run in as_completed(runs):
            name, found = runs[run], run.result()
            _put(record, name, cells[name], {**found, **dataclasses.asdict(mode)}, noise)
            missing = traffic.rounds - found.get("rounds", traffic.rounds)
            if missing:
                record.leave_out(f"{name}: {missing} of {traffic.rounds} rounds")


def _put(
    record: Record, name: str, cell: Cell, found: dict[str, Any], noise: Mapping[str, Any]
) -> None:
    """A cell into the record, with its verdict."""
    found["verdict"] = "failed"
    if "failed" in noise:
        found.setdefault("failed", noise["failed"])
    if "failed" not in found:
        retracts = cell.environment.items() >= RETRACTED.items()
        found["verdict"] = verdict(
            found, noise, deterministic=found["deterministic"], retracts=retracts
        )
    record.put(found, "cells", name)


def run(setting: Setting, record: Record) -> None:
    """The part, into its record. What does not start in one mode is tried in the next."""
    modes = [Mode(True, False), Mode(False, False)]
    if setting.device == "cuda":
        modes.insert(0, Mode(True, True))
    cells = SMALL if setting.small else {**CELLS, **(COMPILED if setting.has_sgl_kernel else {})}
    left: Mapping[str, Cell] = cells
    for number, mode in enumerate(modes):
        if number and setting.left_s() < AGAIN_S:
            record.leave_out(f"{', '.join(left)}: not tried as {mode}")
            break
        left = _compare(setting, mode, left, record)
        if not left:
            break
        print(f"not started as {mode}: {', '.join(left)}", flush=True)


def checks(report: Mapping[str, Any]) -> list[Check]:
    """No answer of any cell is another one."""
    claims = []
    for name, found in report.get("cells", {}).items():
        said = found["verdict"]
        other = found.get("different") if said != "rounding" else 0
        what = f"{name}: answers that are not those of no cache"
        if said not in (*GOOD, "different"):
            # it proves nothing, whatever was answered
            what, other = f"{name}: {said}", None
        claims.append(Check(what, other, 0))
    return claims or [Check("answers that are not those of no cache", None, 0)]


def table(report: Mapping[str, Any]) -> list[str]:
    """The report for a reader."""
    lines = [f"{'':38} answers  other  from host  logprob: mean   largest"]
    for name, found in {**report.get("noise", {}), **report.get("cells", {})}.items():
        if "failed" in found:
            lines.append(f"{name:38} FAILED {reason(found['failed']):.100}")
            continue
        share = found["host"] / max(1, found["prompt"])
        lines.append(
            f"{name:38} {found['answers']:>7} {found['different']:>6} {share:>10.2f} "
            f"{found['logprob_mean']:>14.2e} {found['logprob_largest']:>9.2e}  "
            f"{found.get('verdict', '')}"
            f"{'' if found.get('deterministic', True) else ', not in deterministic mode'}"
        )
    return lines
