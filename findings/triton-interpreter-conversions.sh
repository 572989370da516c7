#!/usr/bin/env bash
# Triton 3.8.0: with TRITON_INTERPRET=1 a kernel converts numbers in another way than when it is
# compiled for a GPU, and nothing is said.
#
# - float32 to bfloat16 cuts the low half off. The compiled kernel rounds to nearest even
#   (cvt.rn.bf16.f32). Of normally distributed numbers half are one step off.
# - float32 to float8_e4m3 beyond 448 gives a smaller number: 500 becomes 256. The compiled kernel
#   saturates (cvt.rn.satfinite): 448.
# - float8 to float32 knows no NaN: NaN in e4m3 becomes 480, in e5m2 114688, and infinity 65536.
#
# So a kernel that quantizes a KV cache can pass its tests in the interpreter and differ on a GPU,
# and a NaN in an fp8 cache, which shows at once on a GPU, goes on as a number here.
#
# Seen on Linux x86-64, Python 3.11, torch 2.14.1. No GPU is needed: what a GPU would run is read
# from the PTX that Triton makes for sm_90.
set -euo pipefail
unset PYTHONPATH
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 triton==3.8.0 numpy==2.4.6
cat > "$folder/kernels.py" <<'PYTHON'
import triton
import triton.language as tl


@triton.jit
def convert(source, target, COUNT: tl.constexpr):
    place = tl.arange(0, COUNT)
    tl.store(target + place, tl.load(source + place).to(target.dtype.element_ty))
PYTHON
cat > "$folder/interpreted.py" <<'PYTHON'
import torch
from kernels import convert

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def converted(numbers, kind):
    out = torch.zeros(len(numbers), dtype=kind)
    convert[(1,)](numbers, out, len(numbers))
    return out


torch.manual_seed(0)
normal = torch.randn(4096)
cut = (normal.view(torch.int32) & -65536).view(torch.float32)
bfloat16 = converted(normal, torch.bfloat16)
share = (bfloat16 == normal.to(torch.bfloat16)).float().mean().item()
all_cut = torch.equal(bfloat16.float(), cut)
print(f"bfloat16: {share:.2f} are rounded to nearest, the rest cut: {all_cut}")
print("e4m3 of 500, 1000:", converted(torch.tensor([500.0, 1000.0]), E4M3).tolist())
for kind in (E4M3, E5M2):
    special = torch.tensor([float("nan"), float("inf")][: 1 if kind is E4M3 else 2]).to(kind)
    print(kind, special.float().tolist(), "->", converted(special, torch.float32).tolist())
PYTHON
cat > "$folder/compiled.py" <<'PYTHON'
import re

import triton
from kernels import convert
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

for source, target in (("*fp32", "*bf16"), ("*fp32", "*fp8e4nv")):
    signature = {"source": source, "target": target, "COUNT": "constexpr"}
    kernel = ASTSource(convert, signature, {"COUNT": 128})
    ptx = triton.compile(kernel, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    print(target, sorted(set(re.findall(r"cvt\.rn\.[a-z0-9.]+", ptx))))
PYTHON
export TRITON_CACHE_DIR="$folder/cache"
{
    TRITON_INTERPRET=1 venv/bin/python -W ignore interpreted.py
    venv/bin/python -W ignore compiled.py
} > seen
cat seen
cat > expected <<'TEXT'
bfloat16: 0.50 are rounded to nearest, the rest cut: True
e4m3 of 500, 1000: [256.0, 256.0]
torch.float8_e4m3fn [nan] -> [480.0]
torch.float8_e5m2 [nan, inf] -> [114688.0, 65536.0]
*bf16 ['cvt.rn.bf16.f32']
*fp8e4nv ['cvt.rn.satfinite.e4m3x2.f32']
TEXT
diff expected seen
echo "as described"
