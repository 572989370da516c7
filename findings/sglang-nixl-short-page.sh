#!/usr/bin/env bash
# SGLang 0.5.23, HiCache on NIXL 1.5.1 (POSIX): one page file that is too short takes all pages of
# its batch with it. They are whole, they have been read, and each of them is reported as missing.
#
# A batch (up to 128 pages) is one NIXL transfer. NIXL has one state for it: a descriptor that ends
# short makes it NIXL_ERR_BACKEND, and says neither which one it was nor that the others are there.
# SGLang makes that state the answer of every page of the batch. The question whether pages exist
# looks for names alone, so the prefix is promised, waited for, and computed again.
#
# A page is written under its own name, which is there before its bytes are. So a server that is
# killed, a disk that is full, or a reader beside a writer has such a file. What helps is that a page
# that was computed again is written again, over the old one.
#
# Seen on Linux x86-64, Python 3.11, torch 2.14.1, no GPU. The host pool is a tensor.
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
# NIXL takes the build that has the name of torch's CUDA, or of none
"$folder/venv/bin/pip" install -q --no-deps sglang==0.5.23 nixl==1.5.1 nixl-cu12==1.5.1 \
  nixl-cu13==1.5.1
cat > "$folder/pages.py" <<'PYTHON'
import logging
import os
from pathlib import Path

STORE = Path("store")
os.environ["SGLANG_HICACHE_NIXL_BACKEND_STORAGE_DIR"] = str(STORE.resolve())

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
from sglang.srt.mem_cache.storage.nixl.hicache_nixl import HiCacheNixl

logging.disable(logging.CRITICAL)
PAGES, TOKENS, ROW = 4, 16, 256
KEYS = [f"{number:064x}" for number in range(PAGES)]
SLOTS = torch.arange(PAGES * TOKENS)


class HostPool:
    layout, page_size = "layer_first", TOKENS

    def __init__(self, value):
        self.kv_buffer = torch.full((PAGES * TOKENS, ROW), value, dtype=torch.uint8)

    def get_dummy_flat_data_page(self):
        return torch.empty(TOKENS * ROW, dtype=torch.uint8)

    def get_data_page(self, first, flat=True):
        return self.kv_buffer[first : first + TOKENS].flatten()

    def set_from_flat_data_page(self, first, page):
        self.kv_buffer[first : first + TOKENS] = page.view(TOKENS, ROW)


def server(value):
    options = {"plugin": {"posix": {"active": True}}, "use_direct_io": False}
    storage = HiCacheNixl(
        HiCacheStorageConfig(
            tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, attn_cp_rank=0, attn_cp_size=1,
            is_mla_model=False, enable_storage_metrics=False, is_page_first_layout=False,
            model_name="model", extra_config=options,
        )
    )
    storage.register_mem_pool_host(HostPool(value))
    return storage


first = server(7)
print("written:", first.batch_set_v1(KEYS, SLOTS))
print("read:", server(0).batch_get_v1(KEYS, SLOTS))
(last,) = (file for file in STORE.rglob("*") if KEYS[-1] in file.name)
os.truncate(last, 100)
second = server(0)
print("the last page is short; pages that exist:", second.batch_exists(KEYS))
print("read:", second.batch_get_v1(KEYS, SLOTS))
print("without the last:", second.batch_get_v1(KEYS[:-1], SLOTS[:-TOKENS]))
print("written again:", first.batch_set_v1(KEYS[-1:], SLOTS[-TOKENS:]))
print("read:", second.batch_get_v1(KEYS, SLOTS))
PYTHON
mkdir "$folder/store"
"$folder/venv/bin/python" -W ignore "$folder/pages.py" 2> "$folder/log" | tee "$folder/seen"
cat > "$folder/expected" <<'TEXT'
written: [True, True, True, True]
read: [True, True, True, True]
the last page is short; pages that exist: 4
read: [False, False, False, False]
without the last: [True, True, True]
written again: [True]
read: [True, True, True, True]
TEXT
diff "$folder/expected" "$folder/seen"
echo "as described"
