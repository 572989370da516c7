"""Recorded traffic."""

from pathlib import Path

import numpy as np
import pytest

from sglang_ext.sizing.traces import MOONCAKE_BLOCK, TraceError, read


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_token_ids(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.jsonl", '{"input_ids": [5, 6], "output_ids": [7]}', "", '{"input_ids": [5]}'
    )
    first, second = read(path)
    assert first[0].tolist() == [5, 6]
    assert first[1].tolist() == [7]
    assert second[0].tolist() == [5]
    assert len(second[1]) == 0


def test_equal_hash_ids_are_equal_blocks_and_answers_are_unknown(tmp_path: Path) -> None:
    line = '{"timestamp": 0, "input_length": %d, "output_length": 3, "hash_ids": %s}'
    path = write(tmp_path / "m.jsonl", line % (600, [4, 9]), line % (1024, [4, 8]))
    (first, answer), (second, other) = read(path)
    assert (len(first), len(second)) == (600, 1024)
    assert np.array_equal(first[:MOONCAKE_BLOCK], second[:MOONCAKE_BLOCK])
    assert not np.intersect1d(first[MOONCAKE_BLOCK:], second).size
    assert len(set(first.tolist())) == len(first)
    assert not np.intersect1d(answer, other).size
    assert max(answer.max(), other.max()) < 0


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "{}",
        '{"input_ids": [[1]]}',
        '{"input_ids": ["a"]}',
        '{"hash_ids": [1], "input_length": 513, "output_length": 1}',
        '{"hash_ids": [1], "input_length": 5}',
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "bad.jsonl", '{"input_ids": [1]}', line)
    with pytest.raises(TraceError, match=r"bad\.jsonl, line 2"):
        list(read(path))
