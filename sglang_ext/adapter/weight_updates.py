"""Updates of the weights while the server runs: the end of what storage has of the old ones.

The engine has a dozen calls that write weights. Hooks on them tell the cache before and after, so
that nothing is stored or read under a name that is not that of the weights it was computed with,
on every rank alike. What becomes of pages on device and host is the engine's contract: it drops
them if the call says ``flush_cache`` and nothing runs, and keeps them otherwise.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from sglang_ext.adapter import checkpoint, hooks
from sglang_ext.adapter.rank_agreement import RankAgreement
from sglang_ext.adapter.served_weights import Source

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler_components.weight_updater import (
        SchedulerWeightUpdaterManager as Updater,
    )

    from sglang_ext.adapter.prefix_cache import SwaHiCache

    Call = Callable[..., Any]

_UPDATER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager."
_LOADER = "sglang.srt.model_loader.loader.DefaultModelLoader.restore_weights_before_loading"

_loads = 0
"""How often weights of this process were about to be written by a loader."""


def install() -> None:
    """Hook the calls, before a scheduler keeps any of them; for a scheduler with our cache.

    Raises:
        StartupError: a hook did not take effect.
    """
    from sglang.srt.plugins.hook_registry import HookType

    around, before = HookType.AROUND, HookType.BEFORE
    hooks.apply(
        (_UPDATER + "update_weights_from_disk", around, from_disk),
        (_UPDATER + "update_weights_from_ipc", around, from_processes),
        (_UPDATER + "update_weights_from_tensor", around, part_of_session),
        (_UPDATER + "update_weights_from_distributed", around, part_of_session),
        (_UPDATER + "begin_weight_update", around, session_begins),
        (_UPDATER + "end_weight_update", around, session_ends),
        (_UPDATER + "check_weights", around, check),
        (_UPDATER + "_assert_weight_cache_inactive", before, memory_comes_or_goes),
        (_LOADER, before, note_load),
    )


# ---- the engine's calls ------------------------------------------------------


def from_disk(original: "Call", updater: "Updater", request: Any) -> Any:
    """The weights are those of the checkpoint, if it has all of them and every rank has loaded
    it."""
    from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqOutput
    from sglang.srt.runtime_context import get_model

    cache = cache_of(updater)
    model = get_model()
    path = request.model_path
    before, loads = Source.at(checkpoint.find(path, model.revision)), _loads
    _begin(cache)
    with _flushed_alike(updater, request) as result:
        try:
            answer = original(updater, request)
        except Exception as error:
            # its way back has failed too, and would take the server with it
            answer = UpdateWeightFromDiskReqOutput(
                success=False, message=f"Failed to update weights from {path}: {error!r}"
            )
        result.set(answer.success, _loads != loads)
    # a name on the hub may have been downloaded only now
    source = before or Source.at(checkpoint.find(path, model.revision))
    known = result.success and request.load_format in (None, model.load_format)
    _end(cache, result.changed, source if known else None)
    return answer


def from_processes(original: "Call", updater: "Updater", request: Any) -> Any:
    """Nobody knows what other processes have sent."""
    cache = cache_of(updater)
    _begin(cache)
    with _flushed_alike(updater, request) as result:
        answer = original(updater, request)
        # without the package for it, nothing can be received
        possible = importlib.util.find_spec("checkpoint_engine") is not None
        result.set(answer.success, answer.success or possible)
    _end(cache, result.changed, None)
    return answer


def session_begins(original: "Call", updater: "Updater", request: Any) -> Any:
    """From here to the end of the session weights may be written at any time, by whoever can
    reach the memory."""
    if updater._session is not None:
        return original(updater, request)  # is refused
    _begin(cache_of(updater))
    return original(updater, request)


def part_of_session(original: "Call", updater: "Updater", request: Any) -> Any:
    """What a session writes."""
    if updater._session is None:
        return original(updater, request)  # is refused
    cache = cache_of(updater)
    if cache.cache_controller is not None:
        cache.settle(give_up=False)  # requests may have run since it began
    with _flushed_alike(updater, request) as result:
        answer = original(updater, request)
        result.set(answer.success, True)
    return answer


def session_ends(original: "Call", updater: "Updater", request: Any) -> Any:
    """Nobody knows what was written."""
    was_open = updater._session is not None
    answer = original(updater, request)
    if was_open:
        _end(cache_of(updater), True, None)
    return answer


def check(original: "Call", updater: "Updater", request: Any) -> Any:
    """A test of the engine's fills the weights with numbers at random."""
    if request.action != "reset_tensors":
        return original(updater, request)
    cache = cache_of(updater)
    _begin(cache)
    answer = original(updater, request)
    _end(cache, True, None)
    return answer


def memory_comes_or_goes(updater: "Updater", what: str) -> None:
    """Memory of weights that was released comes back with anything in it, unless the engine has
    kept a copy."""
    from sglang.srt.runtime_context import get_exec

    features = get_exec().features
    kept = features.enable_weights_cpu_backup or not features.enable_memory_saver
    if what == "resume_memory_occupation" and not kept:
        cache = cache_of(updater)
        _begin(cache)
        _end(cache, True, None)


def note_load(*_: Any) -> None:
    """A loader is about to write weights."""
    global _loads
    _loads += 1


# ---- what they share ---------------------------------------------------------


def cache_of(updater: "Updater") -> "SwaHiCache":
    """The cache of the scheduler whose weights these are."""
    from sglang_ext.adapter.prefix_cache import SwaHiCache

    assert updater.scheduler is not None
    cache = updater.scheduler.tree_cache
    assert isinstance(cache, SwaHiCache)
    return cache


def _begin(cache: "SwaHiCache") -> None:
    if cache.cache_controller is not None:
        cache.storage.weights_change()
        # what is being written still gets the name of the old weights
        cache.settle(give_up=False)


def _end(cache: "SwaHiCache", changed: bool, source: Source | None) -> None:
    if cache.cache_controller is None:
        return
    if changed:
        cache.storage.weights_have_changed(source)
    else:
        cache.storage.weights_are_as_they_were()


class _Result:
    """What a call has done, as all ranks agree."""

    def __init__(self) -> None:
        self.success = self.changed = False

    def set(self, success: bool, changed: bool) -> None:
        """What it has done here."""
        self.success, self.changed = success, changed


@contextlib.contextmanager
def _flushed_alike(updater: "Updater", request: Any) -> Iterator[_Result]:
    """A call that may flush, which the engine decides on each rank for itself: after it, it is
    done on all of them or on none. Where weights were written on some rank and the call failed,
    what the old ones computed goes as well, if the caller wants it to."""
    cache, result = cache_of(updater), _Result()
    before = cache.resets
    yield result
    flushed = cache.resets != before
    ranks = RankAgreement([updater.tp_cpu_group])
    own = (int(result.success), -int(result.changed), -int(flushed))
    success, changed, some_flushed = ranks.minimum(own)
    result.set(bool(success), bool(changed))
    failed_half_way = changed and not success
    if request.flush_cache and not flushed and (some_flushed or failed_half_way):
        updater.flush_cache()
