"""CUDA, XPU and the like: pinned staging, one copy stream, and the three edges.

    edge          recorded                        waited on by
    uploaded      copy stream, after the scatter  consumer stream, before the gather
    read_done     consumer stream, after the      copy stream, before it overwrites
                  gather                          those pages
    staging_free  copy stream, after the H2D      the host, before a reader overwrites
                                                  that staging buffer

Uploads and gathers that the device has not finished are kept in two small logs with the pages
they touch. Whoever issues the next operation waits for those in the other log that share a
page with it: one event for each (batch, consumer stream), never one event for each page, so
that no earlier reader is lost. In a warm epoch the upload log is empty and a gather waits for
nothing.
"""

import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch

from gpucache_pipes.device.arena import Arena
from gpucache_pipes.device.backend import Column
from gpucache_pipes.device.runtime import Runtime

_log = logging.getLogger("gpucache_pipes")

_FIRST_SEGMENT = 64 << 20
"""Bytes of the arena at first; then it doubles."""

_HEADROOM = 0.1
"""Part of the device's memory that a store without a budget leaves to others."""

_STEP = 8 << 20
"""Bytes that are added at least when batches in flight need more than the budget."""

_STAGING_BUFFERS = 2
"""Staging buffers for each reader thread: one is filled while the other is copied."""


class _Issued(NamedTuple):
    """An operation that the device may not have finished."""

    event: Any
    # What it touches; None is every page.
    pages: Sequence[int] | None
    # What must not be freed before.
    arena: Arena | None


Log = dict[int, _Issued]


class AcceleratorBackend:
    """Pages in the memory of an accelerator with streams.

    Every reader thread has two staging buffers of its own, which grow to the largest upload of
    that thread: pinned host memory is at most 2 x threads x largest upload, rounded up to
    powers of two, and nobody waits for a buffer but for the device to be done with it.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.device = runtime.device
        self.page_bytes = 0
        self._runtime = runtime
        self._copy_stream = runtime.new_stream()
        self._arena: Arena | None = None
        self._warned = False
        self._lanes = threading.local()
        self._serial = itertools.count()
        # Guards the two logs, for as long as it takes to look at them.
        self._logs = threading.Lock()
        self._uploads: Log = {}
        self._gathers: Log = {}
        # Held while the arena moves, or while somebody issues writes to it.
        self._writing = threading.Lock()

    @property
    def reserved_bytes(self) -> int:
        """See Backend."""
        return self._arena.nbytes if self._arena is not None else 0

    def configure(self, page_bytes: int) -> None:
        """See Backend."""
        self.page_bytes = page_bytes
        self._arena = Arena(page_bytes, self.device)

    def grow(self, needed: int, useful: int | None) -> int:
        """See Backend. Doubles, and asks for less where the device has less."""
        arena = self._arena
        assert arena is not None
        pages = max(needed, arena.pages, _FIRST_SEGMENT // self.page_bytes)
        if useful is None:
            # What is needed first is needed by a batch, and not only by the cache.
            least = 0 if arena.pages else needed
            pages = max(least, min(pages, self._spare_bytes() // self.page_bytes))
        else:
            # Beyond what the budget can use, what is in flight is held: in steps, too.
            beyond = max(-useful, _STEP // self.page_bytes)
            pages = max(needed, min(pages, useful if useful > 0 else beyond))
            if 0 < useful - pages <= 2 * arena.pages:
                pages = useful  # rather than to move once more
        while pages >= needed:
            try:
                return self._extend(arena, pages)
            except torch.OutOfMemoryError:
                if pages == needed:
                    break
                pages = max(needed, pages // 2)
        memory = self._runtime.memory()
        free = "" if memory is None else f" ({memory[0]} of {memory[1]} bytes are free)"
        if not arena.pages:
            raise MemoryError(
                f"{self.device} has no room for the {needed * self.page_bytes} bytes that are "
                f"needed{free}: free some of it, or lower batch size and depth"
            )
        if not self._warned:
            self._warned = True
            _log.warning(
                "%s has no room for %d more bytes%s; the cache stops growing at %d bytes and "
                "evicts from now on. Set max_cache_bytes to leave memory for the model",
                self.device, needed * self.page_bytes, free, arena.nbytes,
            )  # fmt: skip
        return 0

    def _spare_bytes(self) -> int:
        """What could be taken without a budget, so that a model beside the store can live."""
        memory = self._runtime.memory()
        if memory is None:
            return 1 << 62
        free, total = memory
        return max(0, free - int(total * _HEADROOM))

    def _extend(self, arena: Arena, pages: int) -> int:
        """Extent the arena to a place that has so many pages more; where there is none, add one.

        One piece of memory is worth a copy: a batch takes operations for each that it touches.
        """
        # On the copy stream: the allocator ties memory to the stream it was made on.
        with self._writing, self._runtime.on(self._copy_stream):
            if arena.pages:
                try:
                    memory = self._runtime.empty((arena.pages + pages) * self.page_bytes)
                except torch.OutOfMemoryError:
                    pass
                else:
                    larger = Arena(self.page_bytes, self.device)
                    larger.add_segment(memory)
                    larger.copy_from(arena)
                    moved = self._runtime.new_event()
                    moved.record(self._copy_stream)
                    self._note(self._uploads, moved, None)
                    # Gathers of the old one hold it until the device is through with them.
                    self._arena = larger
                    return pages
            return arena.add_segment(self._runtime.empty(pages * self.page_bytes))

    def upload(self, placements: Sequence[Sequence[int]]) -> "StagedUpload":
        """See Backend."""
        lane = getattr(self._lanes, "lane", None)
        if lane is None:
            lane = self._lanes.lane = _Lane(self._runtime)
        pages = [page for placement in placements for page in placement]
        return StagedUpload(self, lane, placements, pages)

    def submit(self, staging: torch.Tensor, pages: Sequence[int], lane: "_Lane") -> Any:
        """Copy `staging` up and into `pages`; returns the event behind it. Reader threads."""
        with self._writing, self._runtime.on(self._copy_stream):
            arena = self._arena
            if arena is None:
                raise RuntimeError("the store was closed")
            self._wait_for(self._gathers, pages, self._copy_stream)  # edge: read_done
            shape = (len(pages), self.page_bytes)
            try:
                rows = lane.device_rows(staging.numel())
                rows.copy_(staging, non_blocking=True)
                arena.scatter(pages, rows.view(shape), self._runtime.index)
            except torch.OutOfMemoryError:
                # The arena has it all. Page by page is slow, and needs nothing.
                arena.fill(pages, staging.view(shape))
            done = self._runtime.new_event()
            done.record(self._copy_stream)
        self._note(self._uploads, done, pages)
        return done

    def gather(self, pages: Sequence[int], columns: Sequence[Column]) -> list[torch.Tensor]:
        """See Backend."""
        arena = self._arena
        assert arena is not None
        with self._runtime.on_device():
            stream = self._runtime.current_stream()
            self._wait_for(self._uploads, pages, stream)  # edge: uploaded
            results = arena.gather(pages, columns, self._runtime.index)
            done = self._runtime.new_event()
            done.record(stream)
        self._note(self._gathers, done, pages, arena)
        return results

    def join(self, placements: Sequence[Sequence[int]]) -> torch.Tensor:
        """See Backend."""
        pages = [page for pages in placements for page in pages]
        [block] = self.gather(pages, [(0, self.page_bytes)])
        return block.view(torch.uint8).view(-1)

    def memory(self) -> torch.Tensor | None:
        """See Backend."""
        return None

    def bind_stream(self) -> Callable[[], AbstractContextManager[Any]]:
        """See Backend."""
        return partial(self._runtime.on, self._runtime.current_stream())

    def _note(
        self, log: Log, event: Any, pages: Sequence[int] | None, arena: Arena | None = None
    ) -> None:
        with self._logs:
            self._forget_finished(log)
            log[next(self._serial)] = _Issued(event, pages, arena)

    def _wait_for(self, log: Log, pages: Sequence[int], stream: Any) -> None:
        """Make `stream` wait for the unfinished operations of `log` that touch `pages`."""
        with self._logs:
            self._forget_finished(log)
            unfinished = list(log.values())
        if unfinished:
            mine = frozenset(pages)
            for issued in unfinished:
                if issued.pages is None or not mine.isdisjoint(issued.pages):
                    stream.wait_event(issued.event)

    @staticmethod
    def _forget_finished(log: Log) -> None:
        """With the lock of the logs held."""
        for serial in [serial for serial, issued in log.items() if issued.event.query()]:
            del log[serial]

    def reset(self) -> None:
        """See Backend."""
        # Consumers' gathers run on streams of theirs: their memory may not be reused by others
        # before they are through.
        for issued in [*self._gathers.values(), *self._uploads.values()]:
            issued.event.synchronize()
        self._gathers.clear()
        self._uploads.clear()
        self._arena = None
        self.page_bytes = 0

    def close(self) -> None:
        """See Backend."""
        self._copy_stream.synchronize()
        self.reset()
        self._lanes = threading.local()


class _Lane:
    """The staging buffers of one reader thread, and its landing place on the device."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._slots: list[tuple[torch.Tensor | None, Any]] = [(None, None)] * _STAGING_BUFFERS
        self._turn = 0
        self._rows: torch.Tensor | None = None

    def staging(self, nbytes: int) -> torch.Tensor:
        """Pinned memory that the device no longer reads. Waits for it."""
        self._turn = (self._turn + 1) % _STAGING_BUFFERS
        buffer, free = self._slots[self._turn]
        if free is not None:
            free.synchronize()  # edge: staging_free
        if buffer is None or buffer.numel() < nbytes:
            buffer = self._runtime.pinned(_power_of_two(nbytes))
        self._slots[self._turn] = (buffer, None)
        return buffer[:nbytes]

    def busy_until(self, event: Any) -> None:
        """The buffer handed out last is being read by the device until `event`."""
        self._slots[self._turn] = (self._slots[self._turn][0], event)

    def device_rows(self, nbytes: int) -> torch.Tensor:
        """Device memory for one upload; the copy stream orders its uses. On that stream."""
        if self._rows is None or self._rows.numel() < nbytes:
            self._rows = None
            self._rows = self._runtime.empty(_power_of_two(nbytes))
        return self._rows[:nbytes]


class StagedUpload:
    """See Upload. The buffers lie one behind the other in staging, page by page."""

    def __init__(
        self,
        backend: AcceleratorBackend,
        lane: _Lane,
        placements: Sequence[Sequence[int]],
        pages: Sequence[int],
    ) -> None:
        self._backend = backend
        self._lane = lane
        self._pages = pages
        self._starts = list(itertools.accumulate(map(len, placements), initial=0))
        self._staging = lane.staging(len(pages) * backend.page_bytes)
        self._bytes = backend._runtime.bytes_of(self._staging)

    def buffers(self, number: int) -> list[memoryview]:
        """See Upload."""
        size = self._backend.page_bytes
        return [self._bytes[self._starts[number] * size : self._starts[number + 1] * size]]

    def finish(self) -> None:
        """See Upload."""
        if self._pages:
            done = self._backend.submit(self._staging, self._pages, self._lane)
            self._lane.busy_until(done)


def _power_of_two(nbytes: int) -> int:
    """The pinned allocator rounds up to powers of two; so the rounding is of use."""
    return 1 << max(12, (nbytes - 1).bit_length())
