"""GPUFeatureStore: give it paths, get tensors on the device."""

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from types import TracebackType
from typing import Any, NoReturn

import torch

from gpucache_pipes.batches import RaggedOptions
from gpucache_pipes.cache import AccessPlan, Cache, Ledger, Policy, make_policy
from gpucache_pipes.device import Backend, open_backend, resolve_device
from gpucache_pipes.files import PathLike, PathTable, opener
from gpucache_pipes.store.loader import Loader
from gpucache_pipes.store.lock import StoreLock, require_stack
from gpucache_pipes.store.pending_batch import PendingBatch
from gpucache_pipes.store.process_hooks import watch
from gpucache_pipes.store.reader_pool import ReaderPool
from gpucache_pipes.store.requests import RequestManager
from gpucache_pipes.store.stats import StoreStats
from gpucache_pipes.store.upcoming import Upcoming
from gpucache_pipes.store.warmup import warm
from gpucache_pipes.units import parse_bytes, positive_int, require_hashable

_log = logging.getLogger("gpucache_pipes")

_DEFAULT_THREADS = 1
_STAGING_BYTES = 64 << 20
_CLOSE_SECONDS = 5.0


class GPUFeatureStore:
    """A bounded cache of feature files in the memory of a device.

        with GPUFeatureStore("cuda", max_cache_bytes="8GiB") as store:
            batch = store.get_batch(["a.pt", "b.pt"])      # features, on the GPU
            batch[0]["feature"]                            # as it was saved

    May be used from several threads. What it returns is always a fresh copy: nothing that is
    done to a result changes the cache, and evicting never changes a result.

    Args:
        device: where to keep features; None is the accelerator if there is one, else the CPU.
            "cuda" means the device that is current now. Also a `device.Backend`.
        max_cache_bytes: budget for the tensors of cached features: a number of bytes or a
            string such as "8GiB". None is no limit: the cache grows until a tenth of the
            device's memory is left. Batches in flight take memory beside it.
        max_cache_items: budget for the number of cached features; None is no limit.
        policy: what goes when the budget is used up: "clairvoyant" (default), "keep", "lru",
            "fifo", "lfu", "sieve", "s3fifo", "w-tinylfu", or an object with the methods of
            `cache.Policy`.
        load_fn: `load_fn(path) -> feature` replaces reading `.pt` files; called from reader
            threads, several at a time.
        weights_only: as in `torch.load`. False lets a file run any code it likes.
        asynchronous: read in background threads; False reads in the caller's.
        reader_threads: number of background threads; None chooses.
        page_bytes: size of a page, a multiple of 16; None fits it to the first features.
        staging_bytes: page-locked host memory for uploads to an accelerator, a number or a
            string; None is 64 MiB for each reader thread. Each has two buffers, which are
            powers of two. A file that does not fit into one makes it larger.
        revalidate: look at each hit whether the file has changed (device, inode, size or time
            of modification), and read it again if so. Takes a stat, about 3 us on a local
            disk, for each file of a batch, in the thread that asks. A file that was written
            less than two seconds before it was read is read again at its next hit, since
            clocks are too coarse to tell; a path that is no file, as load_fn may take it, always.
        read_timeout: seconds after which a file that is still being read counts as failed, with a
            TimeoutError as the cause. Its reader is replaced by another thread, and ends when the
            read returns, if ever. None waits for as long as it takes.

    Raises:
        ValueError: an argument is out of range; the message names it and its value.
    """

    def __init__(
        self,
        device: str | torch.device | Backend | None = None,
        *,
        max_cache_bytes: int | str | None = None,
        max_cache_items: int | None = None,
        policy: str | Policy = "clairvoyant",
        load_fn: Callable[[str], Any] | None = None,
        weights_only: bool = True,
        asynchronous: bool = True,
        reader_threads: int | None = None,
        page_bytes: int | None = None,
        staging_bytes: int | str | None = None,
        revalidate: bool = False,
        read_timeout: float | None = None,
    ) -> None:
        if load_fn is not None and not callable(load_fn):
            raise ValueError(f"load_fn={load_fn!r} must be callable")
        seconds = 1.0 if read_timeout is None else read_timeout
        if read_timeout is not None and not (asynchronous and 0 < seconds < threading.TIMEOUT_MAX):
            raise ValueError(
                f"read_timeout={read_timeout!r} must be a positive, finite number of seconds"
                if asynchronous
                else "read_timeout needs reader threads: asynchronous=True"
            )
        if page_bytes is not None and positive_int("page_bytes", page_bytes) % 16:
            raise ValueError(f"page_bytes={page_bytes} must be a multiple of 16")
        threads = positive_int(
            "reader_threads", _DEFAULT_THREADS if reader_threads is None else reader_threads
        )
        staging = _STAGING_BYTES * threads
        if staging_bytes is not None:
            staging = parse_bytes("staging_bytes", staging_bytes)
        ledger = Ledger(
            None if max_cache_bytes is None else parse_bytes("max_cache_bytes", max_cache_bytes),
            None if max_cache_items is None else positive_int("max_cache_items", max_cache_items),
        )
        policy = make_policy(policy)
        self._backend = (
            device if isinstance(device, Backend) else open_backend(resolve_device(device))
        )
        lock = StoreLock()
        self._cache = Cache(ledger, policy, self._backend.grow)
        pool = ReaderPool(threads, "gpucache-reader") if asynchronous else None
        self._loader = Loader(
            self._cache,
            self._backend,
            opener(load_fn, weights_only),
            load_fn is not None,
            pool,
            page_bytes,
            _power_of_two_below(staging // (2 * threads)),
            revalidate,
            read_timeout,
            lock,
        )
        self._desk = RequestManager(self._cache, self._backend, self._loader, lock)
        self._paths = PathTable(self._cache.entries.add, lock, revalidate)
        self._pid = os.getpid()
        self._finalizer = weakref.finalize(self, _let_go, self._pid, pool, self._backend)
        self._finalizer.atexit = False
        self._closed = threading.Event()
        self._closed_by: int | None = None
        watch(self)

    # What users ask for

    @property
    def device(self) -> torch.device:
        """Where results are."""
        return self._backend.device

    def get(self, path: PathLike) -> Any:
        """One feature, as it was saved, its tensors on the device.

        Raises FeatureLoadError (FileNotFoundError, MemoryError) if it cannot be loaded; the
        next request tries again.
        """
        return self.request([path]).result()[0]

    def get_batch(
        self,
        paths: Sequence[PathLike],
        *,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> Any:
        """The features of `paths`, in order, repeats allowed; or `collate_fn(their list)`.

        Without collate_fn a FeatureBatch: a sequence that was gathered by O(1) device
        operations, whose `collate()` gives tensors [B, ...]. Errors as in `get`.
        """
        batch = self.request(paths).result()
        return batch if collate_fn is None else collate_fn(list(batch))

    def prefetch(self, paths: Sequence[PathLike]) -> None:
        """Start to load what is not there yet, and return at once.

        Nothing is held for the caller: with a budget smaller than what is prefetched, some of
        it may have gone, or not have come, when it is asked for. `request` holds.
        """
        self._desk.prefetch(self._resolve(paths))

    def request(self, paths: Sequence[PathLike], *, owner: object = None) -> PendingBatch:
        """Start to load what is not there yet, and hold all of it until the ticket is used.

        `owner` says whose request it is, for the policy: the one of `begin_epoch`. Any hashable
        object. Raises TypeError for one that is not.
        """
        require_hashable("owner", owner)
        ticket = self._desk.request(self._resolve(paths), owner)
        # A store that is dropped while somebody waits for a batch of it would not read it.
        ticket.holder = self
        return ticket

    def collect(self, tickets: Sequence[PendingBatch], ragged: RaggedOptions | None = None) -> Any:
        """The features of several tickets as one batch, in order. Uses the tickets up.

        Waits for files that are still being read. The gather runs on the current stream of the
        calling thread. Raises the first error among the features, in their order, that was not
        dealt with by `PendingBatch.replace`. With `ragged` what its `collate(ragged)` gives,
        which on the host takes one copy less.
        """
        return self._desk.collect(tickets, ragged)

    def cancel(self, tickets: Iterable[PendingBatch]) -> None:
        """Give tickets up: what they held may go. Harmless for tickets that were used."""
        self._desk.cancel(tickets)

    def release(self, paths: Sequence[PathLike]) -> None:
        """Stop caching these. Batches in flight still get theirs; unknown paths are ignored.

        From a signal handler or a finalizer that has interrupted a call of this store: once that
        is through.
        """
        if self._postponed(partial(self.release, list(paths))):
            return
        require_stack()
        numbers = self._resolve(paths)
        with self._desk.lock:
            self._desk.require_open()
            entries = self._cache.entries
            self._cache.release([entries[number] for number in entries.current(numbers)])

    def clear(self) -> None:
        """Stop caching everything, and give memory back as soon as no batch is in flight."""
        if not self._postponed(self.clear):
            require_stack()
            self._desk.clear()

    def _postponed(self, call: Callable[[], None]) -> bool:
        """Whether this thread is inside, as under a signal handler; then `call` comes later."""
        lock = self._desk.lock
        if not lock.is_entered():
            return False
        lock.postpone(lambda: call() if self._desk.refusal is None else None)
        return True

    def warm(self, paths: Sequence[PathLike], progress: bool = True) -> int:
        """Load `paths` until all are cached or the budget is used up; returns how many are.

        Evicts nothing, and does not count as requests in `stats()`. Shows a progress bar on
        stderr. Errors as in `get`; what was loaded before stays.
        """
        return warm(self._desk, self._cache, self._resolve, paths, progress)

    def begin_epoch(self, owner: object = None) -> None:
        """Tell the policy that `owner` begins a new pass over its data.

        Pipelines do this themselves. Without one, call it before each epoch.
        """
        require_hashable("owner", owner)
        require_stack()
        with self._desk.lock:
            self._desk.require_open()
            self._cache.begin_epoch(owner)

    def announce(
        self,
        owner: object,
        upcoming: Iterable[PathLike] | Upcoming | Callable[[], Iterable[PathLike] | Upcoming],
    ) -> None:
        """Tell the policy what `owner` will request from now on. Pipelines do this themselves.

        A hint: whatever it says, results stay right. It holds until the next call, or `retract`.
        A function that gives it is called only where something may ever have to go.

        Raises TypeError for an owner that is not hashable.
        """
        require_hashable("owner", owner)
        with self._desk.lock:
            if not self._cache.ledger.bounded:
                return  # nothing will ever have to go
        # All that takes long is done without the lock.
        if callable(upcoming):
            upcoming = upcoming()
        if isinstance(upcoming, Upcoming):
            numbers = self._resolve(upcoming.files)
            in_order = numbers == list(range(len(numbers)))  # as with the first pipeline
            keys = upcoming.order if in_order else map(numbers.__getitem__, upcoming.order)
            plan = AccessPlan(keys, upcoming.left)
        else:
            plan = AccessPlan(self._resolve(upcoming))
        with self._desk.lock:
            self._desk.require_open()
            self._cache.announce(owner, plan)

    def retract(self, owner: object) -> None:
        """Take back, at some later time, what `owner` foresaw. Takes no lock.

        Raises TypeError for an owner that is not hashable.
        """
        require_hashable("owner", owner)
        self._desk.defer(partial(self._cache.retract, owner))

    def bind_stream(self) -> Callable[[], AbstractContextManager[Any]]:
        """A function whose contexts make any thread work on the stream that is current here.

        For code that gathers in a thread of its own and hands results to this one. Pipelines do
        this themselves.
        """
        return self._backend.bind_stream()

    def __contains__(self, path: object) -> bool:
        if not isinstance(path, (str, os.PathLike)):
            return False
        numbers = self._resolve([path])
        with self._desk.lock:
            [number] = self._cache.entries.current(numbers)
            return self._cache.entries[number].cached

    def __bool__(self) -> bool:
        """True, also while nothing is cached: `store or other` must not drop a store."""
        return True

    def __len__(self) -> int:
        """Features cached now."""
        return self._cache.ledger.cached_items

    def stats(self) -> StoreStats:
        """Counters and sizes, all of one moment.

        But for a signal handler or a finalizer that has interrupted a call of this store: it may
        see some of them before a change, and some behind it.
        """
        if not self._desk.lock.is_entered():
            with self._desk.lock:
                self._desk.run_deferred()
                return self._count()
        return self._count()

    def _count(self) -> StoreStats:
        ledger = self._cache.ledger
        return StoreStats(
            hits=self._desk.hits,
            misses=self._desk.misses,
            failures=self._loader.failures,
            files_read=self._loader.files_read,
            bytes_read=self._loader.bytes_read,
            evictions=self._cache.evictions,
            skipped=self._desk.skipped,
            items=ledger.cached_items,
            cached_bytes=ledger.cached_bytes,
            padding_bytes=ledger.cached_pages * ledger.page_bytes - ledger.cached_bytes,
            bypassed_items=self._cache.bypassed_items,
            reserved_bytes=self._backend.reserved_bytes,
            page_bytes=ledger.page_bytes,
            wait_seconds=self._desk.wait_seconds,
        )

    def check(self) -> None:
        """Recompute every total from the ground truth; raises AssertionError on a difference."""
        with self._desk.lock:
            self._desk.run_deferred()
            self._cache.check()

    def close(self) -> None:
        """End the readers and give memory back. Consumers that wait are woken with an error.

        May be called more than once, from any thread, and from signal handlers and finalizers:
        where these have interrupted a call of this store, they return at once, and the store is
        closed as soon as that call is through with its memory.
        """
        self.shut(_CLOSE_SECONDS)

    def shut(self, seconds: float) -> None:
        """Close, and wait at most so long for files that are being read, and for batches."""
        self._desk.refuse()
        lock = self._desk.lock
        if lock.is_entered():
            lock.postpone(partial(self.shut, seconds))
            return
        deadline = time.monotonic() + seconds
        self._desk.shut(seconds)
        if os.getpid() != self._pid:
            return
        if self._finalizer.detach() is None:
            # Another thread is at it, or this one, which a signal has interrupted.
            if self._closed_by != threading.get_ident():
                self._closed.wait(max(0.0, deadline - time.monotonic()))
            return
        self._closed_by = threading.get_ident()
        try:
            if running := self._loader.join(max(0.0, deadline - time.monotonic())):
                _log.warning("still reading after close: %s", ", ".join(running))
            self._give_memory_back()
        finally:
            self._closed.set()

    def _give_memory_back(self) -> None:
        """Once nothing uses it: a gather that takes longer than closing waits does it itself."""
        lock = self._desk.lock
        if lock.uses:
            lock.postpone(self._give_memory_back)
            if not lock.uses:  # it has ended meanwhile, and may be the last
                lock.run_postponed()
        else:
            self._backend.close()

    def __enter__(self) -> "GPUFeatureStore":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a GPUFeatureStore lives in one process and cannot be pickled; give worker processes "
            "paths, and make the store where the training loop runs"
        )

    def __repr__(self) -> str:
        # Without the lock: handlers of logs have locks of their own, and format what they get.
        items, size = len(self), self._cache.ledger.cached_bytes
        return f"GPUFeatureStore({self.device}, {items} items, {size} bytes)"

    def refuse_after_fork(self) -> None:
        """For the child of a fork: refuse to work."""
        self._desk.refuse_after_fork()

    def _resolve(self, paths: Iterable[PathLike]) -> list[int]:
        """The numbers of the entries of `paths`. Without the lock."""
        if self._desk.refusal is not None:
            raise RuntimeError(self._desk.refusal)
        return self._paths.numbers(paths)


def _power_of_two_below(number: int) -> int:
    return 1 << max(0, number.bit_length() - 1)


def _let_go(pid: int, pool: ReaderPool | None, backend: Backend) -> None:
    """For a store that was collected without close(). Takes no lock and joins no thread."""
    if os.getpid() == pid:
        if pool is not None:
            pool.stop()
        backend.close()
