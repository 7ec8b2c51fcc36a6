"""Requests for files become pending batches, and pending batches become batches."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np

from gpucache_pipes.batches import RaggedOptions
from gpucache_pipes.cache import AccessPlan, Numbers, distinct
from gpucache_pipes.device import ends_the_device
from gpucache_pipes.files import (
    LoadedFeature,
    Parts,
    PathLike,
    Paths,
    PathTable,
    Source,
    as_samples,
)
from gpucache_pipes.files.packed import DiskCache
from gpucache_pipes.store.announcement import Announcement
from gpucache_pipes.store.gather import Gatherer
from gpucache_pipes.store.host_tier import HostTier
from gpucache_pipes.store.loader import Loader
from gpucache_pipes.store.lock import require_stack
from gpucache_pipes.store.pace import requests_ahead
from gpucache_pipes.store.pending_batch import PendingBatch
from gpucache_pipes.store.shared_cache import OldVersion, SharedCache
from gpucache_pipes.store.tracing import trace
from gpucache_pipes.store.upcoming import Upcoming


class RequestManager:
    """Serves any number of consumers: resolves paths, has files read, gathers batches.

    It holds no lock and no state of its own but the table of paths: each step that needs the lock
    is a method of the shared cache. Methods are described at GPUFeatureStore.

    Args:
        shared: the cache.
        source: where files come from.
        loader: reads them.
        gatherer: makes batches of them.
        revalidate: compare each requested file with the version that was read.
        host: features in host memory.
        disk: the disk cache, if the source is one.
    """

    def __init__(
        self,
        shared: SharedCache,
        source: Source,
        loader: Loader,
        gatherer: Gatherer,
        *,
        revalidate: bool,
        host: HostTier | None = None,
        disk: DiskCache | None = None,
    ) -> None:
        self._shared = shared
        self._host = host
        self._disk = disk
        self._source = source
        self._loader = loader
        self._gatherer = gatherer
        self._revalidate = revalidate
        self._paths = PathTable(source, shared.cache.entries.add, shared.lock, revalidate)

    def resolve(self, paths: Iterable[PathLike]) -> Numbers:
        """The numbers of the entries of `paths`. Raises RuntimeError if the store was closed."""
        samples = as_samples(paths)
        return self._resolve(paths if samples is None else samples.paths)[0]

    def _resolve(self, paths: Iterable[PathLike]) -> tuple[Numbers, Sequence[PathLike]]:
        """The numbers of the entries of `paths`, and the paths, absolute."""
        if self._shared.refusal.reason is not None:
            self._shared.refusal.check()
        numbers, absolute = self._paths.resolve(paths)
        if absolute is None:
            absolute = list(map(self._shared.cache.entries.paths.__getitem__, numbers.tolist()))
        return numbers, absolute

    # Requests

    def prefetch(self, paths: Iterable[PathLike]) -> None:
        """See GPUFeatureStore."""
        numbers = self.resolve(paths)
        require_stack()
        loading: list[int] = []
        stale = self._find_stale(numbers)
        try:
            self._shared.start_loading(numbers, stale, loading)
            self._loader.submit(loading)
        except BaseException as error:
            self._shared.loads.fail(loading, error)
            raise

    def request(
        self,
        paths: Iterable[PathLike],
        owner: object = None,
        *,
        keep_alive: object = None,
        warmup: bool = False,
        ahead: int = 0,
    ) -> PendingBatch:
        """See GPUFeatureStore. The batch keeps `keep_alive` alive.

        A `warmup` does not count as a request, and evicts nothing.
        """
        samples = as_samples(paths)
        numbers, absolute = self._resolve(paths if samples is None else samples.paths)
        require_stack()
        loading: list[int] = []
        stale = self._find_stale(numbers)
        try:
            batch = self._shared.open_batch(
                numbers,
                absolute,
                loading,
                stale=stale,
                owner=owner,
                warmup=warmup,
                issuer=self,
                keep_alive=keep_alive,
                ahead=ahead,
                parts=() if samples is None else samples.parts,
            )
            if self._host is not None and not warmup:
                self._host.requested(owner, batch.numbers)
            if loading:
                self._loader.submit(loading)
        except BaseException as error:
            # An interrupt: no batch may wait for what no reader has been told of.
            self._shared.loads.fail(loading, error)
            raise
        return batch

    def requests_ahead(self, files: int) -> int:
        """See GPUFeatureStore."""
        ledger = self._shared.cache.ledger  # without the lock: an estimate
        mean = ledger.cached_bytes / max(1, ledger.cached_items)
        return requests_ahead(files, self._loader.readers, mean, ledger.max_bytes)

    def _find_stale(self, numbers: Numbers) -> list[OldVersion]:
        """The ready entries whose files have changed. Looks at each file, without the lock."""
        if not self._revalidate:
            return []
        return [
            (number, version)
            for number, path, version in self._shared.versions(numbers)
            if not self._source.is_current(path, version)
        ]

    # Pending batches

    def collect(self, batches: Sequence[PendingBatch], ragged: RaggedOptions | None = None) -> Any:
        """See GPUFeatureStore."""
        held: list[int] = []
        use, uses = object(), self._shared.lock.uses
        try:
            self._require_own(batches)
            parts = self._parts_of(batches)
            taken = self._shared.take(batches, held, use)
            with trace("gpucache::gather"):
                if parts:
                    return self._gatherer.join(taken, parts, ragged)
                if ragged is None:
                    return self._gatherer.gather(taken)
                return self._gatherer.collate(taken, ragged)
        except Exception as error:
            if ends_the_device(error):
                self._shared.end(error)
            raise
        finally:
            # By one operation, and not within a function: an interrupt may come at its entry.
            uses.pop(use, None)
            self._shared.finish([b for b in batches if b.issuer is self], held)

    def wait(self, batch: PendingBatch) -> dict[int, Exception]:
        """See PendingBatch."""
        return self._shared.wait(batch)

    def replace(self, batch: PendingBatch, position: int, feature: LoadedFeature | None) -> None:
        """See PendingBatch."""
        self._shared.replace(batch, position, feature)

    def cancel(self, batches: Iterable[PendingBatch]) -> None:
        """See GPUFeatureStore."""
        batches = list(batches)
        self._require_own(batches)
        self._shared.cancel(batches)

    def abandon(self, number: int) -> None:
        """See PendingBatch."""
        self._shared.abandon(number)

    def _parts_of(self, batches: Sequence[PendingBatch]) -> Parts:
        """Of samples of several files, the names of their parts; () for single files."""
        parts = batches[0].parts if len(batches) == 1 else ()
        if len(batches) > 1 and any(batch.parts for batch in batches):
            raise ValueError("batches of samples of several files are collected one by one")
        return parts

    def _require_own(self, batches: Iterable[PendingBatch]) -> None:
        """The number of a batch of another store may be that of another batch here."""
        if any(batch.issuer is not self for batch in batches):
            raise RuntimeError("this batch is of another store")

    # The cache

    def cached(self, paths: Sequence[PathLike]) -> int:
        """How many of these files are cached, repeats counted once."""
        return self.count_cached(self.resolve(paths))

    def count_cached(self, numbers: Numbers) -> int:
        """How many of these entries are cached, repeats counted once."""
        if self._host is None:
            return self._shared.cached(numbers)
        # A feature may be in both, once the device has evicted it.
        some = distinct(self._shared.cache.entries.current(numbers))
        return int((self._shared.cache.are_cached(some) | self._host.are_here(some)).sum())

    def has_room(self) -> bool:
        """Whether a budget is not used up. Takes no lock."""
        host = self._host is not None and self._host.has_room()
        return host or self._shared.cache.ledger.fits(1, 1)

    def begin_epoch(self, owner: object) -> None:
        """See GPUFeatureStore."""
        self._shared.begin_epoch(owner)
        if self._host is not None:
            self._host.begin_epoch(owner)

    def retract(self, owner: object) -> None:
        """See GPUFeatureStore. Takes no lock."""
        self._shared.retract(owner)
        if self._host is not None:
            self._host.retract(owner)

    def has(self, path: PathLike) -> bool:
        """See GPUFeatureStore.__contains__."""
        numbers = self.resolve([path])
        if self._shared.cached(numbers) or (
            self._host is not None and self._host.are_here(numbers).any()
        ):
            return True
        keys = self._shared.cache.entries.keys(numbers.tolist())
        return self._disk is not None and all(self._disk.holds(keys))

    def release(self, paths: Iterable[PathLike]) -> None:
        """See GPUFeatureStore."""
        paths = list(paths)
        if not self._postponed(lambda: self.release(paths)):
            require_stack()
            numbers = self.resolve(paths)
            self._shared.release(numbers)
            if self._host is not None:
                self._host.release(self._shared.cache.entries.current(numbers))
            if self._disk is not None:
                self._disk.forget_checks(self._shared.cache.entries.keys(numbers.tolist()))

    def clear(self) -> None:
        """See GPUFeatureStore."""
        if not self._postponed(self.clear):
            require_stack()
            self._shared.memory.clear()
            if self._host is not None:
                self._host.clear()
            if self._disk is not None:
                self._disk.forget_checks()

    def _postponed(self, call: Callable[[], None]) -> bool:
        """Postpone `call` if this thread is inside the lock, as below a signal handler."""
        locks = [self._shared.lock] + ([] if self._host is None else [self._host.lock])
        for lock in locks:
            if lock.is_entered():
                lock.postpone(lambda: call() if self._shared.refusal.reason is None else None)
                return True
        return False

    def announce(
        self,
        owner: object,
        upcoming: Iterable[PathLike] | Upcoming | Callable[[], Iterable[PathLike] | Upcoming],
    ) -> None:
        """See GPUFeatureStore."""
        cache, memory = self._shared.cache, self._shared.memory
        builds_plan = cache.ledger.bounded and cache.log.uses_plans
        if not builds_plan and not memory.lacks_size(owner) and self._disk is None:
            return
        if callable(upcoming):
            upcoming = upcoming()
        if self._disk is not None and isinstance(upcoming, Upcoming):
            self._disk.expect_files(owner, len(upcoming.files.paths))
        if isinstance(upcoming, Upcoming):
            # One allocation for all files is the best.
            memory.expect_files(owner, len(upcoming.files.paths))
        if builds_plan:
            build: Callable[[], AccessPlan]
            if isinstance(upcoming, Upcoming):
                build = partial(self._plan, upcoming)
            else:  # while paths mean what they mean now
                build = partial(AccessPlan, self.resolve(upcoming))
            self._shared.announce(owner, Announcement(build))
            if self._host is not None:
                self._host.announce(owner, Announcement(build))

    def _plan(self, upcoming: Upcoming) -> AccessPlan:
        """Takes long for many files: called without the lock."""
        files = upcoming.files
        numbers, _ = self._paths.resolve(Paths(files, np.arange(len(files.paths))))
        return AccessPlan(numbers[upcoming.order], upcoming.left)
