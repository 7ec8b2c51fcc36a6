"""Closing a store."""

import logging
import os
import threading
import time
import weakref
from functools import partial

from gpucache_pipes.device import Backend
from gpucache_pipes.files import AnyFiles
from gpucache_pipes.files.packed import END_SECONDS, DiskCache
from gpucache_pipes.store.host_tier import HostTier
from gpucache_pipes.store.loader import Loader
from gpucache_pipes.store.reader_pool import ReaderPool
from gpucache_pipes.store.shared_cache import SharedCache

_log = logging.getLogger("gpucache_pipes")


class Shutdown:
    """Closes a store once: no new requests, waiting consumers woken, readers ended, memory freed.

    A store that is collected without `close` ends its readers and frees its memory as well; that
    takes no lock and joins no thread.

    Args:
        store: the store, to which only a weak reference is kept.
        shared, loader, pool, backend, disk, host: its parts.
        files: the source that the store has made; None if it was given one.
    """

    def __init__(
        self,
        store: object,
        shared: SharedCache,
        loader: Loader,
        pool: ReaderPool | None,
        backend: Backend,
        disk: DiskCache | None,
        host: HostTier | None,
        files: AnyFiles | None,
    ) -> None:
        self._shared = shared
        self._loader = loader
        self._backend = backend
        self._disk = disk
        self._host = host
        self._files = files
        self._pid = os.getpid()
        self._finalizer = weakref.finalize(store, _release, self._pid, pool, backend, disk, files)
        self._finalizer.atexit = False
        self._done = threading.Event()
        self._closing_thread: int | None = None

    def close(self, seconds: float) -> None:
        """Close, and wait at most this long for gathers and reads under way.

        Called from inside the store, by a signal handler or a finalizer, it returns at once, and
        the store closes as soon as the interrupted call is done with its memory. A second thread
        that closes waits for the first.
        """
        self._shared.refusal.close()
        self._loader.stop()
        if self._disk is not None:
            self._disk.end()
        for lock in (self._shared.lock, None if self._host is None else self._host.lock):
            if lock is not None and lock.is_entered():
                lock.postpone(partial(self.close, seconds))
                return
        deadline = time.monotonic() + seconds
        self._shared.await_uses(seconds)
        if os.getpid() != self._pid:
            return
        if self._finalizer.detach() is None:
            # Another thread closes, or this one, below a signal handler.
            if self._closing_thread != threading.get_ident():
                self._done.wait(max(0.0, deadline - time.monotonic()))
            return
        self._closing_thread = threading.get_ident()
        try:
            if running := self._loader.join(max(0.0, deadline - time.monotonic())):
                _log.warning("still reading after close: %s", ", ".join(running))
            self._free_memory()
            if self._host is not None:
                self._host.close()
        finally:
            self._done.set()
            if self._files is not None:
                self._files.end()
            if self._disk is not None:
                self._disk.close(END_SECONDS)

    def _free_memory(self) -> None:
        """Free the memory once no thread uses it: the last use does it, if it is not over."""
        lock = self._shared.lock
        if lock.uses:
            lock.postpone(self._free_memory)
            if not lock.uses:  # over meanwhile, and perhaps the last
                lock.run_postponed()
        else:
            self._backend.close()


def _release(
    pid: int,
    pool: ReaderPool | None,
    backend: Backend,
    disk: DiskCache | None,
    files: AnyFiles | None,
) -> None:
    if os.getpid() == pid:
        if files is not None:
            files.end()
        if disk is not None:
            disk.end()
        # Not here, if a reader can do it: the garbage collector may have called this in the midst
        # of an upload, whose locks `close` takes.
        if pool is not None:
            pool.stop(backend.close)
        else:
            backend.close()
