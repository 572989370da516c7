"""The oracle of speculative decoding: two servers, the same requests, and all that they draft.

A target takes no wrong token from its draft, so tokens say nothing of the draft's KV, and how many
random drafts it takes is chance. What a draft proposes does say it: it is compared wherever both
servers verify the same request at the same position (see ``sglang_ext_cpu.proposals``).

    python -m tests.e2e.drafts mimo-v2 --left "" --right "--enable-hierarchical-cache"
"""

import argparse
import dataclasses
import json
import shlex
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from launch.models import architectures, tiny
from launch.server import CPU, STRICT_CHECKS, Server, running
from launch.traffic import Traffic
from tests.e2e.conversations import Answer, converse, differences, hit_rates

LOG = "EXT_CPU_PROPOSALS"
STEPS = 3
_CHAIN = (
    *("--speculative-num-steps", str(STEPS), "--speculative-eagle-topk", "1"),
    *("--speculative-num-draft-tokens", str(STEPS + 1)),
)
_NGRAM = (
    *("--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", str(STEPS + 1)),
    # with pages above one token the engine drafts chains alone
    *("--speculative-ngram-min-bfs-breadth", "1", "--speculative-ngram-max-bfs-breadth", "1"),
)
_LAYER = ("--speculative-algorithm", "NEXTN", *_CHAIN)
_LAYERS = (*_LAYER, "--enable-multi-layer-eagle")


class Drafting(NamedTuple):
    """A model, and how its tokens are drafted.

    Attributes:
        model: makes it, or finds it.
        options: of the server.
        draft: the same for a draft model; None without one.
    """

    model: Callable[[], Path]
    options: tuple[str, ...]
    draft: Callable[[], Path] | None = None

    def without(self) -> list[str]:
        """Options of a server that serves the model and drafts nothing."""
        return ["--model-path", str(self.model())]

    def arguments(self) -> list[str]:
        """Options of a server that serves the model."""
        draft = [] if self.draft is None else ["--speculative-draft-model-path", str(self.draft())]
        return [*self.without(), *self.options, *draft]


def _ready_made(name: str) -> Callable[[], Path]:
    return lambda: architectures.ready_made(name)


def _tiny() -> Path:
    return tiny.ready_made(128)


KINDS = {
    "ngram": Drafting(_tiny, _NGRAM),
    # the draft is the target, and so it often proposes what its target takes
    "standalone": Drafting(_tiny, ("--speculative-algorithm", "STANDALONE", *_CHAIN), _tiny),
    "mimo-v2": Drafting(_ready_made("mimo-v2"), _LAYERS, _ready_made("mimo-v2")),
    # one layer drafts all, each behind what it has drafted
    "mimo-v2-one": Drafting(_ready_made("mimo-v2"), _LAYER, _ready_made("mimo-v2")),
    # a block at once
    "dflash": Drafting(
        _ready_made("mimo-v2"), ("--speculative-algorithm", "DFLASH"), _ready_made("mimo-v2-dflash")
    ),
    "step-3.5": Drafting(_ready_made("step-3.5"), _LAYERS, _ready_made("step-3.5")),
    "eagle3": Drafting(
        _ready_made("gpt-oss"),
        ("--speculative-algorithm", "EAGLE3", *_CHAIN),
        _ready_made("gpt-oss-eagle3"),
    ),
    "llama-4": Drafting(
        _ready_made("llama-4"),
        ("--speculative-algorithm", "EAGLE3", *_CHAIN),
        _ready_made("llama-4-eagle3"),
    ),
    "gemma-4": Drafting(
        _ready_made("gemma-4"),
        _LAYER,
        _ready_made("gemma-4-assistant"),
    ),
}
"""One of each place where the KV of drafts is, and of each model."""

TAKEN = {
    "SGLANG_SIMULATE_ACC_LEN": "3",
    "SGLANG_SIMULATE_ACC_TOKEN_MODE": "real-draft-token",
}
"""Two drafts stand at each step, whatever the target says, for servers with random drafts: what is
behind accepted drafts is drafted too, and answers are the drafts'. The engine reads these variables
when it is imported."""

Position = tuple[int, int, int]
"""(conversation, round, tokens of the request that have KV)."""


@dataclasses.dataclass(frozen=True)
class Drafted:
    """What a server has answered and drafted.

    Attributes:
        answers: of all requests.
        proposals: what was verified, by position: the last token and the drafts behind it.
        accepted: how many of these stood.
    """

    answers: list[Answer]
    proposals: dict[Position, tuple[int, ...]]
    accepted: dict[Position, int]

    @property
    def accept_length(self) -> float:
        """Tokens for each verification, on average; at least one."""
        return sum(self.accepted.values()) / max(1, len(self.accepted))


def converse_and_draft(server: Server, traffic: Traffic, log: Path) -> Drafted:
    """Hold conversations with a server whose proposals go to ``log``."""
    return drafted_for(converse(server, traffic), log)


def drafted_for(answers: list[Answer], log: Path) -> Drafted:
    """What ``log`` has of the requests with these answers."""
    asked = {answer.request: (answer.conversation, answer.round) for answer in answers}
    proposals, accepted = {}, {}
    for line in map(json.loads, log.read_text().splitlines()):
        if line["rid"] in asked:
            position = (*asked[line["rid"]], line["position"])
            proposals[position] = tuple(line["tokens"])
            accepted[position] = line["accepted"]
    return Drafted(answers, proposals, accepted)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Of two servers.

    Attributes:
        steps: positions at which either verified.
        different: those of them at which not both have verified the same.
    """

    steps: int
    different: list[Position]

    def __str__(self) -> str:
        return f"{self.steps - len(self.different)} of {self.steps} proposals are equal"


def compare(left: Drafted, right: Drafted) -> Comparison:
    """Proposals of both, position by position."""
    positions = sorted({*left.proposals, *right.proposals})
    different = [
        position
        for position in positions
        if left.proposals.get(position) != right.proposals.get(position)
    ]
    return Comparison(len(positions), different)


def _run(arguments: Sequence[str], traffic: Traffic, folder: Path, taken: bool) -> Drafted:
    log, proposals = folder / "server.log", folder / "proposals"
    variables = {**CPU, **STRICT_CHECKS, **(TAKEN if taken else {}), LOG: str(proposals)}
    with running(arguments, log, variables) as server:
        drafted = converse_and_draft(server, traffic, proposals)
        print(shlex.join(arguments))
        print(f"  accept length {drafted.accept_length:.3f}, {hit_rates(drafted.answers)}")
    return drafted


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--common", default="--page-size 16", help="options of both servers")
    parser.add_argument("--left", default="", help="options of the one server")
    parser.add_argument("--right", default="", help="options of the other")
    parser.add_argument("--conversations", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--taken", action="store_true", help="two drafts stand, whatever they are")
    args = parser.parse_args()
    traffic = Traffic(
        conversations=args.conversations,
        rounds=args.rounds,
        parallel=args.parallel,
        seed=args.seed,
    )
    common = [*KINDS[args.kind].arguments(), "--dtype", "float32", "--skip-server-warmup"]
    common += ["--max-running-requests", "8"]
    common += ["--mem-fraction-static", "0.6", *shlex.split(args.common)]
    with tempfile.TemporaryDirectory() as folder:
        left, right = (
            _run([*common, *shlex.split(options)], traffic, Path(folder) / name, args.taken)
            for name, options in (("left", args.left), ("right", args.right))
        )
    print(compare(left, right))
    print(f"{len(differences(left.answers, right.answers))} of {len(left.answers)} answers differ")


if __name__ == "__main__":
    main()
