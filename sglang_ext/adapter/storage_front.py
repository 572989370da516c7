"""The storage tier, as the engine sees it through the tree cache."""

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

from sglang_ext.adapter.storage_tier import POLICIES, StorageTier
from sglang_ext.config import BACKEND
from sglang_ext.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from sglang_ext.adapter.controller import HostTierController
    from sglang_ext.adapter.metrics import IndexMetrics
    from sglang_ext.adapter.served_weights import Source
    from sglang_ext.adapter.storage_setup import StorageSetup
    from sglang_ext.core.cache import PrefixCache
    from sglang_ext.core.table.digest import Pages

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class _Opened:
    """How the storage was opened, and whose pages it has.

    Attributes:
        remove: removes them, if nobody else can ever look for them.
    """

    name: str
    settings: str | None
    model_name: str | None
    identity: bytes
    remove: "Callable[[], None] | None"


class StorageFront:
    """What the engine calls of a tree cache with a storage tier: it is attached, detached, and
    follows the weights.

    Attributes:
        tier: None while no storage is attached.
        setup: None without a host tier.

    Args:
        holds_nothing: whether no page is in any tier but storage, and nothing is in flight.
    """

    def __init__(self, index: "PrefixCache", holds_nothing: "Callable[[], bool]") -> None:
        self.tier: StorageTier | None = None
        self.setup: StorageSetup | None = None
        self._index = index
        self._holds_nothing = holds_nothing
        self._controller: HostTierController | None = None
        self._metrics: IndexMetrics | None = None
        self._opened: _Opened | None = None
        self._weights_change = self._is_stale = False

    def use(self, controller: "HostTierController", setup: "StorageSetup") -> None:
        """There is a host tier; at start."""
        self._controller = controller
        self.setup = setup

    # ---- requests ------------------------------------------------------------

    def prefetch(self, handle: "Hashable", pages: "Pages", namespace: "Hashable") -> None:
        """A request waits: look for its prompt in storage, and read what is there."""
        if self.tier is not None:
            self.tier.prefetch(handle, pages, namespace)

    def is_ready(self, handle: "Hashable") -> bool:
        """Whether a request may be scheduled."""
        return self.tier is None or self.tier.is_ready(handle)

    def pop_loaded(self, handle: "Hashable") -> tuple[int, int | None]:
        """(tokens that storage made usable, where they begin) of a request; once."""
        return (0, None) if self.tier is None else self.tier.pop_loaded(handle)

    def forget(self, handle: "Hashable") -> None:
        """A request has gone."""
        if self.tier is not None:
            self.tier.forget(handle)

    @property
    def reading(self) -> dict[int, Any]:
        """Lookups and reads in flight."""
        return {**self._index.prefetches.lookups, **self._index.prefetches.reading}

    @property
    def writing(self) -> "Sequence[int]":
        """Writes in flight, and those that are promised."""
        writing = self.tier is not None and self.tier.is_writing
        return list(self._index.persists.writing) or ([-1] if writing else [])

    # ---- life cycle ----------------------------------------------------------

    def attach(
        self,
        name: str,
        settings: str | None,
        model_name: str | None,
        policy: str,
        write_policy: str | None = None,
    ) -> tuple[bool, str]:
        """Attach a storage backend while the server runs; (done, message).

        Args:
            name, settings: see ``StorageSetup.open``.
            policy: how long requests wait, see Patience.
            write_policy: of the host; None for that of the start.
        """
        if policy not in POLICIES:
            return False, f"prefetch policy {policy!r} is not allowed; use {', '.join(POLICIES)}"
        if self.setup is None or self._controller is None:
            return False, "there is no host tier; start with --enable-hierarchical-cache"
        if write_policy not in (None, self._index.policy.write.value):
            return False, (
                f"--radix-cache-backend {BACKEND} does not change --hicache-write-policy "
                f"({self._index.policy.write.value}) while it runs; leave hicache_write_policy out"
            )
        attached = self._controller.storage_backend_type
        if self.tier is not None and attached != name:
            return False, f"storage {attached} is attached; detach it first"
        if self.tier is None:
            problem = None
            try:
                self.open(name, settings, policy, model_name)
            except StartupError as error:
                problem = str(error)
            # whatever it is, the other ranks wait in the collective below
            except (Exception, SystemExit) as error:
                logger.exception("sglang-ext: storage %s did not start", name)
                problem = f"storage {name} did not start: {error!r}"
            # a rank alone would wait for the others' reports for ever
            if not self._controller.all_ranks(problem is None):
                self._close()
                return False, problem or "it did not start on another rank"
        assert self.tier is not None
        patience = self.tier.patience
        self.tier.patience = type(patience)(policy, patience.base_ms, patience.per_1024_tokens_ms)
        return True, f"storage {name} is attached"

    def open(self, name: str, settings: str | None, policy: str, model_name: str | None) -> None:
        """Attach a storage backend.

        Raises:
            StartupError: it did not start.
        """
        assert self.setup is not None
        assert self._controller is not None
        own = self.setup.identity()
        self.tier, backend = self.setup.open(name, settings, policy, own)
        self._controller.attach_storage(self.tier, name, backend)
        nobodys = self.setup.weights.is_nobodys
        remove = getattr(backend, "remove", None) if nobodys and name == "file" else None
        self._opened = _Opened(name, settings, model_name, own, remove)
        if self._weights_change or self._is_stale:
            self.tier.suspend()
        self._export()

    def export_to(self, metrics: "IndexMetrics") -> None:
        """Export what happens in storage: in the engine's metrics, and to files, if storage is a
        directory of them."""
        self._metrics = metrics
        self._export()

    def _export(self) -> None:
        controller, metrics = self._controller, self._metrics
        if metrics is None:
            return
        metrics.files = getattr(controller and controller.storage_backend, "events", None) or dict
        metrics.take_waits = tuple if self.tier is None else self.tier.take_waits
        if metrics.storage is None:
            return
        if self.tier is None:
            metrics.storage.detach()
        else:
            assert self.setup is not None
            metrics.take_batches = self.setup.take_batches
            metrics.storage.attach(self.setup.labels, self.setup.take_stats)

    # ---- weights -------------------------------------------------------------

    def weights_change(self) -> None:
        """The weights are about to change: from now on nothing is stored and nothing is looked
        for, until ``weights_have_changed``. On every rank in the same step."""
        self._weights_change = True
        if self.tier is not None:
            self.tier.suspend()

    def weights_have_changed(self, source: "Source | None") -> None:
        """The weights are others now. Pages of the old ones may be left, if the engine was not
        asked to flush or could not: they never get into storage. On every rank in the same step.

        Args:
            source: see ``ServedWeights.changed``.
        """
        assert self.setup is not None
        self.setup.weights.changed(source)
        self._is_stale = True
        self.weights_are_as_they_were()

    def weights_are_as_they_were(self) -> None:
        """What was about to change them did not."""
        self._weights_change = False
        self.follow_weights()

    def follow_weights(self) -> None:
        """Storage goes on, under the name of the weights that there are now, as soon as
        nothing is left of others. On every rank in the same step."""
        if self._holds_nothing():
            self._is_stale = False
        if self._weights_change or self._is_stale:
            return
        if self.tier is None or not self.tier.is_suspended:
            return
        assert self.setup is not None
        assert self._opened is not None
        if self.setup.identity() == self._opened.identity:
            self.tier.resume()
            return
        opened, policy = self._opened, self.tier.patience.policy
        done, problem = self.detach()
        if not done:
            logger.warning("sglang-ext: storage stays with the old weights, unused: %s", problem)
            return
        _remove_nobodys(opened)
        done, problem = self.attach(opened.name, opened.settings, opened.model_name, policy)
        if not done:
            logger.warning("sglang-ext: no storage for the new weights: %s", problem)

    @property
    def is_nobodys(self) -> bool:
        """Whether nobody can ever look for what is stored."""
        return self._opened is not None and self._opened.remove is not None

    def remove_nobodys(self) -> None:
        """Weights that come from a trainer change a thousand times: pages that nobody can find
        any more must not pile up."""
        _remove_nobodys(self._opened)

    def detach(self) -> tuple[bool, str]:
        """Detach the storage backend; nothing is in flight. (done, message)"""
        if self.tier is None or self._controller is None:
            return True, "no storage is attached"
        if not self._controller.all_ranks(self.tier.drain()):
            return False, "storage still reads or writes; it stays attached"
        self._close()
        return True, "storage is detached"

    def _close(self) -> None:
        """Leave this rank without storage, also if it was opened in part."""
        assert self._controller is not None
        if self.tier is not None:
            self.tier.reset()
            self.tier.close()
        self._index.detach_storage()
        self._controller.detach_storage()
        self.tier = None
        self._export()

    def clear(self) -> bool:
        """Forget everything that is stored; whether all of it has gone, on every rank."""
        if self.tier is None or self._controller is None:
            return True
        done = self._controller.all_ranks(self.tier.clear())
        if not done:
            logger.warning("sglang-ext: the storage was not cleared, or not all of it")
        return done


def _remove_nobodys(opened: "_Opened | None") -> None:
    if opened is not None and opened.remove is not None:
        opened.remove()
