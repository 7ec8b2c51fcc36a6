"""The arena: pages of one size, in one or more segments of device memory."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch

from gpucache_pipes.device.backend import Column, Pages
from gpucache_pipes.device.runtime import Reservation

_WORDS = (
    (16, torch.complex128),
    (8, torch.int64),
    (4, torch.int32),
    (2, torch.int16),
    (1, torch.uint8),
)
"""Dtypes to move bytes with, by size. torch copies by element, so wide dtypes are much faster."""

Index = Callable[[Pages], torch.Tensor]
"""Makes an int64 tensor on the device from numbers on the host."""

Select = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""New rows [len(at), words] from rows of a 2-D tensor and an index `at` of them."""


def _select(rows: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    return rows.index_select(0, at)


class Arena:
    """Pages of `page_bytes`, numbered consecutively over the segments that hold them.

    Args:
        page_bytes: size of a page, a multiple of 16.
        device: where the segments are.
        select: how rows are gathered from one segment.

    >>> arena = Arena(16, torch.device("cpu"))
    >>> arena.add_segment(torch.arange(64, dtype=torch.uint8))
    4
    >>> [rows] = arena.gather(np.array([3, 0]), [(0, 8)], torch.from_numpy)
    >>> rows.view(torch.uint8)[:, 0].tolist()
    [48, 0]
    """

    def __init__(self, page_bytes: int, device: torch.device, select: Select = _select) -> None:
        self._device = device
        self._select = select
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
        shorter = Arena(self.page_bytes, self._device, self._select)
        for reservation in self._reservations[:count]:
            shorter.add_segment(reservation)
        return shorter

    def __del__(self) -> None:
        # First the views, then what they are views of: see Reservation.
        self._views.clear()
        self._segments.clear()
        self._reservations.clear()

    def gather(self, pages: Pages, columns: Sequence[Column], index: Index) -> list[torch.Tensor]:
        """For each column a new tensor [len(pages), words], whose row i comes from `pages[i]`.

        Args:
            pages: in any order, with repeats.
            columns: byte ranges of a page.
            index: makes an index on the device.

        Raises:
            IndexError: a page is not in the arena. With one segment only on the host.
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

    def memory(self) -> torch.Tensor:
        """All pages of the only segment, uint8 1-D. A view, not a copy."""
        return self._segments[0].view(-1)

    def runs(self, pages: Pages) -> Iterator[tuple[int, torch.Tensor]]:
        """Stretches of `pages` that lie in a row: for each, its position in `pages`, and its rows.

        A view, uint8 [rows, page_bytes], which is not kept.
        """
        segments = self._segments_of(pages)
        ends = np.flatnonzero((np.diff(pages) != 1) | (np.diff(segments) != 0)) + 1
        for start, end in pairwise([0, *ends.tolist(), len(pages)] if len(pages) else []):
            segment = segments[start]
            row = int(pages[start]) - self._starts[segment]
            yield start, self._segments[segment][row : row + end - start]

    def scatter(self, pages: Pages, rows: torch.Tensor, index: Index) -> None:
        """Write `rows`, uint8 [len(pages), page_bytes], into `pages`. May allocate memory."""
        column = (0, self.page_bytes)
        words = rows.view(self._word(column))
        for segment, at, positions in self._by_segment(pages):
            source = words if len(at) == len(pages) else words.index_select(0, index(positions))
            self._view(segment, column).index_copy_(0, index(at), source)

    def fill(self, pages: Pages, rows: torch.Tensor) -> None:
        """Write `rows` into `pages` as `scatter` does, but without allocating memory.

        Slow: one operation for each stretch of pages.
        """
        for start, target in self.runs(pages):
            target.copy_(rows[start : start + len(target)], non_blocking=True)

    def _segments_of(self, pages: Pages) -> Pages:
        """The segment of each page. Raises IndexError for a page that is not in the arena."""
        if len(pages) and not 0 <= pages.min() <= pages.max() < self.pages:
            raise IndexError(f"pages {pages.min()} to {pages.max()} of {self.pages}")
        return np.searchsorted(self._starts, pages, side="right") - 1

    def _by_segment(self, pages: Pages) -> list[tuple[int, Pages, Pages]]:
        """Group `pages` by segment: (segment, rows of that segment, their positions in `pages`).

        With one segment the positions are left empty, since they are all of `pages`.
        """
        if len(self._starts) == 1:
            return [(0, pages, pages[:0])]
        segments = self._segments_of(pages)
        groups = [(n, np.flatnonzero(segments == n)) for n in sorted(set(segments.tolist()))]
        return [(n, pages[positions] - self._starts[n], positions) for n, positions in groups]

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


_MAX_VIEWS = 4096
"""More views than a uniform data set needs. Bounds the cache if every file has its own layout."""
