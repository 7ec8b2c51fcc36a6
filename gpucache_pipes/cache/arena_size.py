"""ArenaSize: how many pages the arena of a cache has, and should have."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from gpucache_pipes.cache.entries import LAYOUT_SHIFT, Pages
from gpucache_pipes.cache.places import scattered_among
from gpucache_pipes.cache.states import CACHED

Grow = Callable[[int, int | None, int | None], int]
"""grow(needed, useful, known) -> pages added to the arena: see device.Backend."""

_SLACK = 0.02
"""More pages than a mean of a sample says, where files differ."""


class NoPagesError(MemoryError):
    """The device has no pages for a feature: batches in flight need all that there are."""


if TYPE_CHECKING:
    from gpucache_pipes.cache.cache import Cache


class ArenaSize:
    """Has the arena grow for what is known to be needed, and returns pages to the device.

    A part of Cache.

    Attributes:
        pages_per_file: an estimate, before enough files have been read.
        files_in_flight: the most files that pipelines have said they hold in pending batches.
        shrinking: whether pages have been retired that are still in the arena.
        files_to_come: how many different files each pipeline has said it will request.
    """

    def __init__(self, owner: "Cache", grow: Grow, shrink: Callable[[int], None]) -> None:
        self.pages_per_file = 0.0
        self.files_in_flight = 0
        self.files_to_come: dict[object, int] = {}
        # Files that were known before there was this arena.
        self._known_before = 0
        self._owner = owner
        self._ledger = owner.ledger
        self._grow = grow
        self._shrink = shrink
        self.shrinking = False

    def forget(self) -> None:
        """There is no arena any more."""
        self.pages_per_file = 0.0
        self.shrinking = False
        self.files_to_come.clear()
        self._known_before = len(self._owner.entries.paths)

    # Growing

    def grow(self, pages: int, each: int) -> bool:
        """Have `pages` free ones from the device, if it has them, for features of `each`."""
        ledger = self._ledger
        self.settle()
        if ledger.ceiling is None and not ledger.retiring:
            self._add(pages - ledger.free_pages, *self._wishes(each))
        return ledger.free_pages >= pages

    def find_pages(self, wanted: int, pages: int, cached: bool) -> bool:
        """Have `pages` free ones: from the device or, once that is full, by evicting."""
        ledger, owner = self._ledger, self._owner
        if self.grow(pages, pages):
            return True
        owner.log.report()
        victims: dict[int, None] = {}
        shortage = pages - ledger.free_pages
        for number in self._evictable(wanted):
            if shortage <= 0:
                break
            if number not in victims:
                victims[number] = None
                shortage -= len(ledger.kept(self._pages_of(number)))
        if shortage > 0:
            # Batches in flight hold the rest. They may grow the arena beyond the budget.
            if ledger.retiring:
                self._keep_retired()
                freed = sum(len(self._pages_of(number)) for number in victims)
                shortage = pages - ledger.free_pages - freed
            # At once for all batches in flight: a batch issues operations for each segment.
            wish = max(shortage, self._in_flight(pages) - ledger.bypassed_pages)
            if shortage > 0 and self._add(shortage, wish, wish) < shortage:
                return False
        owner.evict(list(victims))
        # Batches in flight need the rest: a cache that took it again would evict for each of them.
        ledger.set_ceiling(ledger.cached_pages + (pages if cached else 0))
        return True

    def _add(self, needed: int, useful: int | None, known: int | None) -> int:
        added = self._grow(needed, useful, known)
        self._ledger.add_pages(added)
        return added

    def _wishes(self, pages: int) -> tuple[int | None, int | None]:
        """What the budget can use, and what all known files need, in addition to what there is.

        `pages` are those of the entry that needs some now.
        """
        ledger = self._ledger
        each = self._pages_each(pages)
        named = len(self._owner.entries.paths) - self._known_before
        need = max(sum(self.files_to_come.values()), named) * each
        need = math.ceil(need if each == int(each) else need * (1 + _SLACK))
        in_flight = self._in_flight(pages)
        if ledger.max_items is not None:
            need = min(need, math.ceil(ledger.max_items * each) + in_flight)
        known = need - ledger.pages
        if not self.files_to_come:
            known = max(known, ledger.pages)  # more files will be named: double the arena
        if ledger.useful_pages is None:
            return None, known
        # Batches in flight take pages beyond the budget once that is used up.
        useful = ledger.useful_pages + in_flight - ledger.pages
        return useful, min(useful, known)

    def _pages_each(self, pages: int) -> float:
        """The mean number of pages of a feature, one of which has `pages`."""
        ledger = self._ledger
        if ledger.cached_items >= _ENOUGH:
            return ledger.cached_pages / ledger.cached_items
        return self.pages_per_file or float(pages)

    def _in_flight(self, pages: int) -> int:
        """About how many pages the features of all batches in flight take."""
        files = max(self.files_in_flight, len(self._owner.pins.numbers()))
        return math.ceil(files * self._pages_each(pages))

    def _evictable(self, wanted: int) -> Iterator[int]:
        """What may be evicted where pages must be found: the policy's victims, then any entry."""
        owner, entries = self._owner, self._owner.entries
        chosen = map(entries.latest, owner.policy.victims(entries.file(wanted)))
        pinned = owner.pins.numbers()
        others = (int(number) for number in entries.in_state(CACHED))
        for number in chain(chosen, others):
            if entries.state[number] == CACHED and number not in pinned:
                yield number

    def _pages_of(self, number: int) -> Pages:
        return self._owner.pages_of(np.array([number], np.intp))

    # Shrinking

    def retire(self, count: int) -> None:
        """Return the last `count` pages to the device, once no batch in flight needs them."""
        ledger = self._ledger
        if self.shrinking or count > ledger.pages:
            return
        ledger.retire(ledger.pages - count)
        self.shrinking = True
        owner = self._owner
        held = owner.entries.with_pages()
        each = owner.layouts.pages[owner.layouts.of_places(owner.entries.place[held])]
        owner.release(np.repeat(held, each)[owner.pages_of(held) >= ledger.pages])
        self.settle()

    def _keep_retired(self) -> None:
        """Take `retire` back."""
        self._ledger.keep_all(self._owner.pages_of(self._owner.entries.with_pages()))
        self.shrinking = False

    def settle(self) -> None:
        """Finish what `retire` began, if nothing holds the pages any more."""
        if self.shrinking and not self._ledger.retiring:
            self.shrinking = False
            self._shrink(self._ledger.pages)

    def needed_pages(self) -> list[int]:
        """Drop all but what batches in flight need; the pages of that, in order."""
        owner = self._owner
        if self.shrinking:
            self._keep_retired()
        owner.release(owner.pins.without_pins(owner.entries.in_state(CACHED)))
        pages: list[int] = np.sort(owner.pages_of(owner.entries.with_pages())).tolist()
        return pages

    def renumber(self, pages: Sequence[int]) -> None:
        """The arena now consists of these pages, the held ones, in this order."""
        owner, entries = self._owner, self._owner.entries
        held = entries.with_pages()
        layouts = owner.layouts.of_places(entries.place[held])
        moved = np.searchsorted(pages, owner.pages_of(held))
        first, scattered = scattered_among(moved, owner.layouts.pages[layouts])
        place = (layouts << LAYOUT_SHIFT) + first
        for at in scattered:
            place[at] = ~place[at]
        entries.place[held] = place
        entries.scattered = {int(held[at]): these for at, these in scattered.items()}
        self._ledger.renumbered(len(pages))
        self._ledger.set_ceiling(None)  # the device had no more before; now it has


_ENOUGH = 64
"""Cached features whose mean size is that of all."""
