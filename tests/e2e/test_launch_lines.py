"""Lines that operators start these models with, as published, on tiny models of the same
architectures: ``launch_lines.py`` has them.

Answers are those of a server without a prefix cache and without drafts. What is drafted with DP
attention is compared in ``test_dp_drafts.py``.
"""

import contextlib
from pathlib import Path

import pytest

from launch.server import OURS, STRICT_CHECKS
from tests.e2e.conftest import COMMON, RANKS, assert_idle_and_alive
from tests.e2e.conversations import converse, differences, hit_rates
from tests.e2e.launch_lines import LINES
from tests.e2e.rounded import ASKED, assert_same
from tests.fixtures.kv_subscriber import KvSubscriber
from tests.fixtures.kv_view import GPU, ON_HOST
from tests.fixtures.zygote import Zygote

# tiny models are made for fewer tokens than a line may ask for
CHECKS = {**STRICT_CHECKS, **RANKS, "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}
FEW = ("sglang pull 23391, gpt-oss-120b",)
"""The line that this cache was first asked for; the others are with the whole matrix."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in FEW else pytest.mark.full) for name in LINES],
)
def test_a_line(zygote: Zygote, tmp_path: Path, name: str) -> None:
    line = LINES[name]
    asked = ASKED if line.rounded else {}
    both = [*COMMON, *line.options]
    without = [*line.kind.without(), *both, *line.ranks(), "--disable-radix-cache"]
    without += ["--max-total-tokens", "16384"]
    with zygote.running(without, tmp_path / "without.log", CHECKS) as server:
        expected = converse(server, line.traffic, **asked)
    ours = [*line.kind.arguments(), *both, *line.ranks(), *OURS, *line.host]
    ours += ["--max-total-tokens", str(line.tokens)]
    with contextlib.ExitStack() as up:
        router = None
        if line.events is not None:
            router = up.enter_context(KvSubscriber(**line.events))
            ours += router.options
        server = up.enter_context(zygote.running(ours, tmp_path / "ours.log", CHECKS))
        answers = converse(server, line.traffic, **asked)
        if router is not None:
            router.wait_for(lambda view: view.at(GPU) and view.at(ON_HOST))
        assert_idle_and_alive(server)
    if line.rounded:
        assert_same(answers, expected)
    else:
        assert not differences(answers, expected)
    assert hit_rates(answers)["host_share"] > 0
