"""Host memory for large results, which is reused once the results are freed."""

import math
import weakref
from mmap import mmap

import torch

from gpucache_pipes.device.memory import map_memory

LARGE = 1 << 20
"""Bytes from which a result is large. The C library maps new memory for many such allocations, and
returns it afterwards. The kernel then clears it page by page, which takes longer than the copy."""

_STEP = 2 << 20
"""Regions are multiples of this, a huge page of most systems: fewer sizes, more reuse."""

_MOST_FREE = 256 << 20
"""Bytes of free regions that are kept for reuse; the last one whatever its size."""


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A new contiguous host tensor with undefined content, owned by the caller.

    Raises:
        MemoryError: the system has no memory for it.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < LARGE:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return MEMORY.empty(nbytes).view(dtype).view(shape)


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
                region = map_memory(-(-nbytes // _STEP) * _STEP)
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
            if nbytes <= len(region) <= max(2 * nbytes, _STEP):
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
    kept = nbytes = 0
    for one in reversed(free.copy()):
        nbytes += len(one)
        if kept and nbytes > _MOST_FREE:
            break
        kept += 1
    del free[:-kept]


MEMORY = ResultMemory()
"""For all results of this process."""
