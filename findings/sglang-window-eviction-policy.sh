#!/usr/bin/env bash
# SGLang 0.5.23: `--radix-eviction-policy` rules the KV of full attention alone. When a model with
# sliding windows runs out of room for windows, what was used least recently goes, whatever was asked
# for, and the prefix that the policy protects is lost.
#
# Windows have a list of their own by last use, and eviction from it asks no policy. Without its
# window a prefix is no hit. Their pool is the smaller one, so it is often the first to run out.
# Nothing is logged. With full attention alone all policies do as their names say.
#
# And with `--hicache-write-policy write_back` no hit is counted, as counting belongs to the copies
# that the other write policies make. So `lfu` and `slru` have nothing to go by, and are LRU.
#
# Seen on Linux x86-64, Python 3.11, torch 2.14.1, no GPU. Three prompts: the first has a higher
# priority and comes three times, and then come the two others. Room for one is asked for.
set -euo pipefail
unset PYTHONPATH
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 numpy==2.4.6 \
  aiohttp==3.14.5 apache-tvm-ffi==0.1.11 compressed-tensors==0.18.0 dill==0.4.1 gguf==0.19.0 \
  httpx==0.28.1 ipython==9.18.1 msgspec==0.22.0 openai==2.8.0 orjson==3.13.0 packaging==26.3 \
  partial-json-parser==0.2.1.1.post7 pillow==13.0.0 psutil==7.2.2 pybase64==1.5.1 \
  pydantic==2.14.3 pyzmq==27.3.0 requests==2.34.2 sentencepiece==0.2.1 starlette==1.10.0 \
  tokenizers==0.23.2 tqdm==4.70.1 transformers==5.19.0
"$folder/venv/bin/pip" install -q --no-deps sglang==0.5.23
cat > "$folder/policies.py" <<'PYTHON'
import logging
from array import array

import torch
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

logging.disable(logging.CRITICAL)
SLOTS, TOKENS, WINDOW = 512, 64, 16
SHAPE = {"page_size": 1, "dtype": torch.float32, "head_num": 1, "head_dim": 2, "device": "cpu"}
COMMON = {"dtype": torch.float32, "device": "cpu", "need_sort": False}
set_global_server_args_for_scheduler(ServerArgs(model_path="dummy", page_size=1, device="cpu"))


class Cache:
    def __init__(self, policy, windows):
        rows = ReqToTokenPool(4, SLOTS, device="cpu", enable_memory_saver=False)
        kinds = (ComponentType.FULL,)
        if windows:
            kinds += (ComponentType.SWA,)
            pool = SWAKVPool(
                size=SLOTS, size_swa=SLOTS, **SHAPE,
                swa_attention_layer_ids=[0], full_attention_layer_ids=[1],
            )
            self.slots = SWATokenToKVPoolAllocator(
                size=SLOTS, size_swa=SLOTS, page_size=1, kvcache=pool, **COMMON
            )
        else:
            pool = MHATokenToKVPool(size=SLOTS, layer_num=2, enable_memory_saver=False, **SHAPE)
            self.slots = TokenToKVPoolAllocator(size=SLOTS, kvcache=pool, **COMMON)
        self.tree = UnifiedRadixCache(
            CacheInitParams(
                disable=False, req_to_token_pool=rows, token_to_kv_pool_allocator=self.slots,
                page_size=1, sliding_window_size=WINDOW - 1 if windows else None,
                tree_components=kinds, eviction_policy=policy,
            )
        )

    def key(self, prompt):
        return RadixKey(array("q", range(1000 * prompt, 1000 * prompt + TOKENS)))

    def insert(self, prompt, priority=0):
        """What a request does that computes the prompt, or finds it."""
        values = self.slots.alloc(TOKENS)
        self.tree.insert(InsertParams(key=self.key(prompt), value=values, priority=priority))

    def found(self, prompt):
        return self.tree.match_prefix(MatchPrefixParams(key=self.key(prompt))).device_prefix_len


def lost(policy, windows=False, write_back=False):
    """Which of three prompts goes when there must be room for one."""
    cache = Cache(policy, windows)
    cache.tree.is_write_back = write_back  # as the option sets it
    for _ in range(3):
        cache.insert(1, priority=9)
    cache.insert(2)
    cache.insert(3)
    cache.tree.is_write_back = False  # there is no host that a victim could be copied to
    room = {"num_tokens": 0, "swa_num_tokens": TOKENS} if windows else {"num_tokens": TOKENS}
    cache.tree.evict(EvictParams(**room))
    (prompt,) = (prompt for prompt in (1, 2, 3) if not cache.found(prompt))
    return prompt


for policy in ("lru", "lfu", "slru", "priority"):
    print(f"{policy}: full attention {lost(policy)}, windows {lost(policy, windows=True)},", end="")
    print(f" full attention with write_back {lost(policy, write_back=True)}")
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/policies.py" 2> "$folder/log" > "$folder/seen" || {
  cat "$folder/log"
  exit 1
}
cat "$folder/seen"
cat > "$folder/expected" <<'TEXT'
lru: full attention 1, windows 1, full attention with write_back 1
lfu: full attention 2, windows 1, full attention with write_back 1
slru: full attention 2, windows 1, full attention with write_back 1
priority: full attention 2, windows 1, full attention with write_back 2
TEXT
diff "$folder/expected" "$folder/seen"
echo "as described"
