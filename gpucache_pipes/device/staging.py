"""Staging: pinned host memory that a reader thread fills and the copy stream reads.

See `device.accelerator` for the edge `staging_free`, which this module waits for.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch

from gpucache_pipes.device.runtime import Runtime

_STAGING_BUFFERS = 2
"""Staging buffers for each reader thread: one is filled while the device copies the other."""


class StagingLane:
    """The staging buffers of one reader thread, and its landing area on the device.

    Not thread-safe: only the reader thread that owns the lane calls it.

    Args:
        runtime: allocates pinned memory and device memory.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._slots: list[tuple[torch.Tensor | None, Any]] = [(None, None)] * _STAGING_BUFFERS
        self._turn = 0
        self._rows: torch.Tensor | None = None

    def staging(self, nbytes: int) -> torch.Tensor:
        """The next staging buffer, uint8 [nbytes]. Waits until the device no longer reads it."""
        self._turn = (self._turn + 1) % _STAGING_BUFFERS
        buffer, free = self._slots[self._turn]
        if free is not None:
            free.synchronize()  # edge: staging_free
        if buffer is None or buffer.numel() < nbytes:
            buffer = self._runtime.pinned(_power_of_two(nbytes))
        self._slots[self._turn] = (buffer, None)
        return buffer[:nbytes]

    def bytes_of(self, staging: torch.Tensor) -> memoryview:
        """The memory of a staging buffer, writable. The tensor must outlive it."""
        return self._runtime.bytes_of(staging)

    def busy_until(self, event: Any) -> None:
        """State that the device reads the last buffer from `staging` until it reaches `event`."""
        self._slots[self._turn] = (self._slots[self._turn][0], event)

    def device_rows(self, nbytes: int) -> torch.Tensor:
        """Device memory where one upload lands, uint8 [nbytes].

        Must be called, and used, with the copy stream current. All uploads of the lane share this
        memory; the copy stream orders them.
        Raises torch.OutOfMemoryError.
        """
        if self._rows is None or self._rows.numel() < nbytes:
            self._rows = None
            self._rows = self._runtime.empty(_power_of_two(nbytes))
        return self._rows[:nbytes]


class StagedUpload:
    """An `Upload` through staging. The buffers lie end to end there, page by page.

    Args:
        lane: of the calling reader thread.
        placements: the pages of each feature.
        page_bytes: size of a page.
        submit: called once by `finish` with the staging buffer, the pages and the lane. It copies
            the buffer into the pages and returns the event after which the buffer is free.
    """

    def __init__(
        self,
        lane: StagingLane,
        placements: Sequence[Sequence[int]],
        page_bytes: int,
        submit: Callable[[torch.Tensor, Sequence[int], StagingLane], Any],
    ) -> None:
        self._lane = lane
        self._page_bytes = page_bytes
        self._submit = submit
        self._pages = [page for placement in placements for page in placement]
        self._starts = list(accumulate(map(len, placements), initial=0))
        self._staging = lane.staging(len(self._pages) * page_bytes)
        self._bytes = lane.bytes_of(self._staging)

    def buffers(self, number: int) -> list[memoryview]:
        """See Upload."""
        size = self._page_bytes
        return [self._bytes[self._starts[number] * size : self._starts[number + 1] * size]]

    def finish(self) -> None:
        """See Upload."""
        if self._pages:
            self._lane.busy_until(self._submit(self._staging, self._pages, self._lane))


def _power_of_two(nbytes: int) -> int:
    """Round up as the pinned allocator does, so that its rounding is not wasted.

    >>> [_power_of_two(nbytes) for nbytes in (1, 4096, 5000)]
    [4096, 4096, 8192]
    """
    return 1 << max(12, (nbytes - 1).bit_length())
