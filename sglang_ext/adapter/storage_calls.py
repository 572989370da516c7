"""What the engine calls of a tree cache with a storage tier."""

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from sglang_ext.adapter.storage_tier import POLICIES, StorageTier
from sglang_ext.config import BACKEND
from sglang_ext.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from sglang_ext.adapter.controller import HostTierController
    from sglang_ext.adapter.metrics import IndexMetrics
    from sglang_ext.adapter.served_weights import Source
    from sglang_ext.adapter.storage_setup import StorageSetup
    from sglang_ext.core.cache import CacheIndex
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


class StorageCalls:
    """The storage part of ``SwaHiCache``.

    Attributes that the engine reads:
        enable_storage: whether a storage backend is attached.
        hicache_storage_pass_prefix_keys: False; backends get no keys of what is in front.
        ongoing_prefetch, ongoing_backup: lookups and reads, writes in flight: while there are
            any, it does not flush and does not detach.
    """

    enable_storage = False
    hicache_storage_pass_prefix_keys = False
    index: "CacheIndex"
    cache_controller: "HostTierController | None"
    storage: StorageTier | None = None
    storage_setup: "StorageSetup | None" = None
    _opened: "_Opened | None" = None
    _weights_change = _is_stale = False
    metrics: "IndexMetrics | None"

    if TYPE_CHECKING:

        @property
        def holds_nothing(self) -> bool: ...

        def _pages(self, token_ids: Any, length: int) -> "Pages": ...

    # ---- requests ------------------------------------------------------------

    def prefetch_from_storage(
        self,
        handle: "Hashable",
        last_host_node: Any,
        new_input_tokens: "Sequence[int]",
        last_hash: Any = None,
        prefix_keys: Any = None,
        **rest: Any,
    ) -> None:
        """A request waits: look for its prompt in storage, and read what is there.

        Args:
            rest: ``matched_prefix_tokens``, those before ``new_input_tokens``; ``extra_key``
                and ``cache_salt`` of the request; more that only stock's cache needs.
        """
        if self.storage is not None:
            parts = (rest["matched_prefix_tokens"], new_input_tokens)
            tokens = np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])
            namespace = (rest["extra_key"], rest["cache_salt"])
            self.storage.prefetch(handle, self._pages(tokens, len(tokens)), namespace)

    def check_prefetch_progress(self, handle: "Hashable") -> bool:
        """Whether a request may be scheduled."""
        return self.storage is None or self.storage.is_ready(handle)

    def pop_prefetch_loaded_span(self, handle: "Hashable") -> tuple[int, int | None]:
        """(tokens that storage made usable, where they begin) of a request; once."""
        return (0, None) if self.storage is None else self.storage.pop_loaded(handle)

    def release_aborted_request(self, handle: "Hashable") -> None:
        """A request has gone."""
        if self.storage is not None:
            self.storage.forget(handle)

    def is_backuped(self, node: Any) -> bool:
        """Storage is asked whatever a prefix ends with."""
        return True

    def is_root(self, node: Any) -> bool:
        """Whether a prefix is empty."""
        return len(node.rows) == 0

    def get_last_hash_value(self, node: Any) -> None:
        """Keys are the index's matter."""

    def get_prefix_hash_values(self, node: Any) -> None:
        """Keys are the index's matter."""

    @property
    def ongoing_prefetch(self) -> dict[int, Any]:
        """Lookups and reads in flight."""
        return {**self.index.prefetches.lookups, **self.index.prefetches.reading}

    @property
    def ongoing_backup(self) -> "Sequence[int]":
        """Writes in flight, and those that are promised."""
        writing = self.storage is not None and self.storage.is_writing
        return list(self.index.persists.writing) or ([-1] if writing else [])

    # ---- life cycle ----------------------------------------------------------

    def attach_storage_backend(
        self,
        storage_backend: str,
        storage_backend_extra_config_json: str | None = None,
        served_model_name: str | None = None,
        hicache_storage_prefetch_policy: str | None = None,
        hicache_write_policy: str | None = None,
    ) -> tuple[bool, str]:
        """Attach a storage backend while the server runs; (done, message)."""
        from sglang.srt.runtime_context import get_memory

        policy = hicache_storage_prefetch_policy or get_memory().hicache_storage_prefetch_policy
        if policy not in POLICIES:
            return False, f"prefetch policy {policy!r} is not allowed; use {', '.join(POLICIES)}"
        if self.storage_setup is None or self.cache_controller is None:
            return False, "there is no host tier; start with --enable-hierarchical-cache"
        if hicache_write_policy not in (None, self.index.policy.write.value):
            return False, (
                f"--radix-cache-backend {BACKEND} does not change --hicache-write-policy "
                f"({self.index.policy.write.value}) while it runs"
            )
        attached = self.cache_controller.storage_backend_type
        if self.storage is not None and attached != storage_backend:
            return False, f"storage {attached} is attached; detach it first"
        if self.storage is None:
            problem = None
            try:
                self.open_storage(
                    storage_backend, storage_backend_extra_config_json, policy, served_model_name
                )
            except StartupError as error:
                problem = str(error)
            # whatever it is, the other ranks wait in the collective below
            except (Exception, SystemExit) as error:
                logger.exception("sglang-ext: storage %s did not start", storage_backend)
                problem = f"storage {storage_backend} did not start: {error!r}"
            # a rank alone would wait for the others' reports for ever
            if not self.cache_controller.all_ranks(problem is None):
                self._close_storage()
                return False, problem or "it did not start on another rank"
        assert self.storage is not None
        patience = self.storage.patience
        self.storage.patience = type(patience)(
            policy, patience.base_ms, patience.per_1024_tokens_ms
        )
        return True, f"storage {storage_backend} is attached"

    def open_storage(
        self, name: str, settings: str | None, policy: str, model_name: str | None
    ) -> None:
        """Attach a storage backend.

        Raises:
            StartupError: it did not start.
        """
        assert self.storage_setup is not None
        assert self.cache_controller is not None
        own = self.storage_setup.identity()
        self.storage, backend = self.storage_setup.open(name, settings, policy, own)
        self.cache_controller.attach_storage(self.storage, name, backend)
        nobodys = self.storage_setup.weights.is_nobodys
        remove = getattr(backend, "remove", None) if nobodys and name == "file" else None
        self._opened = _Opened(name, settings, model_name, own, remove)
        if self._weights_change or self._is_stale:
            self.storage.suspend()
        self.enable_storage = True
        self.export_storage()

    def export_storage(self) -> None:
        """Export what happens in storage: in the engine's metrics, and to files, if storage is a
        directory of them."""
        controller, metrics = self.cache_controller, self.metrics
        if metrics is None:
            return
        metrics.files = getattr(controller and controller.storage_backend, "events", None) or dict
        if metrics.storage is None:
            return
        if self.storage is None:
            metrics.storage.detach()
        else:
            assert self.storage_setup is not None
            metrics.storage.attach(self.storage_setup.labels, self.storage_setup.take_stats)

    # ---- weights -------------------------------------------------------------

    def weights_change(self) -> None:
        """The weights are about to change: from now on nothing is stored and nothing is looked
        for, until ``weights_have_changed``. On every rank in the same step."""
        self._weights_change = True
        if self.storage is not None:
            self.storage.suspend()

    def weights_have_changed(self, source: "Source | None") -> None:
        """The weights are others now. Pages of the old ones may be left, if the engine was not
        asked to flush or could not: they never get into storage. On every rank in the same step.

        Args:
            source: see ``ServedWeights.changed``.
        """
        assert self.storage_setup is not None
        self.storage_setup.weights.changed(source)
        self._is_stale = True
        self.weights_are_as_they_were()

    def weights_are_as_they_were(self) -> None:
        """What was about to change them did not."""
        self._weights_change = False
        self.follow_weights()

    def follow_weights(self) -> None:
        """Storage goes on, under the name of the weights that there are now, as soon as
        nothing is left of others. On every rank in the same step."""
        if self.holds_nothing:
            self._is_stale = False
        if self._weights_change or self._is_stale:
            return
        if self.storage is None or not self.storage.is_suspended:
            return
        assert self.storage_setup is not None
        assert self._opened is not None
        if self.storage_setup.identity() == self._opened.identity:
            self.storage.resume()
            return
        opened, policy = self._opened, self.storage.patience.policy
        done, problem = self.detach_storage_backend()
        if not done:
            logger.warning("sglang-ext: storage stays with the old weights, unused: %s", problem)
            return
        self.remove_nobodys(opened)
        done, problem = self.attach_storage_backend(
            opened.name, opened.settings, opened.model_name, policy
        )
        if not done:
            logger.warning("sglang-ext: no storage for the new weights: %s", problem)

    def remove_nobodys(self, opened: "_Opened | None") -> None:
        """Weights that come from a trainer change a thousand times: pages that nobody can find
        any more must not pile up."""
        if opened is not None and opened.remove is not None:
            opened.remove()

    def detach_storage_backend(self) -> tuple[bool, str]:
        """Detach the storage backend; nothing is in flight. (done, message)"""
        if self.storage is None or self.cache_controller is None:
            return True, "no storage is attached"
        if not self.cache_controller.all_ranks(self.storage.drain()):
            return False, "storage still reads or writes; it stays attached"
        self._close_storage()
        return True, "storage is detached"

    def _close_storage(self) -> None:
        """Leave this rank without storage, also if it was opened in part."""
        assert self.cache_controller is not None
        if self.storage is not None:
            self.storage.reset()
            self.storage.close()
        self.index.detach_storage()
        self.cache_controller.detach_storage()
        self.storage = None
        self.enable_storage = False
        self.export_storage()

    def clear_storage_backend(self) -> bool:
        """Forget everything that is stored; whether all of it has gone, on every rank."""
        if self.storage is None or self.cache_controller is None:
            return True
        done = self.cache_controller.all_ranks(self.storage.clear())
        if not done:
            logger.warning("sglang-ext: the storage was not cleared, or not all of it")
        return done
