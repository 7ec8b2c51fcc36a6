"""Which entry holds which pages, and all totals of bytes, items and pages."""

from collections.abc import Iterable, Sequence

from gpucache_pipes.cache.entry import Entry


class Ledger:
    """Assigns pages to entries, and counts pages, bytes and items against the budget.

    Invariants, which `check` recomputes from the entries:

        free_pages + cached_pages + bypassed_pages == pages + retiring
        cached_bytes <= charged_bytes <= max_bytes
        cached_items <= max_items,  cached_pages <= ceiling

    A feature is charged the bytes that it spans and what it leaves unused of its last page, without
    the up to 15 bytes that align the feature to 16: so a budget of exactly n features of one tensor
    holds n, and badly fitting pages cannot take more memory than the budget.

    Any page may hold cached or bypassed features, and a feature changes from one to the other in
    place. The number of pages exceeds the budget by the most that batches in flight have needed at
    one time.
    """

    def __init__(self, max_bytes: int | None, max_items: int | None) -> None:
        self.max_bytes = max_bytes
        self.max_items = max_items
        self.page_bytes = 0
        self.pages = 0
        self._retired = 0
        # The most pages that cached features may hold. Set once the device has no more memory.
        self.ceiling: int | None = None
        # Whether there is any limit, so that something may have to be evicted.
        self.bounded = False
        self.set_ceiling(None)
        # Pages that were used and freed, and the first page that was never used: so an arena of
        # millions of new pages need not be listed.
        self._freed: list[int] = []
        self._fresh = 0
        # Pages that are held and will not exist any more when they are freed.
        self.retiring = 0
        self.cached_pages = 0
        self.cached_bytes = 0
        self.charged_bytes = 0
        self.cached_items = 0
        self.bypassed_pages = 0

    @property
    def useful_pages(self) -> int | None:
        """About how many pages the budget can fill; None without a limit in bytes."""
        if self.max_bytes is None or not self.page_bytes:
            return None
        return -(-self.max_bytes // self.page_bytes)

    def set_ceiling(self, pages: int | None) -> None:
        """Cached features may hold at most so many pages from now on; None is no such limit."""
        self.ceiling = pages
        self.bounded = not (self.max_bytes is self.max_items is pages is None)

    def demand(self, span: int) -> tuple[int, int]:
        """Pages that a feature of `span` bytes takes, and what it counts against max_bytes."""
        if not span:
            return 0, 0
        pages = -(-span // self.page_bytes)
        return pages, span + pages * self.page_bytes - -(-span // 16) * 16

    def fits(self, pages: int, charge: int, items: int = 1) -> bool:
        """Whether the budget has room for this much in addition to all that is cached."""
        return (
            (self.max_items is None or self.cached_items + items <= self.max_items)
            and (self.max_bytes is None or self.charged_bytes + charge <= self.max_bytes)
            and (self.ceiling is None or self.cached_pages + pages <= self.ceiling)
        )

    def could_fit(self, pages: int, charge: int) -> bool:
        """Whether the budget would have room for this much if nothing else were cached."""
        return (self.max_bytes is None or charge <= self.max_bytes) and (
            self.ceiling is None or pages <= self.ceiling
        )

    @property
    def free_pages(self) -> int:
        """Pages that no entry holds."""
        return len(self._freed) + self.pages - self._fresh

    def add_pages(self, count: int) -> None:
        """The arena has grown by `count` pages, which are free."""
        self.pages += count

    def take(self, entry: Entry, pages: int, charge: int, nbytes: int, *, cached: bool) -> bool:
        """Assign free pages to `entry`; returns False, and assigns none, if there are too few."""
        freed = self._freed
        if len(freed) + self.pages - self._fresh < pages:
            return False
        assert not (entry.pages or entry.cached)
        reused = min(pages, len(freed))
        fresh = range(self._fresh, self._fresh + pages - reused)
        entry.pages = (*reversed(freed[len(freed) - reused :]), *fresh) if reused else fresh
        del freed[len(freed) - reused :]
        self._fresh = fresh.stop
        entry.nbytes = nbytes
        entry.charge = charge
        entry.cached = cached
        self._count(entry, +1)
        return True

    def free(self, entry: Entry) -> None:
        """Free the pages of `entry`."""
        self._count(entry, -1)
        kept = self.kept(entry.pages)
        self.retiring -= len(entry.pages) - len(kept)
        self._freed.extend(reversed(kept))
        entry.pages = ()
        entry.nbytes = entry.charge = 0
        entry.cached = False

    def kept(self, pages: Sequence[int]) -> Sequence[int]:
        """Those of `pages` that are not retiring."""
        return [page for page in pages if page < self.pages] if self.retiring else pages

    def retire(self, keep: int) -> None:
        """Give out none of the pages from `keep` on. They end when what holds them is freed."""
        assert not self.retiring and keep <= self.pages
        freed = [page for page in self._freed if page < keep]
        self.retiring = max(0, self._fresh - keep) - (len(self._freed) - len(freed))
        self._freed = freed
        self._fresh = min(self._fresh, keep)
        self._retired = self.pages - keep
        self.pages = keep

    def keep_all(self, entries: Iterable[Entry]) -> None:
        """Take `retire` back: batches in flight need the pages."""
        self.pages += self._retired
        held = {page for entry in entries for page in entry.pages}
        self._fresh = max(self._fresh, max(held, default=-1) + 1)
        self._freed = [page for page in range(self._fresh) if page not in held]
        self.retiring = 0

    def renumbered(self, pages: int) -> None:
        """There are `pages` pages now, all of them held."""
        assert not self.retiring and pages == self.held_pages
        self._freed.clear()
        self.pages = self._fresh = pages

    def bypass(self, entry: Entry) -> None:
        """Count `entry`, which is cached, as bypassed. It keeps its pages."""
        self._count(entry, -1)
        entry.cached = False
        self._count(entry, +1)

    def _count(self, entry: Entry, sign: int) -> None:
        if entry.cached:
            self.cached_pages += sign * len(entry.pages)
            self.cached_bytes += sign * entry.nbytes
            self.charged_bytes += sign * entry.charge
            self.cached_items += sign
        else:
            self.bypassed_pages += sign * len(entry.pages)

    @property
    def held_pages(self) -> int:
        """Pages that entries hold."""
        return self.cached_pages + self.bypassed_pages

    def forget_pages(self) -> None:
        """Start anew without an arena. Only while no entry holds a page."""
        assert not self.held_pages
        self._freed.clear()
        self._fresh = 0
        self.retiring = 0
        self.pages = 0
        self.page_bytes = 0
        self.set_ceiling(None)

    def check(self, entries: Iterable[Entry]) -> None:
        """Recompute every total from `entries`, which are all. Raises AssertionError."""
        held = [e for e in entries if e.pages or e.cached]
        cached = [e for e in held if e.cached]
        owned = [page for e in held for page in e.pages if page < self.pages]
        expected = {
            "retiring": sum(page >= self.pages for e in held for page in e.pages),
            "cached_pages": sum(len(e.pages) for e in cached),
            "cached_bytes": sum(e.nbytes for e in cached),
            "charged_bytes": sum(e.charge for e in cached),
            "cached_items": len(cached),
            "bypassed_pages": sum(len(e.pages) for e in held if not e.cached),
        }
        for name, value in expected.items():
            _require(getattr(self, name) == value, f"{name}: {getattr(self, name)} != {value}")
        everything = sorted([*owned, *self._freed])
        _require(everything == list(range(self._fresh)), "a page has two owners or none")
        _require(self._fresh <= self.pages, "pages are used that do not exist")
        _require(self.fits(0, 0, items=0), f"over budget: {expected}")


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(f"ledger: {what}")
