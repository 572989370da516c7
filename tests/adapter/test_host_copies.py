"""SGLang's host pools on the CPU copies: every layout moves every byte."""

import pytest

from tests.fixtures.zygote import Zygote

CHILD = """
import torch, sys
from types import SimpleNamespace
import sglang_ext_cpu.host_copies as copies
copies.install()
from sglang.srt.mem_cache.pool_host import mha
from sglang.srt.mem_cache.pool_host.common import HostTensorAllocator
layout, io_backend, page = sys.argv[1], sys.argv[2], int(sys.argv[3])
layers, heads, k_dim, tokens, host_tokens = 3, 2, 4, 64, 128
k = [torch.randn(tokens, heads, k_dim) for _ in range(layers)]
v = [torch.randn(tokens, heads, k_dim) for _ in range(layers)]
pool = mha.MHATokenToKVPoolHost.__new__(mha.MHATokenToKVPoolHost)
pool.layout, pool.page_size, pool.layer_num, pool.target_layer_num = layout, page, layers, layers
pool.size, pool.page_num = host_tokens, host_tokens // page
pool.head_num, pool.head_dim = heads, k_dim
pool.v_head_dim, pool.dtype, pool.device = k_dim, torch.float32, "cpu"
pool.pin_memory, pool._transfer_device = True, torch.device("cpu")
pool.allocator = HostTensorAllocator()
pool.device_k_buffers, pool.device_v_buffers = tuple(k), tuple(v)
table = lambda ts: torch.tensor([t.data_ptr() for t in ts], dtype=torch.uint64)
pool.device_k_data_ptrs, pool.device_v_data_ptrs = table(k), table(v)
pool.kv_buffer = pool.init_kv_buffer()
pool._initialize_transfer_views(SimpleNamespace(), None)
device = torch.cat([torch.arange(p * page, (p + 1) * page) for p in (2, 1)])
host = torch.cat([torch.arange(p * page, (p + 1) * page) for p in (0, 3)])
want = [(a[device].clone(), b[device].clone()) for a, b in zip(k, v)]
pool.backup_from_device_all_layer(None, host, device, io_backend)
target = torch.cat([torch.arange(p * page, (p + 1) * page) for p in (3, 0)])
for layer in range(layers):
    pool.load_to_device_per_layer(None, host, target, layer, io_backend)
    assert torch.equal(k[layer][target], want[layer][0])
    assert torch.equal(v[layer][target], want[layer][1])
print("ok")
"""


@pytest.mark.parametrize(
    ("layout", "io_backend"),
    [
        ("layer_first", "kernel"),
        ("page_first", "kernel"),
        ("page_head", "kernel"),
        ("layer_first", "direct"),
        ("page_first_direct", "direct"),
    ],
)
def test_round_trip(zygote: Zygote, layout: str, io_backend: str) -> None:
    # a process of its own: the engine's modules keep process-wide state
    run = zygote.run("-c", CHILD, layout, io_backend, "16")
    assert run.stdout.strip().endswith("ok"), run.stderr[-2000:]
