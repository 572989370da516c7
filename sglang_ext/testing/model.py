"""An independent model of the cache: what each operation may do, in plain Python.

The model knows pages by their whole prefix, not by row or digest, and keeps for each the state of
its four copies and when it was used. ``ModelledIndex`` runs the real index beside it: every match
is compared with the definition, and every change must be one that the operation may make.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.cache import PrefixCache
from sglang_ext.core.candidates import Kind
from sglang_ext.core.compiled.constants import FREE, PAD
from sglang_ext.core.device.look_ahead import Found
from sglang_ext.core.host.sampling import passed_over
from sglang_ext.core.inserts import Own, Tail
from sglang_ext.core.plan import Declined, Hold, PrefixMatch, Transfer, TransferKind
from sglang_ext.core.retention.expiry import Expiry
from sglang_ext.core.table.columns import Rows, SlotColumn
from sglang_ext.core.table.digest import Pages
from sglang_ext.core.table.paths import Page, filled_up
from sglang_ext.core.write_policy import WritePolicy, worth_keeping
from sglang_ext.testing import definitions, model_control
from sglang_ext.testing.model_page import (
    ABSENT,
    INSIDE,
    READY,
    RESERVED,
    TIERS,
    Key,
    ModelPage,
    Order,
    States,
    page_order,
    prefix_keys,
    window_order,
)
from sglang_ext.testing.model_quota import QuotaModel
from sglang_ext.testing.model_room import RoomRules, duplicates
from sglang_ext.testing.model_storage import StorageRules
from sglang_ext.testing.watch import around, require


class ModelledIndex(PrefixCache):
    """A PrefixCache that is checked against the model after every operation."""

    def reset(self) -> None:
        """See PrefixCache."""
        super().reset()
        around(self.residency, "use", self._watch_use)
        around(self.inserts, "padding", self._watch_padding)
        around(self.eviction, "evict", self._watch_evict)
        around(self.residency.candidates, "first", self._watch_first)
        around(self.ahead, "look", self._watch_look)
        around(self.backups, "begin", self._watch_backup)
        around(self.room, "make", RoomRules(self, self._worth).watch)
        self._storage_rules = StorageRules(self)
        for owner, name, marks in model_control.CALLS:
            around(getattr(self, owner), name, self._watch_control, marks)
        self._quota = QuotaModel(self, self.states, self.accept, self.key, self._worth)
        self.pages: dict[Key, ModelPage] = {}
        self._clock = self._first_tick = 0
        self.table.when_renumbered.append(self._move_together)
        self._keys: dict[tuple[int, int], Key] = {}
        self._at_insert: States = {}

    # ---- operations ----------------------------------------------------------

    def match(self, pages: Pages, namespace: Hashable, rest: Page | None = None) -> PrefixMatch:
        """See PrefixCache; compared with the definition of the resume rule."""
        found = super().match(pages, namespace, rest)
        known: list[ModelPage] = []
        for key in prefix_keys(pages, namespace):
            if key not in self.pages:
                break
            known.append(self.pages[key])
        if rest is not None:
            page = filled_up(rest, self.geometry.name_tokens)
            page = pages[len(known)] if len(known) < len(pages) else page
            self._check_inside(pages[: len(known)], namespace, page)
            known += self._inside(pages[: len(known)], namespace, page, found)
        best = max(n for n in range(len(known) + 1) if self._can_resume(known[:n], load=True))
        direct = max(n for n in range(len(known) + 1) if self._can_resume(known[:n], load=False))
        expected = (max(best, direct), direct)
        require(
            (len(found.rows), found.device_pages) == expected,
            f"match is {(len(found.rows), found.device_pages)}, by definition {expected}",
        )
        return found

    def _inside(
        self, above: Pages, namespace: Hashable, page: Page, found: PrefixMatch
    ) -> list[ModelPage]:
        """The page inside which a match may end, by definition: the child of ``above`` with most
        tokens in common, of those with a window. Where some have none, another such child will
        do, or none if no request could resume in it."""
        prefix = above.tobytes()
        parent = (namespace, prefix) if len(above) else None
        common: dict[Key, int] = {}
        some_have_none = False
        for key, child in self.pages.items():
            if key[0] == namespace and child.parent == parent and child.depth == len(above):
                tokens = np.frombuffer(key[1][len(prefix) :], dtype=np.int64)
                differs = np.flatnonzero((tokens != page) | (page == PAD))
                count = int(differs[0] if len(differs) else len(page)) - self.geometry.overlap
                count -= count % self.geometry.device_page
                if child.swa_device or child.swa_host == READY:
                    common[key] = count
                else:
                    some_have_none = True
        most = max(common.values(), default=0)
        if len(found.rows) > len(above):
            key = self.key(int(found.rows[-1]))
            require(key in common, "a match ends inside a page that is not there")
            require(common[key] + found.cut == self.geometry.page_tokens, "too much in common")
            require(some_have_none or common[key] == most, "another page has more in common")
            return [self.pages[key]]
        require(found.cut == 0, "a whole page is cut")
        # any of them will do: if one of the best could be resumed in, the match is not complete
        best = [key for key, count in common.items() if count == most > 0]
        if some_have_none or not best:
            return []
        return [self.pages[min(best, key=lambda key: not self.pages[key].swa_device)]]

    def match_and_use(
        self, pages: Pages, namespace: Hashable, rest: Page | None = None
    ) -> PrefixMatch:
        """See PrefixCache."""
        expected = self.match(pages, namespace, rest)
        found = super().match_and_use(pages, namespace, rest)
        require(np.array_equal(found.rows, expected.rows), "match_and_use finds something else")
        require(found[1:] == expected[1:], "match_and_use finds something else")
        if len(found.rows):
            self.note_use(found.rows)
        self.check_ages()
        return found

    def _can_resume(self, prefix: list[ModelPage], *, load: bool) -> bool:
        window = prefix[max(0, len(prefix) - self.geometry.window_pages) :]
        if not load:
            on_device = all(page.device for page in prefix)
            return on_device and all(page.swa_device for page in window)
        return all(page.has_window for page in window)

    def _watch_use(self, use: Callable[[Rows], None], rows: Rows) -> None:
        use(rows)
        if len(rows):
            self.note_use(rows)

    def note_use(self, rows: Rows) -> None:
        """A path is used."""
        self._clock += 1
        size, policy = self.geometry.window_pages, self.eviction_policy.name.lower()
        keys = [self.key(row) for row in rows.tolist()]
        path = [self.pages[key] for key in keys]
        used = [self._clock] * len(path)
        if self.table.is_learned:
            stays = self.table.stay[self.table.kind[rows]].tolist()
            used = definitions.expiry(self._clock, stays, [page.used for page in path])
        for page, tick in zip(path, used, strict=True):
            page.used, page.rank = tick, page.ranked(policy, self.spare_pages)
        path[-1].resume = True
        children = Counter(page.parent for page in self.pages.values())
        for end, key in enumerate(keys, start=1):
            if end == len(keys) or children[key] > 1:
                for page in path[max(0, end - size) : end]:
                    page.use_window(page.used if self.table.is_learned else self._clock)

    def new_page(self, depth: int, parent: Key | None, *, ticks: int) -> ModelPage:
        """A page that comes in so many ticks."""
        return ModelPage(depth, parent, window_used=self._clock + ticks)

    def _move_together(self) -> None:
        """Ages have bits for so many ticks. Those of long ago, which is before the last
        ``recent``, are moved to the ticks in front of that, in their order."""
        capacity = self.table.capacity
        recent = (self._limits.ticks - capacity) // 2
        begin = self._clock + 1 - recent  # in the middle of an operation: its tick comes
        if begin - capacity <= self._first_tick:
            return
        self._first_tick = begin - capacity
        for name in ("used", "window_used"):
            ticks = sorted(
                {t for page in self.pages.values() if (t := getattr(page, name)) < begin}
            )
            moved = {tick: begin - len(ticks) + place for place, tick in enumerate(ticks)}
            for page in self.pages.values():
                tick = getattr(page, name)
                setattr(page, name, moved.get(tick, tick))

    def insert(self, pages: Pages, namespace: Hashable, *args: Any) -> Rows:
        """See PrefixCache; the pages it names, and nothing else, are on the device now."""
        first, _, swa, request, priority, tail = (*args, None)[:6]
        rows = super().insert(pages, namespace, *args)
        before = self._at_insert
        keys = list(prefix_keys(pages, namespace))
        if len(rows) > len(pages):
            require(tail is not None, "a tail appeared from nowhere")
            keys.append((namespace, pages.tobytes() + tail.tokens.tobytes()))
            swa = np.concatenate((swa, np.zeros((1, swa.shape[1]), swa.dtype)))
        known = sum(key in before for key in keys)
        if 0 < known < len(rows):
            self.count_fork(keys[known - 1])
        for depth, key in enumerate(keys[: len(rows)]):
            parent = None if depth == 0 else keys[depth - 1]
            page = self.pages.setdefault(key, self.new_page(depth, parent, ticks=1))
            page.device = page.device or READY
            if depth >= first and swa[depth - first, 0] >= 0:
                page.swa_device = page.swa_device or READY
            page.count(request, priority, len(rows))
            before[key] = page.states
        if len(rows):
            self.note_use(rows)
        else:
            self._clock += 1
        self.expect(before, "insert")
        self._mark_resume_points(keys[: len(rows)])
        self.check_ages()
        hits = self.table.hits[rows].tolist()
        counted = [len(self.pages[self.key(row)].requests) for row in rows.tolist()]
        require(hits == counted, f"hits are {hits}, requests {counted}")
        return rows

    def _mark_resume_points(self, keys: list[Key]) -> None:
        """A path has grown."""
        if not keys:
            return
        path = [self.pages[key] for key in keys]
        size, interval = self.geometry.window_pages, self.policy.checkpoint_pages
        children = Counter(page.parent for page in self.pages.values())
        requests = [len(page.requests) for page in path]
        left = [above - below >= 2 for above, below in itertools.pairwise(requests)]
        branches = [
            children[key] > 1 or gone for key, gone in zip(keys, [*left, False], strict=True)
        ]
        marked = [page.resume for page in path]
        complete = definitions.complete_windows([page.has_window for page in path], size)
        keep = definitions.resume_points(marked, branches, complete, interval)
        for end, page in enumerate(path, start=1):
            page.resume = keep[end - 1]
            if page.resume and not marked[end - 1]:
                for inner in path[max(0, end - size) : end]:
                    inner.band = max(inner.band, INSIDE)

    def note_prompt_end(self, rows: Rows, pages: int) -> None:
        """See PrefixCache; the window of a prompt that nothing has gone on from is used."""
        path = [self.pages[self.key(row)] for row in rows[:pages].tolist()]
        window = path[max(0, len(path) - self.geometry.window_pages) :]
        super().note_prompt_end(rows, pages)
        if window and len(rows) - pages <= 1 and all(page.has_window for page in window):
            path[-1].resume = True
            for page in window:
                page.use_window(self._clock)
        self.check_ages()

    def end_request(self, rows: Rows, prompt: int) -> None:
        """See PrefixCache; windows near the end of the prompt are worth more."""
        super().end_request(rows, prompt)
        path = [self.pages[self.key(row)] for row in rows[:prompt].tolist()]
        if self.table.is_learned and path:
            copy_one = self.expiry.near_end_pays
            definitions.keep_windows_near_end(path, self.geometry, copy_one=copy_one)
            self.check_ages()

    def check_ages(self) -> None:
        """Both orders of eviction, from the first page to the last, and which windows are worth
        keeping."""
        table = self.table
        rows = np.flatnonzero(table.parent != FREE)
        pages = {row: self.pages[self.key(row)] for row in rows.tolist()}
        for name, age, order in (
            ("age", table.age, page_order),
            ("swa_age", table.swa_age, window_order),
        ):
            in_order = [order(pages[row]) for row in rows[np.argsort(age[rows])].tolist()]
            rises = all(one <= other for one, other in itertools.pairwise(in_order))
            require(rises, f"{name} is not the order of eviction")
            different = len(set(in_order)) == len(in_order)
            # pages of different paths may expire at once, and storage's come in a tick of others
            alike = table.is_learned or self.attachment.is_there
            require(different or alike, f"{name} does not tell pages apart")
        marked = {row for row, page in pages.items() if page.resume}
        require(set(rows[table.resume[rows]].tolist()) == marked, "other windows are worth keeping")

    def _check_inside(self, above: Pages, namespace: Hashable, page: Page) -> None:
        """The way down the siblings is the one that follows from their tokens and digests."""
        table = self.table
        path = table.lookup(above, namespace)
        parent = int(path[-1]) if len(path) else table.root(namespace)
        if parent is not None:
            found = table.inside(parent, page)
            expected = definitions.inside(table, parent, page.tolist())
            require(found == expected, f"inside is {found}, by definition {expected}")

    def count_request(self, rows: Rows, request: int, priority: int = 0) -> bool:
        """See PrefixCache."""
        pages = [self.pages[self.key(row)] for row in rows.tolist()]
        expected = sum(page.count(request, priority, len(pages)) for page in pages) > 0
        counted = super().count_request(rows, request, priority)
        require(counted == expected, f"a request was counted: {counted}, expected {expected}")
        return counted

    def _watch_padding(self, padding: Callable[..., Any], tail: Tail | None) -> Any:
        """What it evicts is checked by itself."""
        slots = padding(tail)
        self._at_insert = self.states()
        return slots

    def own(self, path: Rows, used: int, hold: Hold) -> Own | None:
        """See PrefixCache; nothing goes but a tail that is used up."""
        key, is_tail = self.key(int(path[-1])), self.table.is_tail(int(path[-1]))
        own = super().own(path, used, hold)
        after = self.states()
        gone = self.pages.keys() - after.keys()
        require(not gone or (gone == {key} and is_tail), "a page went with its user")
        for other, states in after.items():
            require(states[:3] == self.pages[other].states[:3], "a copy went with a tail")
        self.accept(after)
        return own

    def count_fork(self, key: Key) -> None:
        """A request goes on from a page for itself; whether another one had before."""
        page = self.pages[key]
        siblings = any(other.parent == key for other in self.pages.values())
        page.forks += siblings or len(page.requests) > 1

    def _watch_control(self, marks: bool, call: Callable[..., Any], *args: Any) -> Any:
        """What goes is the matter of ``SimControl``; what stays is as it was."""
        before = self.states()
        answer = call(*args)
        after = self.states()
        model_control.check(before, after)
        if marks:
            self.pages[self.key(int(args[0][-1]))].resume = True
        self.accept(after)
        return answer

    def _watch_evict(
        self,
        evict: Callable[..., tuple[int, int]],
        pages: int,
        window_pages: int,
        **options: bool,
    ) -> tuple[int, int]:
        """Victims are unlocked, oldest first or those worth least, and as many as it says."""
        table = self.table
        keys = {row: self.key(row) for row in self._evictable(table.device, page_order)}
        locked = self._locked(table.device)
        locked_windows = self._locked(table.swa_device)
        before, learned = self.states(), None
        if isinstance(self.expiry, Expiry) and self.expiry.is_learned and not self.residency.tier:
            learned = definitions.least_worth(table, self.expiry, list(keys))
        freed = evict(pages, window_pages, **options)
        after = self.states()
        lost = {k for k, s in before.items() if s[0] and not after.get(k, (0, 0, 0, 0))[0]}
        lost_windows = {k for k, s in before.items() if s[2] and not after.get(k, (0,) * 4)[2]}
        require((len(lost), len(lost_windows)) == freed, "evict counts what it did not free")
        if not options.get("abandon_backups"):
            require(not lost & locked, "evict took a locked page")
            require(not lost_windows & locked_windows, "evict took a locked window")
            possible = sum(1 for k, s in before.items() if s[0] and k not in locked)
            require(freed[0] >= min(pages, possible), "evict freed less than it could")
        left = [page_order(self.pages[k]) for k, s in after.items() if s[0] and k not in locked]
        if learned is not None:
            require(lost == {keys[row] for row in learned(len(lost))}, "others are worth least")
        elif lost and left:
            youngest = max(page_order(self.pages[key]) for key in lost)
            require(youngest <= min(left), "evict took a page before an older one")
        self.accept(after)
        self.check_ages()
        return freed

    def _watch_first(self, first: Callable[[Kind, int], Rows], kind: Kind, count: int) -> Rows:
        """Victims are the oldest that nobody holds, in their order."""
        rows = first(kind, count)
        if kind is Kind.VICTIMS:
            expected = self._evictable(self.table.device, page_order)
        elif kind is Kind.WINDOW_VICTIMS:
            expected = self._evictable(self.table.swa_device, window_order)
        else:
            return rows
        require(rows.tolist() == expected[: max(0, count)], "other victims, or in another order")
        return rows

    def _evictable(self, column: SlotColumn, order: Order) -> list[int]:
        """Rows, those first that are evicted first."""
        rows = np.flatnonzero(column.present & (column.locks == 0)).tolist()
        return sorted(rows, key=lambda row: order(self.pages[self.key(row)]))

    def _watch_look(
        self, look: Callable[..., Found], free: int, free_windows: int, pins: NDArray[np.int16]
    ) -> Found:
        """What is to be copied ahead of eviction is what eviction would lose."""
        table, kept, policy = self.table, self.kept.ends, self.policy
        found = look(free, free_windows, pins)
        worth = worth_keeping(policy.write, table.hits) & table.device.ready
        if self.own_room.is_on:
            worth &= ~self.own_room.passes_over(np.arange(table.capacity))
        if self.sampling.is_on:
            worth &= ~passed_over(table, np.arange(table.capacity))
        if isinstance(self.expiry, Expiry) and not self.attachment.is_there:
            worth &= definitions.admitted(table, self.expiry)
        marked = table.resume.copy()
        if self.host_window.free_for_copies(needed_now=False) >= self.geometry.window_pages:
            marked |= table.resume_if_room
        on_device, on_host = table.swa_device, table.swa_host
        ends = definitions.windows_to_save(
            table,
            set(np.flatnonzero(worth & marked & ~kept).tolist()),
            lambda row: bool(on_device.ready[row] or on_host.present[row]),
        )
        lost = {row for row in ends if on_device.present[row] and not on_host.present[row]}
        dirty = lost | set(np.flatnonzero(worth & ~table.host.present).tolist())
        in_window = {row: end for row, end in enumerate(found.window_end.tolist()) if end >= 0}
        require(in_window == ends, "other windows are to be saved")
        require(set(np.flatnonzero(found.with_window).tolist()) == lost, "other windows are lost")
        pages = found.full, table.device, table.host, page_order, pins
        windows = found.window, on_device, on_host, window_order, 1
        for (ahead, device, host, order, held), n_free, low, losses in (
            (pages, free, self.ahead.low_pages(), dirty),
            (windows, free_windows, policy.low_window_pages, lost),
        ):
            copying = device.present & host.present & ~host.ready & (device.locks == held)
            safe = n_free + int(np.count_nonzero(copying))
            expected = definitions.look_ahead(self._evictable(device, order), losses, safe, low)
            answer = (ahead.dirty.tolist(), ahead.soon.tolist(), ahead.room, ahead.room_then)
            require(answer == expected, f"a look finds {answer}, by definition {expected}")
        return found

    def _watch_backup(
        self, begin: Callable[..., Transfer | Declined | None], rows: Rows, **options: Any
    ) -> Transfer | Declined | None:
        """Sources are READY, windows whole, victims in order."""
        before, _ = self.states(), self._quota.take()
        path = {self.key(row) for row in rows.tolist()}
        copies = self._storage_rules.stored_copies(rows, options.get("pages"))
        copied = [self.key(row) for row in copies.tolist()]
        missing = [self.pages[key] for key in copied if before[key][1] == ABSENT]
        youngest = max(missing, key=page_order, default=None)
        held = path | self._locked(self.table.host)
        first_ones = duplicates(before, self.pages, held, youngest) if youngest else set()
        recycled = self._storage_rules.may_be_recycled(before)
        alone = self._ends_on_the_host_alone()
        first = min((page.depth for page in missing), default=len(rows) - 1)
        most = max(self._worth(row) for row in rows[first:].tolist())
        most = model_control.MOST if options.get("claim") else most
        plan = begin(rows, **options)
        after = self.states()
        taken = [k for k, s in before.items() if s[1] and not after.get(k, (0, 0, 0, 0))[1]]
        require(not path & set(taken), "a backup took host copies of its own path")
        eager = set() if options["make_room"] else set(taken)
        require(eager <= recycled, "an eager backup took something away")
        for key, worth in alone.items():
            require(key in after or worth < most, "a backup took a prefix that is worth more")
        own = self._quota.take()
        others = [key for key in taken if key not in own]
        if not self.room.copies_stay and any(not before[key][0] for key in others):
            require(not first_ones - set(taken), "a page on the host alone went first")
        self.accept(after)
        if isinstance(plan, Transfer):
            for row in plan.full.rows.tolist():
                states = before[self.key(row)]
                require(states[0] == READY and states[1] == ABSENT, "backup of a wrong page")
            self._check_windows(plan, before)
            selective = self.policy.write is WritePolicy.WRITE_THROUGH_SELECTIVE
            if selective and "claim" not in options:
                requests = [len(self.pages[key].requests) for key in path]
                require(min(requests) >= 2, "a page was copied at its first request")
        return plan

    def _ends_on_the_host_alone(self) -> dict[Key, tuple[int, float]]:
        """Where prefixes can be resumed that are not on the device, with their worth."""
        found = definitions.ends_alone(self.table, self.kept, self._worth)
        return {self.key(row): worth for row, worth in found.items()}

    def _worth(self, row: int) -> tuple[int, float]:
        """What the host goes by."""
        page = self.pages[self.key(row)]
        if isinstance(self.expiry, Expiry):
            return definitions.worth(self.table, self.expiry, row, page.forks)
        return page.worth(self._clock)

    def _check_windows(self, plan: Transfer, before: States) -> None:
        """Every window page that is copied belongs to a window that is whole on the host
        when all backups of it have ended."""
        swa_host = self.table.swa_host
        for row in plan.window.rows.tolist():
            require(before[self.key(row)][2] == READY, "backup of a window that is not there")
            ends = [row, *definitions.descendants(self.table, row, self.geometry.window_pages - 1)]
            size = self.geometry.window_pages
            whole = [end for end in ends if swa_host.present[self.table.path(end)[-size:]].all()]
            require(bool(whole), "half a window was copied")

    def begin_load(self, rows: Rows) -> Transfer | Declined:
        """See PrefixCache; a declined load changes nothing but what it evicted."""
        before = self.states()
        plan = super().begin_load(rows)
        after = self.states()
        loading = set()
        if isinstance(plan, Transfer):
            path = [self.key(row) for row in rows.tolist()]
            loading = {self.key(row) for row in plan.full.rows.tolist()}
            require(all(after[key][0] for key in path), "a loaded path has a hole")
            window = path[max(0, len(path) - self.geometry.window_pages) :]
            require(all(after[key][2] for key in window), "a loaded window has a hole")
            for key in path:
                require(after[key][1] == before[key][1], "a load changed its source")
        for key, state in after.items():
            appeared = state[0] and not before[key][0]
            require(not appeared or key in loading, "a load brought a page it does not name")
        self.accept(after)
        return plan

    def commit_backup(self, op: int, *, ok: bool) -> None:
        """See PrefixCache; what was RESERVED is READY or gone, nothing else changes."""
        transfer = self.pending[TransferKind.BACKUP][op]
        expected = self.states()
        if not transfer.abandoned:
            state = READY if ok else ABSENT
            for copies, tier in ((transfer.full, 1), (transfer.window, 3)):
                for row in copies.rows.tolist():
                    key = self.key(row)
                    states = expected[key]
                    require(states[tier] == RESERVED, "a backup lost its reservation")
                    expected[key] = (*states[:tier], state, *states[tier + 1 :])
        super().commit_backup(op, ok=ok)
        self.allow_half_windows_to_go(transfer.path, expected)
        self.expect(expected, "commit of a backup")

    def commit_load(self, op: int) -> None:
        """See PrefixCache; what was RESERVED is READY, nothing else changes."""
        transfer = self.pending[TransferKind.LOAD][op]
        expected = self.states()
        for copies, tier in ((transfer.full, 0), (transfer.window, 2)):
            for row in copies.rows.tolist():
                key = self.key(row)
                states = expected[key]
                require(states[tier] == RESERVED, "a load lost its reservation")
                expected[key] = (*states[:tier], READY, *states[tier + 1 :])
        super().commit_load(op)
        self.allow_half_windows_to_go(transfer.path, expected)
        self.expect(expected, "commit of a load")

    def allow_half_windows_to_go(self, path: Rows, expected: States) -> None:
        """A window page that a transfer has used may go with it, if no window around it is
        whole on the host."""
        after, size = self.states(), self.geometry.window_pages - 1
        # of an abandoned backup the path may be gone
        for row in path[self.table.parent[path] != FREE].tolist():
            key = self.key(row)
            if expected[key][3] == READY and after[key][3] == ABSENT:
                expected[key] = (*expected[key][:3], ABSENT)
                ends = [row, *definitions.descendants(self.table, row, size)]
                kept = self.kept.ends[ends]
                require(not kept.any(), "a page of a kept window went with a transfer")

    # ---- the table, as the model sees it --------------------------------------

    def states(self) -> States:
        """What the table has now."""
        table = self.table
        rows = np.flatnonzero(table.parent != FREE)
        columns = [getattr(table, tier) for tier in TIERS]
        states = [c.present[rows].astype(int) + c.ready[rows].astype(int) for c in columns]
        keys = [self.key(row) for row in rows.tolist()]
        listed = zip(*(state.tolist() for state in states), strict=True)
        return dict(zip(keys, listed, strict=True))

    def key(self, row: int) -> Key:
        """The prefix that a row is."""
        version = (row, int(self.table.generation[row]))
        if version not in self._keys:
            path = self.table.path(row)
            self._keys[version] = self.table.namespace(path), self.table.tokens[path].tobytes()
        return self._keys[version]

    def _locked(self, column: SlotColumn) -> set[Key]:
        return {self.key(row) for row in np.flatnonzero(column.locks > 0).tolist()}

    def expect(self, expected: States, operation: str) -> None:
        """Nothing has changed but what was expected."""
        after = self.states()
        require(after == expected, f"{operation} changed what it should not")
        self.accept(after)

    def accept(self, after: States) -> None:
        """The model has what the table has; nothing appeared from nowhere."""
        require(after.keys() <= self.pages.keys(), "a page appeared from nowhere")
        for key in self.pages.keys() - after.keys():
            del self.pages[key]
        for key, states in after.items():
            page = self.pages[key]
            page.device, page.host, page.swa_device, page.swa_host = states
