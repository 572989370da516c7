"""What the routes take, and what several DP ranks say in all."""

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
    for call in CALLS:
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
