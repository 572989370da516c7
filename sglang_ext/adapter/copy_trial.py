"""One page there and back at start: copies that are missing on this machine, or wrong, would
otherwise end the server at its first backup, or corrupt answers. Then as many pages as tell how
fast they are."""

import dataclasses
import itertools
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sglang_ext.config import COPIES
from sglang_ext.errors import StartupError
from sglang_ext.kernels.page_copy.plane import Plane
from sglang_ext.transfer.job import PageCopies, Part

_FIRST, _SECOND = np.array([0], dtype=np.int64), np.array([1], dtype=np.int64)
_TRIAL_BYTES = 32 * 1024**2
"""Enough for a bandwidth, and milliseconds of a start."""


@dataclasses.dataclass(frozen=True, slots=True)
class Bandwidth:
    """Of copies that nothing else disturbs, in bytes a second."""

    to_host: float
    to_device: float

    def __str__(self) -> str:
        return f"{self.to_host / 1e9:.1f} GB/s to the host, {self.to_device / 1e9:.1f} GB/s back"


def try_copies(copies: PageCopies, pools: Sequence[Sequence[Plane]], chosen: str) -> Bandwidth:
    """Copy a page of each pool to the host and into another page of the device, then the first
    pages of one pool there and back.

    The device's memory is left as it was. On the host, the first pages are overwritten.

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
    # one pool alone: on the host they have their pages in the same memory
    pool = next(number for number, planes in enumerate(pools) if planes)
    return _speed(copies, pool, pools[pool])


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
        _wait_for(memory[0])
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


def _speed(copies: PageCopies, pool: int, planes: Sequence[Plane]) -> Bandwidth:
    first, tokens = planes[0], planes[0].page_tokens
    layers = [layer for plane in planes for layer in plane.layers]
    page_bytes = sum(layer[:tokens].nbytes for layer in layers)
    room = min(first.host.shape[0], len(first.layers[0]) // tokens)
    count = max(1, min(room, _TRIAL_BYTES // page_bytes))
    pages = np.arange(count, dtype=np.int64)
    job = copies.prepare([Part(pool, host=pages, device=pages)])
    _wait_for(layers[0])
    times = [time.perf_counter()]
    job.backup()
    _wait_for(layers[0])
    times.append(time.perf_counter())
    for layer in range(len(first.layers)):
        job.load_layer(pool, layer)
    _wait_for(layers[0])
    times.append(time.perf_counter())
    to_host, to_device = (max(end - start, 1e-9) for start, end in itertools.pairwise(times))
    return Bandwidth(count * page_bytes / to_host, count * page_bytes / to_device)


def _wait_for(memory: Tensor) -> None:
    if memory.is_cuda:
        torch.cuda.synchronize()
