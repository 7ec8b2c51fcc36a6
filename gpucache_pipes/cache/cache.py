"""The bookkeeping of a store: which files are cached, loading, pinned, and which are evicted.

Pure logic over plain values: no lock, no thread, no device. Its owner calls every method with the
lock of the store held. What is done to a batch is a few operations on arrays, whatever its size.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpucache_pipes.cache.allocation import Allocator
from gpucache_pipes.cache.arena_size import ArenaSize, Grow
from gpucache_pipes.cache.entries import NOWHERE, Entries, Numbers, Pages, distinct
from gpucache_pipes.cache.layouts import LayoutTable
from gpucache_pipes.cache.ledger import Ledger
from gpucache_pipes.cache.pins import Pins
from gpucache_pipes.cache.places import first_pages, pages_in
from gpucache_pipes.cache.policies import Policy
from gpucache_pipes.cache.policy_log import PolicyLog
from gpucache_pipes.cache.states import (
    ABSENT,
    BYPASSED,
    CACHED,
    FILLING,
    FILLING_BYPASSED,
    LOADING,
    READY,
    counts_as_cached,
)


class Cache:
    """Entries, the ledger that counts them, the policy that orders them, and the pins.

    Attributes:
        entries: of all known files, by number.
        layouts: of the features that hold pages.
        pins: the pending batches, and what they need.
        arena: how many pages there are, and how many there should be.
        allocator: assigns pages to what is being loaded.
        log: what the policy has not been told yet.
        loading: how many entries are LOADING or FILLING.
        bypassed: how many entries are BYPASSED.
        evictions: how many entries have been evicted.
        not_cached: what is being loaded and must not become cached.
        evict_nothing: what is being loaded and nothing may be evicted for.
        is_kept_below: whether another tier keeps what is not cached, so that it is read also if
            nothing may be evicted for it.
    """

    def __init__(
        self,
        ledger: Ledger,
        policy: Policy,
        grow: Grow,
        shrink: Callable[[int], None] = lambda pages: None,
    ) -> None:
        self.ledger = ledger
        self.policy = policy
        self.entries = Entries()
        self.layouts = LayoutTable()
        self.pins = Pins()
        self.log = PolicyLog(policy, self.entries)
        self.loading = 0
        self.bypassed = 0
        self.evictions = 0
        self.not_cached: set[int] = set()
        self.evict_nothing: set[int] = set()
        self.is_kept_below: Callable[[], bool] = lambda: False
        self.arena = ArenaSize(self, grow, shrink)
        self.allocator = Allocator(self)

    # Pending batches

    def open_batch(self, numbers: Numbers, owner: object, *, report: bool = True) -> int:
        """Pin these entries (repeats allowed) until close_batches; returns the batch's number.

        With `report` the policy will be told that `owner` requests them.
        """
        if report and len(numbers) and self.ledger.bounded:
            self.log.requested(owner, numbers)
        return self.pins.open(numbers)

    def close_batches(self, batches: Iterable[int]) -> None:
        """Unpin; free bypassed entries that no batch needs any more. Ignores unknown batches."""
        closed = self.pins.close(batches)
        if self.bypassed and closed:
            numbers = np.concatenate(closed)
            numbers = numbers[self.entries.state[numbers] == BYPASSED]
            self._drop(self.pins.without_pins(numbers))

    def close_lost_batches(self) -> None:
        """Close the batches that have ended, or whose holders have been collected."""
        if lost := self.pins.lost():
            self.close_batches(lost)

    @property
    def idle(self) -> bool:
        """Whether no batch is open and no entry is being loaded."""
        self.close_lost_batches()
        return not self.pins.batches and not self.loading

    # Loading

    def start_loading(self, numbers: Numbers, *, evict: bool = True) -> list[int]:
        """ABSENT -> LOADING, where that is their state; returns these, each once and in order.

        The others that are being loaded may be cached again, if they were released meanwhile.
        Without `evict` no other entry is evicted for what nobody else has requested.
        """
        states = self.entries.state[numbers]
        absent = list(dict.fromkeys(numbers[states == ABSENT].tolist()))
        if absent:
            self.entries.move(np.array(absent, np.intp), LOADING)
            self.loading += len(absent)
        if self.not_cached:
            self.not_cached.difference_update(numbers.tolist())
        if not evict:
            self.evict_nothing.update(absent)
        elif self.evict_nothing:
            self.evict_nothing.difference_update(numbers.tolist())
        return absent

    def left_over(self) -> set[int]:
        """Entries of which more is remembered until their loading ends."""
        return self.not_cached | self.evict_nothing

    def is_loading(self, numbers: Numbers) -> NDArray[np.bool_]:
        """Which of these entries are being loaded."""
        states = self.entries.state[numbers]
        return (states > ABSENT) & (states < READY)

    def count(self, layouts: Numbers, sign: int, *, cached: bool) -> None:
        """Features of these layouts have come (sign 1) or gone (-1)."""
        sums = (sign * total for total in self.layouts.sums(layouts))
        self.ledger.count(sign * len(layouts), *sums, cached=cached)

    def finish_loading(
        self,
        numbers: Numbers,
        values: Sequence[tuple[Any, ...]],
        versions: Sequence[bytes | None] | None = None,
    ) -> None:
        """FILLING -> CACHED or BYPASSED, with the plain values and versions of their files."""
        entries = self.entries
        filled = numbers.tolist()
        if any(values):
            entries.values.update((n, v) for n, v in zip(filled, values, strict=True) if v)
        if versions is not None:
            entries.versions.update(zip(filled, versions, strict=True))
        self._end_loading(numbers)
        cached = entries.state[numbers] == FILLING
        if cached.all():
            self._insert(numbers)
            return
        self._insert(numbers[cached])
        bypassed = numbers[~cached]
        entries.move(bypassed, BYPASSED)
        self.bypassed += len(bypassed)
        self._drop(self.pins.without_pins(bypassed))

    def _insert(self, numbers: Numbers) -> None:
        self.entries.move(numbers, CACHED)
        if len(numbers):
            self.log.inserted(numbers)

    def _end_loading(self, numbers: Numbers) -> None:
        self.loading -= len(numbers)
        for left_over in (self.not_cached, self.evict_nothing):
            if left_over:
                left_over.difference_update(numbers.tolist())

    def fail_loading(self, numbers: Numbers) -> None:
        """LOADING or FILLING -> ABSENT, for those that are in one of these states."""
        numbers = numbers[self.is_loading(numbers)]
        self._free(numbers)
        self._end_loading(numbers)
        self.entries.move(numbers, ABSENT)

    def abandon_loading(self, number: int) -> bool:
        """Give up an entry whose reader hangs. Returns whether the reader may still write to it.

        If it has pages, it keeps them until `fail_loading`, and another entry takes its place for
        new requests.
        """
        numbers = np.array([number], np.intp)
        if self.entries.place[number] == NOWHERE:
            self.fail_loading(numbers)
            return False
        self.not_cached.add(number)
        self._bypass(numbers[self.entries.state[numbers] == FILLING], FILLING_BYPASSED)
        self.entries.renew(number)
        return True

    def restart_loading(self, numbers: Numbers) -> None:
        """FILLING -> LOADING: another reader reads them anew."""
        filling = numbers[self.entries.state[numbers] != LOADING]
        self._free(filling)
        self.entries.move(filling, LOADING)

    def count_cached(self, numbers: Numbers) -> int:
        """How many of these files are cached, or being read into the cache; repeats count once."""
        states = self.entries.state[self.entries.current(distinct(numbers))]
        return int(counts_as_cached(states).sum())

    # Leaving the cache

    def release(self, numbers: Numbers) -> None:
        """Stop caching these. What pending batches need stays, bypassed, until they have it."""
        state = self.entries.state
        numbers = distinct(numbers)
        self.not_cached.update(numbers[self.is_loading(numbers)].tolist())
        self._bypass(numbers[state[numbers] == FILLING], FILLING_BYPASSED)
        cached = numbers[state[numbers] == CACHED]
        self._drop(self.pins.without_pins(cached))
        pinned = cached[state[cached] == CACHED]
        self.log.removed(pinned)
        self._bypass(pinned, BYPASSED)
        self.bypassed += len(pinned)

    def _bypass(self, numbers: Numbers, to: int) -> None:
        """Count as bypassed what was cached. It keeps its pages."""
        layouts = self.layouts.of_places(self.entries.place[numbers])
        self.count(layouts, -1, cached=True)
        self.count(layouts, +1, cached=False)
        self.entries.move(numbers, to)

    def renew(self, number: int) -> None:
        """The file has changed: keep the READY bytes for pending batches only."""
        if self.entries.state[number] < READY or number in self.entries.newer:
            return
        self.release(np.array([number], np.intp))
        if self.entries.state[number] >= READY:
            self.entries.renew(number)

    def forget_pages(self) -> None:
        """Start anew without an arena. Only while no entry holds a page."""
        self.ledger.forget_pages()
        self.arena.forget()
        self.layouts.forget_unused()

    def evict(self, victims: Collection[int], *, told: bool = False) -> None:
        """Drop cached entries that are not pinned. `told` means that the policy knows."""
        self.evictions += len(victims)
        numbers = np.fromiter(victims, np.intp)
        self.entries.evicted[numbers] = True
        self._drop(numbers, told=told)

    def _drop(self, numbers: Numbers, *, told: bool = False) -> None:
        """CACHED or BYPASSED -> ABSENT."""
        if not len(numbers):
            return
        cached = numbers[self.entries.state[numbers] == CACHED]
        if not told:
            self.log.removed(cached)
        self.bypassed -= len(numbers) - len(cached)
        self._free(numbers)
        self.entries.move(numbers, ABSENT)

    def _free(self, numbers: Numbers) -> None:
        """Free the pages of these entries, where they have any. The caller changes the states."""
        entries = self.entries
        numbers = numbers[entries.place[numbers] != NOWHERE]
        if not len(numbers):
            return
        layouts = self.layouts.of_places(entries.place[numbers])
        cached = counts_as_cached(entries.state[numbers])
        self.count(layouts[cached], -1, cached=True)
        self.count(layouts[~cached], -1, cached=False)
        self.ledger.free(self.pages_of(numbers))
        self.layouts.disuse(layouts)
        entries.place[numbers] = NOWHERE
        for table in (entries.scattered, entries.values, entries.versions):
            if table:
                for number in numbers.tolist():
                    table.pop(number, None)

    def are_cached(self, numbers: Numbers) -> NDArray[np.bool_]:
        """Which of these entries are cached, or being read into the cache. Takes no lock."""
        return counts_as_cached(self.entries.state[numbers])

    def page_lists(self, numbers: Sequence[int]) -> list[Sequence[int]]:
        """The pages of each of these entries, which hold some: a range where they lie in a row."""
        places = self.entries.place[np.array(numbers, np.intp)]
        counts = self.layouts.pages[self.layouts.of_places(places)].tolist()
        first = first_pages(places).tolist()
        lists: list[Sequence[int]] = [
            range(page, page + count) for page, count in zip(first, counts, strict=True)
        ]
        for at in np.flatnonzero(places < 0).tolist():
            lists[at] = self.entries.scattered[numbers[at]].tolist()
        return lists

    def pages_of(self, numbers: Numbers) -> Pages:
        """The pages of these entries, which hold some, end to end."""
        places = self.entries.place[numbers]
        counts = self.layouts.pages[self.layouts.of_places(places)]
        return pages_in(places, counts, numbers, self.entries.scattered)
