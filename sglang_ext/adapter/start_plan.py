"""What a server is going to do with its memory, as a table in its log."""

import dataclasses

from sglang_ext.planning.host_plan import HostPlan
from sglang_ext.planning.table import Row, lines


@dataclasses.dataclass(frozen=True, slots=True)
class StartPlan:
    """All that was decided at start.

    Attributes:
        host: None for a cache on the device alone.
        ranks: of the server, each with host memory of its own.
        policies: of writing and of retention, by the engine's names.
        copies: who copies between device and host, and how fast that was.
        storage: the backend, where it keeps pages, whose they are; None without one.
    """

    host: HostPlan | None
    ranks: int
    policies: tuple[str, str]
    copies: str
    storage: str | None

    def table(self) -> str:
        """For the log."""
        return "\n".join(["the cache of this server", *lines(self._rows())])

    def _rows(self) -> list[Row]:
        write, eviction = self.policies
        if self.host is None:
            return [
                ("host memory", "none; --enable-hierarchical-cache adds it"),
                ("retention", eviction),
            ]
        return [
            *self.host.rows(self.ranks),
            ("write policy", write),
            ("retention", eviction),
            ("copies", self.copies),
            ("storage", self.storage or "none"),
        ]
