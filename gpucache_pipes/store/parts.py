"""Makes the parts of a store, from the arguments that its user gives."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from gpucache_pipes.cache import Ledger, Policy, make_policy
from gpucache_pipes.device import Backend, open_backend, resolve_device, total_host_bytes
from gpucache_pipes.files import AnyFiles, Source, require_options
from gpucache_pipes.files.packed import DiskCache
from gpucache_pipes.files.source import OPTIONAL
from gpucache_pipes.peers import PeerGroup
from gpucache_pipes.store.disk import DiskOptions, open_disk_cache
from gpucache_pipes.store.gather import Gatherer
from gpucache_pipes.store.host_tier import HostTier
from gpucache_pipes.store.loader import Loader, require_timeout
from gpucache_pipes.store.pace import MOST_READERS
from gpucache_pipes.store.reader_pool import ReaderPool
from gpucache_pipes.store.requests import RequestManager
from gpucache_pipes.store.serving import Serving
from gpucache_pipes.store.shared_cache import SharedCache
from gpucache_pipes.store.shutdown import Shutdown
from gpucache_pipes.store.task_reader import TaskReader
from gpucache_pipes.units import parse_bytes, positive_int

_log = logging.getLogger("gpucache_pipes")

_STAGING_BYTES = 64 << 20
"""For each reader thread."""

_MOST_STAGING_BYTES = 512 << 20
"""Unless the number of reader threads is given."""


class Parts(NamedTuple):
    """What a store consists of."""

    backend: Backend
    shared: SharedCache
    loader: Loader
    requests: RequestManager
    shutdown: Shutdown
    disk: DiskCache | None
    host: HostTier | None
    peers: PeerGroup | None
    serving: Serving


def make_parts(
    store: object,
    device: str | torch.device | Backend | None,
    *,
    max_cache_bytes: int | str | None,
    max_cache_items: int | None,
    policy: str | Policy,
    load_fn: Callable[[str], Any] | None,
    weights_only: bool,
    keys: Any,
    dtype: Any,
    source: Source | None,
    storage_options: Mapping[str, Any] | None,
    asynchronous: bool,
    reader_threads: int | None,
    page_bytes: int | None,
    staging_bytes: int | str | None,
    revalidate: bool,
    read_timeout: float | None,
    host_cache_bytes: int | str | None,
    disk: DiskOptions,
    process_group: Any,
    exchange_timeout: float,
) -> Parts:
    """The parts of `store`. Arguments and errors are those of GPUFeatureStore."""
    if load_fn is not None and not callable(load_fn):
        raise ValueError(f"load_fn={load_fn!r} must be callable")
    given = load_fn is not None or not weights_only or keys is not None or dtype is not None
    if source is not None and (given or storage_options is not None):
        raise ValueError("a source reads files itself: give load_fn, keys and the like to it")
    require_options(storage_options)
    if source is not None:
        _require_source(source)
    require_timeout(read_timeout, asynchronous)
    if page_bytes is not None and positive_int("page_bytes", page_bytes) % 16:
        raise ValueError(f"page_bytes={page_bytes} must be a multiple of 16")
    threads, most_threads, staging = 1, MOST_READERS, _MOST_STAGING_BYTES
    if reader_threads is not None:
        threads = most_threads = positive_int("reader_threads", reader_threads)
        staging = _STAGING_BYTES * threads
    if staging_bytes is not None:
        staging = parse_bytes("staging_bytes", staging_bytes)
    items = None if max_cache_items is None else positive_int("max_cache_items", max_cache_items)
    host_policy = make_policy(policy if isinstance(policy, str) else "clairvoyant")
    policy = make_policy(policy)
    backend = device if isinstance(device, Backend) else open_backend(resolve_device(device))
    peers = PeerGroup.of(process_group, exchange_timeout, backend.device)
    budget = None
    if max_cache_bytes is not None:
        budget = parse_bytes("max_cache_bytes", max_cache_bytes, backend.total_bytes)
    ledger = Ledger(budget, items)
    host_ledger = None
    if host_cache_bytes is not None:
        host_budget = parse_bytes("host_cache_bytes", host_cache_bytes, total_host_bytes)
        host_ledger = Ledger(host_budget, None)
    files = source
    if files is None:
        files = AnyFiles(load_fn, weights_only, keys, dtype, storage_options)
    disk_cache = open_disk_cache(files, disk, revalidate)
    top: Source = files if disk_cache is None else disk_cache
    pool = None
    if asynchronous:
        pool = ReaderPool(threads, "gpucache-reader", backend.bind_thread)
    shared = SharedCache(ledger, policy, backend)
    host = None
    if host_ledger is not None:
        if backend.memory_is_host():
            _log.info("host_cache_bytes is ignored: the cache is in host memory already")
        else:
            is_current = top.is_current if revalidate else None
            host = HostTier(host_ledger, host_policy, shared.cache, is_current)
            shared.cache.is_kept_below = host.has_room
    reader = TaskReader(
        top,
        shared.loads,
        backend,
        in_threads=asynchronous,
        page_bytes=page_bytes,
        upload_bytes=_power_of_two_below(staging // (2 * most_threads)),
        revalidate=revalidate,
        host=host,
        timed=read_timeout is not None,
    )
    loader = Loader(reader, shared.loads, backend, pool, most_threads, read_timeout)
    gatherer = Gatherer(shared.cache, backend)
    requests = RequestManager(
        shared, top, loader, gatherer, revalidate=revalidate, host=host, disk=disk_cache
    )
    made = files if isinstance(files, AnyFiles) and source is None else None
    shutdown = Shutdown(store, shared, loader, pool, backend, disk_cache, host, made)
    serving = Serving(shared, backend, gatherer)
    return Parts(backend, shared, loader, requests, shutdown, disk_cache, host, peers, serving)


def _require_source(source: object) -> None:
    """Raise ValueError for anything but an object with the methods of a source."""
    names = [name for name in vars(Source) if not name.startswith("_") and name not in OPTIONAL]
    lacks = [name for name in names if not callable(getattr(source, name, None))]
    if lacks or isinstance(source, type):
        raise ValueError(
            f"source={source!r:.80} must be an object with the methods of files.Source"
            + (f"; it lacks {', '.join(lacks)}" if lacks else ", not the class")
        )


def _power_of_two_below(number: int) -> int:
    return 1 << max(0, number.bit_length() - 1)
