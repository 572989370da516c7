"""What the routes take, and what several DP ranks say in all."""

import re

import pytest

from sglang_ext.adapter.cache_routes import CALLS, CallError, combined, parse


def test_answers_of_dp_ranks_are_one() -> None:
    one = {"device": 16, "storage": None}
    other = {"device": 32, "storage": None}
    assert combined("lookup", [one]) == one
    both = combined("lookup", [one, other])
    assert both == {"device": 32, "storage": None, "ranks": [one, other]}
    assert combined("drop", [{"dropped": 16}, {"dropped": 32}])["dropped"] == 48


def test_a_prompt_may_be_empty_and_a_namespace_needs_none() -> None:
    for call in CALLS.keys() - {"quota"}:
        assert parse(call, b'{"input_ids": []}').input_ids == []
    assert parse("drop", b'{"cache_salt": "a"}').cache_salt == "a"
    assert parse("unpin", b'{"all": true}').all


@pytest.mark.parametrize(
    "text",
    [
        *(b"", b"[]", b'{"input_ids": 1}', b'{"prompt": "a"}'),
        # a scheduler would end of it
        *(b'{"input_ids": [-1]}', b'{"input_ids": [9223372036854775808]}'),
    ],
)
def test_what_is_no_body_is_refused_in_one_line(text: bytes) -> None:
    with pytest.raises(CallError) as error:
        parse("pin", text)
    assert "\n" not in str(error.value)


def test_a_quota_is_a_size_or_a_share() -> None:
    size = parse("quota", b'{"extra_key": "a", "size": "20GB"}')
    assert size.quota == {"action": "set", "bytes": 20 * 10**9, "percent": None}
    share = parse("quota", b'{"size": "12.5%"}')
    assert share.quota == {"action": "set", "bytes": None, "percent": 12.5}
    assert parse("quota", b'{"clear": true, "cache_salt": "b"}').quota == {"action": "clear"}
    assert parse("quota", b'{"list": true}').quota == {"action": "list"}
    assert parse("drop", b'{"extra_key": "a"}').quota is None


@pytest.mark.parametrize(
    ("call", "text", "said"),
    [
        ("quota", b"{}", '"size", "clear": true or "list": true'),
        ("quota", b'{"size": "1GB", "list": true}', '"size", "clear": true or "list": true'),
        ("quota", b'{"size": "1GB", "input_ids": [1]}', "no prompt"),
        ("quota", b'{"list": true, "extra_key": "a"}', "no namespace"),
        ("quota", b'{"size": "-1GB"}', "'-1GB' is not allowed; use bytes like 20GB"),
        ("quota", b'{"size": "20"}', "'20' is not allowed"),
        ("quota", b'{"size": "101%"}', "at most 100%"),
        ("drop", b'{"extra_key": "a", "size": "1GB"}', "drop does not take"),
    ],
)
def test_a_quota_that_makes_no_sense_is_refused(call: str, text: bytes, said: str) -> None:
    with pytest.raises(CallError, match=re.escape(said)):
        parse(call, text)


def test_lists_of_dp_ranks_are_one() -> None:
    def listed(used: int, bound: int | None) -> dict[str, object]:
        return {"extra_key": "a", "cache_salt": None, "used": used, "bound": bound}

    other = {"extra_key": None, "cache_salt": None, "used": 1, "bound": None}
    one = {"host": 100, "namespaces": [listed(10, 50), other], "more": 0}
    two = {"host": 100, "namespaces": [listed(20, 50)], "more": 2}
    both = combined("quota", [one, two])
    assert both["namespaces"] == [listed(20, 50), other]
    assert (both["host"], both["more"]) == (100, 2)
    assert both["ranks"] == [one, two]
