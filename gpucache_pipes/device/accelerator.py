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

The backend keeps two logs (`device.operations`), of uploads and of gathers that the device may not
have finished, each entry with its event and the pages it touches. The thread that issues an
operation makes its stream wait for the entries of the other log that share a page with it. In a
warm epoch the log of uploads is empty, so a gather waits for nothing.

How much memory the arena takes, and when: see `device.growing_arena`.

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
  log entry holds the arena that its gather reads, and `reset` and `shrink` wait for all events
  before they drop memory.
- Moving the arena while an upload is issued. The upload could go to the old arena after its pages
  were copied, and be lost. `submit` and `GrowingArena`
  therefore share the lock `writing`.
- Publishing the larger arena before its move is in the log. A gather could then read pages that are
  not copied yet. `GrowingArena` logs the move first, as an upload that touches every page. A gather
  that is being issued meanwhile keeps reading the old arena, of which it holds a reference.
- Copying an upload at once. Copies to the device run one after the other, so the index of a gather
  would wait for tens of megabytes. They go in pieces of 4 MiB.
- Landing every upload in a buffer, to scatter it from there. Pages that lie in a row, as those of a
  first epoch do, are copied to their places; only others need the buffer.
- Trying to allocate, to see how much memory there is. Before it fails, torch's allocator frees its
  cache, which is the model's. So optional growth takes what the driver has free.
- Waiting for `staging_free` on a stream. The host writes to the staging buffer next, and no stream
  can delay the host.

`tests/device/test_streams.py` removes each edge in turn, and a simulated device reports the access
that is then unordered.
"""

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import torch

from gpucache_pipes.device.arena import Arena
from gpucache_pipes.device.backend import Backend, Column, Pages
from gpucache_pipes.device.exchange_stream import OwnExchangeStream
from gpucache_pipes.device.growing_arena import GrowingArena
from gpucache_pipes.device.operations import EventPool, Operation, OperationLog
from gpucache_pipes.device.runtime import Reservation, Runtime
from gpucache_pipes.device.staging import StagedUpload, StagingLane

_log = logging.getLogger("gpucache_pipes")

_PIECE = 4 << 20
"""Bytes that are copied to the device at once."""

_LONG_RUN = 64 << 10
"""Bytes of a stretch of pages that is worth a copy of its own."""


class AcceleratorBackend(Backend):
    """Pages in the memory of an accelerator with streams. Implements `Backend`.

    Every reader thread has two staging buffers of its own, which grow to the largest upload of
    that thread. Pinned host memory is therefore at most 2 x threads x largest upload, rounded up
    to powers of two. A reader thread never waits for another thread's buffer, only for the device
    to finish with its own.

    Args:
        runtime: streams, events and memory of the device.
    """

    shares_memory = True

    def __init__(self, runtime: Runtime) -> None:
        self.device = runtime.device
        self.page_bytes = 0
        self._runtime = runtime
        with runtime.on_device():
            self._copy_stream = runtime.new_stream()
        self._lanes = threading.local()
        # All lanes, to count their bytes. A lane ends with its thread.
        self._known_lanes: list[weakref.ref[StagingLane]] = []
        self._events = EventPool(runtime)
        self._uploads = OperationLog(self._events)
        self._gathers = OperationLog(self._events)
        # Where uploads land that are scattered from there; on the copy stream only.
        self._landing: Reservation | None = None
        self._pages = GrowingArena(runtime, self._copy_stream, self._uploads, self._gathers)

    @property
    def reserved_bytes(self) -> int:
        """See Backend."""
        return self._pages.nbytes

    @property
    def staging_bytes(self) -> int:
        """See Backend."""
        lanes = [lane for reference in list(self._known_lanes) if (lane := reference()) is not None]
        return sum(lane.nbytes for lane in lanes)

    def bind_thread(self) -> None:
        """See Backend."""
        self._runtime.bind_thread()

    def configure(self, page_bytes: int) -> None:
        """See Backend."""
        self.page_bytes = page_bytes
        self._pages.configure(page_bytes)

    # Memory

    def grow(self, needed: int, useful: int | None, known: int | None = None) -> int:
        """See Backend. Takes less than it would like to if the device has less memory."""
        with self._runtime.on_device():
            return self._pages.grow(needed, useful, known)

    def balance(self) -> int:
        """See Backend."""
        with self._runtime.on_device():
            return self._pages.balance()

    def shrink(self, pages: int) -> None:
        """See Backend."""
        with self._runtime.on_device():
            self._pages.shrink(pages)

    def rebuild(self, pages: Sequence[int]) -> None:
        """See Backend."""
        with self._runtime.on_device():
            self._pages.rebuild(pages)

    # Uploads

    def upload(self, placements: Sequence[Sequence[int]]) -> StagedUpload:
        """See Backend."""
        lane = getattr(self._lanes, "lane", None)
        if lane is None:
            lane = self._lanes.lane = StagingLane(self._runtime)
            with self._pages.writing:
                lanes = [known for known in self._known_lanes if known() is not None]
                self._known_lanes = [*lanes, weakref.ref(lane)]
        with self._runtime.on_device():
            return StagedUpload(lane, placements, self.page_bytes, self.submit)

    def submit(self, staging: torch.Tensor, pages: Pages) -> Operation:
        """Copy `staging` to the device, into `pages`. For reader threads.

        Args:
            staging: pinned, uint8 [len(pages) * page_bytes].
            pages: where the rows of `staging` go, in order.

        Returns:
            The operation that the device may not have finished. Until it has, `staging` must not
            be written.

        Raises:
            RuntimeError: the store was closed.
        """
        with self._pages.writing, self._runtime.on(self._copy_stream):
            arena = self._pages.arena
            if arena is None:
                raise RuntimeError("the store was closed")
            self._gathers.hold_back(self._copy_stream, pages)  # edge: read_done
            try:
                self._copy(arena, staging.view(len(pages), self.page_bytes), pages)
                return self._uploads.add(self._copy_stream, pages)
            except BaseException:
                # An interrupt, or an error of the device: it may still read from staging, which the
                # thread fills again.
                self._copy_stream.synchronize()
                raise

    def _copy(self, arena: Arena, rows: torch.Tensor, pages: Pages) -> None:
        """Copy rows of staging into pages, on the copy stream."""
        runs = list(arena.runs(pages))
        if len(runs) * _LONG_RUN <= max(_LONG_RUN, rows.numel()):
            for start, target in runs:
                source = rows[start : start + len(target)].view(-1)
                flat = target.view(-1)
                for at in range(0, len(flat), _PIECE):
                    piece = slice(at, at + _PIECE)
                    flat[piece].copy_(source[piece], non_blocking=True)
            return
        most = _PIECE // self.page_bytes  # no longer than a stretch that is worth a copy
        for at in range(0, len(pages), most):
            source, places = rows[at : at + most], pages[at : at + most]
            try:
                landed = self._landing_rows(source.numel()).view(source.shape)
                landed.copy_(source, non_blocking=True)
                arena.scatter(places, landed, self._runtime.index)
            except torch.OutOfMemoryError:
                # The arena has taken all memory. Copies of stretches are slow, but allocate none.
                arena.fill(places, source)

    def _landing_rows(self, nbytes: int) -> torch.Tensor:
        """Device memory where a piece of an upload lands, uint8 [nbytes].

        With the copy stream current, which orders all uploads. Raises torch.OutOfMemoryError.
        """
        if self._landing is None:
            self._landing = self._pages.reserve(_PIECE)
        assert self._landing.memory is not None
        return self._landing.memory[:nbytes]

    # Gathers

    def gather(self, pages: Pages | Sequence[int], columns: Sequence[Column]) -> list[torch.Tensor]:
        """See Backend."""
        pages = np.asarray(pages, np.int64)
        # One reference for the whole call: the arena may move while the gather is issued.
        arena = self._pages.arena
        assert arena is not None
        with self._runtime.on_device():
            stream = self._runtime.current_stream()
            self._uploads.hold_back(stream, pages)  # edge: uploaded
            results = arena.gather(pages, columns, self._runtime.index)
            self._gathers.add(stream, pages, arena)
        self._pages.batches += 1
        return results

    def total_bytes(self) -> int | None:
        """See Backend."""
        memory = self._runtime.memory()
        return None if memory is None else memory.total

    def memory(self) -> torch.Tensor | None:
        """See Backend."""
        return None

    def bind_stream(self) -> Callable[[], AbstractContextManager[Any]]:
        """See Backend."""
        return partial(self._runtime.on, self._runtime.current_stream())

    def exchange_stream(self) -> OwnExchangeStream:
        """See Backend."""
        return OwnExchangeStream(self._runtime)

    def index(self, numbers: Pages) -> torch.Tensor:
        """See Backend. The host does not wait for the copy."""
        with self._runtime.on_device():
            return self._runtime.index(np.asarray(numbers, np.int64))

    # The end

    def drain(self) -> None:
        """See Backend."""
        with self._runtime.on_device():
            self._uploads.synchronize()
            self._gathers.synchronize()

    def reset(self) -> None:
        """See Backend."""
        with self._runtime.on_device():
            try:
                # Gathers run on the streams of the consumers, and the allocator does not know of
                # them. The arena must outlive them.
                self._gathers.synchronize()
                self._uploads.synchronize()
            finally:
                self._drop_memory()

    def _drop_memory(self) -> None:
        for log in (self._gathers, self._uploads, self._events):
            log.clear()
        self._pages.drop()
        self._landing = None
        self._lanes = threading.local()
        self._known_lanes = []
        self.page_bytes = 0
        self._runtime.release_pinned()

    def close(self) -> None:
        """See Backend. If the device has failed, this is logged, and all is dropped."""
        try:
            with self._runtime.on_device():
                self._copy_stream.synchronize()
                self.reset()
        except Exception:
            # After a device-side assert every call raises. What is left is to drop everything.
            _log.exception("%s has failed; what it held is dropped", self.device)
            try:
                with self._runtime.on_device():
                    self._drop_memory()
            except Exception:
                _log.exception("%s cannot free its memory", self.device)
