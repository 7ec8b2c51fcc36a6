"""Requests become tickets, and tickets become batches: what happens under the one lock."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from threading import get_ident
from typing import Any

from gpucache_pipes.batches import RaggedOptions
from gpucache_pipes.batches.feature_batch import collate_batch, gather_batch
from gpucache_pipes.cache import NOT_READY, SCATTERED, Cache, Entry, State
from gpucache_pipes.device import Backend
from gpucache_pipes.errors import load_error
from gpucache_pipes.files import LoadedFeature
from gpucache_pipes.store.loader import Loader
from gpucache_pipes.store.lock import StoreLock, require_stack
from gpucache_pipes.store.pending_batch import PendingBatch
from gpucache_pipes.store.tracing import trace

_log = logging.getLogger("gpucache_pipes")

_USED = "this ticket has been used or cancelled; request its paths again"


class RequestManager:
    """Serves requests for entries, by their numbers, to any number of consumers.

    `lock` is the one lock of a store, with its condition. It guards the cache and all that
    is here. Nothing is read or copied under it, and nothing waited for but the condition.
    """

    def __init__(
        self,
        cache: Cache,
        backend: Backend,
        loader: Loader,
        lock: StoreLock,
    ) -> None:
        self.lock = lock
        self.hits = 0
        self.misses = 0
        self.skipped = 0
        self.wait_seconds = 0.0
        # Why there is no service, once the store is closed or in a forked process.
        self.refusal: str | None = None
        self._cache = cache
        self._backend = backend
        self._loader = loader
        # clear() was called, and memory is to be given back when no batch is in flight.
        self._clearing = False
        # Files that were left out and have been named in the log.
        self._said: set[int] = set()
        # What finalizers want done under the lock, which they may not take.
        self._deferred: deque[Callable[[], None]] = deque()

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Start to load what is absent, for nobody in particular."""
        require_stack()
        loading: list[Entry] = []
        stale = self._find_stale(numbers)
        try:
            with self.lock:
                self.require_open()
                self._start_loading(self._renew(numbers, stale), loading)
            self._loader.submit(loading)
        except BaseException as error:
            self._loader.give_up(loading, error)
            raise

    def request(
        self, numbers: Sequence[int], owner: object = None, *, warming: bool = False
    ) -> PendingBatch:
        """Start to load what is absent, and hold all of it until the ticket is used up.

        The policy is told that `owner` asks. `warming` is not counted as a request, and evicts
        nothing.
        """
        require_stack()
        loading: list[Entry] = []
        try:
            ticket = self._open_ticket(numbers, owner, loading, warming)
            self._loader.submit(loading)
        except BaseException as error:
            # An interrupt: nobody may wait for what no reader has heard of.
            self._loader.give_up(loading, error)
            raise
        return ticket

    def _open_ticket(
        self, numbers: Sequence[int], owner: object, loading: list[Entry], warming: bool
    ) -> PendingBatch:
        stale = self._find_stale(numbers)
        with self.lock:
            self.require_open()
            cache = self._cache
            numbers = self._renew(numbers, stale)
            rows = list(map(cache.rows.__getitem__, numbers))
            number = cache.open_ticket(numbers, owner, report=not warming)
            ticket = PendingBatch(self, number, numbers)
            cache.pins.hold(number, ticket)
            least = min(rows, default=NOT_READY)
            if least > SCATTERED:
                ticket.rows = rows
            elif least == NOT_READY:
                self._start_loading(numbers, loading, evict=not warming)
                for number in set(numbers):
                    entry = cache.entries[number]
                    if entry.state is State.LOADING:
                        entry.keep = True
                        entry.evict |= not warming
                        entry.waiters += (ticket,)
                        ticket.pending += 1
            if not warming:
                self.misses += len(loading)
                self.hits += len(numbers) - len(loading)
        return ticket

    def _find_stale(self, numbers: Sequence[int]) -> list[tuple[Entry, bytes | None]]:
        """What is READY but no longer as in its file, with its version. Without the lock."""
        if not self._loader.revalidate:
            return []
        numbers = self._cache.entries.current(list(dict.fromkeys(numbers)))
        # Not by [], which makes an entry where there is none.
        entries = filter(None, map(self._cache.entries.get, numbers))
        ready = [(entry, entry.version) for entry in entries if entry.state is State.READY]
        return [
            (entry, version)
            for entry, version in ready
            if not self._loader.is_current(entry.path, version)
        ]

    def _renew(
        self, numbers: Sequence[int], stale: Sequence[tuple[Entry, bytes | None]]
    ) -> Sequence[int]:
        """Under the lock: drop what is stale; the numbers of what takes its place."""
        for entry, version in stale:
            if entry.version is version:  # and nobody has read it anew since
                self._cache.renew(entry)
        return self._cache.entries.current(numbers)

    def _start_loading(
        self, numbers: Sequence[int], loading: list[Entry], *, evict: bool = True
    ) -> None:
        """Mark the absent ones as LOADING, each once, and add them. Under the lock."""
        for number in dict.fromkeys(numbers):
            entry = self._cache.entries[number]
            if entry.state is State.ABSENT:
                loading.append(entry)
                self._cache.start_loading(entry, evict=evict)

    def collect(self, tickets: Sequence[PendingBatch], ragged: RaggedOptions | None = None) -> Any:
        """The features of several tickets as one batch; see GPUFeatureStore.collect."""
        require_stack()
        held: list[int] = []
        use = object()
        try:
            with self.lock:
                self.wait_for(tickets)
                numbers = tickets[0].numbers
                rows = tickets[0].rows
                substitutes: dict[int, LoadedFeature] = {}
                if len(tickets) > 1 or tickets[0].instead:
                    numbers, substitutes = _taken(tickets)
                    rows = None
                if rows is None:
                    rows = list(map(self._cache.rows.__getitem__, numbers))
                    rows = rows if min(rows, default=NOT_READY) > SCATTERED else None
                # Ours alone from now on: nobody else can close them during the gather.
                held += [n for ticket in tickets if (n := ticket.use_up()) is not None]
                if len(held) < len(tickets):
                    raise RuntimeError(_USED)
                self.lock.uses[use] = get_ident()
            with trace("gpucache::gather"):
                what = self._cache, self._backend, numbers, rows, substitutes
                return gather_batch(*what) if ragged is None else collate_batch(*what, ragged)
        finally:
            self.lock.uses.pop(use, None)
            if held:
                with self.lock:
                    self._close(held)
            self.cancel([ticket for ticket in tickets if ticket.is_from(self)])

    def settle(self, ticket: PendingBatch) -> dict[int, Exception]:
        """Wait until nothing of it is loading; what failed, by position."""
        with self.lock:
            self._wait_for([ticket])
            return {at: _error_of(entry, ticket) for at, entry in self._failed(ticket)}

    def replace(self, ticket: PendingBatch, position: int, feature: LoadedFeature | None) -> None:
        """Take `feature` in the place of one that failed; None leaves it out."""
        if not 0 <= position < len(ticket.numbers):
            raise IndexError(f"there is no feature {position} among {len(ticket.numbers)}")
        with self.lock:
            entry = self._cache.entries[ticket.numbers[position]]
            if entry not in ticket.errors:
                raise ValueError(f"{entry.path!r} has not failed: there is nothing to replace")
            ticket.instead[position] = feature
            self.skipped += 1
            error = _error_of(entry, ticket)
            new = feature is None and entry.file not in self._said
            if new:
                self._said.add(entry.file)
        if new:
            _log.warning("left out: %s", error)

    def _failed(self, ticket: PendingBatch) -> Iterator[tuple[int, Entry]]:
        """Under the lock: what failed and nobody has replaced, with its position."""
        if ticket.errors:
            for at, number in enumerate(ticket.numbers):
                entry = self._cache.entries[number]
                if entry in ticket.errors and at not in ticket.instead:
                    yield at, entry

    def wait_for(self, tickets: Sequence[PendingBatch]) -> None:
        """Wait until nothing of `tickets` is loading; raise what became of it. Under the lock."""
        self._wait_for(tickets)
        for ticket in tickets:
            for _, entry in self._failed(ticket):
                raise _error_of(entry, ticket)

    def _wait_for(self, tickets: Sequence[PendingBatch]) -> None:
        self._require_valid(tickets)
        if any(ticket.pending for ticket in tickets):
            start = time.perf_counter()
            try:
                with trace("gpucache::wait"):
                    while any(ticket.pending for ticket in tickets):
                        self.lock.wait()
                        self._require_valid(tickets)
            finally:
                self.wait_seconds += time.perf_counter() - start

    def _require_valid(self, tickets: Sequence[PendingBatch]) -> None:
        self.require_open()
        if any(ticket.used for ticket in tickets):
            raise RuntimeError(_USED)
        self._require_mine(tickets)

    def _require_mine(self, tickets: Sequence[PendingBatch]) -> None:
        """A number of another store's may be that of another ticket here."""
        if not all(ticket.is_from(self) for ticket in tickets):
            raise RuntimeError("this ticket is of another store")

    def cancel(self, tickets: Iterable[PendingBatch]) -> None:
        """Give tickets up: what they held may go. Harmless for tickets that were used.

        Raises RuntimeError for one of another store, and leaves all as they are.
        """
        tickets = list(tickets)
        self._require_mine(tickets)
        if not all(ticket.used for ticket in tickets):
            # Within the lock, where no interrupt can come between a ticket and its number.
            with self.lock:
                numbers = [n for ticket in tickets if (n := ticket.use_up()) is not None]
                self._close(numbers)

    def _close(self, numbers: Sequence[int]) -> None:
        """Under the lock: unpin, and wake who waits for that."""
        self._cache.close_tickets(numbers)
        self.lock.changed.notify_all()
        if self._clearing:
            self._give_memory_back()

    def abandon(self, number: int) -> None:
        """Give up the ticket of that number at some later time. Takes no lock."""
        self.defer(partial(self._cache.close_tickets, [number]))

    def defer(self, wish: Callable[[], None]) -> None:
        """Have `wish()` called under the lock at some later time. Takes no lock."""
        self._deferred.append(wish)

    def run_deferred(self) -> None:
        """Under the lock: fulfil the wishes of finalizers.

        What one of them raises, as a policy may, goes to the log: it is not the caller's.
        """
        self._cache.close_lost_tickets()
        while self._deferred:
            try:
                self._deferred.popleft()()
            except Exception as error:
                log = partial(_log.error, "what a finalizer has asked for failed", exc_info=error)
                self.lock.postpone(log)
        if self._clearing:
            self._give_memory_back()

    def clear(self) -> None:
        """Stop caching everything, and give memory back as soon as no batch is in flight."""
        with self.lock:
            self.require_open()
            self._cache.release(list(self._cache.entries.values()))
            self._clearing = True
            self._give_memory_back()

    def _give_memory_back(self) -> None:
        """Under the lock: end what clear() began, if it is time."""
        if self._cache.idle and not self.lock.uses:
            self._clearing = False
            if not self._cache.ledger.held_pages:
                self._cache.forget_pages()
                self._backend.reset()

    def require_open(self) -> None:
        """Under the lock: RuntimeError if there is no service any more."""
        if self.refusal is not None:
            raise RuntimeError(self.refusal)
        self.run_deferred()

    def refuse(self) -> None:
        """Serve no new requests. Takes no lock."""
        if self.refusal is None:
            self.refusal = "this GPUFeatureStore is closed"
        self._loader.stop()

    def shut(self, seconds: float) -> None:
        """Wake who waits, and let what has begun to use memory end, waiting at most so long."""
        with self.lock:
            self.lock.changed.notify_all()
            self.lock.await_uses(seconds)

    def refuse_after_fork(self) -> None:
        """For the child of a fork, where the lock may be held by a thread that is gone."""
        self.lock = StoreLock()
        self.refusal = (
            "this GPUFeatureStore was made before a fork and does not work in the new process; "
            "make it where it is used (DataLoader workers need only paths)"
        )


def _error_of(entry: Entry, ticket: PendingBatch) -> Exception:
    """A new one for each consumer."""
    cause = ticket.errors[entry]
    error = load_error(entry.path, cause)
    error.__cause__ = cause
    return error


def _taken(tickets: Sequence[PendingBatch]) -> tuple[list[int], dict[int, LoadedFeature]]:
    """What of several tickets comes into a batch, and what is not of the cache, by position."""
    numbers: list[int] = []
    substitutes: dict[int, LoadedFeature] = {}
    for ticket in tickets:
        if not ticket.instead:
            numbers += ticket.numbers
            continue
        for at, number in enumerate(ticket.numbers):
            if at in ticket.instead:
                feature = ticket.instead[at]
                if feature is None:
                    continue
                substitutes[len(numbers)] = feature
            numbers.append(number)
    return numbers, substitutes
