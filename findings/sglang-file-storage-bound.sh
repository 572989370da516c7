#!/usr/bin/env bash
# SGLang 0.5.23, HiCache on files: `max_size` bounds what one rank has written under one name of a
# model and one number of ranks. The directory may hold a multiple of it.
#
# - Each rank has a bound of its own: `--tp 8` with 500 GB may take 4 TB. The number is cut to the
#   size of the disk, for each rank alone.
# - Files whose names end in another rank, number of ranks or model are not counted, and nobody
#   removes them. After a restart with another `--tp` what the last server left stays for good, and
#   the new one takes as much again. So do the servers of two models in one directory.
#
# A start removes what is too much of a rank's own files, and logs how many bytes those are. What it
# passes over is not in that line.
#
# Seen on Linux x86-64, Python 3.11, torch 2.14.1, no GPU. Pages of 1 KB, `max_size` of 16 of them.
set -euo pipefail
unset PYTHONPATH
unset SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR SGLANG_HICACHE_FILE_BACKEND_MIN_FREE_SPACE
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
cat > "$folder/bound.py" <<'PYTHON'
import logging
from pathlib import Path

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheFile, HiCacheStorageConfig

logging.disable(logging.CRITICAL)
STORE = Path("store")
PAGE = 1024
BOUND = 16 * PAGE


def serve(ranks, model="org/model"):
    """What a start and 16 pages of other prompts leave, each rank in turn."""
    stores = [
        HiCacheFile(
            HiCacheStorageConfig(
                tp_rank=rank, tp_size=ranks, pp_rank=0, pp_size=1, attn_cp_rank=0, attn_cp_size=1,
                is_mla_model=False, enable_storage_metrics=False, is_page_first_layout=False,
                model_name=model, extra_config={"file_storage_path": "store", "max_size": BOUND},
            )
        )
        for rank in range(ranks)
    ]
    for number in range(16):
        for store in stores:
            assert store.set(f"{number:064x}", torch.zeros(PAGE, dtype=torch.uint8))
    held = sum(file.stat().st_size for file in STORE.glob("*.bin"))
    print(f"{model}, {ranks} ranks: {held / BOUND:.1f} times max_size in the directory")


serve(1)
serve(1)
serve(2)
serve(4)
serve(1, "org/another")
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/bound.py" 2> "$folder/log" > "$folder/seen" || {
  cat "$folder/log"
  exit 1
}
cat "$folder/seen"
cat > "$folder/expected" <<'TEXT'
org/model, 1 ranks: 1.0 times max_size in the directory
org/model, 1 ranks: 1.0 times max_size in the directory
org/model, 2 ranks: 3.0 times max_size in the directory
org/model, 4 ranks: 7.0 times max_size in the directory
org/another, 1 ranks: 8.0 times max_size in the directory
TEXT
diff "$folder/expected" "$folder/seen"
echo "as described"
