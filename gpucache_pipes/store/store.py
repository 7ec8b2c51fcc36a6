"""GPUFeatureStore: give it paths, get tensors on the device."""

import html
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn, Self

import torch

from gpucache_pipes.batches import RaggedOptions
from gpucache_pipes.cache import Policy
from gpucache_pipes.device import Backend
from gpucache_pipes.files import Key, PathLike, Source
from gpucache_pipes.peers import NO_GROUP
from gpucache_pipes.store.device_sharing import DeviceSharing
from gpucache_pipes.store.disk import DiskOptions
from gpucache_pipes.store.lock import require_stack
from gpucache_pipes.store.parts import make_parts
from gpucache_pipes.store.pending_batch import PendingBatch
from gpucache_pipes.store.process_hooks import register
from gpucache_pipes.store.stats import StoreStats
from gpucache_pipes.store.upcoming import Upcoming
from gpucache_pipes.store.warmup import warm_up
from gpucache_pipes.units import require_hashable


class GPUFeatureStore(DeviceSharing):
    """A bounded cache of feature files in the memory of a device.

        with GPUFeatureStore("cuda", max_cache_bytes="8GiB") as store:
            batch = store.get_batch(["a.pt", "b.pt"])      # features, on the GPU
            batch[0]["feature"]                            # as it was saved

    May be used from any number of threads. Results are fresh copies: writing to a result changes
    nothing in the cache, and evicting a feature changes no result.

    Args:
        device: where features are kept. None is the accelerator if there is one, else the CPU;
            "cuda" is the device that is current now; under torchrun that of LOCAL_RANK, if the
            program has set none. Also a `device.Backend`.
        max_cache_bytes: budget for the tensors of cached features: a number of bytes, "8GiB", or
            "50%" of the memory of the device. Batches in flight take memory in addition. None is no
            limit: the cache takes what the model has not needed, and returns it when it does.
        max_cache_items: budget for the number of cached features; None is no limit.
        policy: which features are evicted when the budget is used up: "clairvoyant" (default),
            "keep", "lru", "fifo", "lfu", "sieve", "s3fifo", "w-tinylfu", or an object with the
            methods of `cache.Policy`.
        load_fn: `load_fn(path) -> feature` replaces reading files. Reader threads call it, several
            at a time, with paths as they were first written; absolute after a change of directory.
        weights_only: as in `torch.load`. False lets a file run any code.
        keys: the parts of dict features that are kept: a key, or a list of keys, each of which may
            be a tuple of keys that leads to a part of a part. It is an error of a file to lack one.
        dtype: floating tensors are converted to this dtype as they are read, as by `Tensor.to`:
            rounded to the nearest value, or inf. Or the dtypes of named tensors, by keys as above.
        source: where features come from, in place of the four above: see `files.Source`.
        storage_options: for paths that are URLs, such as "s3://bucket/a.pt": arguments of obstore
            for S3, Google Cloud Storage, Azure and HTTP, of fsspec for others. Without them the
            environment tells, as it does the SDKs.
        asynchronous: read in background threads; False reads in the thread that requests.
        reader_threads: number of background threads; None finds 1 to 128 by measurement.
        page_bytes: size of a page, a multiple of 16; None fits it to the first features.
        staging_bytes: page-locked host memory for uploads to an accelerator, a number or a string;
            None is 512 MiB, or 64 MiB for each of `reader_threads`. Each thread has two buffers, of
            powers of two bytes. A file that does not fit into a buffer makes it larger.
        revalidate: look at each hit whether the file has changed (device, inode, size or
            modification time), and read it again if so. Takes a stat, about 3 us on a local disk,
            for each file of a batch, in the requesting thread. A file that was written less than
            two seconds before it was read is read again at its next hit, since clocks are too
            coarse to tell; a path that is not a file, as a load_fn may take it, always.
        read_timeout: seconds after which a file that is still being read has failed, with a
            TimeoutError as the cause. Another thread replaces its reader, which ends when the read
            returns, if ever. None waits for as long as it takes.
        host_cache_bytes: budget for features in host memory that are not on an accelerator; a
            number, "300GiB", or "50%" of what this process may use, divided by the processes that
            torchrun started on this machine. Ignored if the device is the CPU.
        disk_cache: a directory on a local disk, which keeps what was read, packed, for later epochs
            and runs, and for other processes of this machine. It is made if need be; nothing else
            may be in it.
        disk_cache_bytes: budget of that directory, a number, "1TiB", or "50%" of the disk. The
            directory remembers the largest one that it was given; a process with a smaller one
            writes less. None is 90% of the disk.
        disk_cache_check: before a file's first use from the disk cache, "stat" looks whether it has
            the size and modification time that it had; "listing" whether its directory lists it;
            "never" does not look.
        disk_cache_key: with a load_fn or a source of your own: a string that you change whenever
            it makes other features of the same files.
        process_group: ranks whose caches are one, such as `torch.distributed.group.WORLD`.
            Pipelines over a sharded PathLister then read each file once in all of them, and send
            it to who needs it; all ranks must iterate alike. All other methods concern this rank
            alone. None is no group.
        exchange_timeout: seconds that ranks wait for each other in such a pipeline, and so the
            longest time between two batches.

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
        keys: Key | Iterable[Key] | None = None,
        dtype: torch.dtype | Mapping[Key, torch.dtype] | None = None,
        source: Source | None = None,
        storage_options: Mapping[str, Any] | None = None,
        asynchronous: bool = True,
        reader_threads: int | None = None,
        page_bytes: int | None = None,
        staging_bytes: int | str | None = None,
        revalidate: bool = False,
        read_timeout: float | None = None,
        host_cache_bytes: int | str | None = None,
        disk_cache: PathLike | None = None,
        disk_cache_bytes: int | str | None = None,
        disk_cache_check: str = "stat",
        disk_cache_key: str | None = None,
        process_group: Any = NO_GROUP,
        exchange_timeout: float = 60.0,
    ) -> None:
        parts = make_parts(
            self, device, max_cache_bytes=max_cache_bytes, max_cache_items=max_cache_items,
            policy=policy, load_fn=load_fn, weights_only=weights_only, keys=keys, dtype=dtype,
            source=source, storage_options=storage_options, asynchronous=asynchronous,
            reader_threads=reader_threads, page_bytes=page_bytes, staging_bytes=staging_bytes,
            revalidate=revalidate, read_timeout=read_timeout, host_cache_bytes=host_cache_bytes,
            disk=DiskOptions(
                disk_cache, disk_cache_bytes, disk_cache_check, disk_cache_key
            ), process_group=process_group, exchange_timeout=exchange_timeout,
        )  # fmt: skip
        self._backend, self._shared, self._loader, self._requests, self._shutdown = parts[:5]
        self._disk, self._host = parts.disk, parts.host
        self.peers, self.serving = parts.peers, parts.serving
        register(self)

    # Batches

    def get(self, path: PathLike) -> Any:
        """One feature as it was saved, with its tensors on the device.

        Raises FeatureLoadError (FileNotFoundError, MemoryError); the next request tries again.
        """
        return self.request([path]).result()[0]

    def get_batch(
        self,
        paths: Sequence[PathLike],
        *,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> Any:
        """The features of `paths`, in order, repeats allowed; or `collate_fn(their list)`.

        Without collate_fn a FeatureBatch: a sequence that was gathered by a few device operations,
        whose `collate()` gives tensors [B, ...]. Errors as in `get`.
        """
        batch = self.request(paths).result()
        return batch if collate_fn is None else collate_fn(list(batch))

    def prefetch(self, paths: Sequence[PathLike]) -> None:
        """Start to load the files that are not loaded, and return at once.

        Nothing is pinned: with a budget smaller than the files, some of them may have been evicted,
        or not admitted, when they are requested. `request` pins.
        """
        self._requests.prefetch(paths)

    def request(
        self, paths: Sequence[PathLike], *, owner: object = None, ahead: int = 0
    ) -> PendingBatch:
        """Start to load the files that are not loaded, and pin all of them for a batch.

        They stay until the pending batch is consumed, cancelled or dropped. `owner` names the
        pipeline to the policy: any hashable object, the one of `begin_epoch`. `ahead` says how many
        more batches like this one will be pending at the same time, so that memory is allocated for
        all of them at once. Raises TypeError for an owner that is not hashable.
        """
        require_hashable("owner", owner)
        return self._requests.request(paths, owner, keep_alive=self, ahead=ahead)

    def requests_ahead(self, files: int) -> int:
        """How many requests of `files` files should be pending, so that all readers have work.

        2, and more where storage with latency has made reader threads more; their features take
        256 MiB and an eighth of the budget at most. Takes no lock.
        """
        return self._requests.requests_ahead(files)

    def collect(self, batches: Sequence[PendingBatch], ragged: RaggedOptions | None = None) -> Any:
        """The features of several pending batches as one FeatureBatch, in order; consumes them.

        Waits for files that are still being read. The gather runs on the current stream of the
        calling thread. With `ragged`: what the `collate(ragged)` of that batch gives, which takes
        one copy less on the host. Raises the first error by position of a file without a substitute
        (`PendingBatch.replace`), and RuntimeError for a batch that was consumed or is of another
        store.
        """
        return self._requests.collect(batches, ragged)

    def cancel(self, batches: Iterable[PendingBatch]) -> None:
        """Give pending batches up. Does nothing for those that were consumed.

        Raises RuntimeError for a batch of another store, and cancels none.
        """
        self._requests.cancel(batches)

    # The cache

    def release(self, paths: Sequence[PathLike]) -> None:
        """Stop caching these files. Pending batches still get theirs; unknown paths are ignored.

        In a signal handler or a finalizer that has interrupted a call of this store, it takes
        effect when that call has finished.
        """
        self._requests.release(paths)

    def clear(self) -> None:
        """Stop caching everything, and free the memory as soon as no batch is in flight."""
        self._requests.clear()

    def warm(self, paths: Any, progress: bool = True) -> int:
        """Load `paths` until all are cached or the budget is used up; returns how many are cached.

        Paths, or a PathLister (the files of its shard), a glob, or a directory of `.pt` files.
        Evicts nothing, and does not count as requests in `stats()`. Shows a progress bar on a
        terminal. Errors as in `get`; what was loaded before stays.
        """
        return warm_up(self._requests, self._shared, paths, progress)

    def wait_idle(self, timeout: float | None = None) -> bool:
        """Wait until no file is being read, at most `timeout` seconds; returns whether that is so.

        Counts readers of other threads, and those that `read_timeout` has replaced.
        """
        return self._shared.wait_idle(timeout)

    # Hints for the policy. Pipelines give them themselves.

    def begin_epoch(self, owner: object = None) -> None:
        """Tell the policy that `owner` begins a new pass over its data.

        Without a pipeline, call it before each epoch.
        """
        require_hashable("owner", owner)
        require_stack()
        self._requests.begin_epoch(owner)
        if self._disk is not None:
            self._disk.flush()

    def announce(
        self,
        owner: object,
        upcoming: Iterable[PathLike] | Upcoming | Callable[[], Iterable[PathLike] | Upcoming],
    ) -> None:
        """Tell the policy what `owner` will request from now on.

        A hint: results are right whatever it says. It holds until the next call, or `retract`. A
        function that returns it is called only if anything may ever have to be evicted.

        Raises TypeError for an owner that is not hashable.
        """
        require_hashable("owner", owner)
        self._requests.announce(owner, upcoming)

    def retract(self, owner: object) -> None:
        """Take back, at some later time, what `owner` announced. Takes no lock.

        Raises TypeError for an owner that is not hashable.
        """
        require_hashable("owner", owner)
        self._requests.retract(owner)

    foresee = announce  # the former names
    withdraw = retract

    # Inspection

    def __contains__(self, path: object) -> bool:
        """Whether a request would read no file: it is in memory, or in the disk cache.

        What is in the disk cache may still turn out to be another file by now.
        """
        return isinstance(path, (str, os.PathLike)) and self._requests.has(path)

    def __bool__(self) -> bool:
        """True, even while nothing is cached: `store or other` must not drop a store."""
        return True

    def __len__(self) -> int:
        """The number of features that are cached now."""
        return self._shared.cache.ledger.cached_items

    def stats(self) -> StoreStats:
        """Counters and sizes, all of one moment.

        In a signal handler or a finalizer that has interrupted a call of this store, not quite.
        """
        stats = self._shared.stats(self._loader.readers)
        for tier in (self._host, self._disk, self.peers):
            if tier is not None:
                stats = replace(stats, **tier.figures())
        return stats

    def check(self) -> None:
        """Recompute every total from the entries; raises AssertionError on a difference."""
        self._shared.check()
        if self._host is not None:
            self._host.check()

    def __repr__(self) -> str:
        # Without the lock: handlers of logs have locks of their own, and format their arguments.
        return f"GPUFeatureStore({self.device}, {self._shared.describe()})"

    def _repr_html_(self) -> str:
        return f"<b>{html.escape(repr(self))}</b>{self.stats()._repr_html_()}"

    # The end

    def close(self, timeout: float = 5.0) -> None:
        """End the readers and free the memory. Consumers that wait get a RuntimeError.

        May be called more than once and from any thread, also from signal handlers and finalizers:
        where these have interrupted a call of this store, `close` returns at once, and the store
        closes as soon as that call is done with its memory. Waits for gathers and reads under way
        for `timeout` seconds at most, in all.
        """
        self._shutdown.close(timeout)

    def refuse_after_fork(self) -> None:
        """In a forked child: refuse all further calls."""
        self._shared.refuse_after_fork()
        if self._host is not None:
            self._host.lock.reset()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a GPUFeatureStore lives in one process and cannot be pickled; give worker processes "
            "paths, and make the store where the training loop runs"
        )
