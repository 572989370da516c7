#!/bin/sh
# What `python -m launch.bench.gpu` needs on a GPU machine without a network, as one file.
#
# usage: gpu_setup.sh collect FILE            where there is a network: everything, into a .tar.xz
#        gpu_setup.sh install FILE [FOLDER]   on the GPU machine: unpacks it, /tmp/sglang-ext-gpu
#                                             unless told otherwise, and prints variables to set
#
# The machine has Linux on x86-64, Python 3.12, PyTorch 2.11 for CUDA 13, nvcc, Triton 3.6, and what
# launch/requirements/gpu.txt names in its head. `collect` takes the wheels of that list (63, in all
# 70 MiB; SGLang itself is 37 MiB) without their dependencies, drops what is not used here (SGLang's
# diffusion models and Rust extensions), and packs them anew, with the entry points of this
# repository.
#
# Of sglang-kernel 0.4.4 (587 MiB) it takes the library for sm_90 (20 MiB, for CUDA 13) and the
# functions that call its copies: the rest is attention. Whether it loads with PyTorch 2.11 has not
# been tried; nothing but the io backend `direct` and the layout `page_head` needs it. flashinfer
# (65 MB) is left out: attention is Triton's.
#
# `collect` fails if the file is larger than 64 MiB. Nothing is compiled on the machine but what the
# engine compiles itself when its copies are used first.
set -eu
most=$((64 * 1024 * 1024))
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)

collect() {
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    # pip takes no tag for a later one
    platforms="--platform manylinux1_x86_64 --platform manylinux2014_x86_64"
    for minor in 5 12 17 24 26 27 28 31 34; do
        platforms="$platforms --platform manylinux_2_${minor}_x86_64"
    done
    target="--no-deps --only-binary=:all: --python-version 3.12 --implementation cp"
    target="$target --abi cp312 --abi abi3 --abi none $platforms"
    # shellcheck disable=SC2086
    python3 -m pip install -q --no-compile --target "$work/site" $target \
        -r "$root/launch/requirements/gpu.txt"
    rm -rf "$work/site/sglang/multimodal_gen" "$work/site/bin"
    find "$work/site/sglang/srt/rust_extensions" -name '*.so' -delete
    # shellcheck disable=SC2086
    python3 -m pip download -q -d "$work" $target sglang-kernel==0.4.4
    python3 - "$work" <<'PYTHON'
import pathlib
import sys
import zipfile

work = pathlib.Path(sys.argv[1])
target = work / "site" / "sgl_kernel_copies"
target.mkdir()
with zipfile.ZipFile(next(work.glob("sglang_kernel-*.whl"))) as wheel:
    for name in ("sgl_kernel/sm90/common_ops.abi3.so", "sgl_kernel/kvcacheio.py"):
        (target / pathlib.Path(name).name).write_bytes(wheel.read(name))
PYTHON
    # entry points alone: the code is that of the repository
    python3 -m pip wheel -q --no-deps -w "$work/own" "$root" "$root/launch/platform"
    for wheel in "$work"/own/*.whl; do
        python3 -m zipfile -e "$wheel" "$work/own/unpacked"
    done
    mv "$work"/own/unpacked/*.dist-info "$work/site"
    tar -C "$work" -cJf "$1" site
    size=$(wc -c < "$1")
    echo "$1: $size bytes, $((size * 100 / most)) % of 64 MiB"
    test "$size" -le "$most"
}

install() {
    python3 -W ignore -m tarfile -e "$1" "$2"
    site=$2/site
    cat <<TEXT
export PYTHONPATH=$root:$root/launch/platform:$site
export EXT_CPU_SGL_KERNEL=$site/sgl_kernel_copies
TEXT
}

case "${1:-}:${2:-}" in
    collect:?*) collect "$2" ;;
    install:?*) install "$2" "${3:-/tmp/sglang-ext-gpu}" ;;
    *) sed -n 's/^# \{0,1\}//p' "$0" | sed -n 2,7p; exit 2 ;;
esac
