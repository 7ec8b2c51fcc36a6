"""GrowingArena: the arena of an accelerator, and the device memory that it takes."""

import logging
import threading
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from gpucache_pipes.device.arena import Arena
from gpucache_pipes.device.errors import DeviceMemoryError
from gpucache_pipes.device.growth import (
    FIRST_BYTES,
    LEAST_BYTES,
    STEPS,
    ModelMemory,
    segment_beside_model,
    step_within_budget,
)
from gpucache_pipes.device.operations import OperationLog
from gpucache_pipes.device.runtime import DeviceMemory, Reservation, Runtime

_log = logging.getLogger("gpucache_pipes")


class GrowingArena:
    """An arena that grows and shrinks while the device reads it.

    `device.growth` decides how far. All methods that change it are called with the store's lock
    held, and with the device current.

    Args:
        runtime: the device.
        copy_stream: on which memory is allocated and copied.
        uploads, gathers: the logs of operations that the device may not have finished.

    Attributes:
        arena: the pages; None before `configure` and after `drop`. A thread that uses them keeps
            its reference: the arena may be replaced meanwhile.
        batches: how many have been gathered.
        writing: held while the arena changes, and while a reader thread issues writes to it.
    """

    def __init__(
        self, runtime: Runtime, copy_stream: Any, uploads: OperationLog, gathers: OperationLog
    ) -> None:
        self.arena: Arena | None = None
        self.writing = threading.Lock()
        self.batches = 0
        self._runtime = runtime
        self._copy_stream = copy_stream
        self._uploads = uploads
        self._gathers = gathers
        self._model = ModelMemory()
        # Bytes of segments that the arena has left, if the allocator keeps them.
        self._left_behind = 0
        self._warned = False
        # Pages that the device had no memory for, and what it had then.
        self._refused: tuple[int, tuple[int, int, int]] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return 0 if self.arena is None else self.arena.nbytes

    def configure(self, page_bytes: int) -> None:
        """Begin with an empty arena."""
        self.arena = Arena(page_bytes, self._runtime.device)

    def drop(self) -> None:
        """Free all pages. Nothing reads or writes them any more, but the device may."""
        self._look()
        self.arena = None
        self._left_behind = 0
        self._model.short = self._model.full = False
        self._refused = None

    def grow(self, needed: int, useful: int | None, known: int | None) -> int:
        """See Backend."""
        arena = self.arena
        assert arena is not None
        # The arena may have moved before, and nothing may have been issued since: drop the old one.
        self._uploads.forget_finished()
        self._gathers.forget_finished()
        memory = self._look()
        if useful is not None:
            pages, moves = self._step_within_budget(arena, needed, useful, known, memory)
        else:
            moves = False
            pages = self._step_beside_model(arena, needed, known, memory)
            if not pages and not arena.pages:
                pages = needed  # a batch needs the first pages, whatever the model needs
            elif not pages:
                return 0 if self.batches < STEPS else self._leave_to_model(arena)
        # A vain try makes the allocator free its cache. One is enough while nothing has changed.
        state = None if memory is None else (memory.free, memory.reserved, memory.allocated)
        if self._refused is not None and state == self._refused[1] and needed >= self._refused[0]:
            return self._refuse(arena, needed)
        while pages >= needed:
            try:
                return self._add(arena, pages, moves)
            except torch.OutOfMemoryError:
                self._absorb()
                if pages == needed:
                    break
                pages, moves = max(needed, pages // 2), False
        if (memory := self._runtime.memory()) is not None:
            self._refused = (needed, (memory.free, memory.reserved, memory.allocated))
        return self._refuse(arena, needed)

    def _look(self) -> DeviceMemory | None:
        """Note what the model has needed so far. Before each change of the arena."""
        memory = self._runtime.memory()
        if memory is not None:
            self._model.look(memory, self.nbytes, self.batches)
        return memory

    def _absorb(self) -> None:
        """What the change of the arena did to the counters is not the model's doing. After it."""
        memory = self._runtime.memory()
        if memory is not None:
            self._model.absorb(memory)

    def _step_within_budget(
        self,
        arena: Arena,
        needed: int,
        useful: int,
        known: int | None,
        memory: DeviceMemory | None,
    ) -> tuple[int, bool]:
        size = arena.page_bytes
        pages, moves = step_within_budget(
            needed,
            useful,
            known,
            pages=arena.pages,
            left=None if self._runtime.returns_memory else self._left_behind // size,
            first=FIRST_BYTES // size,
            least=LEAST_BYTES // size,
        )
        if memory is None:
            return pages, moves
        moves = moves and (arena.pages + pages) * size <= memory.free
        # To find more than the driver has free, the allocator would free its cache, which is the
        # model's.
        return max(needed, min(pages, memory.free // size)), moves

    def _step_beside_model(
        self,
        arena: Arena,
        needed: int,
        known: int | None,
        memory: DeviceMemory | None,
    ) -> int:
        size = arena.page_bytes
        first = FIRST_BYTES // size
        if memory is None:
            return max(needed, arena.pages, first)
        spare = 0 if self._model.full else self._model.spare(memory, arena.nbytes, self.batches)
        return segment_beside_model(
            needed,
            known,
            spare // size,
            pages=arena.pages,
            first=min(first, memory.total // 64 // size),
            least=LEAST_BYTES // size,
            total=memory.total // size,
        )

    def _refuse(self, arena: Arena, needed: int) -> int:
        """Log once that there is no memory, and return the number of pages added: 0.

        Raises DeviceMemoryError if there are no pages yet.
        """
        memory = self._runtime.memory()
        free = "" if memory is None else f" ({memory.free} of {memory.total} bytes are free)"
        if not arena.pages:
            raise DeviceMemoryError(
                f"{self._runtime.device} has no memory for the {needed * arena.page_bytes} bytes "
                f"that a batch needs{free}: free device memory, or lower the batch size and depth"
            )
        if not self._warned:
            self._warned = True
            _log.warning(
                "%s has no memory for %d more bytes%s; the cache stops growing at %d bytes and "
                "evicts from now on. Set max_cache_bytes to leave memory for the model",
                self._runtime.device, needed * arena.page_bytes, free, arena.nbytes,
            )  # fmt: skip
        return 0

    def _leave_to_model(self, arena: Arena) -> int:
        """Log once that the model needs the rest; the number of pages added: 0."""
        if not self._warned:
            self._warned = True
            _log.info(
                "the cache stops growing at %d bytes and evicts from now on, since the model has "
                "needed %d bytes of %s", arena.nbytes, self._model.peak, self._runtime.device,
            )  # fmt: skip
        return 0

    def _add(self, arena: Arena, pages: int, moves: bool) -> int:
        """Add a segment of `pages`, or move the arena to one that is larger by as many.

        Returns the number of pages added. Raises torch.OutOfMemoryError.
        """
        # On the copy stream: the allocator ties memory to the stream it was allocated on.
        with self.writing, self._runtime.on(self._copy_stream):
            if moves:
                self._move(arena, self.reserve((arena.pages + pages) * arena.page_bytes))
            else:
                arena.add_segment(self.reserve(pages * arena.page_bytes))
        self._absorb()
        return pages

    def reserve(self, nbytes: int) -> Reservation:
        """New memory on the device. With the copy stream current. Raises torch.OutOfMemoryError."""
        # The first thread that needs memory may be in inference mode: see Arena.add_segment.
        with torch.inference_mode(False):
            return self._runtime.reserve(nbytes)

    def _move(self, arena: Arena, memory: Reservation) -> None:
        larger = Arena(arena.page_bytes, self._runtime.device)
        larger.add_segment(memory)
        larger.copy_from(arena)
        # First the log, then the new arena: a gather that is issued meanwhile must wait for the
        # copy. The log holds the old arena until the copy has been made, and unfinished gathers
        # hold it as long as they need it.
        self._uploads.add(self._copy_stream, None, arena)
        self._left_behind += arena.nbytes
        self.arena = larger

    def balance(self) -> int:
        """See Backend."""
        memory, arena = self._look(), self.arena
        if memory is None or arena is None or not arena.pages:
            return 0
        lack = self._model.missing(memory, arena.nbytes) - memory.free
        if self._model.short or (self.batches >= STEPS and lack > 0):
            self._model.full = True
            return -_last_segments(arena, max(1, lack))
        if self._model.full:
            return 0
        return max(0, self._model.spare(memory, arena.nbytes, self.batches) // arena.page_bytes)

    def shrink(self, pages: int) -> None:
        """See Backend."""
        arena = self.arena
        assert arena is not None
        ends = list(accumulate(arena.segments))
        assert pages in ends, f"{pages} pages are no whole segments of {arena.segments}"
        with self.writing:
            self.arena = arena.first_segments(ends.index(pages) + 1)
        # The model has run short. A cache that grew again would make it run short again.
        self._model.short, self._model.full = False, True
        del arena
        self._return_memory()

    def rebuild(self, pages: Sequence[int]) -> None:
        """See Backend."""
        old = self.arena
        assert old is not None
        self._look()
        kept = np.asarray(pages, np.int64)
        nbytes = len(kept) * old.page_bytes
        smaller = Arena(old.page_bytes, self._runtime.device)
        with self.writing, self._runtime.on(self._copy_stream):
            # The copies of uploads are on this stream as well.
            try:
                smaller.add_segment(self.reserve(nbytes))
            except torch.OutOfMemoryError:
                # There is no memory for both arenas. The pages wait on the host.
                rows = torch.empty(nbytes, dtype=torch.uint8, device="cpu").view(len(kept), -1)
                for start, source in old.runs(kept):
                    rows[start : start + len(source)].copy_(source)
                self.arena = None
                self._gathers.synchronize()
                del old, source
                self._uploads.synchronize()
                smaller.add_segment(self.reserve(nbytes))
                for start, target in smaller.runs(np.arange(len(kept))):
                    target.copy_(rows[start : start + len(target)])
                old = None
            else:
                for start, source in old.runs(kept):
                    for _, target in smaller.runs(np.arange(start, start + len(source))):
                        target.copy_(source)
            self._uploads.add(self._copy_stream, None, old)
            self.arena = smaller
        del old
        self._return_memory()
        # The shortage that this is for is over.
        self._model.short = self._model.full = False

    def _return_memory(self) -> None:
        """The arena has become smaller: return the rest once the device does not read it."""
        # No thread issues reads of these pages any more, but the device may be behind. Until it is
        # not, the logs hold the memory.
        self._uploads.synchronize()
        self._gathers.synchronize()
        self._absorb()


def _last_segments(arena: Arena, nbytes: int) -> int:
    """The pages of the fewest segments, from the last, that hold `nbytes`; never the first."""
    pages = 0
    for count in reversed(arena.segments[1:]):
        if pages * arena.page_bytes >= nbytes:
            break
        pages += count
    return pages
