"""One page there and back at start: copies that are missing on this machine, or wrong, would
otherwise end the server at its first backup, or corrupt answers."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sglang_ext.config import COPIES
from sglang_ext.errors import StartupError
from sglang_ext.kernels.page_copy.plane import Plane
from sglang_ext.transfer.job import PageCopies, Part

_FIRST, _SECOND = np.array([0], dtype=np.int64), np.array([1], dtype=np.int64)


def try_copies(copies: PageCopies, pools: Sequence[Sequence[Plane]], chosen: str) -> None:
    """Copy a page of each pool to the host and into another page of the device.

    The device's memory is left as it was. On the host, the first page is overwritten.

    Args:
        copies: what will move pages.
        pools: the planes of each, none of one without layers.
        chosen: the options that led to these copies, for the message.

    Raises:
        StartupError: a copy failed, or brought back other bytes.
    """
    for pool, planes in enumerate(pools):
        if not planes:
            continue
        try:
            same = _there_and_back(copies, pool, planes)
        except Exception as error:
            raise StartupError(_message(chosen, repr(error))) from error
        if not same:
            raise StartupError(_message(chosen, "a page came back with other bytes"))


def _message(chosen: str, reason: str) -> str:
    return (
        f"{chosen}: these copies between device and host do not work here: {reason}; use another "
        f"of --hicache-io-backend kernel, direct or of {COPIES} engine, kernels"
    )


def _there_and_back(copies: PageCopies, pool: int, planes: Sequence[Plane]) -> bool:
    page = planes[0].page_tokens
    # bytes of the first two device pages, [0, page) and [page, 2 * page), of every layer
    memory = [layer[: 2 * page].view(torch.uint8) for plane in planes for layer in plane.layers]
    before = [part.clone() for part in memory]
    try:
        for number, part in enumerate(memory):
            part[:page] = _pattern(number, part[:page])
        copies.prepare([Part(pool, host=_FIRST, device=_FIRST)]).backup()
        load = copies.prepare([Part(pool, host=_FIRST, device=_SECOND)])
        for layer in range(len(planes[0].layers)):
            load.load_layer(pool, layer)
        if memory[0].is_cuda:
            torch.cuda.synchronize()
        return all(
            torch.equal(part[page:], _pattern(number, part[page:]))
            for number, part in enumerate(memory)
        )
    finally:
        for part, old in zip(memory, before, strict=True):
            part.copy_(old)


def _pattern(number: int, like: Tensor) -> Tensor:
    # a period that no row has, and another beginning for every layer of K and of V
    count = torch.arange(like.numel(), device=like.device)
    return ((count + 31 * number) % 251).to(torch.uint8).view(like.shape)
