"""The oracle: with the cache on, every token equals the server without a cache."""

import itertools
from pathlib import Path
from typing import NamedTuple

import pytest

from launch.server import OURS
from launch.traffic import Traffic
from tests.e2e.conftest import RANKS, assert_idle_and_alive
from tests.e2e.conversations import Conversations, converse, differences, hit_rates
from tests.e2e.test_storage import flush, stored_in
from tests.fixtures.pairwise import cover

POLICIES = ("write_through", "write_through_selective", "write_back")
HOST = (*OURS, "--enable-hierarchical-cache", "--hicache-ratio", "4")
LATER = POLICIES[1:]


class Cell(NamedTuple):
    """One kind of server. A device alone has no write policy."""

    ranks: int
    chunk: str
    tier: str
    policy: str
    page: int
    window: int

    def options(self, directory: Path) -> list[str]:
        """Options of the server.

        Args:
            directory: of the storage tier.
        """
        tier = {"device": OURS, "host": HOST, "storage": stored_in(directory)}[self.tier]
        options = [*tier, "--page-size", str(self.page), "--chunked-prefill-size", self.chunk]
        options += ["--hicache-write-policy", self.policy] if self.policy else []
        return [*options, *(("--tp", str(self.ranks)) if self.ranks > 1 else ())]

    @property
    def environment(self) -> dict[str, str]:
        """Variables of the server: half of them make the engine's copies, its default on GPUs,
        and the others learn who comes back."""
        later = self.policy in LATER
        return {
            "SGLANG_EXT_COPIES": "engine" if later else "kernels",
            "SGLANG_EXT_RETENTION": "lru" if later else "learned",
            **(RANKS if self.ranks > 1 else {}),
        }


TIERS = [("device", ""), *itertools.product(("host", "storage"), POLICIES)]
MATRIX = [
    Cell(ranks, chunk, *tier, page, window)
    for ranks, chunk, tier, page, window in itertools.product(
        (1, 2), ("256", "-1"), TIERS, (1, 16, 64), (16, 100, 128)
    )
]
PAIRWISE = cover(MATRIX)
FEW = [cell for cell in PAIRWISE if cell.ranks == 1 or cell.tier == "storage"]
"""What ``make test`` takes: all of one rank, and of two, which take three times as long, those with
every tier."""
SHORT = Traffic(conversations=6, rounds=4)


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(
            cell,
            marks=[] if cell in FEW else pytest.mark.full,
            id="-".join(map(str, filter(None, cell))),
        )
        for cell in PAIRWISE
    ],
)
def test_host_tier_is_token_exact(serve, reference, cell: Cell, tmp_path: Path) -> None:  # noqa: ANN001
    expected = reference(cell.window, SHORT)
    conversations = Conversations(SHORT)
    options = cell.options(tmp_path)
    with serve(cell.window, *options, tokens=1536, **cell.environment) as server:
        answers = conversations.hold(server, SHORT.rounds - 1)
        if cell.tier == "storage":
            flush(server)
        last = conversations.hold(server, 1)
        assert_idle_and_alive(server)
    assert not differences([*answers, *last], expected)
    # what is still held where not everything is copied depends on who else runs just then
    copied_late = cell.tier == "device" or cell.policy == "write_through_selective"
    if copied_late:
        assert hit_rates([*answers, *last])["hit_rate"] > 0
    else:
        assert hit_rates(answers)["hit_rate"] >= 0.2
    # what a second request must have used is copied late or never
    if cell.tier != "device" and cell.policy != "write_through_selective":
        assert sum(a.host_tokens for a in answers) > 0
        assert cell.tier == "host" or sum(a.storage_tokens for a in last) > 0


LONG = Traffic(conversations=12, rounds=6)
# (page, window): the window is no multiple of the page, or smaller than it
SIZES = [(1, 128), (16, 128), (64, 128), (1, 100), (16, 100), (64, 100), (64, 16)]
CELLS = [
    *(Cell(1, "256", "host", "write_through", *size) for size in SIZES),
    *(Cell(1, "-1", "host", LATER[n % 2], *size) for n, size in enumerate(SIZES)),
]
LEAST = {
    "write_through": (0.6, 0.5),
    "write_back": (0.6, 0.5),
    "write_through_selective": (0.3, 0.1),
}


@pytest.mark.full
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: "-".join(map(str, cell)))
def test_long_conversations_are_token_exact(serve, reference, cell: Cell, tmp_path: Path) -> None:  # noqa: ANN001
    expected = reference(cell.window, LONG)
    with serve(cell.window, *cell.options(tmp_path), **cell.environment) as server:
        answers = converse(server, LONG)
        assert_idle_and_alive(server)
    assert not differences(expected, answers)
    rates = hit_rates(answers)
    hit_rate, host_share = LEAST[cell.policy]
    assert rates["hit_rate"] >= hit_rate, rates
    assert rates["host_share"] >= host_share, rates


def test_hit_rate_is_not_below_stock_under_host_pressure(serve) -> None:  # noqa: ANN001
    # one request at a time: no admission race, so the hits are the caches' own
    traffic = Traffic(conversations=8, rounds=5, fork=0.0, parallel=1, seed=3)
    options = ["--enable-hierarchical-cache", "--hicache-ratio", "2", "--page-size", "16"]
    options += ["--chunked-prefill-size", "256"]
    rates = []
    for selection in (OURS, ()):
        with serve(128, *selection, *options, tokens=2048) as server:
            answers = converse(server, traffic)
            assert_idle_and_alive(server)
        rates.append(hit_rates(answers)["hit_rate"])
    ours, stock = rates
    assert ours >= stock > 0
