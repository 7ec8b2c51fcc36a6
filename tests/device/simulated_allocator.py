"""A model of torch's caching allocator, on a device whose memory is only counted.

`SimulatedAllocator` follows CUDACachingAllocator of torch 2.13 in what decides how much memory a
process takes: blocks that are split from segments, a cache of free blocks for each stream, the
sizes of segments, private pools, and what is tried before an allocation fails: the cache is freed
first, but not for an allocation in a private pool. It does not model
expandable segments, nor the rounding of `roundup_power2_divisions`.
"""

import itertools
from bisect import insort
from collections import defaultdict
from typing import Any

import torch

from gpucache_pipes.device import DeviceMemory, InOrderRuntime, Pages, Reservation
from gpucache_pipes.device.runtime import SMALLEST_RESERVATION

_ROUND = 512
_SMALL = 1 << 20
_SMALL_SEGMENT = 2 << 20
_LARGE_SEGMENT = 20 << 20
_ALONE = 10 << 20


class Block:
    """A part of a segment, in use or free.

    Attributes:
        size: in bytes.
        segment: number of its segment.
        start: where it begins there.
        in_use: whether a tensor has it.
    """

    __slots__ = ("in_use", "pool", "segment", "size", "start")

    def __init__(self, size: int, segment: int, start: int, pool: Any) -> None:
        self.size = size
        self.segment = segment
        self.start = start
        self.pool = pool
        self.in_use = False


class SimulatedAllocator:
    """Allocates bytes of a device with `total` bytes. Not thread-safe.

    Args:
        total: bytes of the device.
        taken: bytes of it that other processes have.

    Attributes:
        reserved: bytes of all segments.
        peak_reserved: the most that it has been.
        allocated, peak: bytes that tensors have, and the most that they have had.
        retries, failures: how often the cache was freed for an allocation, and how often that did
            not help.

    >>> allocator = SimulatedAllocator(100 << 20)
    >>> one = allocator.malloc(60 << 20, stream=0)
    >>> allocator.free(one)
    >>> allocator.reserved >> 20, allocator.allocated
    (60, 0)
    >>> two = allocator.malloc(60 << 20, stream=1)  # the cached block is of another stream
    >>> allocator.reserved >> 20, allocator.retries
    (60, 1)
    """

    def __init__(self, total: int, taken: int = 0) -> None:
        self.total = total
        self.taken = taken
        self.reserved = self.peak_reserved = 0
        self.allocated = self.peak = 0
        self.retries = self.failures = 0
        # The blocks of each segment in the order of their places, and the free ones of each pool.
        self._segments: dict[int, list[Block]] = {}
        self._free: defaultdict[Any, list[tuple[int, int, int]]] = defaultdict(list)
        self._numbers = itertools.count()

    @property
    def free_bytes(self) -> int:
        """What the driver has."""
        return self.total - self.taken - self.reserved

    def malloc(self, nbytes: int, stream: int, private: object = None) -> Block:
        """A block for a tensor of a stream, from the common pools or a private one.

        Raises torch.OutOfMemoryError.
        """
        size = max(_ROUND, -(-nbytes // _ROUND) * _ROUND)
        pool = (private, stream, size <= _SMALL)
        block = self._find(pool, size) or self._new_segment(pool, size)
        if block is None and private is None:
            self.retries += 1
            self.empty_cache()
            block = self._new_segment(pool, size)
        if block is None:
            self.failures += 1
            raise torch.OutOfMemoryError(f"no {nbytes} bytes of {self.total}")
        self._take(block, size)
        self.allocated += block.size
        self.peak = max(self.peak, self.allocated)
        return block

    def _find(self, pool: Any, size: int) -> Block | None:
        """The smallest free block that is large enough."""
        free = self._free[pool]
        at = next((at for at, (have, _, _) in enumerate(free) if have >= size), None)
        if at is None:
            return None
        _, segment, start = free.pop(at)
        return next(block for block in self._segments[segment] if block.start == start)

    def _new_segment(self, pool: Any, size: int) -> Block | None:
        """A block that is a whole new segment; None if the driver has no memory for it."""
        if size <= _SMALL:
            nbytes = _SMALL_SEGMENT
        elif size < _ALONE:
            nbytes = _LARGE_SEGMENT
        else:
            nbytes = -(-size // _SMALL_SEGMENT) * _SMALL_SEGMENT
        if nbytes > self.free_bytes:
            return None
        block = Block(nbytes, next(self._numbers), 0, pool)
        self._segments[block.segment] = [block]
        self.reserved += nbytes
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return block

    def _take(self, block: Block, size: int) -> None:
        """Use a free block, and split off what it is too large by."""
        block.in_use = True
        rest = block.size - size
        if rest >= _ROUND if size <= _SMALL else rest > _SMALL:
            block.size = size
            split = Block(rest, block.segment, block.start + size, block.pool)
            blocks = self._segments[block.segment]
            blocks.insert(blocks.index(block) + 1, split)
            insort(self._free[block.pool], (split.size, split.segment, split.start))

    def free(self, block: Block) -> None:
        """A tensor is gone: its block joins the free ones beside it, in the cache of its stream."""
        block.in_use = False
        self.allocated -= block.size
        blocks = self._segments[block.segment]
        free = self._free[block.pool]
        at = blocks.index(block)
        for other in (*blocks[at + 1 : at + 2], *blocks[max(0, at - 1) : at]):
            if not other.in_use:
                free.remove((other.size, other.segment, other.start))
                blocks.remove(other)
                block.start = min(block.start, other.start)
                block.size += other.size
        insort(free, (block.size, block.segment, block.start))

    def empty_cache(self, private: object = None) -> None:
        """Return the segments to the driver that hold nothing.

        Args:
            private: of this private pool; None of the common pools.
        """
        for segment, blocks in list(self._segments.items()):
            if len(blocks) == 1 and not blocks[0].in_use and blocks[0].pool[0] is private:
                self._free[blocks[0].pool].remove((blocks[0].size, segment, 0))
                self.reserved -= blocks[0].size
                del self._segments[segment]

    def memory(self) -> DeviceMemory:
        """As a Runtime tells it."""
        return DeviceMemory(
            max(0, self.free_bytes),
            self.total,
            self.reserved,
            self.allocated,
            self.peak,
            self.retries + self.failures,
        )


class CountingRuntime(InOrderRuntime):
    """A runtime whose device memory is counted by a SimulatedAllocator, and holds nothing.

    Args:
        allocator: counts.
        returns_memory: whether reservations have pools of their own, as TorchRuntime has on CUDA.
        holds: whether memory holds bytes after all, as small devices can.
    """

    def __init__(
        self, allocator: SimulatedAllocator, *, returns_memory: bool = True, holds: bool = False
    ) -> None:
        super().__init__(torch.device("cpu"))
        self.allocator = allocator
        self.returns_memory = returns_memory
        self._holder = torch.device("cpu" if holds else "meta")

    def reserve(self, nbytes: int) -> Reservation:
        """See Runtime."""
        private = object() if self.returns_memory else None
        size = max(nbytes, SMALLEST_RESERVATION)
        try:
            block = self.allocator.malloc(size, _COPY_STREAM, private)
        except torch.OutOfMemoryError:
            if private is None:
                raise
            self.allocator.empty_cache()  # as TorchRuntime does
            self.allocator.retries += 1
            block = self.allocator.malloc(size, _COPY_STREAM, private)
        memory = torch.empty(nbytes, dtype=torch.uint8, device=self._holder)
        return Reservation(memory, _Pool(self.allocator, block, private))

    def index(self, numbers: Pages) -> torch.Tensor:
        """See Runtime."""
        return super().index(numbers).to(self._holder)

    def memory(self) -> DeviceMemory:
        """See Runtime."""
        return self.allocator.memory()


_COPY_STREAM = 1


class _Pool:
    """Frees a block when it is dropped, and returns its memory if the pool is private."""

    def __init__(self, allocator: SimulatedAllocator, block: Block, private: object) -> None:
        self._allocator = allocator
        self._block = block
        self._private = private

    def __del__(self) -> None:
        self._allocator.free(self._block)
        if self._private is not None:
            self._allocator.empty_cache(self._private)
