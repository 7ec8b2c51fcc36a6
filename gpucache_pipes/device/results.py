"""Host memory for large results, used again once nobody holds them."""

import weakref
from mmap import mmap

import torch

from gpucache_pipes.device.memory import map_memory

LARGE = 32 << 20
"""Results from this size on. The C library maps such memory anew for each of them and unmaps it
afterwards, and then the kernel clears it page by page: that takes longer than the gather."""

_MOST_FREE = 4


class ResultMemory:
    """Gives memory, and takes it back when the last tensor that uses it is gone.

    For any number of threads. Takes no lock: memory comes back whenever the garbage collector
    runs.
    """

    def __init__(self) -> None:
        # The one that was freed last is the last.
        self._free: list[mmap] = []

    def empty(self, nbytes: int) -> torch.Tensor:
        """A tensor uint8 [nbytes] of undefined content. Raises MemoryError."""
        region = self._take(nbytes)
        if region is None:
            try:
                region = map_memory(nbytes)
            except OSError as error:
                raise MemoryError(f"no host memory for a result of {nbytes} bytes") from error
        # The tensor's storage holds the view, and the view dies with it.
        view = memoryview(region)
        weakref.finalize(view, _give_back, self._free, region).atexit = False
        # No more than the result: whoever saves a tensor saves all of its storage.
        return torch.frombuffer(view, dtype=torch.uint8, count=nbytes)

    def _take(self, nbytes: int) -> mmap | None:
        for region in reversed(self._free.copy()):
            if nbytes <= len(region) <= 2 * nbytes:
                try:
                    self._free.remove(region)
                except ValueError:  # another thread was faster
                    continue
                return region
        return None

    def clear(self) -> None:
        """Give back what is not in use, and what is in use when it comes back."""
        self._free = []


def _give_back(free: list[mmap], region: mmap) -> None:
    free.append(region)
    del free[:-_MOST_FREE]
