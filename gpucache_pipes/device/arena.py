"""Pages: rows of device memory, in segments."""

import ctypes
from bisect import bisect_right
from collections.abc import Callable, Sequence

import torch

from gpucache_pipes.device.backend import Column
from gpucache_pipes.device.results import LARGE, ResultMemory

_WORDS = (
    (16, torch.complex128),
    (8, torch.int64),
    (4, torch.int32),
    (2, torch.int16),
    (1, torch.uint8),
)
"""Element types to move bytes with. Copying is by element, so wide ones are much faster."""

Index = Callable[[Sequence[int]], torch.Tensor]
"""Makes an int64 index on the device of numbers on the host."""


class Arena:
    """Rows of `page_bytes`, numbered through over the segments that hold them.

    On the host `results` is where large results of gathers from one segment go, and
    `cores_are_busy` says whether other threads are reading files.
    """

    def __init__(
        self,
        page_bytes: int,
        device: torch.device,
        results: ResultMemory | None = None,
        cores_are_busy: Callable[[], bool] = lambda: False,
    ) -> None:
        self._results = results
        self.cores_are_busy = cores_are_busy
        self.page_bytes = page_bytes
        self.pages = 0
        self._segments: list[torch.Tensor] = []
        self._starts: list[int] = []
        self._views: dict[tuple[int, int, int], torch.Tensor] = {}
        # MPS has no complex128.
        self._words = _WORDS[1:] if device.type == "mps" else _WORDS

    @property
    def nbytes(self) -> int:
        """Bytes of all segments."""
        return self.pages * self.page_bytes

    def add_segment(self, memory: torch.Tensor) -> int:
        """Use `memory` (uint8, 1-D, aligned to 16 bytes) for more pages; returns how many."""
        rows = memory.numel() // self.page_bytes
        self._segments.append(memory[: rows * self.page_bytes].view(rows, self.page_bytes))
        self._starts.append(self.pages)
        self.pages += rows
        return rows

    def copy_from(self, other: "Arena") -> None:
        """Write the pages of `other` to the same ones of this, which has one segment."""
        rows = self._segments[0]
        for start, segment in zip(other._starts, other._segments, strict=True):
            rows[start : start + len(segment)].copy_(segment)

    def gather(
        self, pages: Sequence[int], columns: Sequence[Column], index: Index
    ) -> list[torch.Tensor]:
        """One tensor for each column, row i from `pages[i]`."""
        groups = self._by_segment(pages)
        if len(groups) == 1:
            segment, rows, _ = groups[0]
            at = index(rows)
            return [self._select(self._view(segment, column), at) for column in columns]
        parts = [(segment, index(rows), index(places)) for segment, rows, places in groups]
        results = []
        for column in columns:
            sample = self._view(0, column)
            out = sample.new_empty((len(pages), sample.shape[1]))
            for segment, at, to in parts:
                out.index_copy_(0, to, self._view(segment, column).index_select(0, at))
            results.append(out)
        return results

    def _select(self, view: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        if self._results is None:
            return view.index_select(0, at)
        row_bytes = view.shape[1] * view.element_size()
        alone = row_bytes >= LONG_ROW and self.cores_are_busy()
        if len(at) * row_bytes < LARGE and not alone:
            return view.index_select(0, at)
        out = self._empty(len(at) * row_bytes).view(view.dtype).view(len(at), view.shape[1])
        return _copy_rows(view, at, out) if alone else torch.index_select(view, 0, at, out=out)

    def join(self, placements: Sequence[Sequence[int]], index: Index) -> torch.Tensor:
        """The pages of several features end to end, uint8. On the host, where one segment is."""
        size = self.page_bytes
        runs = [(p.start, len(p) * size) for p in placements if type(p) is range]
        longest = max((nbytes for _, nbytes in runs), default=0)
        if len(runs) < len(placements) or (longest >= LONG_ROW and not self.cores_are_busy()):
            pages = [page for pages in placements for page in pages]
            [block] = self.gather(pages, [(0, size)], index)
            return block.view(torch.uint8).view(-1)
        # Fresh pages lie in a row: a copy for each feature, and no index of all their pages.
        out = self._empty(sum(nbytes for _, nbytes in runs))
        source, target = self._segments[0].data_ptr(), out.data_ptr()
        for first, nbytes in runs:
            if not 0 <= first * size <= self.nbytes - nbytes:
                raise IndexError(f"{nbytes} bytes from page {first} of {self.pages}")
            ctypes.memmove(target, source + first * size, nbytes)
            target += nbytes
        return out

    def memory(self) -> torch.Tensor:
        """The pages of the one segment in a row, uint8."""
        return self._segments[0].view(-1)

    def _empty(self, nbytes: int) -> torch.Tensor:
        """Room for a result, uint8."""
        if self._results is not None and nbytes >= LARGE:
            return self._results.empty(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    def scatter(self, pages: Sequence[int], rows: torch.Tensor, index: Index) -> None:
        """Write `rows` (uint8 [len(pages), page_bytes]) into pages."""
        column = (0, self.page_bytes)
        words = rows.view(self._word(column))
        for segment, at, places in self._by_segment(pages):
            # Pages that lie in a row need no index at all: the usual case of a first epoch.
            view = self._view(segment, column)
            source = words if len(at) == len(pages) else words.index_select(0, index(places))
            if at[-1] - at[0] == len(at) - 1 and list(at) == list(range(at[0], at[-1] + 1)):
                view[at[0] : at[-1] + 1].copy_(source)
            else:
                view.index_copy_(0, index(at), source)

    def fill(self, pages: Sequence[int], rows: torch.Tensor) -> None:
        """Write `rows` into pages without any memory for it, one operation for each page."""
        for page, row in zip(pages, rows, strict=True):
            segment = bisect_right(self._starts, page) - 1
            self._segments[segment][page - self._starts[segment]].copy_(row, non_blocking=True)

    def _by_segment(self, pages: Sequence[int]) -> list[tuple[int, Sequence[int], Sequence[int]]]:
        """(segment, rows in it, their places in `pages`), one for each segment concerned."""
        if len(self._starts) == 1:
            return [(0, pages, ())]
        rows: dict[int, tuple[list[int], list[int]]] = {}
        for place, page in enumerate(pages):
            segment = bisect_right(self._starts, page) - 1
            at, places = rows.setdefault(segment, ([], []))
            at.append(page - self._starts[segment])
            places.append(place)
        return [(segment, at, places) for segment, (at, places) in rows.items()]

    def _word(self, column: Column) -> torch.dtype:
        return next(dtype for size, dtype in self._words if column[1] % size == 0)

    def _view(self, segment: int, column: Column) -> torch.Tensor:
        """The column of a segment, [rows, words]. Remembered: making one costs microseconds."""
        key = (segment, *column)
        view = self._views.get(key)
        if view is None:
            if len(self._views) > _MAX_VIEWS:
                self._views.clear()
            dtype = self._word(column)
            offset, nbytes = column
            start = offset // dtype.itemsize
            view = self._segments[segment].view(dtype)[:, start : start + nbytes // dtype.itemsize]
            self._views[key] = view
        return view


def _copy_rows(view: torch.Tensor, at: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`view.index_select(0, at, out=out)` on the host, in this thread alone.

    torch shares the work among as many threads as there are cores. Where readers have some of
    these, the threads wait for each other, and take longer than one of them would.
    """
    size = view.element_size()
    row_bytes, stride = view.shape[1] * size, view.stride(0) * size
    source, target = view.data_ptr(), out.data_ptr()
    rows = at.tolist()
    if rows and not 0 <= min(rows) <= max(rows) < len(view):
        raise IndexError(f"rows {min(rows)} to {max(rows)} of {len(view)}")
    for number, row in enumerate(rows):
        ctypes.memmove(target + number * row_bytes, source + row * stride, row_bytes)
    return out


LONG_ROW = 256 << 10
"""Bytes of a row that take much longer to copy than a step of Python takes."""

_MAX_VIEWS = 4096
"""More than any uniform data set needs; a bound for those where each file has its own layout."""
