"""Servers that the kits run against: page size, tiers and write policy."""

import dataclasses
import json
from pathlib import Path

from launch.server import OURS

PAGES = (1, 16, 64)
TIERS = ("device", "host", "storage")
POLICIES = ("write_through", "write_through_selective", "write_back")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One kind of server. A device alone has no write policy."""

    page: int
    tier: str
    policy: str = "write_through"

    @property
    def name(self) -> str:
        """Short and unique."""
        return f"{self.page}-{self.tier}" + ("" if self.tier == "device" else f"-{self.policy}")

    def options(self, directory: Path) -> list[str]:
        """Options of the server.

        Args:
            directory: of the storage tier.
        """
        options = [*OURS, "--page-size", str(self.page), "--max-total-tokens", "12000"]
        if self.tier == "device":
            return options
        options += ["--enable-hierarchical-cache", "--hicache-ratio", "3"]
        options += ["--hicache-write-policy", self.policy]
        if self.tier == "host":
            return options
        extra = {"file_storage_path": str(directory), "prefetch_threshold": 16}
        return [
            *options,
            *("--hicache-storage-backend", "file"),
            *("--hicache-storage-prefetch-policy", "wait_complete"),
            *("--hicache-storage-backend-extra-config", json.dumps(extra)),
        ]


ALL = tuple(
    Cell(page, tier, policy)
    for page in PAGES
    for tier in TIERS
    for policy in (POLICIES[:1] if tier == "device" else POLICIES)
)
