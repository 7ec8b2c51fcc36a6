"""The cache of a store, shared by its threads: the one owner of the store's lock."""

import contextlib
import time
from collections.abc import Sequence
from functools import partial
from logging import getLogger
from threading import get_ident
from typing import TYPE_CHECKING

from gpucache_pipes.cache import READY, Cache, Ledger, Numbers, Policy, check_cache, distinct
from gpucache_pipes.device import Backend
from gpucache_pipes.files import LoadedFeature, Parts, PathLike
from gpucache_pipes.store.announcement import Announcement
from gpucache_pipes.store.gather import Taken
from gpucache_pipes.store.load_tracker import LoadTracker
from gpucache_pipes.store.lock import StoreLock, require_stack
from gpucache_pipes.store.memory_tracker import MemoryTracker
from gpucache_pipes.store.pending_batch import PendingBatch, concatenate
from gpucache_pipes.store.refusal import Refusal
from gpucache_pipes.store.stats import Counters, StoreStats, describe
from gpucache_pipes.store.tracing import trace

if TYPE_CHECKING:
    from gpucache_pipes.store.requests import RequestManager

_log = getLogger("gpucache_pipes")

OldVersion = tuple[int, bytes | None]
"""The number of an entry that is ready, and the version of its file that was read."""

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
        self._gathered = self._waiting = 0  # batches; consumers
        # Files that have been left out and named in the log.
        self._logged: set[int] = set()

    # Consumers

    def open_batch(
        self,
        numbers: Numbers,
        paths: Sequence[PathLike],
        loading: list[int],
        *,
        stale: Sequence[OldVersion],
        owner: object,
        warmup: bool,
        issuer: "RequestManager",
        keep_alive: object,
        ahead: int = 0,
        parts: Parts = (),
    ) -> PendingBatch:
        """Open a batch of these entries, and mark the ABSENT ones as LOADING.

        Args:
            numbers: of the entries; repeats are allowed.
            paths: of their files, absolute.
            loading: gets the numbers of the entries that the caller must have read.
            stale: entries to drop first.
            owner: whose request it is, for the policy.
            warmup: neither count it as a request nor evict anything for it.
            issuer: see PendingBatch.
            keep_alive: see PendingBatch.
            ahead: how many more such batches the caller will have pending.
            parts: see PendingBatch.
        """
        count = len(numbers)
        with self.lock:
            self.require_open()
            cache = self.cache
            if count * (1 + ahead) > cache.arena.files_in_flight:
                cache.arena.files_in_flight = count * (1 + ahead)
            if stale or cache.entries.newer:
                numbers = self._renew(numbers, stale)
            ready = cache.entries.are_ready(numbers)
            number = cache.open_batch(numbers, owner, report=not warmup)
            places = cache.entries.place[numbers] if ready else None
            batch = PendingBatch(issuer, number, numbers, paths, places, keep_alive, parts)
            cache.pins.hold(number, batch)
            if not ready:
                loading += cache.start_loading(numbers, evict=not warmup)
                self.loads.wait_for(number, batch)
            if not warmup:
                self._counters.misses += len(loading)
                self._counters.hits += count - len(loading)
        return batch

    def start_loading(
        self, numbers: Numbers, stale: Sequence[OldVersion], loading: list[int]
    ) -> None:
        """Mark the ABSENT ones of these entries as LOADING, and add them to `loading`."""
        with self.lock:
            self.require_open()
            loading += self.cache.start_loading(self._renew(numbers, stale))

    def versions(self, numbers: Numbers) -> list[tuple[int, str, bytes | None]]:
        """The ready ones of these entries, with path and the version that was read. No lock."""
        entries = self.cache.entries
        numbers = entries.current(distinct(numbers))
        ready = numbers[entries.state[numbers] >= READY].tolist()
        return [(n, entries.paths[n], entries.versions.get(n)) for n in ready]

    def _renew(self, numbers: Numbers, stale: Sequence[OldVersion]) -> Numbers:
        """Drop what is stale; the numbers of the entries that replace it."""
        entries = self.cache.entries
        for number, version in stale:
            if entries.versions.get(number) is version:  # else it has been read again meanwhile
                self.cache.renew(number)
        return entries.current(numbers)

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
        if len(batches) == 1 and (taken := self._take_at_once(batches[0], held, use)) is not None:
            return taken
        require_stack()
        with self.lock:
            self._wait(batches)
            for batch in batches:
                if batch.errors:
                    for _, error in batch.failures():
                        raise error
            numbers, paths, substitutes = concatenate(batches)
            # From here on no other thread can close them during the gather.
            held += [n for batch in batches if (n := batch.use_up()) is not None]
            if len(held) < len(batches):
                raise RuntimeError(_USED)
            self.lock.uses[use] = get_ident()
            return Taken(numbers, paths, self.cache.entries.place[numbers], substitutes)

    def _take_at_once(self, batch: PendingBatch, held: list[int], use: object) -> Taken | None:
        """The same for a batch that is complete, without the lock; None if that is not possible.

        What is pinned stays where it is, unless the store is closed, or the arena is moved while
        readers are held. Both say so first and then look for uses; here it is the other way round.
        """
        if len(batch.missing) or batch.errors or batch.substitutes:
            return None
        self.lock.uses[use] = get_ident()
        if self.refusal.reason is None and self.loads.held_by() is None:
            number = batch.use_up()
            if number is not None:
                held.append(number)
                known = batch.places
                places = self.cache.entries.place[batch.numbers] if known is None else known
                return Taken(batch.numbers, batch.paths, places, {})
        self.lock.uses.pop(use, None)
        return None

    def finish(self, batches: Sequence[PendingBatch], held: list[int]) -> None:
        """The gather of `take` is issued, or has failed: let the next step close the batches."""
        if not len(held) == len(batches) > 0:
            self.cancel(batches, held)
            return
        self.cache.pins.end(held)
        self._gathered += 1
        watch = self.memory.watches and not self._gathered % _BATCHES
        if watch or self.memory.unfinished or self._waiting:
            with self.lock:
                self._run_queued()
                self.lock.changed.notify_all()
                if watch:
                    self.memory.balance()
        self.lock.run_postponed()

    def cancel(self, batches: Sequence[PendingBatch], held: Sequence[int] = ()) -> None:
        """Close the batches that have not been used up, and those whose numbers are `held`."""
        if held or any(batch.claim for batch in batches):
            # Under the lock no interrupt can come between taking a number and closing it.
            with self.lock:
                numbers = [n for batch in batches if (n := batch.use_up()) is not None]
                self.cache.close_batches([*held, *numbers])
                self._run_queued()
                self.lock.changed.notify_all()  # whoever waits for one of them gets an error

    def replace(self, batch: PendingBatch, position: int, feature: LoadedFeature | None) -> None:
        """Replace an entry of the batch that failed; with None leave it out."""
        if not 0 <= position < len(batch.numbers):
            raise IndexError(f"there is no feature {position} among {len(batch.numbers)}")
        with self.lock:
            number = int(batch.numbers[position])
            if number not in batch.errors:
                path = self.cache.entries.paths[number]
                raise ValueError(f"{path!r} has not failed: there is nothing to replace")
            batch.substitutes[position] = feature
            self._counters.skipped += 1
            error = batch.error_of(number)
            file = self.cache.entries.file(number)
            new = feature is None and file not in self._logged
            if new:
                self._logged.add(file)
        if new:
            _log.warning("left out: %s", error)

    def _wait(self, batches: Sequence[PendingBatch]) -> None:
        if self._have_arrived(batches):
            return
        self.loads.require_running_readers()
        start = time.perf_counter()
        self._waiting += 1
        try:
            with trace("gpucache::wait"):
                self.lock.wait_for(lambda: self._have_arrived(batches))
        finally:
            self._waiting -= 1
            self._counters.wait_seconds += time.perf_counter() - start

    def _have_arrived(self, batches: Sequence[PendingBatch]) -> bool:
        """Whether nothing of `batches` is LOADING. Raises if they cannot be had any more."""
        self.require_open()
        if not all(batch.claim for batch in batches):
            raise RuntimeError(_USED)
        return not any(len(batch.missing) for batch in batches)

    # The store

    def cached(self, numbers: Numbers) -> int:
        """How many of these entries are cached, repeats counted once."""
        with self.lock:
            self.require_open()
            return self.cache.count_cached(numbers)

    def describe(self) -> str:
        """See stats.describe."""
        return "closed" if self.refusal.reason else describe(self.cache, self._counters)

    def release(self, numbers: Numbers) -> None:
        """Stop caching these entries."""
        with self.lock:
            self.require_open()
            self.cache.release(self.cache.entries.current(numbers))

    def begin_epoch(self, owner: object) -> None:
        """Tell the policy that `owner` begins a new pass over its data."""
        with self.lock:
            self.require_open()
            self.cache.log.begin_epoch(owner)

    def announce(self, owner: object, announcement: Announcement) -> None:
        """Tell the policy what `owner` will request."""
        with self.lock:
            self.require_open()
            self.cache.log.announce(owner, announcement)

    def retract(self, owner: object) -> None:
        """Take back, the next time the lock is held, what `owner` announced. Takes no lock."""
        self.lock.enqueue(partial(self.cache.log.retract, owner))

    def abandon(self, number: int) -> None:
        """Close a batch the next time the lock is held. Takes no lock."""
        self.cache.pins.end([number])

    def wait_idle(self, seconds: float | None) -> bool:
        """Wait until nothing is LOADING, at most this long. Returns whether that is so."""
        with self.lock:
            if self.cache.loading:
                self.loads.require_running_readers()
            # Of a closed store, files may stay LOADING that no reader reads.
            self.lock.wait_for(self._is_idle, seconds)
            return not self.cache.loading

    def _is_idle(self) -> bool:
        return not self.cache.loading or self.refusal.reason is not None

    def stats(self, readers: int) -> StoreStats:
        """Counters and sizes. Of one moment, unless this thread is inside the lock already."""
        with contextlib.nullcontext() if (inside := self.lock.is_entered()) else self.lock:
            if not inside:
                self._run_queued()
            return StoreStats.of(self.cache, self._counters, self._backend, readers)

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
        if self.cache.pins.ended:
            self.cache.close_lost_batches()
        if self.lock.queued:
            self.lock.run_queued()
        if self.memory.unfinished:
            self.memory.settle()

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
