"""The arena: pages of one size, in one or more segments of device memory."""

import ctypes
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence

import torch

from gpucache_pipes.device.backend import Column
from gpucache_pipes.device.results import LARGE, ResultMemory
from gpucache_pipes.device.runtime import Reservation

_WORDS = (
    (16, torch.complex128),
    (8, torch.int64),
    (4, torch.int32),
    (2, torch.int16),
    (1, torch.uint8),
)
"""Dtypes to move bytes with, by size. torch copies by element, so wide dtypes are much faster."""

Index = Callable[[Sequence[int]], torch.Tensor]
"""Makes an int64 tensor on the device from numbers on the host."""


class Arena:
    """Pages of `page_bytes`, numbered consecutively over the segments that hold them.

    Args:
        page_bytes: size of a page, a multiple of 16.
        device: where the segments are.
        results: memory for large results of gathers from one segment. Only on the host.
        cores_are_busy: whether reader threads are using the cores now. Only on the host.

    >>> arena = Arena(16, torch.device("cpu"))
    >>> arena.add_segment(torch.arange(64, dtype=torch.uint8))
    4
    >>> [rows] = arena.gather([3, 0], [(0, 8)], torch.tensor)
    >>> rows.view(torch.uint8)[:, 0].tolist()
    [48, 0]
    """

    def __init__(
        self,
        page_bytes: int,
        device: torch.device,
        results: ResultMemory | None = None,
        cores_are_busy: Callable[[], bool] = lambda: False,
    ) -> None:
        self._device = device
        self._results = results
        self.cores_are_busy = cores_are_busy
        self.page_bytes = page_bytes
        self.pages = 0
        self._segments: list[torch.Tensor] = []
        self._starts: list[int] = []
        self._reservations: list[Reservation] = []
        self._views: dict[tuple[int, int, int], torch.Tensor] = {}
        # MPS has no complex128.
        self._words = _WORDS[1:] if device.type == "mps" else _WORDS

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return self.pages * self.page_bytes

    @property
    def segments(self) -> list[int]:
        """The number of pages of each segment."""
        return [len(segment) for segment in self._segments]

    def add_segment(self, memory: Reservation | torch.Tensor) -> int:
        """Use `memory` for more pages, and return their number.

        Args:
            memory: uint8, 1-D, aligned to 16 bytes. The arena holds it from now on; bytes that
                do not fill a page are not used.
        """
        reservation = memory if isinstance(memory, Reservation) else Reservation(memory)
        assert reservation.memory is not None
        rows = reservation.memory.numel() // self.page_bytes
        # Whoever is first to need pages may be in inference mode. Nobody else can write to a tensor
        # that is made there, views included.
        with torch.inference_mode(False):
            pages = reservation.memory[: rows * self.page_bytes].view(rows, self.page_bytes)
        self._reservations.append(reservation)
        self._segments.append(pages)
        self._starts.append(self.pages)
        self.pages += rows
        return rows

    def copy_from(self, other: "Arena") -> None:
        """Copy all pages of `other` to the same pages of this arena, which has one segment."""
        rows = self._segments[0]
        for start, segment in zip(other._starts, other._segments, strict=True):
            rows[start : start + len(segment)].copy_(segment)

    def first_segments(self, count: int) -> "Arena":
        """An arena of the first `count` segments of this one, which share their memory."""
        shorter = Arena(self.page_bytes, self._device, self._results, self.cores_are_busy)
        for reservation in self._reservations[:count]:
            shorter.add_segment(reservation)
        return shorter

    def __del__(self) -> None:
        # First the views, then what they are views of: see Reservation.
        self._views.clear()
        self._segments.clear()
        self._reservations.clear()

    def gather(
        self, pages: Sequence[int], columns: Sequence[Column], index: Index
    ) -> list[torch.Tensor]:
        """For each column a new tensor [len(pages), words], whose row i comes from `pages[i]`.

        Args:
            pages: page numbers, in any order, with repeats.
            columns: byte ranges of a page.
            index: makes an index on the device.

        Raises:
            IndexError: on the host, a page is not in the arena.
        """
        groups = self._by_segment(pages)
        if len(groups) == 1:
            segment, rows, _ = groups[0]
            at = index(rows)
            return [self._select(self._view(segment, column), at) for column in columns]
        parts = [(segment, index(rows), index(positions)) for segment, rows, positions in groups]
        results = []
        for column in columns:
            sample = self._view(0, column)
            out = sample.new_empty((len(pages), sample.shape[1]))
            for segment, at, to in parts:
                out.index_copy_(0, to, self._view(segment, column).index_select(0, at))
            results.append(out)
        return results

    def _select(self, view: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """The rows `at` of `view`, by the fastest way for their size."""
        if self._results is None:
            return view.index_select(0, at)
        row_bytes = view.shape[1] * view.element_size()
        alone = row_bytes >= LONG_ROW and self.cores_are_busy()
        if len(at) * row_bytes < LARGE and not alone:
            return view.index_select(0, at)
        out = self._empty(len(at) * row_bytes).view(view.dtype).view(len(at), view.shape[1])
        return _copy_rows(view, at, out) if alone else torch.index_select(view, 0, at, out=out)

    def join(self, placements: Sequence[Sequence[int]], index: Index) -> torch.Tensor:
        """The pages of several features end to end, as one new uint8 tensor.

        Only for an arena with one segment in host memory.

        Args:
            placements: the pages of each feature.
            index: makes an index.

        Raises:
            IndexError: a page is not in the arena.
        """
        size = self.page_bytes
        runs = [(p.start, len(p) * size) for p in placements if type(p) is range]
        longest = max((nbytes for _, nbytes in runs), default=0)
        if len(runs) < len(placements) or (longest >= LONG_ROW and not self.cores_are_busy()):
            pages = [page for pages in placements for page in pages]
            [block] = self.gather(pages, [(0, size)], index)
            return block.view(torch.uint8).view(-1)
        # Fresh pages are consecutive: one copy for each feature, and no index of all their pages.
        out = self._empty(sum(nbytes for _, nbytes in runs))
        source, target = self._segments[0].data_ptr(), out.data_ptr()
        for first, nbytes in runs:
            if not 0 <= first * size <= self.nbytes - nbytes:
                raise IndexError(f"{nbytes} bytes from page {first} of {self.pages}")
            ctypes.memmove(target, source + first * size, nbytes)
            target += nbytes
        return out

    def memory(self) -> torch.Tensor:
        """All pages of the only segment, uint8 1-D. A view, not a copy."""
        return self._segments[0].view(-1)

    def _empty(self, nbytes: int) -> torch.Tensor:
        """Memory for a result, uint8 [nbytes]."""
        if self._results is not None and nbytes >= LARGE:
            return self._results.empty(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")

    def runs(self, pages: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """Stretches of `pages` that lie in a row: for each, its position in `pages`, and its rows.

        A view, uint8 [rows, page_bytes], which is not kept.
        """
        start = 0
        while start < len(pages):
            first = pages[start]
            segment = bisect_right(self._starts, first) - 1
            row = first - self._starts[segment]
            most = min(len(pages) - start, len(self._segments[segment]) - row)
            if type(pages) is range and pages.step == 1:
                count = most
            else:
                count = 1
                while count < most and pages[start + count] == first + count:
                    count += 1
            yield start, self._segments[segment][row : row + count]
            start += count

    def scatter(self, pages: Sequence[int], rows: torch.Tensor, index: Index) -> None:
        """Write `rows`, uint8 [len(pages), page_bytes], into `pages`. May allocate memory."""
        column = (0, self.page_bytes)
        words = rows.view(self._word(column))
        for segment, at, positions in self._by_segment(pages):
            source = words if len(at) == len(pages) else words.index_select(0, index(positions))
            self._view(segment, column).index_copy_(0, index(at), source)

    def fill(self, pages: Sequence[int], rows: torch.Tensor) -> None:
        """Write `rows` into `pages` as `scatter` does, but without allocating memory.

        Slow: one operation for each page.
        """
        for page, row in zip(pages, rows, strict=True):
            segment = bisect_right(self._starts, page) - 1
            self._segments[segment][page - self._starts[segment]].copy_(row, non_blocking=True)

    def _by_segment(self, pages: Sequence[int]) -> list[tuple[int, Sequence[int], Sequence[int]]]:
        """Group `pages` by segment: (segment, rows of that segment, their positions in `pages`).

        With one segment the positions are left empty, since they are all of `pages`.
        """
        if len(self._starts) == 1:
            return [(0, pages, ())]
        rows: dict[int, tuple[list[int], list[int]]] = {}
        for position, page in enumerate(pages):
            segment = bisect_right(self._starts, page) - 1
            at, positions = rows.setdefault(segment, ([], []))
            at.append(page - self._starts[segment])
            positions.append(position)
        return [(segment, at, positions) for segment, (at, positions) in rows.items()]

    def _word(self, column: Column) -> torch.dtype:
        """The widest dtype whose size divides that of the column."""
        return next(dtype for size, dtype in self._words if column[1] % size == 0)

    def _view(self, segment: int, column: Column) -> torch.Tensor:
        """The column of a segment, [rows, words]. Cached: making a view costs microseconds."""
        key = (segment, *column)
        view = self._views.get(key)
        if view is None:
            if len(self._views) > _MAX_VIEWS:
                self._views.clear()
            dtype = self._word(column)
            offset, nbytes = column
            start = offset // dtype.itemsize
            end = start + nbytes // dtype.itemsize
            with torch.inference_mode(False):  # see add_segment
                view = self._segments[segment].view(dtype)[:, start:end]
            self._views[key] = view
        return view


def _copy_rows(view: torch.Tensor, at: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`view.index_select(0, at, out=out)` on the host, in the calling thread only.

    torch splits the work over as many threads as there are cores. If reader threads use some of the
    cores, the threads of torch wait for each other, and take longer than one thread would.
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
"""Rows of at least this many bytes take much longer to copy than one step of Python."""

_MAX_VIEWS = 4096
"""More views than a uniform data set needs. Bounds the cache if every file has its own layout."""
