"""The bookkeeping of a store: which files are cached, loading, pinned, and which are evicted.

Pure logic over plain values: no lock, no thread, no device. Its owner calls every method with the
lock of the store held.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gpucache_pipes.cache.access_plan import AccessPlan
from gpucache_pipes.cache.arena_size import ArenaSize, Grow, NoPagesError
from gpucache_pipes.cache.entries import Entries
from gpucache_pipes.cache.entry import NOT_READY, SCATTERED, Entry, State
from gpucache_pipes.cache.ledger import Ledger
from gpucache_pipes.cache.pins import Pins
from gpucache_pipes.cache.policies import Policy

LAYOUT_SHIFT = 40
"""A row is (number of the layout << LAYOUT_SHIFT) + page; see Cache.rows."""

_MOST_LAYOUTS = 1024
"""Layouts that get a number. A data set with more likely has one for each file."""

_BUNDLE = 64
"""Requests are reported to the policy in bundles of at most this many batches."""


class Cache:
    """Entries, the ledger that counts them, the policy that orders them, and the pins.

    Attributes:
        entries: of all known files, by number.
        rows: for each number, what a batch needs in the usual case, as one number: layout and page
            if the entry is READY in one page; SCATTERED if it is READY in any other way, else
            NOT_READY, which is less. The least and the largest row of a batch tell whether all of
            it is READY and alike, without a look at 256 objects.
        layouts: the layouts by the number that rows have for them.
        pins: the pending batches, and what they need.
        arena: how many pages there are, and how many there should be.
        loading: how many entries are LOADING.
        evictions: how many entries have been evicted.
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
        self.rows = self.entries.rows
        self.layouts: list[Any] = []
        self.pins = Pins()
        self.loading = 0
        self.evictions = 0
        self.layout_numbers: dict[Any, int] = {}
        # READY entries that are not cached: freed with the last batch that needs them.
        self.bypassed: set[Entry] = set()
        self.arena = ArenaSize(self, grow, shrink)
        # Requests that have not been reported to the policy.
        self._unreported: deque[tuple[object, Sequence[int]]] = deque()

    # Pending batches

    def open_batch(self, numbers: Sequence[int], owner: object, *, report: bool = True) -> int:
        """Pin these entries (repeats allowed) until close_batches; returns the batch's number.

        With `report` the policy is told that `owner` requests them.
        """
        if report and numbers and self.ledger.bounded:
            # First: a policy may raise.
            if len(self._unreported) >= _BUNDLE:
                self.report_accesses()
            self._unreported.append((owner, numbers))
        return self.pins.open(numbers)

    def close_batches(self, batches: Iterable[int]) -> None:
        """Unpin; free bypassed entries that no batch needs any more. Ignores unknown batches."""
        closed = self.pins.close(batches)
        if self.bypassed:
            for number in set().union(*closed) - self.pins.numbers():
                if self.entries[number] in self.bypassed:
                    self._drop(self.entries[number])

    def close_lost_batches(self) -> None:
        """Close the batches whose holders have been collected."""
        if lost := self.pins.lost():
            self.close_batches(lost)

    @property
    def idle(self) -> bool:
        """Whether no batch is open and no entry is LOADING."""
        self.close_lost_batches()
        return not self.pins.batches and not self.loading

    # Loading

    def start_loading(self, entry: Entry, *, evict: bool = True) -> None:
        """ABSENT -> LOADING. Without `evict` no other entry is evicted for it."""
        assert entry.state is State.ABSENT
        entry.state = State.LOADING
        entry.may_cache = True
        entry.may_evict = evict
        self.loading += 1

    def join_loading(self, entry: Entry, waiter: Any, *, evict: bool) -> bool:
        """Have `waiter` told when LOADING ends; False if the entry is not LOADING."""
        if entry.state is not State.LOADING:
            return False
        entry.may_cache = True
        entry.may_evict |= evict
        entry.waiters += (waiter,)
        return True

    def allocate(self, entry: Entry, span: int, nbytes: int) -> bool:
        """Assign pages to a LOADING entry: cached if budget and policy admit it, else bypassed.

        False if it is not admitted and no batch needs it: then it need not be read. Raises
        MemoryError if it is larger than the whole budget, or if there are no pages for it.
        """
        ledger = self.ledger
        if ledger.max_bytes is not None and nbytes > ledger.max_bytes:
            raise MemoryError(
                f"{entry.path!r} holds {nbytes} bytes, which is more than "
                f"max_cache_bytes={ledger.max_bytes}; raise the limit or split the feature"
            )
        pages, charge = ledger.demand(span)
        cached = entry.may_cache and self._make_room(entry, pages, charge)
        if not cached and (entry.number not in self.pins.numbers() or not entry.may_evict):
            return False
        while not ledger.take(entry, pages, charge, nbytes, cached=cached):
            if not self.arena.find_pages(entry, pages, cached):
                raise NoPagesError(
                    f"no device memory for {entry.path!r}: {pages} pages of {ledger.page_bytes} "
                    f"bytes needed, {ledger.free_pages} of {ledger.pages} free, the device has no "
                    "more and in-flight batches need the rest; lower depth, batch size or "
                    "max_cache_bytes"
                )
        return True

    def _make_room(self, wanted: Entry, pages: int, charge: int) -> bool:
        """Evict until the budget has room, or evict nothing and return False."""
        if self.ledger.fits(pages, charge):
            return True
        if not wanted.may_evict or not self.ledger.could_fit(pages, charge):
            return False
        self.report_accesses()
        self.close_lost_batches()
        pinned = self.pins.numbers()
        victims: dict[Entry, None] = {}
        freed_pages = freed = 0
        for key in self.policy.victims(wanted.file):
            entry = self.entries.latest(key)
            if not entry.cached:
                raise RuntimeError(f"policy {self.policy!r} would evict {entry.path!r}: not cached")
            if entry.number in pinned or entry in victims:
                continue
            victims[entry] = None
            freed_pages += len(entry.pages)
            freed += entry.charge
            if self.ledger.fits(pages - freed_pages, charge - freed, 1 - len(victims)):
                break
        else:
            return False
        self.evict(victims)
        return True

    def finish_loading(
        self, entry: Entry, layout: Any, values: tuple[Any, ...], version: bytes | None = None
    ) -> Sequence[Any]:
        """LOADING -> READY. Returns the waiters. May raise what the policy raises."""
        assert entry.state is State.LOADING
        if entry.cached:
            # First: where the policy raises, the entry is still LOADING.
            self.report_accesses()
            self.policy.on_insert(entry.file)
        self.loading -= 1
        entry.state = State.READY
        entry.layout = layout
        entry.values = values
        entry.version = version
        self.set_row(entry)
        if not entry.cached:
            self.bypassed.add(entry)
            if entry.number not in self.pins.numbers():
                self._drop(entry)
        waiters, entry.waiters = entry.waiters, ()
        return waiters

    def set_row(self, entry: Entry) -> None:
        """Note where a READY entry is; see `rows`."""
        alone = len(entry.pages) == 1
        self.rows[entry.number] = self._row(entry.layout, entry.pages[0]) if alone else SCATTERED

    def _row(self, layout: Any, page: int) -> int:
        number = self.layout_numbers.get(layout)
        if number is None:
            number = len(self.layouts)
            if number == _MOST_LAYOUTS:
                return SCATTERED
            self.layout_numbers[layout] = number
            self.layouts.append(layout)
        return (number << LAYOUT_SHIFT) + page

    def fail_loading(self, entry: Entry) -> Sequence[Any]:
        """LOADING -> ABSENT. Returns the waiters; none if the entry is not LOADING any more."""
        if entry.state is not State.LOADING:
            return ()
        self.loading -= 1
        self.ledger.free(entry)
        entry.state = State.ABSENT
        waiters, entry.waiters = entry.waiters, ()
        return waiters

    def abandon_loading(self, entry: Entry) -> Sequence[Any]:
        """Give up a LOADING entry whose reader hangs. Returns the waiters.

        The reader may still write to the pages of the entry, if it has any: then the entry stays
        LOADING until `fail_loading`, and another entry takes its place for new requests.
        """
        if not entry.pages:
            return self.fail_loading(entry)
        entry.may_cache = False
        if entry.cached:
            self.ledger.bypass(entry)
        waiters, entry.waiters = entry.waiters, ()
        self.entries.renew(entry)
        return waiters

    def restart_loading(self, entry: Entry) -> None:
        """Free the pages of a LOADING entry, which another reader reads anew. Waiters stay."""
        self.ledger.free(entry)

    # Leaving the cache

    def release(self, entries: Iterable[Entry]) -> None:
        """Stop caching these. What pending batches need stays, bypassed, until they have it."""
        self.report_accesses()
        pinned = self.pins.numbers()
        for entry in entries:
            entry.may_cache = False
            if entry.cached and entry.state is State.READY and entry.number not in pinned:
                self._drop(entry)
            elif entry.cached:
                if entry.state is State.READY:
                    self.policy.on_remove(entry.file)
                    self.bypassed.add(entry)
                self.ledger.bypass(entry)

    def renew(self, entry: Entry) -> None:
        """The file has changed: keep the READY bytes for pending batches only."""
        if entry.state is not State.READY or entry.number in self.entries.newer:
            return
        self.release([entry])
        if entry.state is State.READY:
            self.entries.renew(entry)

    def forget_pages(self) -> None:
        """Start anew without an arena. Only while no entry holds a page."""
        self.ledger.forget_pages()
        self.arena.forget()
        self.layout_numbers.clear()
        self.layouts = []

    def evict(self, victims: Iterable[Entry]) -> None:
        """Drop cached entries that are not pinned."""
        for entry in victims:
            self.evictions += 1
            self._drop(entry)

    def _drop(self, entry: Entry) -> None:
        """READY -> ABSENT."""
        assert entry.state is State.READY
        if entry.cached:
            self.policy.on_remove(entry.file)
        self.bypassed.discard(entry)
        self.ledger.free(entry)
        entry.state = State.ABSENT
        entry.layout = None
        entry.values = ()
        self.rows[entry.number] = NOT_READY

    # The policy

    def report_accesses(self) -> None:
        """Report the requests that the policy has not been told of."""
        while self._unreported:
            owner, numbers = self._unreported.popleft()
            self.policy.on_access(self.entries.files(numbers), owner)

    def begin_epoch(self, owner: object) -> None:
        """`owner` begins a new pass over its data."""
        self.report_accesses()
        self.policy.begin_epoch(owner)

    def announce(self, owner: object, plan: AccessPlan) -> None:
        """`owner` announces its next requests."""
        self.report_accesses()
        self.policy.announce(owner, plan)

    def retract(self, owner: object) -> None:
        """`owner` retracts what it announced."""
        self.report_accesses()
        self.policy.retract(owner)
