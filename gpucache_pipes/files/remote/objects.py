"""Objects as features: small ones whole, large ones by the ranges that their leaves span."""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from gpucache_pipes.files.errors import Unsupported
from gpucache_pipes.files.layout import Layout
from gpucache_pipes.files.planned import Bytes, cut, fill
from gpucache_pipes.files.plans import Extent, ReadPlan
from gpucache_pipes.files.remote.pieces import Piece, pieces_of
from gpucache_pipes.files.remote.versions import ObjectVersion
from gpucache_pipes.files.remote.workers import Workers
from gpucache_pipes.files.strided import copy_one

_WINDOW_BYTES = 64 << 10
_LEAST_BYTES = 4 << 10
_HEADERS_AT_ONCE = 16
_AT_ONCE = 4
"""Requests of up to 8 MiB in flight for one feature."""

Read = Callable[[int, int], Any]
"""`read(start, end)` gives bytes of one version of an object. Raises ChangedError for another."""


class MemoryFeature:
    """An OpenFeature over an object whose bytes are in memory."""

    def __init__(self, plan: ReadPlan, data: Any, version: ObjectVersion) -> None:
        self._plan = plan
        self._data = memoryview(data)
        self.layout: Layout = plan.layout
        self.values = plan.values
        self.version = version.packed
        self.file_version = version.stored

    @property
    def bytes_read(self) -> int:
        """See OpenFeature."""
        return len(self._data)

    def read_into(self, buffers: Sequence[memoryview]) -> None:
        """See OpenFeature."""
        fill(self._plan, self._data, buffers)

    def close(self) -> None:
        """See OpenFeature."""
        self._data = memoryview(b"")


class RemoteBytes(Bytes):
    """The bytes of a large object, which are asked for when a reader needs them.

    The first and the last 64 KiB are read at once, since headers and small records lie there.

    Args:
        size: of the object in bytes.
        read: reads a range.
        workers: make requests at the same time.
    """

    def __init__(self, size: int, read: Read, workers: Workers) -> None:
        self.whole = None
        self.size = size
        self._read = read
        self._workers = workers
        self._windows: list[tuple[int, memoryview]] = []
        last = max(0, self.size - _WINDOW_BYTES)
        self._fetch([(0, min(_WINDOW_BYTES, self.size)), (last, self.size)])

    def read(self, start: int, count: int) -> bytes:
        """See Bytes. Raises OSError as `Client.get_range` does."""
        if start < 0 or start + count > self.size:
            raise Unsupported("the file names bytes beyond its end")
        found = self._find(start, count)
        if found is None:
            self._fetch([(start, min(self.size, start + max(count, _LEAST_BYTES)))])
            found = self._find(start, count)
            assert found is not None
        return bytes(found)

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        """See Bytes."""
        missing = [
            (start, start + count)
            for start, count in ranges
            if start >= 0 and start + count <= self.size and self._find(start, count) is None
        ]
        if len(missing) > 1:
            self._fetch(missing)

    def _find(self, start: int, count: int) -> memoryview | None:
        for at, window in self._windows:
            if at <= start and start + count <= at + len(window):
                return window[start - at : start - at + count]
        return None

    def _fetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        answers = self._workers.each(lambda item: self._read(*item), ranges, _HEADERS_AT_ONCE)
        for (start, _), data in zip(ranges, answers, strict=True):
            self._windows.append((start, memoryview(data)))


class RemoteFeature:
    """An OpenFeature that reads the ranges of a large object that its leaves span.

    Args:
        plan: how to read it.
        version: of the object, for which the plan holds.
        read: reads a range.
        workers: make requests at the same time.
    """

    def __init__(
        self, plan: ReadPlan, version: ObjectVersion, read: Read, workers: Workers
    ) -> None:
        self._plan = plan
        self._read = read
        self._workers = workers
        self._pieces = pieces_of(plan.extents)
        # Requests begin when the feature is opened, so that they overlap with those for others.
        self._pending: deque[Future[Any]] = deque()
        self._begun = 0
        while self._begun < min(_AT_ONCE, len(self._pieces)):
            self._begin_next()
        self.layout: Layout = plan.layout
        self.values = plan.values
        self.version = version.packed
        self.file_version = version.stored

    def _begin_next(self) -> None:
        if self._begun < len(self._pieces):
            self._pending.append(self._workers.begin(self._fetch, self._pieces[self._begun]))
            self._begun += 1

    @property
    def bytes_read(self) -> int:
        """See OpenFeature."""
        strided = sum(extent.nbytes for extent in self._plan.strided_extents)
        return strided + sum(piece.end - piece.start for piece in self._pieces)

    def require_current(self) -> None:
        """Wait for the first piece. Raises ChangedError if the object is not that of the plan."""
        if self._pending:
            self._pending[0].result()

    def read_into(self, buffers: Sequence[memoryview]) -> None:
        """See OpenFeature. Raises ChangedError if the object changes meanwhile."""
        for piece in self._pieces:
            data = self._pending.popleft().result()
            self._begin_next()
            _place(piece, data, buffers)
        for extent in self._plan.strided_extents:
            held = bytearray(extent.nbytes)
            parts = pieces_of([Extent(extent.start, 0, extent.nbytes)])
            answers = self._workers.each(self._fetch, parts, _AT_ONCE)
            for piece, data in zip(parts, answers, strict=True):
                _place(piece, data, [memoryview(held)])
            copy_one(held, extent, buffers)

    def _fetch(self, piece: Piece) -> Any:
        return self._read(piece.start, piece.end)

    def close(self) -> None:
        """See OpenFeature. Requests that have not begun are not made."""
        self._begun = len(self._pieces)
        for future in self._pending:
            future.cancel()
        self._pending.clear()


def _place(piece: Piece, data: Any, buffers: Sequence[memoryview]) -> None:
    view = memoryview(data)
    for start, offset, nbytes in piece.moves:
        for part in cut(buffers, offset, nbytes):
            part[:] = view[start : start + len(part)]
            start += len(part)
