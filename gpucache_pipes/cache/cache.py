"""What is cached, what is on its way and what must stay: the store's bookkeeping.

Pure logic over plain values: no lock, no thread, no device. The store calls everything here
with its lock held.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

from gpucache_pipes.cache.access_plan import AccessPlan
from gpucache_pipes.cache.entries import Entries
from gpucache_pipes.cache.entry import NOT_READY, SCATTERED, Entry, State
from gpucache_pipes.cache.ledger import Ledger
from gpucache_pipes.cache.pins import Pins
from gpucache_pipes.cache.policies import Policy

LAYOUT_SHIFT = 40
"""A row is (number of the layout << LAYOUT_SHIFT) + page; see Cache.rows."""

_MOST_LAYOUTS = 1024
"""Layouts that get a number. Where files have more, each likely has its own, and it is no use."""

_BUNDLE = 64
"""Requests are reported to the policy in bundles of at most so many batches."""

Grow = Callable[[int, int | None], int]
"""grow(needed, useful) -> pages added to the arena: at least `needed` or 0, and no more than
`useful` (None: no limit) beyond that."""


class Cache:
    """Entries, the ledger that counts them, the policy that orders them, and what is pinned.

    Attributes:
        entries: of all known files, by number.
        rows: for each number, what a batch needs to know in the usual case, as one number:
            the layout and the page, if it is READY in one page; SCATTERED if it is READY in
            any other way, else NOT_READY, which is less. So a batch that is all there, and all
            alike, is told from any other by its least and largest row, without looking at 256
            objects.
        layouts: the layouts by their number.
    """

    def __init__(self, ledger: Ledger, policy: Policy, grow: Grow) -> None:
        self.ledger = ledger
        self.policy = policy
        self.entries = Entries()
        self.rows = self.entries.rows
        self.layouts: list[Any] = []
        self.evictions = 0
        self._layout_numbers: dict[Any, int] = {}
        # Entries that are LOADING.
        self.loading = 0
        self._grow = grow
        self.pins = Pins()
        # READY entries that go with their last ticket.
        self._bypassed: set[Entry] = set()
        # Accesses that the policy has not been told of.
        self._unreported: deque[tuple[object, Sequence[int]]] = deque()

    # Tickets

    def open_ticket(self, numbers: Sequence[int], owner: object, *, report: bool = True) -> int:
        """Pin these entries (repeats allowed) until close_tickets.

        `report` to the policy that `owner` requests them.
        """
        if report and numbers and self.ledger.bounded:
            # First: a policy may raise.
            if len(self._unreported) >= _BUNDLE:
                self.report_accesses()
            self._unreported.append((owner, numbers))
        return self.pins.open(numbers)

    def close_tickets(self, tickets: Iterable[int]) -> None:
        """Unpin; transient entries that nobody needs any more go. Unknown tickets are ignored."""
        closed = self.pins.close(tickets)
        if self._bypassed:
            for number in set().union(*closed) - self.pins.numbers():
                if self.entries[number] in self._bypassed:
                    self._drop(self.entries[number])

    def close_lost_tickets(self) -> None:
        """Close those that nobody holds any more."""
        if lost := self.pins.lost():
            self.close_tickets(lost)

    @property
    def idle(self) -> bool:
        """Whether no ticket is open and nothing is being loaded."""
        self.close_lost_tickets()
        return not self.pins.tickets and not self.loading

    @property
    def bypassed_items(self) -> int:
        """READY entries that go with the last ticket that needs them."""
        return len(self._bypassed)

    # Loading

    def start_loading(self, entry: Entry, *, evict: bool = True) -> None:
        """ABSENT -> LOADING. Unless `evict`, nothing else goes for it."""
        assert entry.state is State.ABSENT
        entry.state = State.LOADING
        entry.keep = True
        entry.evict = evict
        self.loading += 1

    def place(self, entry: Entry, span: int, nbytes: int) -> bool:
        """Give pages to a LOADING entry: cached if budget and policy allow, else transient.

        False if it may not be cached and nobody needs it otherwise: then it need not be read.
        Raises MemoryError if it is larger than the whole budget, or if no pages can be had.
        """
        ledger = self.ledger
        if ledger.max_bytes is not None and nbytes > ledger.max_bytes:
            raise MemoryError(
                f"{entry.path!r} holds {nbytes} bytes, which is more than "
                f"max_cache_bytes={ledger.max_bytes}; raise the limit or split the feature"
            )
        pages, charge = ledger.pages_for(span), ledger.charge(span)
        cached = entry.keep and self._make_room(entry, pages, charge)
        if not cached and (entry.number not in self.pins.numbers() or not entry.evict):
            return False
        if ledger.free_pages < pages and not self._find_pages(entry, pages, cached):
            raise MemoryError(
                f"no device memory for {entry.path!r}: {pages} pages of {ledger.page_bytes} bytes "
                f"needed, {ledger.free_pages} of {ledger.pages} free, the device has no more and "
                "in-flight batches need the rest; lower depth, batch size or max_cache_bytes"
            )
        ledger.take(entry, pages, charge, nbytes, cached=cached)
        return True

    def _make_room(self, wanted: Entry, pages: int, charge: int) -> bool:
        """Evict until the budget has room, or evict nothing and return False."""
        if self.ledger.fits(pages, charge):
            return True
        if not wanted.evict or not self.ledger.could_fit(pages, charge):
            return False
        self.report_accesses()
        self.close_lost_tickets()
        pinned = self.pins.numbers()
        going: dict[Entry, None] = {}
        freed_pages = freed = 0
        for victim in self.policy.victims(wanted.file):
            entry = self.entries.latest(victim)
            if not entry.cached:
                raise RuntimeError(f"policy {self.policy!r} would evict {entry.path!r}: not cached")
            if entry.number in pinned or entry in going:
                continue
            going[entry] = None
            freed_pages += len(entry.pages)
            freed += entry.charge
            if self.ledger.fits(pages - freed_pages, charge - freed, 1 - len(going)):
                break
        else:
            return False
        for entry in going:
            self.evictions += 1
            self._drop(entry)
        return True

    def _find_pages(self, wanted: Entry, pages: int, cached: bool) -> bool:
        """Have `pages` free ones: from the device, or once that is full, from the cache."""
        ledger = self.ledger
        if ledger.ceiling is None:
            limit = ledger.useful_pages
            useful = None if limit is None else limit - ledger.pages
            ledger.add_pages(self._grow(pages - ledger.free_pages, useful))
            if ledger.free_pages >= pages:
                return True
        self.report_accesses()
        going: dict[Entry, None] = {}
        shortage = pages - ledger.free_pages
        for entry in self._evictable(wanted):
            if shortage <= 0:
                break
            if entry not in going:
                going[entry] = None
                shortage -= len(entry.pages)
        if shortage > 0:
            # Batches in flight hold the rest, and may have what the cache may not.
            added = self._grow(shortage, 0)
            ledger.add_pages(added)
            if added < shortage:
                return False
        for entry in going:
            self.evictions += 1
            self._drop(entry)
        # In-flight batches need the rest: a cache that took it back would evict for each of them.
        ledger.ceiling = ledger.cached_pages + (pages if cached else 0)
        return True

    def _evictable(self, wanted: Entry) -> Iterator[Entry]:
        """What may go where something must: in the order of the policy, and then anything."""
        chosen = map(self.entries.latest, self.policy.victims(wanted.file))
        pinned = self.pins.numbers()
        for entry in chain(chosen, self.entries.values()):
            if entry.cached and entry.state is State.READY and entry.number not in pinned:
                yield entry

    def finish(self, entry: Entry, layout: Any, values: tuple[Any, ...]) -> Sequence[Any]:
        """LOADING -> READY. Returns the tickets that waited."""
        assert entry.state is State.LOADING
        if entry.cached:
            # First: a policy may raise, and then the entry is still LOADING.
            self.report_accesses()
            self.policy.on_insert(entry.file)
        self.loading -= 1
        entry.state = State.READY
        entry.layout = layout
        entry.values = values
        self.rows[entry.number] = (
            self._row(layout, entry.pages[0]) if len(entry.pages) == 1 else SCATTERED
        )
        if not entry.cached:
            self._bypassed.add(entry)
            if entry.number not in self.pins.numbers():
                self._drop(entry)
        waiters, entry.waiters = entry.waiters, ()
        return waiters

    def _row(self, layout: Any, page: int) -> int:
        number = self._layout_numbers.get(layout)
        if number is None:
            number = len(self.layouts)
            if number == _MOST_LAYOUTS:
                return SCATTERED
            self._layout_numbers[layout] = number
            self.layouts.append(layout)
        return (number << LAYOUT_SHIFT) + page

    def give_up(self, entry: Entry) -> Sequence[Any]:
        """LOADING -> ABSENT. Returns the tickets that waited."""
        if entry.state is not State.LOADING:  # after an interrupt
            return ()
        self.loading -= 1
        self.ledger.give_back(entry)
        entry.state = State.ABSENT
        waiters, entry.waiters = entry.waiters, ()
        return waiters

    def forsake(self, entry: Entry) -> Sequence[Any]:
        """Give up a LOADING entry whose reader is stuck. Returns the tickets that waited.

        If it has pages, the reader may yet write to them: it stays LOADING until somebody gives it
        up, and the file goes on as another entry.
        """
        if not entry.pages:
            return self.give_up(entry)
        entry.keep = False
        if entry.cached:
            self.ledger.bypass(entry)
        waiters, entry.waiters = entry.waiters, ()
        self.entries.renew(entry)
        return waiters

    def start_again(self, entry: Entry) -> None:
        """LOADING by another reader, without what it has got so far; who waits goes on waiting."""
        self.ledger.give_back(entry)

    # Going

    def release(self, entries: Iterable[Entry]) -> None:
        """Stop caching these. What in-flight batches need stays until they have it."""
        self.report_accesses()
        pinned = self.pins.numbers()
        for entry in entries:
            entry.keep = False
            if entry.cached and entry.state is State.READY and entry.number not in pinned:
                self._drop(entry)
            elif entry.cached:
                if entry.state is State.READY:
                    self.policy.on_remove(entry.file)
                    self._bypassed.add(entry)
                self.ledger.bypass(entry)

    def renew(self, entry: Entry) -> None:
        """The file has changed: what is READY of it is for open tickets only, and for no other."""
        if entry.state is not State.READY or entry.number in self.entries.newer:
            return
        self.release([entry])
        if entry.state is State.READY:
            self.entries.renew(entry)

    def forget_pages(self) -> None:
        """The arena is gone. Only while no entry holds a page."""
        self.ledger.forget_pages()
        self._layout_numbers.clear()
        self.layouts = []

    def _drop(self, entry: Entry) -> None:
        """READY -> ABSENT."""
        assert entry.state is State.READY
        if entry.cached:
            self.policy.on_remove(entry.file)
        self._bypassed.discard(entry)
        self.ledger.give_back(entry)
        entry.state = State.ABSENT
        entry.layout = None
        entry.values = ()
        self.rows[entry.number] = NOT_READY

    # The policy's news

    def report_accesses(self) -> None:
        """Tell the policy of the requests that it has not heard of."""
        while self._unreported:
            owner, numbers = self._unreported.popleft()
            self.policy.on_access(self.entries.files(numbers), owner)

    def begin_epoch(self, owner: object) -> None:
        """`owner` begins a new pass over its data."""
        self.report_accesses()
        self.policy.begin_epoch(owner)

    def announce(self, owner: object, plan: AccessPlan) -> None:
        """What `owner` will request from now on."""
        self.report_accesses()
        self.policy.announce(owner, plan)

    def retract(self, owner: object) -> None:
        """`owner` takes back what it foresaw."""
        self.report_accesses()
        self.policy.retract(owner)

    def check(self) -> None:
        """Recompute what can be recomputed; raises AssertionError on a difference."""
        entries = list(self.entries.values())
        self.ledger.check(entries)
        pinned = self.pins.numbers()
        loading = sum(entry.state is State.LOADING for entry in entries)
        if self.loading != loading:
            raise AssertionError(f"cache: {self.loading} != {loading} entries are loading")
        for number, entry in self.entries.items():
            ok = {
                State.ABSENT: not entry.pages and not entry.cached and entry.layout is None,
                State.LOADING: entry.layout is None and entry not in self._bypassed,
                State.READY: entry.layout is not None
                and entry.cached != (entry in self._bypassed)
                and (entry.cached or entry.number in pinned),
            }[entry.state]
            row = SCATTERED if entry.state is State.READY else NOT_READY
            if entry.state is State.READY and len(entry.pages) == 1:
                layout = self._layout_numbers.get(entry.layout)
                row = SCATTERED if layout is None else (layout << LAYOUT_SHIFT) + entry.pages[0]
            if (
                not ok
                or (entry.waiters and entry.state is not State.LOADING)
                or entry.number != number
                or (self.entries.latest(entry.file) is not entry) != (number in self.entries.newer)
                or self.rows[number] != row
            ):
                raise AssertionError(f"cache: inconsistent {entry!r}")
