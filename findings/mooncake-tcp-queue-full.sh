#!/usr/bin/env bash
# Mooncake 0.3.13.post1, TCP: `batch_transfer_sync_write` of some thousands of small buffers fails at
# once (-1), however idle both sides are.
#
# A process keeps, for each peer, 1,024 transfers in a queue and lets 1,024 more wait for a second.
# What is beyond them is refused ("TCP lane queue-full rejection count" in the log of glog), and with
# it the batch; nothing waits for the queue to move. One buffer is one transfer, however small.
# MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER and MC_TCP_MAX_PENDING_ADMISSIONS_PER_PEER raise both bounds,
# to 65535 at most. Known as kvcache-ai/Mooncake#4209; #2974 has brought the queues, #3710 raises their
# bounds in a later version.
#
# SGLang 0.5.23 sends one slice for each token and layer, of K and of V, from a prefill server to a
# decode server with another number of ranks: a batch is a chunk of one layer. After one failure the
# prefill server takes the decode server's rank for dead, and answers requests with status 500
# ("Decode instance could be dead, remote mooncake session ... is not alive") until a probe clears it,
# 30 seconds later.
#
# Seen on Linux x86-64, Python 3.11, two processes on 127.0.0.1.
set -euo pipefail
unset PYTHONPATH
unset MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER MC_TCP_MAX_PENDING_ADMISSIONS_PER_PEER
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q mooncake-transfer-engine-non-cuda==0.3.13.post1
"$folder/venv/bin/pip" install -q --no-deps sglang==0.5.23
# shared libraries that the wheel needs, unpacked beside it
(
    mkdir debian && cd debian
    packages="libibverbs1 librdmacm1 libnuma1 libnl-3-200 libnl-route-3-200"
    # shellcheck disable=SC2086
    apt-get download -q $packages || { apt-get update -q && apt-get download -q $packages; }
    for package in *.deb; do dpkg-deb -x "$package" .; done
) > "$folder/apt.log" 2>&1
LD_LIBRARY_PATH=$(find "$folder/debian" -name 'lib*.so.*' -printf '%h\n' | sort -u | paste -sd:)
export LD_LIBRARY_PATH GLOG_minloglevel=3 MC_FORCE_TCP=1
cat > "$folder/queue.py" <<'PYTHON'
import ctypes
import mmap
import subprocess
import sys

from mooncake.engine import TransferEngine

BYTES = 1024
MOST = 20_000


def engine():
    """An engine, and the address of memory that it has registered."""
    memory = mmap.mmap(-1, MOST * BYTES)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    transfers = TransferEngine()
    assert transfers.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
    assert transfers.register_memory(address, len(memory)) == 0
    return transfers, memory, address


if sys.argv[1:] == ["peer"]:
    transfers, memory, address = engine()
    print("\npeer", transfers.get_rpc_port(), address, flush=True)
    sys.stdin.read()
    sys.exit()
peer = subprocess.Popen(
    [sys.executable, "-W", "ignore", __file__, "peer"],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
)
try:
    _, port, there = next(line for line in peer.stdout if line.startswith("peer ")).split()
    transfers, memory, here = engine()
    for count in (1, 500, MOST):
        places = [BYTES * number for number in range(count)]
        result = transfers.batch_transfer_sync_write(
            f"127.0.0.1:{port}",
            [here + place for place in places],
            [int(there) + place for place in places],
            [BYTES] * count,
        )
        print(f"\n{sys.argv[1]}: {count} buffers of {BYTES} bytes: {result}", flush=True)
finally:
    peer.terminate()
    peer.wait()
PYTHON
cat > "$folder/engine.py" <<'PYTHON'
import importlib.util
import re
from pathlib import Path

(sglang,) = importlib.util.find_spec("sglang").submodule_search_locations
text = Path(sglang, "srt/disaggregation/mooncake/conn.py").read_text()
send = text[text.index("def send_kvcache_slice") :]
print("SGLang:", re.search(r"tokens_per_page = .*", send)[0])
print("SGLang:", re.search(r"length_list = \[.*", send)[0])
print("SGLang:", re.search(r"if self\.session_failures\[.*", text)[0])
PYTHON
python="$folder/venv/bin/python -W ignore"
{
    $python "$folder/queue.py" default
    MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER=65535 $python "$folder/queue.py" 65535
} 2> /dev/null | grep -E '^(default|65535): ' > "$folder/seen"
$python "$folder/engine.py" >> "$folder/seen"
cat "$folder/seen"
cat > "$folder/expected" <<'TEXT'
default: 1 buffers of 1024 bytes: 0
default: 500 buffers of 1024 bytes: 0
default: 20000 buffers of 1024 bytes: -1
65535: 1 buffers of 1024 bytes: 0
65535: 500 buffers of 1024 bytes: 0
65535: 20000 buffers of 1024 bytes: 0
SGLang: tokens_per_page = np.arange(page_size, dtype=np.int64).reshape(1, -1)
SGLang: length_list = [heads_bytes_per_token_to_send] * total_slices
SGLang: if self.session_failures[req.mooncake_session_id] >= 1:
TEXT
diff "$folder/expected" "$folder/seen"
echo "as described"
