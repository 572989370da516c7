#!/usr/bin/env bash
# SGLang 0.5.23: HiCache's storage on files and on NIXL 1.5.1 takes a page of another dtype for a hit.
#
# A stored page is raw bytes. Its name has the tokens, the model's name and the ranks, and not the
# KV's dtype, and a read asks for as many bytes as it needs. A server with `--kv-cache-dtype
# fp8_e4m3` needs half of what one with bf16 stored: it gets the first half of each page, read as
# fp8, and the prefix counts as cached. From e4m3 to e5m2 all bytes fit and mean other numbers.
# Only the way up, from fp8 to bf16, ends in a short read: NIXL's is a miss, that of the files an
# OSError out of `get`, which looks for files that are not there and for nothing else.
#
# The page size is safe, as other pages have other hashes. So is our tier's own file store, whose
# pages name dtype and shapes; with SGLang's, a directory for each dtype is what helps.
#
# Seen on Linux x86-64, Python 3.11, torch 2.14.1, no GPU.
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
"$folder/venv/bin/pip" install -q --no-deps sglang==0.5.23 nixl==1.5.1 nixl-cu12==1.5.1 \
  nixl-cu13==1.5.1
cat > "$folder/dtypes.py" <<'PYTHON'
import logging
import os

os.environ["SGLANG_HICACHE_NIXL_BACKEND_STORAGE_DIR"] = "nixl"

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheFile, HiCacheStorageConfig
from sglang.srt.mem_cache.storage.nixl.hicache_nixl import HiCacheNixl

logging.disable(logging.CRITICAL)
KEY, TOKENS, ROW = "0" * 64, 16, 128
BF16, E4M3, E5M2 = torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2
CONFIG = HiCacheStorageConfig(
    tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, attn_cp_rank=0, attn_cp_size=1,
    is_mla_model=False, enable_storage_metrics=False, is_page_first_layout=False,
    model_name="model",
    extra_config={"plugin": {"posix": {"active": True}}, "use_direct_io": False},
)


class HostPool:
    layout, page_size = "layer_first", TOKENS

    def __init__(self, page):
        self.kv_buffer = page

    def get_dummy_flat_data_page(self):
        return torch.empty_like(self.kv_buffer).flatten()

    def get_data_page(self, first, flat=True):
        return self.kv_buffer.flatten()

    def set_from_flat_data_page(self, first, page):
        self.kv_buffer.copy_(page.view_as(self.kv_buffer))


def page(dtype, value):
    return torch.full((TOKENS, ROW), value).to(dtype)


def files(dtype, value=None):
    storage = HiCacheFile(CONFIG, "files")
    if value is not None:
        return storage.set(KEY, page(dtype, value))
    return storage.get(KEY, page(dtype, 0.0))


def nixl(dtype, value=None):
    storage, pool = HiCacheNixl(CONFIG), HostPool(page(dtype, value or 0.0))
    storage.register_mem_pool_host(pool)
    slots = torch.arange(TOKENS)
    if value is not None:
        return storage.batch_set_v1([KEY], slots)
    return pool.kv_buffer if storage.batch_get_v1([KEY], slots) == [True] else None


def read(storage, dtype):
    try:
        page = storage(dtype)
    except OSError:
        return "an OSError"
    return "a miss" if page is None else f"a hit, {sorted(set(page.float().flatten().tolist()))}"


for name, storage in (("files", files), ("NIXL", nixl)):
    storage(BF16, 1.5)
    for dtype in (BF16, E4M3, E5M2):
        print(f"{name}: 1.5 as bfloat16, read as {dtype}:", read(storage, dtype))
for name, folder, storage in (("files", "files", files), ("NIXL", "nixl", nixl)):
    for root, _, names in os.walk(folder):
        for file in names:
            os.remove(os.path.join(root, file))
    storage(E4M3, 1.5)
    for dtype in (E4M3, E5M2, BF16):
        print(f"{name}: 1.5 as float8_e4m3fn, read as {dtype}:", read(storage, dtype))
PYTHON
mkdir "$folder/nixl"
"$folder/venv/bin/python" -W ignore "$folder/dtypes.py" 2> "$folder/log" | tee "$folder/seen"
cat > "$folder/expected" <<'TEXT'
files: 1.5 as bfloat16, read as torch.bfloat16: a hit, [1.5]
files: 1.5 as bfloat16, read as torch.float8_e4m3fn: a hit, [-2.0, 1.875]
files: 1.5 as bfloat16, read as torch.float8_e5m2: a hit, [-2.0, 1.75]
NIXL: 1.5 as bfloat16, read as torch.bfloat16: a hit, [1.5]
NIXL: 1.5 as bfloat16, read as torch.float8_e4m3fn: a hit, [-2.0, 1.875]
NIXL: 1.5 as bfloat16, read as torch.float8_e5m2: a hit, [-2.0, 1.75]
files: 1.5 as float8_e4m3fn, read as torch.float8_e4m3fn: a hit, [1.5]
files: 1.5 as float8_e4m3fn, read as torch.float8_e5m2: a hit, [1.0]
files: 1.5 as float8_e4m3fn, read as torch.bfloat16: an OSError
NIXL: 1.5 as float8_e4m3fn, read as torch.float8_e4m3fn: a hit, [1.5]
NIXL: 1.5 as float8_e4m3fn, read as torch.float8_e5m2: a hit, [1.0]
NIXL: 1.5 as float8_e4m3fn, read as torch.bfloat16: a miss
TEXT
diff "$folder/expected" "$folder/seen"
echo "as described"
