"""Backend for devices with streams (CUDA, XPU): pinned staging, one copy stream, three edges.

Three streams of work touch the same bytes: reader threads write staging memory, the copy stream
moves it into pages, and each consumer gathers pages on its own stream. Three edges order them.

    edge          recorded                           waited on by
    uploaded      copy stream, after the scatter     consumer stream, before the gather
    read_done     consumer stream, after the gather  copy stream, before the scatter
    staging_free  copy stream, after the scatter     the host, before it writes that staging
                  (the same event as `uploaded`)     buffer again

`uploaded` keeps a gather from reading a page before it is filled. `read_done` keeps an upload from
refilling a page that a gather still reads. `staging_free` keeps a reader thread from overwriting
host memory that the device still copies.

The backend keeps two logs, of uploads and of gathers that the device may not have finished, each
entry with its event and the pages it touches. The thread that issues an operation makes its stream
wait for the entries of the other log that share a page with it. In a warm epoch the log of uploads
is empty, so a gather waits for nothing.

What does not work:

- One event per page. Two consumer streams may read one page. The second gather replaces the event
  of the first, and an upload then waits only for the second. The log has one entry for each gather
  instead, so no earlier reader is lost.
- Synchronising the copy stream before a gather. The host then waits for every queued upload, also
  of batches that are not needed yet. It does not replace `read_done` either: gathers run on the
  streams of the consumers.
- `Tensor.record_stream`. It delays the reuse of a block that is freed, but pages are refilled while
  their segment stays allocated. Results do not need it: `gather` allocates them on the stream of
  the consumer.
- Trusting the allocator across streams. It ties a block to the stream it was allocated on, here the
  copy stream, and may hand out a freed block while a gather on another stream still reads it. So a
  log entry holds the arena that its gather reads, and `reset` waits for all events before it drops
  the arena.
- Moving the arena while an upload is issued. The upload could go to the old arena after its pages
  were copied, and be lost. `submit` and `_extend` therefore share the lock `_writing`.
- Publishing the larger arena before its move is in the log. A gather could then read pages that are
  not copied yet. `_extend` logs the move first, as an upload that touches every page. A gather that
  is being issued meanwhile keeps reading the old arena, of which it holds a reference.
- Waiting for `staging_free` on a stream. The host writes to the staging buffer next, and no stream
  can delay the host.

`tests/device/test_streams.py` removes each edge in turn, and a simulated device reports the access
that is then unordered.
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
from gpucache_pipes.device.staging import StagedUpload, StagingLane

_log = logging.getLogger("gpucache_pipes")

_FIRST_SEGMENT = 64 << 20
"""Bytes of the first arena. Each later `grow` doubles it."""

_HEADROOM = 0.1
"""Fraction of the device's memory that a store without a budget leaves free."""

_STEP = 8 << 20
"""Least number of bytes to add when batches in flight need pages beyond the budget."""


class _Issued(NamedTuple):
    """An operation that the device may not have finished."""

    event: Any
    # The pages it touches; None means every page.
    pages: Sequence[int] | None
    # The arena it reads, held so that its memory is not freed before the operation is finished.
    arena: Arena | None


Log = dict[int, _Issued]


class AcceleratorBackend:
    """Pages in the memory of an accelerator with streams. Implements `Backend`.

    Every reader thread has two staging buffers of its own, which grow to the largest upload of
    that thread. Pinned host memory is therefore at most 2 x threads x largest upload, rounded up
    to powers of two. A reader thread never waits for another thread's buffer, only for the device
    to finish with its own.

    Args:
        runtime: streams, events and memory of the device.
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
        # Guards the two logs. It is held only to add, look up or remove entries.
        self._logs = threading.Lock()
        self._uploads: Log = {}
        self._gathers: Log = {}
        # Held while the arena moves, and while a reader thread issues writes to it.
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
        """See Backend. Doubles the arena, and tries smaller sizes if the device has less memory."""
        arena = self._arena
        assert arena is not None
        pages = max(needed, arena.pages, _FIRST_SEGMENT // self.page_bytes)
        if useful is None:
            # A batch needs the first pages, so they may use the headroom. Later ones are for the
            # cache only.
            least = 0 if arena.pages else needed
            pages = max(least, min(pages, self._spare_bytes() // self.page_bytes))
        else:
            # Pages beyond the budget hold batches in flight. They are added in steps, too.
            beyond = max(-useful, _STEP // self.page_bytes)
            pages = max(needed, min(pages, useful if useful > 0 else beyond))
            if 0 < useful - pages <= 2 * arena.pages:
                pages = useful  # one larger step now saves a second move of the arena
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
                f"{self.device} has no memory for the {needed * self.page_bytes} bytes that a "
                f"batch needs{free}: free device memory, or lower the batch size and depth"
            )
        if not self._warned:
            self._warned = True
            _log.warning(
                "%s has no memory for %d more bytes%s; the cache stops growing at %d bytes and "
                "evicts from now on. Set max_cache_bytes to leave memory for the model",
                self.device, needed * self.page_bytes, free, arena.nbytes,
            )  # fmt: skip
        return 0

    def _spare_bytes(self) -> int:
        """Free device memory less the headroom that is left to the model."""
        memory = self._runtime.memory()
        if memory is None:
            return 1 << 62
        free, total = memory
        return max(0, free - int(total * _HEADROOM))

    def _extend(self, arena: Arena, pages: int) -> int:
        """Move the arena to one larger segment, or add a segment if memory for both is lacking.

        A batch issues operations for each segment that it touches, so one segment is worth a copy.
        Returns the number of pages added. Raises torch.OutOfMemoryError.
        """
        # On the copy stream: the allocator ties memory to the stream it was allocated on.
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
                    # First the log, then the new arena: see the module docstring.
                    self._note(self._uploads, moved, None)
                    # Unfinished gathers hold the old arena until the device has finished them.
                    self._arena = larger
                    return pages
            return arena.add_segment(self._runtime.empty(pages * self.page_bytes))

    def upload(self, placements: Sequence[Sequence[int]]) -> StagedUpload:
        """See Backend."""
        lane = getattr(self._lanes, "lane", None)
        if lane is None:
            lane = self._lanes.lane = StagingLane(self._runtime)
        return StagedUpload(lane, placements, self.page_bytes, self.submit)

    def submit(self, staging: torch.Tensor, pages: Sequence[int], lane: StagingLane) -> Any:
        """Copy `staging` to the device and scatter it into `pages`. For reader threads.

        Args:
            staging: pinned, uint8 [len(pages) * page_bytes].
            pages: where the rows of `staging` go, in order.
            lane: the staging lane of the calling thread.

        Returns:
            The event that is recorded after the scatter. Until the device reaches it, `staging`
            must not be written.

        Raises:
            RuntimeError: the store was closed.
        """
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
                # The arena has taken all memory. Copying page by page is slow, but allocates none.
                arena.fill(pages, staging.view(shape))
            done = self._runtime.new_event()
            done.record(self._copy_stream)
        self._note(self._uploads, done, pages)
        return done

    def gather(self, pages: Sequence[int], columns: Sequence[Column]) -> list[torch.Tensor]:
        """See Backend."""
        # One reference for the whole call: the arena may move while the gather is issued.
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
        """Add an operation to `log`, and drop those that the device has finished."""
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
        """Drop the operations that the device has finished. The caller holds `_logs`."""
        for serial in [serial for serial, issued in log.items() if issued.event.query()]:
            del log[serial]

    def reset(self) -> None:
        """See Backend."""
        # Gathers run on the streams of the consumers, and the allocator does not know of them. The
        # arena must outlive them.
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
