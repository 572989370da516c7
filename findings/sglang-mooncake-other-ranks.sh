#!/usr/bin/env bash
# SGLang 0.5.23, HiCache on Mooncake 0.3.13.post1: of servers that share a store, one with fewer
# ranks takes the pages of one with more for hits. A part of such a page is in another layout, and
# the rest is what the memory held before.
#
# An object's name has the model and the rank (`…_0_k`), and not how many ranks there are; with
# pipeline ranks it is the same. Rank 0 of four has a quarter of the heads, rank 0 of two half of
# them. Mooncake's `batch_get_into` copies what there is into a larger buffer and returns how many
# bytes that were; SGLang takes every number above 0 for the whole page. The other way, into a
# smaller buffer, the read fails: pages are promised, waited for, and computed. In neither case is
# the page written, as its name is there. Nothing is logged in the first.
#
# Names of the storages on files and on NIXL have both numbers. For Mooncake, `tp_lcm_size` with the
# layout `page_head` is made to share between numbers of ranks (sgl-project/sglang#18541), and is to
# be set on all servers; else `extra_backend_tag` has to tell them apart. The KV's dtype is missing
# from these names too (#38362). Models with MLA have the same page on every rank, and are safe.
#
# Seen on Linux x86-64, Python 3.11, torch 2.14.1, no GPU, one store on TCP. The host pool is a
# tensor.
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
  sentencepiece==0.2.1 starlette==1.10.0 tokenizers==0.23.2 tqdm==4.70.1 transformers==5.19.0 \
  mooncake-transfer-engine-non-cuda==0.3.13.post1
"$folder/venv/bin/pip" install -q --no-deps sglang==0.5.23
# shared libraries that Mooncake's wheel needs, unpacked beside it
(
    mkdir debian && cd debian
    packages="libibverbs1 librdmacm1 libnuma1 libnl-3-200 libnl-route-3-200"
    # shellcheck disable=SC2086
    apt-get download -q $packages || { apt-get update -q && apt-get download -q $packages; }
    for package in *.deb; do dpkg-deb -x "$package" .; done
) > "$folder/apt.log" 2>&1
LD_LIBRARY_PATH=$(find "$folder/debian" -name 'lib*.so.*' -printf '%h\n' | sort -u | paste -sd:)
export LD_LIBRARY_PATH GLOG_minloglevel=3
cat > "$folder/ranks.py" <<'PYTHON'
import importlib.util
import logging
import socket
import subprocess
import time

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
from sglang.srt.mem_cache.storage.mooncake_store.mooncake_store import MooncakeStore

logging.disable(logging.CRITICAL)
(MOONCAKE,) = importlib.util.find_spec("mooncake").submodule_search_locations
PAGES, TOKENS, LAYERS, HEADS, WIDTH = 2, 16, 2, 8, 4
KEYS = [f"{number:064x}" for number in range(PAGES)]
SLOTS = torch.arange(PAGES * TOKENS)
OLD = -1.0


class HostPool:
    """K and V of `HEADS / ranks` heads, in the layout `page_first`."""

    layout, page_size = "page_first", TOKENS

    def __init__(self, ranks):
        shape = (2, PAGES * TOKENS, LAYERS, HEADS // ranks, WIDTH)
        self.kv_buffer = torch.full(shape, OLD)

    def get_ksize_per_token(self):
        return self.kv_buffer[0, 0].nbytes

    def get_page_buffer_meta(self, slots):
        parts = [self.kv_buffer[kind, first : first + TOKENS]
                 for first in slots[::TOKENS].tolist() for kind in (0, 1)]
        return [part.data_ptr() for part in parts], [part.nbytes for part in parts]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_0(ranks, **more):
    """Storage and host memory of rank 0 of a server with `ranks`."""
    options = {
        "master_server_address": f"127.0.0.1:{port}", "metadata_server": "P2PHANDSHAKE",
        "local_hostname": "127.0.0.1", "protocol": "tcp", "global_segment_size": 256 << 20,
    }
    storage = MooncakeStore(
        HiCacheStorageConfig(
            tp_rank=0, tp_size=ranks, pp_rank=0, pp_size=1, attn_cp_rank=0, attn_cp_size=1,
            is_mla_model=False, enable_storage_metrics=False, is_page_first_layout=True,
            model_name="model", extra_config=options | more,
        )
    )
    pool = HostPool(ranks)
    storage.register_mem_pool_host(pool)
    return storage, pool


def read(name, ranks, **more):
    storage, pool = rank_0(ranks, **more)
    there = storage.batch_exists(KEYS)
    print(f"{name}: {there} pages exist, read: {storage.batch_get_v1(KEYS, SLOTS)}")
    return storage, pool


port = free_port()
command = [f"{MOONCAKE}/mooncake_master", "--port", str(port), "--metrics_port", str(free_port())]
master = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
try:
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.2)
    four, pool = rank_0(4)
    pool.kv_buffer[:] = SLOTS.float()[:, None, None, None]  # each number says whose token it is
    print("4 ranks, written:", four.batch_set_v1(KEYS, SLOTS))
    read("4 ranks again", 4)
    two, pool = read("2 ranks", 2)
    for token in (0, 1, 7, 8):
        print(f"2 ranks, K of token {token} is that of", pool.kv_buffer[0, token].unique().tolist())
    print("2 ranks, written:", two.batch_set_v1(KEYS, SLOTS))
    read("2 ranks again", 2)
    read("8 ranks", 8)
    read("2 ranks with a tag", 2, extra_backend_tag="tp2")
finally:
    master.terminate()
    master.wait()
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/ranks.py" 2> "$folder/log" \
  | grep -E '^[0-9] ranks' > "$folder/seen" || { cat "$folder/log"; exit 1; }
cat "$folder/seen"
cat > "$folder/expected" <<'TEXT'
4 ranks, written: [True, True]
4 ranks again: 2 pages exist, read: [True, True]
2 ranks: 2 pages exist, read: [True, True]
2 ranks, K of token 0 is that of [0.0, 1.0]
2 ranks, K of token 1 is that of [2.0, 3.0]
2 ranks, K of token 7 is that of [14.0, 15.0]
2 ranks, K of token 8 is that of [-1.0]
2 ranks, written: [True, True]
2 ranks again: 2 pages exist, read: [True, True]
8 ranks: 2 pages exist, read: [False, False]
2 ranks with a tag: 0 pages exist, read: [False, False]
TEXT
diff "$folder/expected" "$folder/seen"
echo "as described"
