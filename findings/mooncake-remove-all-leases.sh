#!/usr/bin/env bash
# Mooncake 0.3.13.post1: `remove_all` passes over what was read, or asked for with `is_exist`, in the
# last 10 seconds. It returns how many objects it removed, and says nothing of those that stay.
#
# Each such call takes a lease of 10 seconds for its readers, and a question whether an object is
# there takes it too. `remove` of one object says so (-706); `remove_all` does not. With `force=True`
# both remove what somebody may be reading.
#
# SGLang 0.5.23 calls `remove_all()` when an operator clears the storage, drops the result, and
# answers that all is cleared: right after traffic, what the traffic used is what stays.
#
# Seen on Linux x86-64, Python 3.11, one store on TCP with 64 MB.
set -euo pipefail
unset PYTHONPATH
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
export LD_LIBRARY_PATH GLOG_minloglevel=3
cat > "$folder/leases.py" <<'PYTHON'
import importlib.util
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

(mooncake,) = importlib.util.find_spec("mooncake").submodule_search_locations
(sglang,) = importlib.util.find_spec("sglang").submodule_search_locations
NAMES = ("put", "asked for", "read")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def connect(port):
    from mooncake.store import MooncakeDistributedStore

    for _ in range(50):
        store = MooncakeDistributedStore()
        master = f"127.0.0.1:{port}"
        if store.setup("127.0.0.1", "P2PHANDSHAKE", 64 << 20, 16 << 20, "tcp", "", master) == 0:
            return store
        time.sleep(0.2)
    raise SystemExit("no master")


port = free_port()
ports = ["--port", str(port), "--metrics_port", str(free_port())]
master = subprocess.Popen(
    [f"{mooncake}/mooncake_master", *ports], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
)
try:
    store = connect(port)
    for name in NAMES:
        store.put(name, b"x" * 4096)
    store.is_exist("asked for")
    store.get("read")
    print("remove of one that was read:", store.remove("read"))
    print("remove_all returns", store.remove_all())
    time.sleep(11)
    print("after 11 s remove_all returns", store.remove_all())
    store.put("again", b"x" * 4096)
    store.get("again")
    print("remove_all by force returns", store.remove_all(force=True))
    backend = Path(sglang, "srt/mem_cache/storage/mooncake_store/mooncake_store.py").read_text()
    print("SGLang:", re.search(r"def clear\(self\) -> None:\n\s+(\S+)\n", backend)[1])
finally:
    master.terminate()
    master.wait()
sys.stdout.flush()
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/leases.py" 2> /dev/null | grep -v '^[IWE][0-9]' > "$folder/seen"
cat "$folder/seen"
cat > "$folder/expected" <<'TEXT'
remove of one that was read: -706
remove_all returns 1
after 11 s remove_all returns 2
remove_all by force returns 1
SGLang: self.store.remove_all()
TEXT
diff "$folder/expected" "$folder/seen"
echo "as described"
