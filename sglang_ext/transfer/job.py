"""What a transfer engine is asked to copy, and how it reports."""

import dataclasses
from typing import Protocol

import torch


class ComponentCopies(Protocol):
    """The copies of one component (full attention, or sliding window).

    Indices are int64 CPU tensors that count tokens of the component's pools.
    """

    def backup(self, host: torch.Tensor, device: torch.Tensor) -> None:
        """Copy device to host, all layers."""
        ...

    def load_layer(self, layer: int, host: torch.Tensor, device: torch.Tensor) -> None:
        """Copy host to device, one layer of this component."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """Tokens of one component to copy."""

    component: int
    host: torch.Tensor
    device: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """One submission: consecutive operations that end, or fail, together."""

    ops: range
    parts: tuple[Part, ...]


class LayerGate(Protocol):
    """Per-layer completion of one load. Readers of a layer wait at its gate."""

    def wait(self, layer: int) -> None:
        """Order the caller's reads of ``layer`` (global number) behind its load."""
        ...

    def is_open(self) -> bool:
        """Whether every layer has been loaded."""
        ...


class TransferEngine(Protocol):
    """Two lanes, device to host and host to device. Each is first in, first out.

    Called from one thread. Submission never waits for a copy.
    """

    def submit_backup(self, job: Job, fence: object | None) -> None:
        """Copy device to host, after the work that ``fence`` (a stream) holds now."""
        ...

    def submit_load(self, job: Job, fence: object | None) -> LayerGate:
        """Copy host to device layer by layer, after the work that ``fence`` holds now."""
        ...

    def backed_up(self) -> tuple[int, range]:
        """(last op that ended, in order; those of them that failed).

        Failed ones are reported once.
        """
        ...

    def loaded(self) -> int:
        """Last load op that ended, in order.

        Raises:
            RuntimeError: a load failed. Its reader has failed too: the request was
                already running on it.
        """
        ...

    def drain(self) -> None:
        """Wait until everything submitted has ended."""
        ...

    def close(self) -> None:
        """Drain and release threads or streams."""
        ...
