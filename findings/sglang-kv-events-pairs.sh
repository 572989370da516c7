#!/usr/bin/env bash
# SGLang 0.5.23, KV events of a server with EAGLE or MTP drafts: the engine cannot read what it
# publishes. Its own type says that `token_ids` is a list of numbers, and each one is a pair.
#
# With such drafts a prefix tree is over pairs, a token and the next one. So are the blocks that are
# told: `token_ids` of a block of 2 tokens is [[1, 2], [2, 3]]. Who writes does not check, and who
# reads with `KVEventBatch` refuses the whole batch, with what else is in it. The engine's subscriber
# for UMBP (`mori` with `kv_events_subscriber`) reads so: it logs an error and goes on without the
# batch, also without what was removed in it.
#
# Nothing in an event says which of the two it has. Routers had to find out one by one (Dynamo's
# #6872, llm-d-kv-cache's #603); that the engine's own type and reader are the old ones is left.
#
# Seen on Linux x86-64, Python 3.11. The engine is not started: its recorder and its types run alone,
# on a node whose hashes are given.
set -euo pipefail
unset PYTHONPATH
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q msgspec==0.22.0
"$folder/venv/bin/pip" install -q --no-deps sglang==0.5.23
cat > "$folder/pairs.py" <<'PYTHON'
import __future__
import ast
import enum
import importlib.util
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional, Union

import msgspec

(sglang,) = importlib.util.find_spec("sglang").submodule_search_locations
SRT = Path(sglang, "srt")
TYPES = {"EventBatch", "KVCacheEvent", "StorageMedium", "BlockStored", "BlockRemoved"}
TYPES |= {"AllBlocksCleared", "KVEventBatch"}
names = {"__name__": "events", "enum": enum, "msgspec": msgspec, "array": array}
names |= {"Any": Any, "Optional": Optional, "Union": Union}


def define(file, wanted, flags=0):
    """Some of what a file of the engine defines, without what it imports."""
    kept = [n for n in ast.parse((SRT / file).read_text()).body if getattr(n, "name", "") in wanted]
    assert len(kept) == len(wanted)
    exec(compile(ast.Module(kept, []), file, "exec", flags=flags), names)


LATER = __future__.annotations.compiler_flag
NAMESPACES = {"kv_event_namespace_seed", "namespaced_block_hash"}
define("disaggregation/kv_events.py", TYPES | NAMESPACES)
define("mem_cache/utils.py", {"hash_str_to_int64"}, LATER)
define("mem_cache/radix_cache.py", {"RadixKey"}, LATER)
define("mem_cache/events.py", {"KVCacheEventRecorder"}, LATER)
names["KvEventLoraNames"] = dict
Batch = names["KVEventBatch"]

for drafts in (False, True):
    recorder = names["KVCacheEventRecorder"](enabled=True, page_size=2)
    key = names["RadixKey"](array("q", [1, 2, 3, 4] + [5] * drafts), is_bigram=drafts)
    hashes = [f"{number:064x}" for number in (1, 2)]
    root = SimpleNamespace(parent=None)
    node = SimpleNamespace(key=key, hash_value=hashes, event_hash_value=None, parent=root)
    recorder.record_all_cleared()
    recorder.record_store(node)
    sent = msgspec.msgpack.encode(Batch(ts=0.0, events=recorder.take()))
    stored = msgspec.msgpack.decode(sent)[1][1]
    print("drafts:", drafts, "block_size", stored["block_size"], stored["token_ids"])
    try:
        read = msgspec.msgpack.Decoder(type=Batch).decode(sent)
        print("read:", len(read.events), "events")
    except msgspec.ValidationError as error:
        print("read:", error)
subscriber = (SRT / "mem_cache/storage/umbp/umbp_store.py").read_text()
print("UMBP's subscriber reads so:", "Decoder(type=KVEventBatch)" in subscriber)
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/pairs.py" > "$folder/seen"
cat "$folder/seen"
cat > "$folder/expected" <<'TEXT'
drafts: False block_size 2 [1, 2, 3, 4]
read: 2 events
drafts: True block_size 2 [[1, 2], [2, 3], [3, 4], [4, 5]]
read: Expected `int`, got `array` - at `$[1][1].token_ids[0]`
UMBP's subscriber reads so: True
TEXT
diff "$folder/expected" "$folder/seen"
echo "as described"
