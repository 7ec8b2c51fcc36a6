"""Many features of packed segments, in columns: no Python for each of them."""

import io
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gpucache_pipes.files.layout import Layout
from gpucache_pipes.files.packed import native
from gpucache_pipes.files.packed.index import Index, Positions
from gpucache_pipes.files.packed.segment import DamagedSegmentError, Records
from gpucache_pipes.files.packed.segment_files import SegmentFiles
from gpucache_pipes.files.source import Progress

MOST_BYTES = 1 << 20
"""Of a record in a group. Reading a larger one takes longer than the Python code for it, several
readers can do it, and its checksum is computed piece by piece, while that is in the cache."""


class PackedGroup:
    """Those of some files that are in segments, but for large ones. See `Source.open_group`.

    Args:
        index: has the records.
        files: the open segments.
        positions: of the records in `index`.
        numbers: which of the files each is.
        version: `version(n)` gives the version of the n-th file, see VersionedFeature.
        damaged: called with the number of a file whose record is damaged.

    Attributes:
        numbers: which of the files are in the group. Records that cannot be read are left out.
        layouts: different layouts.
        which: which of them each feature has.
        values: the plain values of each feature; empty if none has any.
    """

    def __init__(
        self,
        index: Index,
        files: SegmentFiles,
        positions: Positions,
        numbers: Sequence[int],
        version: Callable[[int], bytes | None],
        damaged: Callable[[int], None],
    ) -> None:
        self._index = index
        self._version = version
        self._damaged = damaged
        segments, rows = index.places(positions)
        parts: list[tuple[npt.NDArray[np.intp], io.FileIO, Records]] = []
        for segment in np.flatnonzero(np.bincount(segments)).tolist():
            at = np.flatnonzero(segments == segment)
            try:
                found = index.segments[segment].records(rows[at])
                parts.append((at, files.file(index.segments[segment]), found))
            except (OSError, DamagedSegmentError):
                continue  # each of them says what is wrong when it is opened by itself
        none = np.empty(0, np.int64)
        taken = np.concatenate([none, *[at for at, _, _ in parts]])
        sizes = np.concatenate([none, *[found.nbytes for _, _, found in parts]])
        order = np.argsort(taken, kind="stable")
        order = order[sizes[order] <= MOST_BYTES]

        def column(arrays: list[npt.NDArray[Any]]) -> npt.NDArray[np.int64]:
            joined = np.concatenate([none, *arrays])[order]
            return joined.astype(np.int64, copy=False)

        self._positions = positions[taken[order]]
        self.numbers = [numbers[n] for n in taken[order].tolist()]
        self._held = [file for _, file, _ in parts]  # open as long as the group lives
        self._table = np.zeros((len(order), native.COLUMNS), np.int64)
        self._table[:, native.DESCRIPTOR] = column(
            [np.full(len(at), file.fileno()) for at, file, _ in parts]
        )
        self._table[:, native.START] = column([found.starts for _, _, found in parts])
        self._table[:, native.COUNT] = column([found.nbytes for _, _, found in parts])
        self._checksums = column([found.checksums for _, _, found in parts])
        self.layouts: list[Layout] = []
        which = []
        for _, _, found in parts:
            which.append(found.which + len(self.layouts))
            self.layouts += found.layouts
        self.which: npt.NDArray[np.int64] = column(which)
        self.values: list[tuple[Any, ...]] = []
        if any(found.values for _, _, found in parts):
            values = [value for at, _, found in parts for value in found.values or [()] * len(at)]
            self.values = [values[n] for n in order.tolist()]

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def nbytes(self) -> npt.NDArray[np.int64]:
        """The bytes of each record."""
        sizes: npt.NDArray[np.int64] = self._table[:, native.COUNT]
        return sizes

    def version(self, n: int) -> bytes | None:
        """The version of the file of the n-th feature."""
        return self._version(self.numbers[n])

    def read(
        self,
        at: npt.NDArray[np.intp],
        memory: memoryview,
        offsets: npt.NDArray[np.int64],
        progress: Progress,
    ) -> list[int]:
        """Read features to their places in memory, without the interpreter lock.

        Args:
            at: which of the features, each once.
            memory: writable. It is written beyond the feature, up to a multiple of 16 bytes.
            offsets: where they go.
            progress: is kept up to date, by positions in `at`.

        Returns:
            The positions in `at` of those that are not as they were written.

        Raises:
            RuntimeError: `progress` says to stop.
        """
        table = self._table[at]
        table[:, native.PLACE] = offsets
        order = np.lexsort((table[:, native.START], table[:, native.DESCRIPTOR]))
        table = table[order]  # as they are on the disk
        target = np.frombuffer(memory, np.uint8)
        done = 0
        while done < len(table):
            progress.restart(order[done:].tolist())
            more = native.read(table[done:], target, progress)
            if not more and progress.stopped:
                raise RuntimeError("the store was closed")
            done += more
        whole = table[:, native.GOT] == table[:, native.COUNT]
        expected = self._checksums[at[order]].tolist()
        bad = []
        places = zip(
            order.tolist(), whole.tolist(), table[:, native.PLACE].tolist(),
            table[:, native.COUNT].tolist(), expected, strict=True,
        )  # fmt: skip
        for position, is_whole, start, nbytes, checksum in places:
            if not is_whole or zlib.crc32(memory[start : start + nbytes]) != checksum:
                bad.append(position)
        return bad

    def read_one(self, n: int, buffers: Sequence[memoryview]) -> bool:
        """Read one feature into buffers. Whether it is as it was written."""
        descriptor, start, nbytes = self._table[n, : native.PLACE].tolist()
        data = bytearray(nbytes)
        table = np.array([[descriptor, start, nbytes, 0, 0]], np.int64)
        native.read(table, np.frombuffer(data, np.uint8), Progress())
        if table[0, native.GOT] != nbytes or zlib.crc32(data) != self._checksums[n]:
            return False
        done = 0
        for buffer in buffers:
            part = data[done : done + len(buffer)]
            buffer[: len(part)] = part
            done += len(part)
        return True

    def mark_damaged(self, n: int) -> None:
        """The record of the n-th feature is not as it was written: it is not used any more."""
        self._index.mark_stale(int(self._positions[n]))
        self._damaged(self.numbers[n])
