"""Quotas: how much of the host a namespace may have."""

from collections.abc import Hashable


class Quotas:
    """Bounds that an operator has set. They outlive a flush.

    Bytes are those of full-attention pages and windows together, for one rank.

    Args:
        page_bytes: of a page of full attention, and of one of the windows, on the host.
    """

    def __init__(self, page_bytes: tuple[int, int]) -> None:
        self.page_bytes = page_bytes
        self.bounds: dict[Hashable, int] = {}

    def set(self, namespace: Hashable, bound: int) -> None:
        """A namespace may have so many bytes of the host from now on."""
        assert bound >= 0, f"a namespace cannot have {bound} bytes"
        self.bounds[namespace] = bound

    def clear(self, namespace: Hashable) -> bool:
        """A namespace has no quota any more; whether it had one."""
        return self.bounds.pop(namespace, None) is not None

    def bytes_of(self, pages: int, windows: int) -> int:
        """What pages of both components take."""
        return pages * self.page_bytes[0] + windows * self.page_bytes[1]
