"""The layer-done counter: connects a batch to the loads it must wait for.

It stands where SGLang's ``LayerDoneCounter`` stands (managers/cache_controller.py):
the worker calls ``set_consumer`` before a forward pass, every read of a KV buffer
calls ``wait_until``.
"""

from sglang_ext.transfer.job import LayerGate

_KEPT = 16
"""Gates kept behind the newest one; a batch in the scheduler's pipeline is younger."""


class LayerDoneCounter:
    """Numbers the gates of loads. Number -1 means nothing to wait for."""

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self.consumer_index = -1
        self._next = 0
        self._gates: dict[int, LayerGate] = {}

    def open_gate(self, gate: LayerGate) -> int:
        """Register the gate of a load just submitted; returns its number."""
        number = self._next
        self._next += 1
        self._gates[number] = gate
        for old in [n for n in self._gates if n <= number - _KEPT]:
            if self._gates[old].is_open():
                del self._gates[old]
        return number

    def set_consumer(self, index: int) -> None:
        """The next reads belong to the batch that waits for gate ``index``."""
        self.consumer_index = index

    def wait_until(self, layer: int) -> None:
        """Wait until ``layer`` of the current batch's loads has arrived."""
        gate = self._gates.get(self.consumer_index)
        if gate is not None:
            gate.wait(layer)

    def reset(self) -> None:
        """Forget all gates; no load may be in flight."""
        self._gates.clear()
        self.consumer_index = -1
