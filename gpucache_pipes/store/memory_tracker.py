"""What becomes of the memory of the device: freeing it, and leaving it to the model."""

import logging
from typing import TYPE_CHECKING

import numpy as np

from gpucache_pipes.device import Backend

_log = logging.getLogger("gpucache_pipes")

_PATIENCE = 5.0
"""Seconds to wait for gathers that other threads are issuing."""

if TYPE_CHECKING:
    from gpucache_pipes.store.shared_cache import SharedCache


class MemoryTracker:
    """Frees the arena, or parts of it, once nothing needs them.

    A part of SharedCache: `clear` and `shed` are whole steps under its lock, the others parts of
    such steps.

    Attributes:
        unfinished: whether `settle` has something to do.
        watches: whether `balance` has something to do.
    """

    def __init__(self, owner: "SharedCache", backend: Backend) -> None:
        self._lock = owner.lock
        self._cache = owner.cache
        self._owner = owner
        self._backend = backend
        # clear() was called, and memory is to be freed when no batch is in flight.
        self._clearing = False
        self.unfinished = False
        self.watches = backend.shares_memory and owner.cache.ledger.max_bytes is None

    def lacks_size(self, owner: object) -> bool:
        """Whether the device would like to know how many files a pipeline has. Takes no lock."""
        return self._backend.shares_memory and owner not in self._cache.arena.files_to_come

    def expect_files(self, owner: object, count: int) -> None:
        """So many different files will be requested. A hint; takes no lock."""
        self._cache.arena.files_to_come[owner] = count

    def clear(self) -> None:
        """Stop caching everything, and free the memory as soon as no batch is in flight."""
        with self._lock:
            self._owner.require_open()
            self._cache.release(np.arange(len(self._cache.entries)))
            self._clearing = self.unfinished = True
            self.settle()

    def settle(self) -> None:
        """Finish what `clear` or `balance` began, if no batch in flight needs the memory."""
        self._cache.arena.settle()
        if self._clearing and self._cache.idle and not self._lock.uses:
            self._clearing = False
            if not self._cache.ledger.held_pages:
                self._owner.loads.free_arena()
        self.unfinished = self._clearing or self._cache.arena.shrinking

    def balance(self) -> None:
        """Where there is no budget: leave the model what it needs. Called now and then."""
        if not self.watches:
            return
        ledger = self._cache.ledger
        try:
            pages = self._backend.balance()
        except Exception:  # of a device that has failed: the batch at hand is complete
            _log.exception("the memory of the device is not known")
            return
        if pages < 0:
            self._cache.arena.retire(-pages)
            self.unfinished = True
        elif pages and ledger.ceiling is not None:
            ledger.set_ceiling(None)  # the cache may grow again

    def shed(self) -> int:
        """Drop all but what batches in flight need, and return the memory; how many bytes.

        While readers are held, and outside of any use of the calling thread. Raises
        torch.OutOfMemoryError if there is no memory even for what batches in flight need.
        """
        with self._lock:
            self._owner.require_open()
            self._lock.await_uses(_PATIENCE)
            before = self._backend.reserved_bytes
            if self._lock.uses or not before or not self._backend.shares_memory:
                return 0
            pages = self._cache.arena.needed_pages()
            if pages:
                try:
                    self._backend.rebuild(pages)
                except Exception as error:
                    if not self._backend.reserved_bytes:  # what batches in flight need is lost
                        self._owner.refusal.fail(error)
                    raise
                self._cache.arena.renumber(pages)
                for batch in self._cache.pins.holders():
                    batch.forget_places()
            else:
                self._owner.loads.free_arena()
            return max(0, before - self._backend.reserved_bytes)
