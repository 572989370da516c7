"""What a server will do with its KV memory, from its launch line and its model."""

import dataclasses

from sglang_ext.core.host.arena import ArenaShape, shape_for
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.core.table.window import checkpoint_pages, dense_pages, promised
from sglang_ext.planning.draft import DraftShape
from sglang_ext.planning.host_plan import HostPlan
from sglang_ext.planning.launch_line import HOST_OPTIONS, LaunchLine
from sglang_ext.planning.model import Shape
from sglang_ext.planning.table import Row, size

_PREFIX = 32_768
"""Tokens of the prefix whose load is given as an example."""
_MANY_BYTES = 50e9
"""Host memory of a rank that takes long to allocate with one thread."""
_GOOD_PAGE = 64
"""Tokens of a page with which the engine's copies are fast; windows are in whole pages."""


class PlanError(Exception):
    """Nothing can be planned; one line that names an option."""


@dataclasses.dataclass(frozen=True, slots=True)
class DevicePools:
    """Tokens of the device's pools, as the engine divides its KV memory."""

    full_tokens: int
    swa_tokens: int

    @classmethod
    def of_tokens(cls, tokens: int, ratio: float, page: int) -> "DevicePools":
        """With ``--max-total-tokens`` and ``--swa-full-tokens-ratio``."""
        full = tokens // page * page
        return cls(full, int(full * ratio) // page * page)

    @classmethod
    def of_bytes(
        cls, room: float, ratio: float, page: int, rank: Shape, draft: DraftShape | None
    ) -> "DevicePools":
        """In so many bytes of a device."""
        cell = rank.full_token_bytes + ratio * rank.swa_token_bytes
        if draft is not None:
            cell += draft.token_bytes
        return cls.of_tokens(int(room // cell), ratio, page)


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """A server before it starts.

    Attributes:
        name: of the model, for a reader.
        model: all of it.
        rank: what one rank has of it.
        draft: what one rank has of a draft; None where there is none that is counted.
        pools: of one device; None where the line does not say how large they are.
        host: of one rank.
        link: GB/s between device and host.
    """

    name: str
    line: LaunchLine
    model: Shape
    rank: Shape
    draft: DraftShape | None
    pools: DevicePools | None
    host: HostPlan
    link: float

    @classmethod
    def of(
        cls,
        name: str,
        model: Shape,
        line: LaunchLine,
        device_bytes: float | None = None,
        checkpoint_tokens: int | None = None,
        link: float = 50.0,
        draft: DraftShape | None = None,
    ) -> "Plan":
        """Args:
            device_bytes: KV memory of a device, where the line gives no number of tokens.
            checkpoint_tokens: ``SGLANG_EXT_CHECKPOINT_TOKENS``.
            draft: all of one whose KV counts.

        Raises:
            PlanError: the host memory cannot be told, or is too little.
        """
        draft = None if draft is None else draft.on(line.sharing)
        rank, ratio = model.on(line.sharing), line.swa_full_tokens_ratio or model.default_swa_ratio
        geometry = rank.geometry(line.page_size)
        page = geometry.device_page
        pools = None
        if line.max_total_tokens is not None:
            pools = DevicePools.of_tokens(line.max_total_tokens, ratio, page)
        elif device_bytes is not None:
            pools = DevicePools.of_bytes(device_bytes, ratio, page, rank, draft)
        arena, source = _arena(rank, draft, geometry, line, pools)
        interval = checkpoint_pages(geometry, arena.page_bytes, checkpoint_tokens)
        recompute = promised(geometry, interval, dense_pages(geometry, arena.page_bytes, interval))
        host = HostPlan.of(arena, geometry, source, recompute)
        return cls(name, line, model, rank, draft, pools, host, link)

    def rows(self) -> list[Row]:
        """For a reader."""
        rows = [("model", self._model()), ("ranks", self._ranks()), ("device", self._device())]
        rows += self.host.rows(self.line.ranks)
        rows += [("a GB of host", self._gigabyte()), *self._traffic()]
        if self.draft is not None:
            rows.append(("draft", self.draft.said()))
        elif self.line.speculative is not None:
            rows.append(("not counted", "KV of drafts (--speculative-algorithm)"))
        return [*rows, ("recommended", " ".join(self.recommended()))]

    def recommended(self) -> list[str]:
        """Variables and options for a launch line; the model's path is not among them."""
        line, found = self.line, ["SGLANG_EXT_SWA_HICACHE=1"]
        if self.host.bytes >= _MANY_BYTES:
            found.append("SGLANG_HICACHE_HOST_PARALLEL_ALLOC_THREADS=16")
        page = self.rank.geometry(line.page_size).device_page
        page = page if page > 1 else _GOOD_PAGE
        size_gb = line.hicache_size or self.host.bytes / 1e9
        found += ["--page-size", str(page), "--hicache-size", f"{size_gb:.4g}"]
        return [*found, "--hicache-write-policy", line.write_policy, "--enable-metrics"]

    def _model(self) -> str:
        model = self.model
        return (
            f"{self.name}: {model.said_of_layers()}, window of {model.window - 1:,} tokens before "
            "a position"
        )

    def _ranks(self) -> str:
        line = self.line
        said = self.rank.said_of_sharing()
        return f"{line.ranks}; {line.sharing} share the heads of a layer, {said}"

    def _device(self) -> str:
        if self.pools is None:
            return "not given (--max-total-tokens or --device-gb)"
        pools = self.pools
        taken = pools.full_tokens * self.rank.full_token_bytes
        taken += pools.swa_tokens * self.rank.swa_token_bytes
        if self.draft is not None:
            taken += pools.full_tokens * self.draft.token_bytes
        return (
            f"{pools.full_tokens:,} tokens of full attention and {pools.swa_tokens:,} of windows, "
            f"{size(taken)} a rank"
        )

    def _gigabyte(self) -> str:
        tokens, windows = 1e9 / self.host.token_bytes, 1e9 / self.host.window_bytes
        return f"{tokens:,.0f} tokens or {windows:,.1f} windows, on a rank"

    def _traffic(self) -> list[Row]:
        host = self.host
        written = 1000 * host.token_bytes
        if host.interval:
            written += 1000 * host.window_bytes // host.interval
        load = _PREFIX * host.token_bytes + host.window_bytes
        return [
            ("PCIe, writes", f"{size(written)} for 1,000 new tokens that are kept, a window more "
                             "at the end of each prompt and answer"),
            ("PCIe, loads", f"{size(load)} for a prefix of {_PREFIX:,} tokens, "
                            f"{load / self.link / 1e6:.1f} ms at {self.link:g} GB/s"),
        ]  # fmt: skip


def _arena(
    rank: Shape,
    draft: DraftShape | None,
    geometry: Geometry,
    line: LaunchLine,
    pools: DevicePools | None,
) -> tuple[ArenaShape, str]:
    """The host memory of a rank, and the option that says how large it is."""
    full, swa = rank.page_planes(geometry.page_tokens)
    if draft is not None:
        own = tuple(width * geometry.page_tokens for width in draft.widths)
        full, swa = (*full, *own), (*swa, *(0 for _ in own))
    if line.hicache_size > 0:
        budget, source = int(line.hicache_size * 1e9), f"--hicache-size {line.hicache_size:g}"
    elif pools is None:
        raise PlanError(
            "--hicache-size is not given, and --hicache-ratio is of the device's pools; add "
            "--hicache-size, --max-total-tokens or --device-gb"
        )
    else:
        pages = pools.full_tokens // geometry.page_tokens, pools.swa_tokens // geometry.page_tokens
        device = pages[0] * sum(full) + pages[1] * sum(swa)
        budget, source = int(device * line.hicache_ratio), f"--hicache-ratio {line.hicache_ratio:g}"
    try:
        shape = shape_for(budget, (full, swa), geometry.slots_per_page)
    except ValueError as error:
        raise PlanError(f"this model's KV cannot share a host memory: {error}") from None
    if shape.extents < 2:
        raise PlanError(
            f"{HOST_OPTIONS}: {size(budget)} of host memory are too little; at least "
            f"{size(2 * sum(shape.extent_bytes))} are needed for this model"
        )
    return shape, source
