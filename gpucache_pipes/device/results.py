"""Host memory for large results of gathers, which is reused once the results are freed."""

import weakref
from mmap import mmap

import torch

from gpucache_pipes.device.memory import map_memory

LARGE = 32 << 20
"""Bytes from which a result is large. The C library maps new memory for each such allocation and
unmaps it afterwards. The kernel then clears it page by page, which takes longer than the gather."""

_MOST_FREE = 4
"""Free regions that are kept for reuse."""


class ResultMemory:
    """Allocates memory, and reuses it once the last tensor that uses it is freed.

    Thread-safe without a lock. A lock does not work here: a finalizer returns a region, and the
    garbage collector may run it in any thread, also in one that holds the lock. `_give_back` and
    `_take` rely on single list operations (copy, append, remove, del of a slice) being atomic.
    """

    def __init__(self) -> None:
        # In the order in which they were freed. The last one is reused first.
        self._free: list[mmap] = []

    def empty(self, nbytes: int) -> torch.Tensor:
        """A new uint8 tensor [nbytes] with undefined content, owned by the caller.

        Raises:
            MemoryError: the system has no memory for it.
        """
        region = self._take(nbytes)
        if region is None:
            try:
                region = map_memory(nbytes)
            except OSError as error:
                raise MemoryError(f"no host memory for a result of {nbytes} bytes") from error
        # The storage of the tensor holds the view. When the storage is freed, so is the view, and
        # the finalizer returns the region.
        view = memoryview(region)
        weakref.finalize(view, _give_back, self._free, region).atexit = False
        # The storage is no larger than the result: torch.save writes the whole storage.
        return torch.frombuffer(view, dtype=torch.uint8, count=nbytes)

    def _take(self, nbytes: int) -> mmap | None:
        """Remove a free region of at least `nbytes` and at most twice that, if there is one."""
        for region in reversed(self._free.copy()):
            if nbytes <= len(region) <= 2 * nbytes:
                try:
                    self._free.remove(region)
                except ValueError:  # another thread has taken it
                    continue
                return region
        return None

    def clear(self) -> None:
        """Free the regions that are not in use. The others are freed with their results."""
        # The finalizers of results in use refer to the old list, so their regions are not reused.
        self._free = []


def _give_back(free: list[mmap], region: mmap) -> None:
    free.append(region)
    del free[:-_MOST_FREE]
