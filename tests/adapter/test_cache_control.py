"""Messages that ask something of the cache, and come by a way that takes any message."""

from typing import Any

import pytest
from sglang.srt.managers.io_struct import DumperControlReqInput

from sglang_ext.adapter.cache_control import METHOD, CacheControl

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
