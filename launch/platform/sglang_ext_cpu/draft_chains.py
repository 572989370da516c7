"""The next draft of a chain: its tokens move up by one, and what was just drafted goes behind them.

The engine has a kernel for it, which counts requests by their lengths. With DP attention a batch is
padded to the largest rank's, and its lengths with it, but nothing is drafted for padding: the
kernel reads behind its tensors, and writes where what it finds there says.
"""

import torch


def advance(
    tokens: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    drafted: torch.Tensor,
    last: torch.Tensor | None = None,
) -> torch.Tensor:
    """Move the tokens of every request up by one, in place; returns them.

    Args:
        tokens: of all requests one after another, integers of any type.
        starts: where each request begins, (requests or more,).
        lengths: of each request, (requests or more,); what is behind the requests is padding.
        drafted: a token for each request, (requests,) or (requests, 1).
        last: where it goes, (requests,); behind the other tokens unless given.
    """
    requests = zip(starts.tolist(), lengths.tolist(), drafted.flatten().tolist(), strict=False)
    places = None if last is None else last.tolist()
    for number, (start, length, token) in enumerate(requests):
        if length == 0:
            continue
        end = start + length - 1
        tokens[start:end] = tokens[start + 1 : end + 1].clone()
        tokens[end if places is None else places[number]] = token
    return tokens


def install() -> None:
    """Take the kernel's place where layers draft one behind the other."""
    from sglang.srt.speculative import multi_layer_eagle_worker_v2

    multi_layer_eagle_worker_v2.rotate_input_ids = advance
