#!/usr/bin/env bash
# SGLang 0.5.23, HiCache with a draft model (STANDALONE and others with a cache of their own): if
# the draft has layers of both kinds, the host gets its sliding-window layers alone.
#
# A draft with full attention in all layers is mirrored whole. One with a pool for full layers and
# one for windows goes to `build_swa_draft_pools`, which looks at the second alone. Nothing is
# logged. A hit on the host brings the target's KV back and leaves what other requests wrote since
# in the full layers of the draft.
#
# No answer is wrong, as the target verifies each token, but drafts are worse. With a tiny gpt-oss
# as its own draft (three steps, a device of a quarter of the tokens, multi-turn traffic) 67 of 156
# proposals were those of a server that needs no host, and 2.1 tokens were accepted a step for 3.0.
#
# Seen on Linux x86-64, Python 3.11, torch 2.14.1. The engine is not started, and its host pools,
# which pin memory for a GPU, are replaced by notes of what they would hold.
set -euo pipefail
unset PYTHONPATH
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 numpy==2.4.6 \
  aiohttp==3.14.5 apache-tvm-ffi==0.1.11 compressed-tensors==0.18.0 dill==0.4.1 gguf==0.19.0 \
  httpx==0.28.1 ipython==9.18.1 msgspec==0.22.0 orjson==3.13.0 packaging==26.3 pillow==13.0.0 \
  psutil==7.2.2 pybase64==1.5.1 pydantic==2.14.3 pyzmq==27.3.0 requests==2.34.2 \
  sentencepiece==0.2.1 starlette==1.10.0 tokenizers==0.23.2 tqdm==4.70.1 transformers==5.19.0
"$folder/venv/bin/pip" install -q --no-deps sglang==0.5.23
cat > "$folder/draft.py" <<'PYTHON'
from types import SimpleNamespace

import torch
from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.hybrid_cache import hybrid_pool_assembler as assembler
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

SHAPE = {"page_size": 16, "dtype": torch.float32, "head_num": 2, "head_dim": 8, "device": "cpu"}
WINDOWS, FULL = [0, 2], [1, 3]


def host_pool(*, pool, **options):
    """In place of a host pool of the engine, which needs a GPU: how many layers it has."""
    return SimpleNamespace(layer_num=pool.layer_num, of=pool)


assembler._build_mha_mla_host_pool = host_pool
assembler._get_allocator_type = lambda: "default"
assembler.get_memory = lambda: SimpleNamespace(hicache_mem_layout="layer_first")
window_host = SimpleNamespace(size=256, page_size=16, layout="layer_first")
group = SimpleNamespace(
    logical_size=512, entry_map={PoolName.SWA: SimpleNamespace(host_pool=window_host)}
)
controller = SimpleNamespace(page_size=16, transfer_layer_id_max=4, mem_pool_host=group)
tree = SimpleNamespace(cache_controller=controller)

hybrid = SWAKVPool(
    size=256, size_swa=128, swa_attention_layer_ids=WINDOWS, full_attention_layer_ids=FULL,
    enable_memory_saver=False, **SHAPE,
)
plain = MHATokenToKVPool(size=256, layer_num=4, enable_memory_saver=False, **SHAPE)
for name, pool in (("full attention alone", plain), ("half of them windows", hybrid)):
    _, entries = assembler.build_hicache_draft_sidecars(
        draft_device_pools=(pool,), tree_cache=tree
    )
    layers = sum(entry.host_pool.layer_num for entry in entries)
    print(f"draft of 4 layers, {name}: {layers} on the host,", *(str(e.name) for e in entries))
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/draft.py" > "$folder/seen"
cat "$folder/seen"
cat > "$folder/expected" <<'TEXT'
draft of 4 layers, full attention alone: 4 on the host, draft
draft of 4 layers, half of them windows: 2 on the host, draft_swa
TEXT
diff "$folder/expected" "$folder/seen"
echo "as described"
