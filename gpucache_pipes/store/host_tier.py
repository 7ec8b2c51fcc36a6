"""HostTier: features in host memory, below those on the device."""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpucache_pipes.cache import (
    ABSENT,
    LOADING,
    Cache,
    Ledger,
    Numbers,
    Policy,
    check_cache,
)
from gpucache_pipes.cache.states import CACHED
from gpucache_pipes.device import HostBackend
from gpucache_pipes.files import Layout
from gpucache_pipes.files.packed import native
from gpucache_pipes.store.announcement import Announcement
from gpucache_pipes.store.columns import FeatureColumns, Held, distinct_of
from gpucache_pipes.store.host_moves import moves_of
from gpucache_pipes.store.lock import StoreLock

_log = logging.getLogger("gpucache_pipes")

_EVENTS = 4096
"""Requests and announcements that wait to be told to the policy, at most."""


class HostTier:
    """A cache in host memory of what the cache on the device does not hold.

    It has the numbers of entries, the rules and the policy of that cache, with a budget of its own,
    and memory of its own. What is read for a batch and not cached on the device is kept here; what
    comes from here and is cached there is given up. A feature that the device has evicted before
    stays in both: it will be evicted again. So over epochs that use each file once the hits are
    those of both budgets together, and nothing moves.

    Any number of reader threads call it. It has a lock of its own, which is never held while that
    of the store is taken.

    Args:
        ledger: with the budget.
        policy: which features are evicted.
        above: the cache on the device.
        is_current: whether the file of an entry is unchanged since it had a version; None if
            versions are not looked at.

    Attributes:
        hits: features that were served from here.
        lock: see above.
        cache: the bookkeeping.
    """

    def __init__(
        self,
        ledger: Ledger,
        policy: Policy,
        above: Cache,
        is_current: Callable[[str, bytes | None], bool] | None,
    ) -> None:
        self.hits = 0
        self.lock = StoreLock()
        self._memory = HostBackend()
        self.cache = Cache(ledger, policy, self._memory.grow, self._memory.shrink)
        self._files = above.entries
        self._released_above = above.not_cached
        self._is_current = is_current
        self._clearing = False
        self._is_closed = False
        self._has_warned = False
        # What the policy has to be told. Single operations on it are atomic.
        self._events: deque[tuple[Callable[..., None], Any, Any]] = deque(maxlen=_EVENTS)

    # What a pipeline says. Takes no lock.

    def requested(self, owner: object, numbers: Numbers) -> None:
        """`owner` has requested these entries."""
        self._events.append((self.cache.log.requested, owner, numbers))

    def begin_epoch(self, owner: object) -> None:
        """`owner` begins a new pass over its data."""
        self._events.append((lambda owner, _: self.cache.log.begin_epoch(owner), owner, None))

    def announce(self, owner: object, announcement: Announcement) -> None:
        """`owner` announces its next requests."""
        self._events.append((self.cache.log.announce, owner, announcement))

    def retract(self, owner: object) -> None:
        """`owner` takes back what it announced."""
        self._events.append((lambda owner, _: self.cache.log.retract(owner), owner, None))

    def _catch_up(self) -> None:
        """Know the entries that the store knows, and what pipelines have said. With the lock."""
        entries, files = self.cache.entries, self._files
        known, count = entries.count, files.count
        if count > known:  # the tables of the store are only added to
            entries.add(files.keys(range(known, count)), files.paths[known:count])
        while self._events:
            try:
                tell, owner, what = self._events.popleft()
            except IndexError:
                break
            if self.cache.ledger.bounded:
                tell(owner, what)

    # Reading

    def hold(self, numbers: Sequence[int], held: Held) -> None:
        """Pin those of these features that are here, and describe them in `held`.

        Whatever happens, the caller passes `held` to `let_go`.
        """
        cache, entries = self.cache, self.cache.entries
        if not cache.ledger.cached_items:
            return
        stale = self._stale(numbers)
        with self.lock:
            self._catch_up()
            if stale:
                cache.release(np.array(stale, np.intp))
            wanted = np.array(numbers, np.intp)
            here = wanted[entries.state[wanted] == CACHED]
            if not len(here) or self._is_closed:
                return
            held.batch = cache.open_batch(here, None, report=False)
            self.hits += len(here)
            of = cache.layouts.of_places(entries.place[here])
            known, which = distinct_of(of)
            held.columns = FeatureColumns(
                here, [cache.layouts.layouts[n] for n in known.tolist()], which,
                [entries.values.get(n, ()) for n in here.tolist()] if entries.values else [],
                [entries.versions.get(n) for n in here.tolist()] if self._is_current else [],
            )  # fmt: skip

    def _stale(self, numbers: Sequence[int]) -> list[int]:
        """Those whose files have changed since. Looks at each file, without the lock."""
        if self._is_current is None:
            return []
        entries = self.cache.entries
        return [
            n for n in numbers
            if n < entries.count and entries.state[n] == CACHED
            and not self._is_current(entries.paths[n], entries.versions.get(n))
        ]  # fmt: skip

    def copy(self, held: FeatureColumns, memory: memoryview, offsets: Numbers) -> None:
        """Copy features that are held to these places in `memory`, without the interpreter lock."""
        source = self._memory.memory()
        if source is not None:
            moves = moves_of(self.cache, held, self._memory.page_bytes, offsets)
            native.copy(source.numpy(), np.frombuffer(memory, np.uint8), moves)

    def let_go(self, held: Held, promoted: Sequence[int] = ()) -> None:
        """Unpin what is held. Gives up what is cached on the device now, `promoted`."""
        if held.batch is None:
            return
        with self.lock:
            if len(promoted):
                self.cache.release(np.array(promoted, np.intp))
            self.cache.close_batches([held.batch])
            held.batch = None
            self._settle()

    # Keeping

    def keep(
        self,
        numbers: Numbers,
        layouts: Sequence[Layout],
        values: Sequence[tuple[Any, ...]],
        versions: Sequence[bytes | None],
        copy: Callable[[Sequence[int], memoryview, Numbers], None],
        page_bytes: int,
        *,
        evict: bool = True,
    ) -> None:
        """Keep features that were read, as far as budget and policy admit them.

        Args:
            numbers: of their entries, each once.
            layouts: of the features.
            values: their plain values.
            versions: of their files; empty if these are not looked at.
            copy: `copy(positions, memory, offsets)` copies those of these features to their places
                in `memory`; it is called once.
            page_bytes: the size of a page, if there are none yet.
            evict: whether others may be evicted for them.
        """
        placed: list[int] = []
        try:
            self._place(numbers, layouts, page_bytes, placed, evict)
            if placed:
                at = np.flatnonzero(np.isin(numbers, placed)).tolist()
                self._fill(numbers, at, copy, values, versions, placed)
        except MemoryError as error:
            self._warn(error)
        finally:
            if placed:  # an error, or an interrupt
                with self.lock:
                    self.cache.fail_loading(np.array(placed, np.intp))
                    self._settle()

    def _place(
        self,
        numbers: Numbers,
        layouts: Sequence[Layout],
        page_bytes: int,
        placed: list[int],
        evict: bool,
    ) -> None:
        """Have pages assigned; fills `placed` with the numbers of those that have some."""
        cache, entries = self.cache, self.cache.entries
        tried: list[Any] = []
        while True:
            with self.lock:
                self._catch_up()
                if self._is_closed or self._clearing:
                    return
                self._set_page_bytes(page_bytes)
                cache.close_lost_batches()
                cache.layouts.tidy()
                absent = entries.state[numbers] == ABSENT
                some, of = [], []
                for n in np.flatnonzero(absent).tolist():
                    if int(numbers[n]) in self._released_above:  # while they were being read
                        continue
                    layout = layouts[n]
                    limit = cache.ledger.max_bytes
                    if layout.nbytes and (limit is None or layout.nbytes <= limit):
                        some.append(int(numbers[n]))
                        of.append(
                            cache.allocator.layout_number(
                                some[-1], layout, layout.span, layout.nbytes
                            )
                        )
                if not some:
                    return
                these, kinds = np.array(some, np.intp), np.array(of, np.intp)
                plans = [unbuilt for unbuilt in cache.log.unbuilt() if unbuilt not in tried]
                if not plans or cache.allocator.fits(kinds):
                    cache.start_loading(these, evict=evict)
                    placed += some
                    for error in cache.allocator.allocate(these, kinds).values():
                        self._warn(error)
                    unplaced = these[entries.state[these] == LOADING]
                    cache.fail_loading(unplaced)
                    left_out = set(unplaced.tolist())
                    placed[:] = [number for number in some if number not in left_out]
                    return
            # The policy will choose victims. What it must know is found out without the lock.
            tried += plans
            for announcement in plans:
                announcement.build()

    def _warn(self, error: BaseException) -> None:
        """Log once that there is no memory. Errors of the policy are raised by the cache above."""
        if isinstance(error, MemoryError) and not self._has_warned:
            self._has_warned = True
            _log.warning("no more host memory for host_cache_bytes: %s", error)

    def _set_page_bytes(self, page_bytes: int) -> None:
        ledger = self.cache.ledger
        if not ledger.page_bytes:
            ledger.page_bytes = page_bytes
            self._memory.configure(page_bytes)

    def _fill(
        self,
        numbers: Numbers,
        at: list[int],
        copy: Callable[[Sequence[int], memoryview, Numbers], None],
        values: Sequence[tuple[Any, ...]],
        versions: Sequence[bytes | None],
        placed: list[int],
    ) -> None:
        """Copy features to their pages, which nobody else uses meanwhile."""
        cache = self.cache
        these = numbers[at]
        upload = self._memory.upload(cache.page_lists(these.tolist()))
        memory, offsets = upload.memory()
        whole = offsets >= 0
        if whole.any():
            part = [n for n, is_whole in zip(at, whole.tolist(), strict=True) if is_whole]
            copy(part, memory, offsets[whole])
        for n in np.flatnonzero(~whole).tolist():  # page by page
            buffers = upload.buffers(n)
            held = np.empty(sum(map(len, buffers)), np.uint8)
            copy([at[n]], held.data, np.zeros(1, np.int64))
            done = 0
            for buffer in buffers:
                buffer[:] = held[done : done + len(buffer)].data
                done += len(buffer)
        with self.lock:
            cache.finish_loading(
                these, [values[n] for n in at], [versions[n] for n in at] if versions else None
            )
            placed.clear()
            self._settle()

    # The tier

    def are_here(self, numbers: Numbers) -> NDArray[np.bool_]:
        """Which of these features are here. Takes no lock."""
        entries = self.cache.entries
        here: NDArray[np.bool_] = numbers < entries.count
        here[here] = self.cache.are_cached(numbers[here])
        return here

    def has_room(self) -> bool:
        """Whether the budget is not used up. Takes no lock."""
        return self.cache.ledger.fits(1, 1)

    def release(self, numbers: Numbers) -> None:
        """Stop keeping these features."""
        with self.lock:
            self._catch_up()
            self.cache.release(numbers)

    def clear(self) -> None:
        """Stop keeping everything, and free the memory as soon as no reader needs it."""
        with self.lock:
            self._catch_up()
            self.cache.release(np.arange(len(self.cache.entries)))
            self._clearing = True
            self._settle()

    def _settle(self) -> None:
        if self._clearing and self.cache.idle:
            self._clearing = False
            if not self.cache.ledger.held_pages:
                self.cache.forget_pages()
                self._memory.reset()

    def close(self) -> None:
        """Free the memory, as soon as no reader needs it."""
        self._is_closed = True
        self.clear()

    def check(self) -> None:
        """Recompute all totals; raises AssertionError on a difference."""
        with self.lock:
            self._catch_up()
            check_cache(self.cache)

    def figures(self) -> dict[str, int]:
        """What it holds and has done: see StoreStats. Takes no lock."""
        ledger = self.cache.ledger
        return {
            "host_hits": self.hits,
            "host_items": ledger.cached_items,
            "host_cached_bytes": ledger.cached_bytes,
            "host_reserved_bytes": self._memory.reserved_bytes,
        }
