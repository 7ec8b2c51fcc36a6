"""Which pages are free, and all totals of bytes, items and pages."""

import numpy as np

from gpucache_pipes.cache.entries import Pages


class Ledger:
    """Gives out pages, and counts pages, bytes and items against the budget.

    Invariants, which `check` recomputes from what the entries hold:

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
        # Pages that were used and freed: a stack, the first `_top` of an array. And the first page
        # that was never used: so an arena of millions of new pages need not be listed.
        self._freed: Pages = np.empty(64, np.int64)
        self._top = 0
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

    # Pages

    @property
    def free_pages(self) -> int:
        """Pages that no entry holds."""
        return self._top + self.pages - self._fresh

    @property
    def held_pages(self) -> int:
        """Pages that entries hold."""
        return self.cached_pages + self.bypassed_pages

    def add_pages(self, count: int) -> None:
        """The arena has grown by `count` pages, which are free."""
        self.pages += count

    def take(self, count: int) -> Pages:
        """`count` pages, of which there must be as many free ones."""
        assert count <= self.free_pages
        reused = min(count, self._top)
        self._top -= reused
        fresh = np.arange(self._fresh, self._fresh + count - reused)
        self._fresh += count - reused
        if not reused:
            return fresh
        return np.concatenate([self._freed[self._top : self._top + reused][::-1], fresh])

    def free(self, pages: Pages) -> None:
        """Free these pages, which were taken."""
        kept = self.kept(pages)
        self.retiring -= len(pages) - len(kept)
        top = self._top + len(kept)
        if top > len(self._freed):
            self._freed = np.concatenate([self._freed, np.empty(top + top // 4, np.int64)])
        self._freed[self._top : top] = kept[::-1]
        self._top = top

    def kept(self, pages: Pages) -> Pages:
        """Those of `pages` that are not retiring."""
        return pages[pages < self.pages] if self.retiring else pages

    def retire(self, keep: int) -> None:
        """Give out none of the pages from `keep` on. They end when what holds them is freed."""
        assert not self.retiring and keep <= self.pages
        freed = self._freed[: self._top]
        freed = freed[freed < keep]
        self.retiring = max(0, self._fresh - keep) - (self._top - len(freed))
        self._set_freed(freed)
        self._fresh = min(self._fresh, keep)
        self._retired = self.pages - keep
        self.pages = keep

    def keep_all(self, held: Pages) -> None:
        """Take `retire` back: batches in flight need the pages. `held` are those of all entries."""
        self.pages += self._retired
        self._fresh = max(self._fresh, int(held.max(initial=-1)) + 1)
        self._set_freed(np.setdiff1d(np.arange(self._fresh), held))
        self.retiring = 0

    def renumbered(self, pages: int) -> None:
        """There are `pages` pages now, all of them held."""
        assert not self.retiring and pages == self.held_pages
        self._top = 0
        self.pages = self._fresh = pages

    def _set_freed(self, pages: Pages) -> None:
        self._freed = pages
        self._top = len(pages)

    def forget_pages(self) -> None:
        """Start anew without an arena. Only while no entry holds a page."""
        assert not self.held_pages
        self._top = self._fresh = 0
        self.retiring = 0
        self.pages = 0
        self.page_bytes = 0
        self.set_ceiling(None)

    # Totals

    def count(self, items: int, pages: int, charge: int, nbytes: int, *, cached: bool) -> None:
        """So much has come to what is cached, or to what is bypassed; negative, has left it."""
        if cached:
            self.cached_items += items
            self.cached_pages += pages
            self.charged_bytes += charge
            self.cached_bytes += nbytes
        else:
            self.bypassed_pages += pages

    def check(self, held: Pages, expected: dict[str, int]) -> None:
        """Compare with the pages that entries hold, and with totals. Raises AssertionError."""
        expected = {**expected, "retiring": int((held >= self.pages).sum())}
        for name, value in expected.items():
            _require(getattr(self, name) == value, f"{name}: {getattr(self, name)} != {value}")
        everything = np.sort(np.concatenate([held[held < self.pages], self._freed[: self._top]]))
        whole = np.array_equal(everything, np.arange(self._fresh))
        _require(whole, "a page has two owners or none")
        _require(self._fresh <= self.pages, "pages are used that do not exist")
        _require(self.fits(0, 0, items=0), f"over budget: {expected}")


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(f"ledger: {what}")
