"""Backend for the CPU: reader threads write files directly into pages, without staging.

Every operation is finished when its call returns, so no stream or event is needed.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gpucache_pipes.device import results
from gpucache_pipes.device.arena import Arena
from gpucache_pipes.device.backend import Backend, Column, Pages
from gpucache_pipes.device.host_copies import move, select_rows
from gpucache_pipes.device.memory import available_host_bytes, map_memory, total_host_bytes

_log = logging.getLogger("gpucache_pipes")

_SHARE = 0.9
"""Fraction of the host memory available at the first `grow` that the pages may occupy."""

_LONG = 2 << 10
"""Bytes of stretches that are worth a copy each."""

_FIRST_PAGES = 1 << 20
"""Bytes of the first `grow`. Each later one doubles what is in use."""


class HostBackend(Backend):
    """Pages in host memory. Implements `Backend`.

    The first `grow` maps the address range of all pages that can ever be used, and the kernel adds
    memory as pages are written. So there is one segment, and growing copies nothing.
    """

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.page_bytes = 0
        self._arena: Arena | None = None
        self._memory = memoryview(bytearray())
        self._opened = 0
        self._warned = False

    @property
    def reserved_bytes(self) -> int:
        """See Backend."""
        return self._opened * self.page_bytes

    def memory_is_host(self) -> bool:
        """See Backend."""
        return True

    def configure(self, page_bytes: int) -> None:
        """See Backend."""
        self.page_bytes = page_bytes

    def grow(self, needed: int, useful: int | None, known: int | None = None) -> int:
        """See Backend. Memory that is not written to takes none, so `known` makes no difference."""
        if self._arena is None:
            arena = self._map_everything(needed)
            if not arena.pages:
                return self._full(needed)
            self._arena = arena
        pages = max(needed, self._opened, _FIRST_PAGES // self.page_bytes)
        if useful is not None:
            pages = max(needed, min(pages, useful))
        pages = min(pages, self._arena.pages - self._opened)
        if pages < needed:
            return self._full(needed)
        self._opened += pages
        return pages

    def _full(self, needed: int) -> int:
        """Log once that there is no memory, and return the number of pages added: 0.

        Raises:
            MemoryError: there are no pages yet.
        """
        if not self._opened:
            raise MemoryError(
                f"{self.device} has no memory for the {needed * self.page_bytes} bytes that a "
                f"batch needs ({available_host_bytes()} bytes are free): free host memory, or "
                "lower the batch size and depth"
            )
        if not self._warned:
            self._warned = True
            _log.warning(
                "there is no host memory for %d more bytes; the cache stops growing at %d bytes "
                "and evicts from now on. Set max_cache_bytes to leave memory for other processes",
                needed * self.page_bytes, self.reserved_bytes,
            )  # fmt: skip
        return 0

    def _map_everything(self, needed: int) -> Arena:
        """An arena over the available memory; without pages if `needed` of them do not fit."""
        arena = Arena(self.page_bytes, self.device, select_rows)
        pages = int(available_host_bytes() * _SHARE) // self.page_bytes
        while pages >= needed:
            try:
                region = map_memory(pages * self.page_bytes, inherited=False)
            except OSError:
                # The system counts address space as memory. Map less of it.
                pages //= 2
                continue
            self._memory = memoryview(region)
            with torch.inference_mode(False):  # see Arena.add_segment
                arena.add_segment(torch.frombuffer(region, dtype=torch.uint8))
            break
        return arena

    def upload(self, placements: Sequence[Sequence[int]]) -> "HostUpload":
        """See Backend."""
        return HostUpload(self._memory, self.page_bytes, placements)

    def gather(self, pages: Pages | Sequence[int], columns: Sequence[Column]) -> list[torch.Tensor]:
        """See Backend."""
        assert self._arena is not None
        # A copy: torch takes no memory that is read-only.
        return self._arena.gather(np.array(pages, np.int64), columns, torch.from_numpy)

    def join(self, first: Pages, counts: Pages) -> torch.Tensor:
        """See Backend. Stretches are copied whole, in two thirds of the time of their pages."""
        sizes = counts * self.page_bytes
        ends = np.cumsum(sizes)
        if not len(ends) or ends[-1] < len(ends) * _LONG:
            return super().join(first, counts)
        assert self._arena is not None
        if not 0 <= first.min() <= (first + counts).max() <= self._arena.pages:
            raise IndexError(f"pages {first.min()} to {(first + counts).max()}")
        out = results.empty((int(ends[-1]),), torch.uint8)
        source = self._arena.memory().data_ptr()
        move(out.data_ptr() + ends - sizes, source + first * self.page_bytes, sizes)
        return out

    def total_bytes(self) -> int:
        """See Backend."""
        return total_host_bytes()

    def memory(self) -> torch.Tensor | None:
        """See Backend."""
        return None if self._arena is None else self._arena.memory()

    def bind_stream(self) -> Callable[[], AbstractContextManager[Any]]:
        """See Backend."""
        return nullcontext

    def reset(self) -> None:
        """See Backend."""
        # Tensors and memoryviews in use hold the mapping. It is unmapped with the last of them.
        self._arena = None
        self._memory = memoryview(bytearray())
        results.MEMORY.clear()
        self._opened = 0
        self.page_bytes = 0

    def close(self) -> None:
        """See Backend."""
        self.reset()


class HostUpload:
    """An `Upload` whose buffers are the pages themselves; consecutive pages form one buffer."""

    def __init__(
        self, memory: memoryview, page_bytes: int, placements: Sequence[Sequence[int]]
    ) -> None:
        self._memory = memory
        self._page_bytes = page_bytes
        self._placements = placements

    def buffers(self, number: int) -> list[memoryview]:
        """See Upload."""
        size = self._page_bytes
        pages = self._placements[number]
        if len(pages) == 1:
            return [self._memory[pages[0] * size : (pages[0] + 1) * size]]
        runs: list[list[int]] = []
        for page in pages:
            if runs and runs[-1][1] == page:
                runs[-1][1] = page + 1
            else:
                runs.append([page, page + 1])
        return [self._memory[first * size : end * size] for first, end in runs]

    def memory(self) -> tuple[memoryview, npt.NDArray[np.int64]]:
        """See Upload."""
        first = [pages.start if isinstance(pages, range) else -1 for pages in self._placements]
        return self._memory, np.array(first, np.int64) * self._page_bytes

    def finish(self) -> None:
        """See Upload. The bytes are in their pages already."""
