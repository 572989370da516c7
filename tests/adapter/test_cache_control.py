"""Messages that ask something of the cache, and come by a way that takes any message."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sglang.srt.managers.io_struct import DumperControlReqInput

from sglang_ext.adapter.cache_control import METHOD, CacheControl
from sglang_ext.adapter.keys import Keys
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.core.write_policy import WritePolicy
from sglang_ext.testing.engine import SimEngine
from sglang_ext.testing.sizes import Sizes

CALL = {"call": "lookup", "input_ids": [1, 2], "extra_key": None, "cache_salt": None}


@pytest.mark.parametrize(
    "body",
    [
        {},
        {**CALL, "call": "forget"},
        {**CALL, "input_ids": ["one"]},
        {**CALL, "input_ids": [1 << 70]},
        {**CALL, "extra_key": ["tenant"]},
        {**CALL, "more": 1},
        {**CALL, "call": "quota", "quota": {"action": "double"}},
        {**CALL, "call": "quota", "quota": {"action": "set", "bytes": -1}},
        {**CALL, "call": "quota", "quota": {"action": "set", "percent": 101}},
        {"call": "lookup"},
    ],
)
def test_a_message_that_is_none_of_ours_is_refused(body: dict[str, Any]) -> None:
    """It reaches neither the cache nor the scheduler's loop."""
    cache: Any = None
    answer = CacheControl(cache).begin(DumperControlReqInput(method=METHOD, body=body))
    assert answer is not None
    assert not answer.success
    assert answer.error.startswith(f"{METHOD}: ")


def quota(control: CacheControl, key: str | None, **asked: Any) -> Any:
    """The answer of a call about the quota of requests with a key; None: it comes later."""
    body = {"call": "quota", "input_ids": None, "extra_key": key, "cache_salt": None}
    return control.begin(DumperControlReqInput(method=METHOD, body={**body, "quota": asked}))


@pytest.fixture
def rank() -> SimEngine:
    """A rank of which the host has a prompt of each of two keys."""
    sizes = Sizes(24, 24, 48, 48, write=WritePolicy.WRITE_THROUGH, checkpoint_pages=0)
    rank = SimEngine(Geometry(16, 16), sizes)
    tokens = np.arange(96, dtype=np.int64)
    for key in ("a", "b"):
        request = rank.start(tokens, (key, None))
        rank.compute(request, len(tokens))
        rank.finish(request)
        rank.settle()
    return rank


def control_of(rank: SimEngine) -> CacheControl:
    """Calls on the cache of a simulated rank."""
    cache: Any = SimpleNamespace(index=rank.index, keys=Keys(rank.index, None))
    return CacheControl(cache)


def test_a_quota_is_answered_when_it_holds(rank: SimEngine) -> None:
    control = control_of(rank)
    before = quota(control, None, action="list").response[0]
    assert before["namespaces"] == [
        {"extra_key": key, "cache_salt": None, "used": 8, "bound": None} for key in ("a", "b")
    ]
    assert quota(control, "a", action="set", bytes=3) is None
    assert control.look() == []
    rank.demote()
    ((answer, _),) = control.look()
    assert answer.success
    assert answer.response == [{"bound": 3, "used": 0}]
    listed = quota(control, None, action="list").response[0]["namespaces"]
    assert [(one["extra_key"], one["used"], one["bound"]) for one in listed] == [
        ("a", 0, 3),
        ("b", 8, None),
    ]
    assert quota(control, "a", action="clear").response == [{"cleared": 1, "used": 0}]
    assert quota(control, "a", action="clear").response == [{"cleared": 0, "used": 0}]


def test_a_quota_that_says_nothing_is_refused(rank: SimEngine) -> None:
    control = control_of(rank)
    assert "bytes or percent" in quota(control, "a", action="set").error
    assert "bytes or percent" in quota(control, "a", action="set", bytes=1, percent=1).error
    body = {**CALL, "call": "quota", "input_ids": None}
    answer = control.begin(DumperControlReqInput(method=METHOD, body=body))
    assert answer is not None
    assert "does not say what to do" in answer.error


def test_there_is_no_quota_without_a_host() -> None:
    control = control_of(SimEngine(Geometry(16, 16), Sizes(24, 24)))
    assert "--enable-hierarchical-cache" in quota(control, "a", action="set", bytes=1).error
