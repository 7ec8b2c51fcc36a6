"""Pages for the files of a group that has been opened."""

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np

from gpucache_pipes.cache.admission import Admission
from gpucache_pipes.cache.arena_size import NoPagesError
from gpucache_pipes.cache.entries import LAYOUT_SHIFT, Numbers
from gpucache_pipes.cache.places import scattered_among
from gpucache_pipes.cache.states import FILLING, FILLING_BYPASSED

if TYPE_CHECKING:
    from gpucache_pipes.cache.cache import Cache


class Allocator:
    """Assigns pages to LOADING entries, by groups. A part of Cache."""

    def __init__(self, owner: "Cache") -> None:
        self._cache = owner

    def layout_number(self, number: int, layout: Any, span: int, nbytes: int) -> int:
        """The number of the layout of an entry, of which a feature takes so many bytes.

        Raises MemoryError if that is more than the whole budget.
        """
        cache = self._cache
        limit = cache.ledger.max_bytes
        if limit is not None and nbytes > limit:
            raise MemoryError(
                f"{cache.entries.paths[number]!r} holds {nbytes} bytes, which is more than "
                f"max_cache_bytes={limit}; raise the limit or split the feature"
            )
        return cache.layouts.number(layout, *cache.ledger.demand(span), nbytes)

    def fits(self, layouts: Numbers) -> bool:
        """Whether the budget has room for features of these layouts, so that nothing must go."""
        cache = self._cache
        pages, charge, _ = cache.layouts.sums(layouts)
        return cache.ledger.fits(pages, charge, len(layouts))

    def allocate(self, numbers: Numbers, layouts: Numbers) -> dict[int, Exception]:
        """Assign pages to LOADING entries: cached if budget and policy admit them, else bypassed.

        Those that are not admitted, and that no batch needs, stay LOADING: they need not be read.

        Args:
            numbers: of the entries, each once.
            layouts: of their features, as `self.layouts` numbers them.

        Returns:
            The errors of entries that get no pages: a NoPagesError where there are none, or what
            the policy has raised.
        """
        cache = self._cache
        pages, charge, _ = cache.layouts.sums(layouts)
        have_pages = pages <= cache.ledger.free_pages and not cache.not_cached
        if have_pages and cache.ledger.fits(pages, charge, len(layouts)):
            self._assign(numbers, layouts, cached=True)
            return {}
        errors: dict[int, Exception] = {}
        cached, bypassed = self._admit(numbers.tolist(), layouts.tolist(), errors)
        for positions, is_cached in ((cached, True), (bypassed, False)):
            if positions:
                these = np.array(positions, np.intp)
                self._assign_all(numbers[these], layouts[these], errors, cached=is_cached)
        return errors

    def _admit(
        self, numbers: list[int], layouts: list[int], errors: dict[int, Exception]
    ) -> tuple[list[int], list[int]]:
        """The positions of those that are to be cached, and bypassed. Evicts for them."""
        cache = self._cache
        cached, bypassed = [], []
        admission = Admission(cache)
        try:
            for at, number in enumerate(numbers):
                evict = number not in cache.evict_nothing
                try:
                    if number not in cache.not_cached and admission.admit(
                        number, layouts[at], evict
                    ):
                        cached.append(at)
                    elif (evict or cache.is_kept_below()) and number in cache.pins.numbers():
                        bypassed.append(at)
                except Exception as error:  # of the policy
                    errors[number] = error
        finally:
            cache.evict(admission.victims, told=True)
        return cached, bypassed

    def _assign_all(
        self, numbers: Numbers, layouts: Numbers, errors: dict[int, Exception], *, cached: bool
    ) -> None:
        """Assign pages to all of these that there are pages for; note the errors of the others."""
        cache = self._cache
        ledger = cache.ledger
        total = cache.layouts.sums(layouts)[0]
        if total > ledger.free_pages:
            # A MemoryError says which file has no pages, which is found out below.
            with contextlib.suppress(MemoryError):
                cache.arena.grow(total, cache.layouts.pages.item(layouts[0]))
        if total <= ledger.free_pages:
            self._assign(numbers, layouts, cached=cached)
            return
        ceiling = ledger.ceiling
        for at, number in enumerate(numbers.tolist()):
            if cached and ledger.ceiling != ceiling:
                # The device has no more: decide anew which of the others are cached.
                errors.update(self.allocate(numbers[at:], layouts[at:]))
                return
            pages = cache.layouts.pages.item(layouts[at])
            try:
                if ledger.free_pages < pages and not cache.arena.find_pages(number, pages, cached):
                    path = cache.entries.paths[number]
                    raise NoPagesError(
                        f"no device memory for {path!r}: {pages} pages of {ledger.page_bytes} "
                        f"bytes needed, {ledger.free_pages} of {ledger.pages} free, the device "
                        "has no more and in-flight batches need the rest; lower depth, batch "
                        "size or max_cache_bytes"
                    )
                self._assign(numbers[at : at + 1], layouts[at : at + 1], cached=cached)
            except Exception as error:
                errors[number] = error

    def _assign(self, numbers: Numbers, layouts: Numbers, *, cached: bool) -> None:
        """LOADING -> FILLING, with pages of which there are enough."""
        cache = self._cache
        entries = cache.entries
        counts = cache.layouts.pages[layouts]
        pages = cache.ledger.take(int(counts.sum()))
        first, scattered = scattered_among(pages, counts)
        place = (layouts << LAYOUT_SHIFT) + first
        for at, these in scattered.items():
            place[at] = ~place[at]
            entries.scattered[int(numbers[at])] = these
        entries.move(numbers, FILLING if cached else FILLING_BYPASSED)
        entries.place[numbers] = place
        cache.layouts.use(layouts)
        cache.count(layouts, +1, cached=cached)
