"""A child process of test_engine_attention: one token by the engine's Triton kernels, decoded and
as the last one of a prompt, in Triton's interpreter.

Prints the largest differences between the two, by the size of the window that the lists of keys are
made with.
"""

import os

# read when kernels are imported
os.environ["TRITON_INTERPRET"] = "1"

import torch
from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd
from sglang.kernels.ops.attention.extend_attention import extend_attention_fwd

SIZE, LENGTH, HEADS, KV_HEADS, WIDTH, SPLITS = 31, 80, 4, 2, 16, 2
"""Of a window, without the token itself, as layers have it; and of one request."""
SCALE = WIDTH**-0.5


def ends(count: int) -> torch.Tensor:
    """Where the list of keys of the one request begins and ends."""
    return torch.tensor([0, count], dtype=torch.int32)


def last(length: int, count: int) -> torch.Tensor:
    """Slots of the last of so many tokens; they are their positions."""
    return torch.arange(max(0, length - count), length)


def decoded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, size: int) -> torch.Tensor:
    """The last token by itself, as the backend gives it to the kernel: ``size`` of all tokens."""
    output = torch.empty_like(q)
    keys = last(LENGTH, size)
    logits = torch.empty(1, HEADS, SPLITS, WIDTH)
    sums = torch.empty(1, HEADS, SPLITS)
    splits = torch.full((1,), SPLITS, dtype=torch.int32)
    decode_attention_fwd(
        q, k, v, output, ends(len(keys)), keys, logits, sums, splits, SPLITS, SCALE, 1.0, 1.0
    )
    return output


def of_a_prompt(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, size: int) -> torch.Tensor:
    """The same token behind a prefix, of which the backend gives the kernel ``size`` tokens."""
    output = torch.empty_like(q)
    keys = last(LENGTH - 1, size)
    extend_attention_fwd(
        q, k[-1:].contiguous(), v[-1:].contiguous(), output, k, v, ends(1), ends(len(keys)), keys,
        None, True, None, 1, 1.0, 1.0, sm_scale=SCALE, sliding_window_size=SIZE,
    )  # fmt: skip
    return output


def main() -> None:
    """Both, with the size that layers have and with one more."""
    torch.manual_seed(0)
    q = torch.randn(1, HEADS, WIDTH)
    k, v = (torch.randn(LENGTH, KV_HEADS, WIDTH) for _ in range(2))
    prompt = of_a_prompt(q, k, v, SIZE)
    for size in (SIZE, SIZE + 1):
        apart = [decoded(q, k, v, size) - prompt, of_a_prompt(q, k, v, size) - prompt]
        print(size - SIZE, *(f"{difference.abs().max():.1e}" for difference in apart))


if __name__ == "__main__":
    main()
