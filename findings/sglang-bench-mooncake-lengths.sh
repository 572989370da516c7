#!/usr/bin/env bash
# SGLang 0.5.23, `bench_serving --dataset-name mooncake`: the prompts of a replayed trace have a
# quarter of its tokens. `input_length` is not looked at.
#
# A block of the published traces is 512 tokens. A prompt is made of 128 words for each hash id,
# with the id before the first, so it is a quarter as long, and its last block is as long as the
# others however few tokens the record has in it. The warm-up beside it has 512 words for each id.
# Times, lengths of answers, and which prompts share how many blocks are those of the trace.
#
# So about is the hit rate of a cache without a bound. But prompts need a quarter of the memory, and
# the rate of prompt tokens is a quarter of the trace's. The report counts the tokens that were sent.
# `--mooncake-block-size`, to choose the length of a block, was proposed in sgl-project/sglang#20461
# and is not in this version.
#
# With `--mooncake-num-rounds` above 1 each round has the whole context once more, and is handed out
# at once, with made-up answers: it does not wait for the one before it.
#
# Seen on Linux x86-64, Python 3.11. The client is not started: its generator runs on three records,
# and a word is a token.
set -euo pipefail
unset PYTHONPATH
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-deps sglang==0.5.23
cat > "$folder/lengths.py" <<'PYTHON'
import ast
import asyncio
import importlib.util
import re
import time
import typing
from pathlib import Path
from types import SimpleNamespace

(sglang,) = importlib.util.find_spec("sglang").submodule_search_locations
BENCHMARK = Path(sglang, "benchmark")
source = (BENCHMARK / "datasets/mooncake.py").read_text()
(generator,) = (n for n in ast.parse(source).body if isinstance(n, ast.AsyncFunctionDef))
names = {"asyncio": asyncio, "time": time, "DatasetRow": SimpleNamespace} | vars(typing)
names["PreTrainedTokenizerBase"] = object
exec(compile(ast.Module([generator], []), "mooncake.py", "exec"), names)
BLOCK = 512
RECORDS = [
    {"timestamp": 0, "input_length": 8 * BLOCK, "output_length": 100, "hash_ids": list(range(8))},
    {"timestamp": 1, "input_length": 7 * BLOCK + 1, "output_length": 9, "hash_ids": list(range(8))},
    {"timestamp": 2, "input_length": 40 * BLOCK, "output_length": 9, "hash_ids": list(range(40))},
]


class Words:
    """A tokenizer: each word of a text is a token, and messages stand one behind another."""

    def encode(self, text):
        return text.split()

    def apply_chat_template(self, messages, **options):
        return " ".join(message["content"] for message in messages)


async def prompts(records, rounds):
    return [row async for row in names[generator.name](list(records), Words(), 1.0, rounds)]


for record, row in zip(RECORDS, asyncio.run(prompts(RECORDS, 1))):
    share = row.prompt_len / record["input_length"]
    print(f"{record['input_length']} tokens in the trace: {row.prompt_len} sent, {share:.2f}")
rounds = asyncio.run(prompts(RECORDS[:1], 3))
print("three rounds of the first:", *(row.prompt_len for row in rounds))
print("it looks at input_length:", "input_length" in source)
warm_up = re.search(r'\["hi"\] \* (\d+)', (BENCHMARK / "serving.py").read_text())
print("words for each id in the warm-up:", warm_up[1])
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/lengths.py" > "$folder/seen"
cat "$folder/seen"
cat > "$folder/expected" <<'TEXT'
4096 tokens in the trace: 1026 sent, 0.25
3585 tokens in the trace: 1026 sent, 0.29
20480 tokens in the trace: 5090 sent, 0.25
three rounds of the first: 1026 2152 3278
it looks at input_length: False
words for each id in the warm-up: 512
TEXT
diff "$folder/expected" "$folder/seen"
echo "as described"
