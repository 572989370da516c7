"""Recorded traffic."""

from pathlib import Path

import numpy as np
import pytest

from sglang_ext.sizing.traces import MOONCAKE_BLOCK, Summary, TraceError, check, read


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


@pytest.mark.parametrize("block", [16, MOONCAKE_BLOCK])
@pytest.mark.parametrize("first", [0, 2**53, 2**55, 2**63, -(2**70)])
def test_ids_of_any_size_stay_distinct(tmp_path: Path, block: int, first: int) -> None:
    line = '{"input_length": %d, "output_length": 1, "hash_ids": %s}'
    ids = [first + n for n in range(20)]
    path = write(tmp_path / "m.jsonl", line % (20 * block, ids), line % (block, ids[7:8]))
    (prompt, _), (again, _) = read(path, block)
    assert len(set(prompt.tolist())) == 20 * block
    assert np.array_equal(again, prompt[7 * block : 8 * block])
    assert prompt.min() >= 0


def test_the_block_size_that_fits_is_named(tmp_path: Path) -> None:
    ids = list(range(38))
    line = f'{{"input_length": 600, "output_length": 1, "hash_ids": {ids}}}'
    path = write(tmp_path / "qwen.jsonl", line)
    with pytest.raises(TraceError, match=r"line 1: 38 hash_ids for 600 tokens.*--block-size 16"):
        list(read(path))
    ((prompt, _),) = read(path, 16)
    assert len(prompt) == 600


def test_what_a_trace_is(tmp_path: Path) -> None:
    hashed = '{"hash_ids": [1], "input_length": 5, "output_length": 1}'
    told = '{"input_ids": [1]}'
    assert check(write(tmp_path / "a.jsonl", hashed, hashed)) == Summary(2, hashed=True)
    assert check(write(tmp_path / "b.jsonl", told)) == Summary(1, hashed=False)
    with pytest.raises(TraceError, match="no request"):
        check(write(tmp_path / "c.jsonl", ""))


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "7",
        "{}",
        '{"input_ids": [[1]]}',
        '{"input_ids": ["a"]}',
        '{"input_ids": ["7"]}',
        '{"input_ids": [1.5]}',
        '{"input_ids": [true]}',
        '{"input_ids": [-1]}',
        '{"input_ids": [9223372036854775808]}',
        '{"input_ids": 5}',
        '{"input_ids": []}',
        '{"input_ids": [1], "output_ids": [-1]}',
        '{"hash_ids": [1], "input_length": 513, "output_length": 1}',
        '{"hash_ids": [1], "input_length": 5}',
        '{"hash_ids": [], "input_length": -5, "output_length": 1}',
        '{"hash_ids": [], "input_length": 0, "output_length": 1}',
        '{"hash_ids": [1], "input_length": 5, "output_length": -1}',
        '{"hash_ids": [1], "input_length": 5, "output_length": 1e12}',
        '{"hash_ids": [1], "input_length": 5, "output_length": 1000000000000}',
        '{"hash_ids": [1], "input_length": 5.5, "output_length": 1}',
        '{"hash_ids": [1], "input_length": "5", "output_length": 1}',
        '{"hash_ids": [1.0], "input_length": 5, "output_length": 1}',
        '{"hash_ids": [[1]], "input_length": 5, "output_length": 1}',
        '{"hash_ids": {"1": 1}, "input_length": 5, "output_length": 1}',
        "[" * 100_000,
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "bad.jsonl", '{"input_ids": [1]}', line)
    with pytest.raises(TraceError, match=r"bad\.jsonl, line 2: ") as caught:
        list(read(path))
    assert len(str(caught.value)) < len(str(path)) + 200


def test_a_file_of_other_bytes_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"input_ids": [1]}\n\xff\xfe\n')
    with pytest.raises(TraceError, match=r"bad\.jsonl, line 2: "):
        list(read(path))
