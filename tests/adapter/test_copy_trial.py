"""Copies that do not work here stop the server before its first request."""

from collections.abc import Callable, Sequence

import pytest
import torch

from sglang_ext.adapter.copy_trial import Bandwidth, try_copies
from sglang_ext.errors import StartupError
from sglang_ext.kernels.page_copy.plane import LAYOUTS, Plane, host_by_page, host_shape
from sglang_ext.kernels.page_copy.reference import reference_copy
from sglang_ext.transfer.job import Part

LAYERS, PAGES, PAGE, HEADS = 3, 4, 2, 2
Components = Sequence[Sequence[Plane]]


def components(layout: str = "page_first", dtype: torch.dtype = torch.float32) -> Components:
    """Full attention with K wider than V, nothing, and sliding windows; filled with bytes."""

    def plane(width: int) -> Plane:
        shape = host_shape(
            layout, layers=LAYERS, pages=PAGES, page_tokens=PAGE, heads=HEADS, width=width
        )
        layers = (torch.full((PAGES * PAGE, HEADS, width), 3).to(dtype) for _ in range(LAYERS))
        return Plane(tuple(layers), host_by_page(torch.full(shape, 5).to(dtype), layout, PAGE))

    return [[plane(8), plane(4)], [], [plane(8), plane(8)]]


class Reference:
    """Copies in PyTorch, and how they can be wrong."""

    def __init__(self, memory: Components, bug: str = "") -> None:
        self.memory, self.bug = memory, bug

    def prepare(self, parts: Sequence[Part]) -> "_Job":
        return _Job(self, parts[0])


class _Job:
    def __init__(self, copies: Reference, part: Part) -> None:
        self.copies, self.part = copies, part

    def backup(self) -> None:
        if self.copies.bug == "missing":
            raise NameError("transfer_kv")
        if self.copies.bug != "no backup":
            self._copy(range(LAYERS), to_host=True)

    def load_layer(self, component: int, layer: int) -> None:
        bug = self.copies.bug
        if bug == "no load" or (bug == "no load of windows" and component == 2):
            return
        self._copy(range(layer, layer + 1), to_host=False)
        for plane in self.copies.memory[component]:
            last = plane.layers[layer][2 * PAGE - 1]  # of the page that was loaded
            if bug == "a layer of another":
                plane.layers[layer][PAGE : 2 * PAGE] = plane.host[0, :, 0]
            elif bug == "heads in another order":
                last.copy_(last.flip(0))
            elif bug == "the last byte":
                last.view(torch.uint8)[-1, -1] += 1

    def _copy(self, layers: range, *, to_host: bool) -> None:
        host, device = torch.from_numpy(self.part.host), torch.from_numpy(self.part.device)
        for plane in self.copies.memory[self.part.pool]:
            reference_copy(plane, host, device, layers, to_host=to_host)


def device_bytes(memory: Components) -> list[torch.Tensor]:
    layers = [layer for planes in memory for plane in planes for layer in plane.layers]
    return [layer.view(torch.uint8).clone() for layer in layers]


def unchanged(memory: Components, run: Callable[[], None]) -> bool:
    before = device_bytes(memory)
    run()
    return all(map(torch.equal, device_bytes(memory), before))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_copies_that_work_pass_and_leave_the_device_as_it_was(
    layout: str, dtype: torch.dtype
) -> None:
    memory = components(layout, dtype)
    assert unchanged(memory, lambda: try_copies(Reference(memory), memory, "options"))


@pytest.mark.parametrize(
    ("bug", "reason"),
    [
        ("missing", r"NameError\('transfer_kv'\)"),
        ("no backup", "other bytes"),
        ("no load", "other bytes"),
        ("no load of windows", "other bytes"),
        ("a layer of another", "other bytes"),
        ("heads in another order", "other bytes"),
        ("the last byte", "other bytes"),
    ],
)
def test_copies_that_do_not_work_are_refused_by_name(bug: str, reason: str) -> None:
    memory = components()

    def run() -> None:
        with pytest.raises(StartupError, match=rf"--hicache-io-backend direct: .*{reason}; use"):
            try_copies(Reference(memory, bug), memory, "--hicache-io-backend direct")

    assert unchanged(memory, run)


def test_it_says_how_fast_they_are() -> None:
    """Both directions, whatever a layer is wide: the component without layers is not tried."""
    memory = [[], *components()[2:]]
    found = try_copies(Reference(memory), memory, "options")
    assert found.to_host > 0
    assert found.to_device > 0
    assert str(Bandwidth(25e9, 24.06e9)) == "25.0 GB/s to the host, 24.1 GB/s back"
