"""Reads many features of another tier at once: from host memory, or from packed segments."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from gpucache_pipes.cache import Numbers
from gpucache_pipes.device import Backend, Upload
from gpucache_pipes.files import Layout, Progress
from gpucache_pipes.files.packed import PackedGroup, native
from gpucache_pipes.store.columns import FeatureColumns, Held
from gpucache_pipes.store.host_tier import HostTier
from gpucache_pipes.store.load_tracker import LoadTracker
from gpucache_pipes.store.page_size import choose_page_bytes, pages_per_file
from gpucache_pipes.store.read_task import ReadTask
from gpucache_pipes.store.tracing import trace

Fill = Callable[[FeatureColumns, Upload], list[int]]
"""`fill(features, upload)` reads features into their buffers; the entries where that failed."""


class GroupReader:
    """Has pages assigned to groups of features, reads into them, and reports.

    Args:
        loads: the reader side of the shared cache.
        backend: takes the bytes.
        page_bytes: the size of a page; None chooses by the features.
        upload_bytes: what goes to the device at once, at most, unless one feature is larger.
        host: features in host memory.
    """

    def __init__(
        self,
        loads: LoadTracker,
        backend: Backend,
        page_bytes: int | None,
        upload_bytes: int,
        host: HostTier | None,
    ) -> None:
        self._loads = loads
        self._backend = backend
        self._page_bytes = page_bytes
        self._upload_bytes = upload_bytes
        self._host = host

    def from_host(self, numbers: Sequence[int], task: ReadTask) -> Sequence[int]:
        """Read those of these entries that are in host memory; returns the others."""
        host = self._host
        if host is None:
            return numbers
        held = Held()
        promoted: list[int] = []

        def copy(features: FeatureColumns, upload: Upload) -> list[int]:
            memory, offsets = upload.memory()
            assert memory is not None
            host.copy(features, memory, offsets)
            return []

        try:
            host.hold(numbers, held)
            if held.columns is None:
                return numbers
            for placed, _ in self._read(held.columns, task, copy, is_read=False):
                entries = np.array(placed.numbers, np.intp)
                cached, evicted = self._loads.are_cached(entries)
                promoted += entries[cached & ~evicted].tolist()
        finally:
            host.let_go(held, promoted)
        found = set(held.columns.numbers)
        return [number for number in numbers if number not in found]

    def from_segments(
        self, group: PackedGroup, numbers: Sequence[int], task: ReadTask, revalidate: bool
    ) -> Sequence[int]:
        """Read a group of these entries from packed segments; returns the others."""
        if not len(group):
            return numbers
        versions = [group.version(n) for n in range(len(group))] if revalidate else []
        columns = FeatureColumns(
            np.array(numbers, np.intp)[group.numbers], group.layouts, group.which, group.values,
            versions,
        )  # fmt: skip

        def read(features: FeatureColumns, upload: Upload) -> list[int]:
            progress = task.begin_many(features.numbers)
            try:
                damaged = self._read_segments(group, features, upload, progress)
            finally:
                task.end()
            self._keep_on_host(features, upload, damaged)
            return damaged

        found = set(columns.numbers)
        for _, damaged in self._read(columns, task, read, is_read=True):
            found.difference_update(damaged)
        return [number for number in numbers if number not in found]

    def _read_segments(
        self,
        group: PackedGroup,
        features: FeatureColumns,
        upload: Upload,
        progress: Progress,
    ) -> list[int]:
        """Read features into their buffers; the entries of those that are damaged."""
        memory, offsets = memory_of(upload, len(features.numbers))
        bad: list[int] = []
        whole = offsets >= 0
        if memory is not None and whole.any():
            at = np.flatnonzero(whole)
            found = group.read(features.at[at], memory, offsets[at], progress)
            bad += at[found].tolist()
        for n in np.flatnonzero(~whole).tolist():
            progress.restart([n])
            if not group.read_one(int(features.at[n]), upload.buffers(n)):
                bad.append(n)
        for n in bad:
            group.mark_damaged(int(features.at[n]))
        return [features.numbers[n] for n in bad]

    def _read(
        self, columns: FeatureColumns, task: ReadTask, fill: Fill, *, is_read: bool
    ) -> Iterator[tuple[FeatureColumns, list[int]]]:
        """Read features a part at a time.

        Yields what of each part is ready, and the entries that are LOADING again, since they have
        to be read from elsewhere.
        """
        choice, each = self._choose_page_bytes(columns)
        part = (np.cumsum(columns.spans) - columns.spans) // max(1, self._upload_bytes)
        for number in sorted(set(part.tolist())):
            some = columns.only(part == number)
            placed, pages, failed = self._loads.place(task, some, choice, each)
            with trace("gpucache::upload"):
                upload = self._backend.upload(pages)
                damaged = fill(placed, upload)
                upload.finish()
            ready = placed.without(damaged) if damaged else placed
            self._loads.restart(damaged)
            natively = len(ready.numbers) if is_read and native.is_native() else 0
            self._loads.complete(task.left, ready, failed, natively, read=is_read)
            yield ready, damaged

    def _choose_page_bytes(self, columns: FeatureColumns) -> tuple[int, float]:
        """The page size that suits these features, and their mean number of pages; 0 for none."""
        limit = self._loads.page_limit()
        spans = columns.spans.tolist()
        if limit == 0 or not any(spans):
            return (0 if limit == 0 else self._page_bytes or 0), 0.0
        page_bytes = self._page_bytes or choose_page_bytes(spans)
        return page_bytes, pages_per_file(spans, (), 0, page_bytes)

    # The host

    def _keep_on_host(
        self, features: FeatureColumns, upload: Upload, damaged: Sequence[int]
    ) -> None:
        memory, offsets = upload.memory()
        if self._host is not None and memory is not None:
            layouts, which = features.layouts()
            good = np.array([number not in damaged for number in features.numbers], np.bool_)
            self.keep_on_host(
                np.array(features.numbers, np.intp), [layouts[n] for n in which.tolist()],
                features.values() or [()] * len(which), features.versions, memory, offsets, good,
            )  # fmt: skip

    def keep_on_host(
        self,
        numbers: Numbers,
        layouts: Sequence[Layout],
        values: Sequence[tuple[object, ...]],
        versions: Sequence[bytes | None],
        memory: memoryview,
        offsets: Numbers,
        good: npt.NDArray[np.bool_],
    ) -> npt.NDArray[np.bool_]:
        """Have host memory keep those of these features that the device does not.

        Args:
            numbers: of their entries.
            layouts: of the features.
            values: their plain values.
            versions: of their files; empty if these are not looked at.
            memory: where they are.
            offsets: where each begins.
            good: which of them could be read.

        Returns:
            Which of them a tier in memory keeps.
        """
        cached, evicted = self._loads.are_cached(numbers)
        kept = cached & ~evicted
        if self._host is None:
            return kept
        wanted = np.flatnonzero(~kept & good)
        at = wanted.tolist()
        self._host.keep(
            numbers[wanted], [layouts[n] for n in at], [values[n] for n in at],
            [versions[n] for n in at] if versions else [],
            partial(_copy, [layouts[n].span for n in at], memory, offsets[wanted]),
            self._backend.page_bytes, evict=self._loads.may_evict(numbers.tolist()),
        )  # fmt: skip
        return kept | self._host.are_here(numbers)


def memory_of(upload: Upload, count: int) -> tuple[memoryview | None, Numbers]:
    """`upload.memory()`, with a place for each of `count` features also where there is none."""
    memory, offsets = upload.memory()
    return memory, np.full(count, -1, np.int64) if memory is None else offsets


def _copy(
    spans: Sequence[int],
    source: memoryview,
    sources: Numbers,
    positions: Sequence[int],
    target: memoryview,
    offsets: Numbers,
) -> None:
    """Copy those of the features at `sources` that have these positions to `offsets`."""
    at = np.array(positions, np.intp)
    sizes = np.array(spans, np.int64)[at]
    moves = np.stack([sources[at], offsets, sizes], axis=1)
    native.copy(source, np.frombuffer(target, np.uint8), moves)
