"""The core's device pool over SGLang's hybrid sliding-window allocator."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from sglang_ext.core.compiled.scans import clear_rows, slots_with_peers
from sglang_ext.core.inserts import Own
from sglang_ext.core.table.columns import ABSENT, Slots
from sglang_ext.core.table.geometry import Geometry

if TYPE_CHECKING:
    from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator

    from sglang_ext.adapter.drafts import DraftLayers


class SlotIndices:
    """Translates between slots of the table and token indices of the engine.

    A slot is one device page; the token indices of slot s are
    ``[s * device_page, (s + 1) * device_page)``.
    """

    def __init__(self, geometry: Geometry) -> None:
        self._page = geometry.device_page
        self._slots_per_page = geometry.slots_per_page
        self._offsets = np.arange(self._page, dtype=np.int64)

    def tokens(self, slots: Slots | NDArray[np.int64]) -> torch.Tensor:
        """All token indices, int64 on the CPU, in page order."""
        first = slots.reshape(-1, 1).astype(np.int64) * self._page
        return torch.from_numpy((first + self._offsets).reshape(-1))

    def first_tokens(self, slots: Slots) -> torch.Tensor:
        """The first token index of each slot, int64 on the CPU."""
        return torch.from_numpy(slots.reshape(-1).astype(np.int64) * self._page)

    def page_ids(self, slots: Slots) -> torch.Tensor:
        """The engine's number of each slot, int64 on the CPU."""
        return torch.from_numpy(slots.reshape(-1).astype(np.int64))

    def slots(self, tokens: torch.Tensor) -> Slots:
        """Slots (pages, slots_per_page) of whole pages of token indices."""
        return self.slots_of(tokens[:: self._page].reshape(1, -1).cpu().numpy())[0]

    def in_pages(self, slots: Slots) -> Slots:
        """Slots (n,) as those of table pages, (pages, slots_per_page)."""
        return slots.reshape(-1, self._slots_per_page)

    def slots_of(self, first_tokens: NDArray[np.int64]) -> Slots:
        """The same of the first token index of each device page, (n, device pages): as many
        arrays of slots."""
        first = first_tokens.astype(np.int32)
        if self._page > 1:
            first //= self._page
        return first.reshape(len(first), -1, self._slots_per_page)


def tokens_of(allocator: Any) -> tuple[int, int]:
    """Tokens of each component that an allocator of the engine has; as many of windows as of the
    rest where it knows none."""
    if hasattr(allocator, "size_swa"):
        return int(allocator.size_full), int(allocator.size_swa)
    return int(allocator.size), int(allocator.size)


class ForwardOrder:
    """Work on the device in the order of forward passes: behind the one that runs while the
    scheduler goes on, and before the next one.

    Args:
        stream: of the forward passes; on a CPU everything is in order.
    """

    def __init__(self, stream: Any = None) -> None:
        self._stream = stream if isinstance(stream, torch.cuda.Stream) else None

    @contextmanager
    def after(self, *tensors: torch.Tensor) -> Iterator[None]:
        """What is submitted in this block, which uses ``tensors``."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        for tensor in tensors:
            tensor.record_stream(self._stream)

    def wait(self) -> None:
        """What the scheduler submits next finds it done."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)


class EngineDevicePool:
    """DevicePool (see ``core.ports``) over ``SWATokenToKVPoolAllocator``.

    Attributes:
        rows_name_full: the row of a request names the full-attention slots of its pages.
        forward: the order of what is copied on the device.

    Args:
        drafts: layers with the same slots.
    """

    rows_name_full = True

    def __init__(
        self,
        allocator: "SWATokenToKVPoolAllocator",
        geometry: Geometry,
        forward: ForwardOrder | None = None,
        drafts: Sequence["DraftLayers"] = (),
    ) -> None:
        self._drafts = drafts
        self.forward = forward or ForwardOrder()
        self._allocator = allocator
        self._device = allocator.device
        self._device_page = geometry.device_page
        self._page_tokens = geometry.page_tokens
        self._indices = SlotIndices(geometry)
        self._on_cpu = torch.device(self._device).type == "cpu"
        self._peers: tuple[torch.Tensor, NDArray[np.int64]] | None = None

    def free_pages(self) -> int:
        """See DevicePool."""
        return int(self._allocator.full_available_size()) // self._page_tokens

    def free_window_pages(self) -> int:
        """See DevicePool."""
        return int(self._allocator.swa_available_size()) // self._page_tokens

    def allocate(self, pages: int) -> Slots | None:
        """See DevicePool."""
        tokens = self._allocator.full_attn_allocator.alloc(pages * self._page_tokens)
        return None if tokens is None else self._indices.slots(tokens)

    def allocate_window(self, pages: int) -> Slots | None:
        """See DevicePool."""
        tokens = self._allocator.swa_attn_allocator.alloc(pages * self._page_tokens)
        return None if tokens is None else self._indices.slots(tokens)

    def allocate_bound(self, slots: int) -> tuple[Slots, Slots] | None:
        """See DevicePool."""
        tokens = slots * self._device_page
        full = self._allocator.full_attn_allocator.alloc(tokens)
        if full is None:
            return None
        swa = self._allocator.swa_attn_allocator.alloc(tokens)
        if swa is None:
            self._allocator.full_attn_allocator.free(full)
            return None
        self._allocator.set_full_to_swa_mapping(full, swa)
        return self._single_slots(full), self._single_slots(swa)

    def _single_slots(self, tokens: torch.Tensor) -> Slots:
        first: NDArray[np.int64] = tokens[:: self._device_page].cpu().numpy()
        return (first // self._device_page).astype(np.int32)

    def copy(self, full: Slots, swa: Slots, new_full: Slots, new_swa: Slots) -> None:
        """See DevicePool."""
        cache = self._allocator.get_kvcache()
        components = ((cache.full_kv_pool, full, new_full), (cache.swa_kv_pool, swa, new_swa))
        for component, (own, old, new) in enumerate(components):
            source, target = self._tokens(old), self._tokens(new)
            drafts = [draft.pool for draft in self._drafts if draft.component == component]
            with self.forward.after(source, target):
                for pool in (own, *drafts):
                    # the engine's other way is set up for trees of drafts only
                    native, pool.use_native_move_kv_cache = pool.use_native_move_kv_cache, True
                    pool.move_kv_cache(target, source)
                    pool.use_native_move_kv_cache = native

    def bind_window(self, full: Slots, swa: Slots) -> None:
        """See DevicePool."""
        self._allocator.set_full_to_swa_mapping(self._tokens(full), self._tokens(swa))

    def move_window(self, source: Slots, target: Slots, swa: Slots) -> None:
        """See DevicePool."""
        self._allocator.clear_full_to_swa_mapping(self._tokens(source))
        self.bind_window(target, swa)

    def release(self, full: Slots) -> None:
        """See DevicePool. By page, once each: what takes sets of tokens sorts them first."""
        self._allocator.full_attn_allocator.free_page_ids(self._page_ids(full))

    def release_window(self, full: Slots, swa: Slots) -> None:
        """See DevicePool."""
        if self._on_cpu:
            clear_rows(self._peers_by_page(), full.reshape(-1))
        else:
            mapping = self._allocator.full_to_swa_index_mapping
            pages = len(mapping) // self._device_page
            by_page = mapping[: pages * self._device_page].view(pages, self._device_page)
            by_page[self._page_ids(full)] = 0
        self._allocator.swa_attn_allocator.free_page_ids(self._page_ids(swa))

    def tail_slots(self, tokens: torch.Tensor) -> tuple[Slots, Slots]:
        """Slots (n,) of device pages of a request, and their peers; 0 where one has none."""
        first = self._with_peers(tokens[:: self._device_page]) // self._device_page
        full, swa = first.astype(np.int32)
        return full, swa

    def owned_slots(
        self,
        tokens: torch.Tensor,
        given_back: int,
        own: Own | None = None,
    ) -> tuple[Slots, Slots]:
        """Slots of whole pages that a request owns, and their peers.

        A page whose window has moved on in part gives back the rest of its peers:
        half of a page's window is of no use.

        Args:
            tokens: token indices of whole pages, on the device.
            given_back: so many of the first ones have lost their peers to the window; the
                engine's map says so too.
            own: what the request has of the first page since just now: ``tokens`` may not
                know it yet.

        Returns:
            (full, swa), each (pages, slots_per_page); swa is ABSENT where a page has
            no peer.
        """
        # slot 0 is the engine's padding: a peer of 0 means none
        if self._on_cpu:
            pages = len(tokens) // self._device_page
            full, swa = np.empty((2, pages), dtype=np.int32)
            mapping = self._allocator.full_to_swa_index_mapping.numpy()
            row = np.ascontiguousarray(tokens.numpy(), dtype=np.int32)
            all_have = slots_with_peers(row, mapping, self._device_page, full, swa)
            full, swa = self._indices.in_pages(full), self._indices.in_pages(swa)
        else:
            full, swa = self._indices.slots_of(self._with_peers(tokens[:: self._device_page]))
            all_have = bool(swa.all())
        if own is not None and len(full):
            full[0, : len(own.full)], swa[0, : len(own.swa)] = own.full, own.swa
            all_have = bool(swa.all())
        if all_have:
            return full, swa
        lost = (swa == 0).any(axis=1)
        partial = lost & (swa != 0).any(axis=1)
        if partial.any():
            self._free_peers(full[partial], swa[partial])
        swa[lost] = ABSENT
        return full, swa

    def _with_peers(self, first: torch.Tensor) -> NDArray[np.int64]:
        """(2, n): token indices and their peers."""
        mapping = self._allocator.full_to_swa_index_mapping
        if self._on_cpu:
            indices = first.numpy()
            pairs = np.empty((2, len(indices)), dtype=np.int64)
            pairs[0] = indices
            pairs[1] = mapping.numpy()[indices]
            return pairs
        tokens = first.to(torch.int64)
        peers = mapping.index_select(0, tokens)
        # in one copy: it waits for what runs on the device
        both: NDArray[np.int64] = torch.stack((tokens, peers)).cpu().numpy()
        return both

    def _peers_by_page(self) -> NDArray[np.int64]:
        """(device pages, tokens of one): the engine's map on a CPU. Through NumPy, which takes a
        third of PyTorch's time for so little."""
        mapping = self._allocator.full_to_swa_index_mapping
        if self._peers is None or self._peers[0] is not mapping:
            whole = len(mapping) // self._device_page * self._device_page
            by_page = mapping.numpy()[:whole].reshape(-1, self._device_page)
            self._peers = mapping, by_page
        return self._peers[1]

    def _free_peers(self, full: Slots, swa: Slots) -> None:
        live = swa.reshape(-1) != 0
        self.release_window(full.reshape(-1)[live], swa.reshape(-1)[live])

    def takes(self, pages: int) -> int:
        """How many of so many pages of a request the table can take now: it has their slots."""
        return pages

    def stays_with_request(self, full: Slots) -> None:
        """The table has not taken these pages, which ``owned_slots`` named."""

    def row_tokens(self, full: Slots, swa: Slots) -> torch.Tensor:
        """What the row of a request says of its pages: token indices, int64 on the device."""
        return self._tokens(full)

    def reset(self) -> None:
        """All slots are free, of the engine's allocator too."""

    def _tokens(self, slots: Slots) -> torch.Tensor:
        return self._indices.tokens(slots).to(self._device)

    def _page_ids(self, slots: Slots) -> torch.Tensor:
        ids = self._indices.page_ids(slots)
        return ids if self._on_cpu else ids.to(self._device)
