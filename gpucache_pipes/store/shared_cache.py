"""The cache of a store, shared by its threads: the one owner of the store's lock."""

import time
from collections.abc import Sequence
from functools import partial
from logging import getLogger
from threading import get_ident

from gpucache_pipes.cache import (
    NOT_READY,
    SCATTERED,
    AccessPlan,
    Cache,
    Entry,
    Ledger,
    Policy,
    State,
    check_cache,
)
from gpucache_pipes.device import Backend
from gpucache_pipes.files import LoadedFeature, PathLike
from gpucache_pipes.store.gather import Taken
from gpucache_pipes.store.load_tracker import LoadTracker
from gpucache_pipes.store.lock import StoreLock
from gpucache_pipes.store.memory_tracker import MemoryTracker
from gpucache_pipes.store.pending_batch import Issuer, PendingBatch, concatenate
from gpucache_pipes.store.refusal import Refusal
from gpucache_pipes.store.stats import Counters, StoreStats
from gpucache_pipes.store.tracing import trace

_log = getLogger("gpucache_pipes")

OldVersion = tuple[Entry, bytes | None]
"""A READY entry, and the version of its file that was read."""

_BATCHES = 32
"""Batches between two looks at the memory of the device. A look takes up to 0.1 ms."""

_USED = "this batch has been used or cancelled; request its paths again"


class SharedCache:
    """Entries, pending batches and counters, behind one lock.

    Every public method is one whole step: it takes the lock once, and leaves everything consistent.
    Its parts have the steps of the loader (`loads`) and those that free memory (`memory`). Besides
    these only the path table takes the lock, to number files. No other class changes an entry or a
    counter, or closes a batch. Under the lock no file is opened or read, and a thread waits only
    for the lock's own condition, and for the device where memory is freed.

    Steps that begin something fill a list of the caller (`loading`, `held`) instead of returning
    it: an interrupt between the end of a step and the assignment of its result would lose that.

    Attributes:
        lock: the lock.
        loads: what the loader reports to.
        memory: what frees memory of the device.
        refusal: why the store does not work any more.
    """

    def __init__(self, ledger: Ledger, policy: Policy, backend: Backend) -> None:
        self.lock = StoreLock()
        self.refusal = Refusal()
        self.cache = Cache(ledger, policy, backend.grow, backend.shrink)
        self._backend = backend
        self._counters = Counters()
        self.loads = LoadTracker(self, backend, self._counters)
        self.memory = MemoryTracker(self, backend)
        self._gathered = 0
        # Files that have been left out and named in the log.
        self._logged: set[int] = set()

    # Consumers

    def open_batch(
        self,
        numbers: Sequence[int],
        paths: Sequence[PathLike],
        loading: list[Entry],
        *,
        stale: Sequence[OldVersion],
        owner: object,
        warmup: bool,
        issuer: Issuer,
        keep_alive: object,
        ahead: int = 0,
    ) -> PendingBatch:
        """Open a batch of these entries, and mark the ABSENT ones as LOADING.

        Args:
            numbers: of the entries; repeats are allowed.
            paths: of their files, absolute.
            loading: gets the entries that the caller must have read.
            stale: entries to drop first.
            owner: whose request it is, for the policy.
            warmup: neither count it as a request nor evict anything for it.
            issuer: see PendingBatch.
            keep_alive: see PendingBatch.
            ahead: how many more such batches the caller will have pending.
        """
        with self.lock:
            self.require_open()
            cache = self.cache
            if len(numbers) * (1 + ahead) > cache.arena.files_in_flight:
                cache.arena.files_in_flight = len(numbers) * (1 + ahead)
            numbers = self._renew(numbers, stale)
            rows = list(map(cache.rows.__getitem__, numbers))
            least = min(rows, default=NOT_READY)
            number = cache.open_batch(numbers, owner, report=not warmup)
            known = rows if least > SCATTERED else None
            batch = PendingBatch(issuer, number, numbers, paths, known, keep_alive)
            cache.pins.hold(number, batch)
            if least == NOT_READY:
                self._start_loading(numbers, loading, evict=not warmup)
                for number in set(numbers):
                    if cache.join_loading(cache.entries[number], batch, evict=not warmup):
                        batch.expect()
            if not warmup:
                self._counters.misses += len(loading)
                self._counters.hits += len(numbers) - len(loading)
        return batch

    def start_loading(
        self, numbers: Sequence[int], stale: Sequence[OldVersion], loading: list[Entry]
    ) -> None:
        """Mark the ABSENT ones of these entries as LOADING, and add them to `loading`."""
        with self.lock:
            self.require_open()
            self._start_loading(self._renew(numbers, stale), loading)

    def _start_loading(
        self, numbers: Sequence[int], loading: list[Entry], *, evict: bool = True
    ) -> None:
        for number in dict.fromkeys(numbers):
            entry = self.cache.entries[number]
            if entry.state is State.ABSENT:
                loading.append(entry)
                self.cache.start_loading(entry, evict=evict)

    def versions(self, numbers: Sequence[int]) -> list[OldVersion]:
        """The READY ones of these entries, with the version that was read. Takes no lock."""
        numbers = self.cache.entries.current(list(dict.fromkeys(numbers)))
        # By get and not by [], which would make an entry where there is none.
        entries = filter(None, map(self.cache.entries.get, numbers))
        return [(entry, entry.version) for entry in entries if entry.state is State.READY]

    def _renew(self, numbers: Sequence[int], stale: Sequence[OldVersion]) -> Sequence[int]:
        """Drop what is stale; the numbers of the entries that replace it."""
        for entry, version in stale:
            if entry.version is version:  # else it has been read again meanwhile
                self.cache.renew(entry)
        return self.cache.entries.current(numbers) if self.cache.entries.newer else numbers

    def wait(self, batch: PendingBatch) -> dict[int, Exception]:
        """Wait until nothing of `batch` is LOADING; the errors of its files by position."""
        with self.lock:
            self._wait([batch])
            return dict(batch.failures())

    def take(self, batches: Sequence[PendingBatch], held: list[int], use: object) -> Taken:
        """Wait for `batches`, and use them up for a gather that the caller issues next.

        Adds their numbers to `held`, and `use` to the uses of the lock. Whatever happens, the
        caller removes the one and passes the other to `finish`. Raises the first error of a file.
        """
        with self.lock:
            self._wait(batches)
            for batch in batches:
                if batch.errors:
                    for _, error in batch.failures():
                        raise error
            if len(batches) == 1 and not batches[0].substitutes:
                [batch] = batches
                numbers, paths, rows = batch.numbers, batch.paths, batch.rows
                substitutes: dict[int, LoadedFeature] = {}
            else:
                numbers, paths, substitutes = concatenate(batches)
                rows = None
            if rows is None:
                rows = list(map(self.cache.rows.__getitem__, numbers))
                rows = rows if min(rows, default=NOT_READY) > SCATTERED else None
            # From here on no other thread can close them during the gather.
            held += [n for batch in batches if (n := batch.use_up()) is not None]
            if len(held) < len(batches):
                raise RuntimeError(_USED)
            self.lock.uses[use] = get_ident()
            return Taken(numbers, paths, rows, substitutes)

    def finish(self, batches: Sequence[PendingBatch], held: list[int]) -> None:
        """The gather that `take` prepared has been issued, or has failed: close the batches."""
        if len(held) == len(batches) > 0:
            with self.lock:
                self._close(held)
                self._gathered += 1
                if not self._gathered % _BATCHES:
                    self.memory.balance()
        else:
            self.cancel(batches, held)

    def cancel(self, batches: Sequence[PendingBatch], held: Sequence[int] = ()) -> None:
        """Close the batches that have not been used up, and those whose numbers are `held`."""
        if held or any(batch.claim for batch in batches):
            # Under the lock no interrupt can come between taking a number and closing it.
            with self.lock:
                numbers = [n for batch in batches if (n := batch.use_up()) is not None]
                self._close([*held, *numbers])

    def replace(self, batch: PendingBatch, position: int, feature: LoadedFeature | None) -> None:
        """Replace an entry of the batch that failed; with None leave it out."""
        if not 0 <= position < len(batch.numbers):
            raise IndexError(f"there is no feature {position} among {len(batch.numbers)}")
        with self.lock:
            entry = self.cache.entries[batch.numbers[position]]
            if entry.number not in batch.errors:
                raise ValueError(f"{entry.path!r} has not failed: there is nothing to replace")
            batch.substitutes[position] = feature
            self._counters.skipped += 1
            error = batch.error_of(entry.number)
            new = feature is None and entry.file not in self._logged
            if new:
                self._logged.add(entry.file)
        if new:
            _log.warning("left out: %s", error)

    def _wait(self, batches: Sequence[PendingBatch]) -> None:
        if self._have_arrived(batches):
            return
        self.loads.require_running_readers()
        start = time.perf_counter()
        try:
            with trace("gpucache::wait"):
                self.lock.wait_for(lambda: self._have_arrived(batches))
        finally:
            self._counters.wait_seconds += time.perf_counter() - start

    def _have_arrived(self, batches: Sequence[PendingBatch]) -> bool:
        """Whether nothing of `batches` is LOADING. Raises if they cannot be had any more."""
        self.require_open()
        if not all(batch.claim for batch in batches):
            raise RuntimeError(_USED)
        return not any(batch.pending for batch in batches)

    def _close(self, numbers: Sequence[int]) -> None:
        """Unpin, and wake the threads that wait for batches or for their end."""
        self.cache.close_batches(numbers)
        self.lock.changed.notify_all()
        if self.memory.unfinished:
            self.memory.settle()

    # The store

    def cached(self, numbers: Sequence[int]) -> int:
        """How many of these entries are cached, repeats counted once."""
        with self.lock:
            self.require_open()
            current = set(self.cache.entries.current(numbers))
            return sum(self.cache.entries[number].cached for number in current)

    def size(self) -> tuple[int, int]:
        """How many features are cached, and bytes of their tensors. Takes no lock."""
        return self.cache.ledger.cached_items, self.cache.ledger.cached_bytes

    def release(self, numbers: Sequence[int]) -> None:
        """Stop caching these entries."""
        with self.lock:
            self.require_open()
            entries = self.cache.entries
            self.cache.release([entries[number] for number in entries.current(numbers)])

    def begin_epoch(self, owner: object) -> None:
        """Tell the policy that `owner` begins a new pass over its data."""
        with self.lock:
            self.require_open()
            self.cache.begin_epoch(owner)

    def announce(self, owner: object, plan: AccessPlan) -> None:
        """Tell the policy what `owner` will request."""
        with self.lock:
            self.require_open()
            self.cache.announce(owner, plan)

    def retract(self, owner: object) -> None:
        """Take back, the next time the lock is held, what `owner` announced. Takes no lock."""
        self.lock.enqueue(partial(self.cache.retract, owner))

    def abandon(self, number: int) -> None:
        """Close a batch the next time the lock is held. Takes no lock."""
        self.lock.enqueue(partial(self.cache.close_batches, [number]))

    def wait_idle(self, seconds: float | None) -> bool:
        """Wait until nothing is LOADING, at most this long. Returns whether that is so."""
        with self.lock:
            if self.cache.loading:
                self.loads.require_running_readers()
            # Of a closed store, files may stay LOADING that no reader reads.
            self.lock.wait_for(lambda: not self.cache.loading or self._is_ended(), seconds)
            return not self.cache.loading

    def _measure(self) -> StoreStats:
        return StoreStats.of(self.cache, self._counters, self._backend)

    def stats(self) -> StoreStats:
        """Counters and sizes. Of one moment, unless this thread is inside the lock already."""
        if not self.lock.is_entered():
            with self.lock:
                self._run_queued()
                return self._measure()
        return self._measure()

    def check(self) -> None:
        """Recompute all totals; raises AssertionError on a difference."""
        with self.lock:
            self._run_queued()
            check_cache(self.cache)

    # The end

    def require_open(self) -> None:
        """Raise if calls are refused, or make those that were queued. With the lock."""
        if self.refusal.reason is not None:
            self.refusal.check()
        self._run_queued()

    def _run_queued(self) -> None:
        if self.cache.pins.gone:
            self.cache.close_lost_batches()
        if self.lock.queued:
            self.lock.run_queued()
        if self.memory.unfinished:
            self.memory.settle()

    def _is_ended(self) -> bool:
        return self.refusal.reason is not None

    def end(self, error: BaseException) -> None:
        """The device has failed for good: every call raises `error` from now on."""
        with self.lock:
            self.refusal.fail(error)
            self.lock.changed.notify_all()

    def await_uses(self, seconds: float) -> None:
        """Wake waiting consumers, and wait until no thread uses memory, at most this long."""
        with self.lock:
            self.lock.changed.notify_all()
            self.lock.await_uses(seconds)

    def refuse_after_fork(self) -> None:
        """In a forked child: refuse all further calls."""
        self.lock.reset()
        self.refusal.fork()
