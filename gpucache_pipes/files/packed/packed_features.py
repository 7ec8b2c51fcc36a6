"""Opens features in packed segments, many in one go."""

import io
import os
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from gpucache_pipes.files.chunks import ScratchFeature
from gpucache_pipes.files.layout import Layout
from gpucache_pipes.files.packed import native
from gpucache_pipes.files.packed.index import Index, Positions
from gpucache_pipes.files.packed.packed_group import MOST_BYTES
from gpucache_pipes.files.packed.segment import DamagedSegmentError, Record
from gpucache_pipes.files.packed.segment_files import SegmentFiles
from gpucache_pipes.files.planned import cut, fill
from gpucache_pipes.files.plans import Extent, ReadPlan
from gpucache_pipes.files.scratch import SCRATCH_BYTES, borrow
from gpucache_pipes.files.selection import Selection
from gpucache_pipes.files.source import OpenFeature, Progress, VersionedFeature

_WHOLE = MOST_BYTES
"""Bytes of a record that is read into scratch memory. Larger ones are read to their places."""

_PIECE = 256 << 10
_ALIGNMENT = 64
_MAX_KNOWN = 1 << 14


class PackedFeatures:
    """Opens records of an index as features.

    Args:
        files: the open segments.
        selection: what is kept of each feature; None is all.
    """

    def __init__(self, files: SegmentFiles, selection: Selection | None = None) -> None:
        self._files = files
        self._selection = selection
        # By layout, which is kept with it. Single operations are atomic.
        self._plans: dict[int, tuple[Layout, ReadPlan]] = {}

    def open(
        self,
        index: Index,
        position: int,
        version: Callable[[], bytes | None],
        again: Callable[[], OpenFeature],
    ) -> "PackedFeature":
        """Open one record.

        Args:
            index: has it.
            position: of the record.
            version: gives that of its file, see VersionedFeature.
            again: opens the feature elsewhere, if the record turns out to be damaged.

        Raises:
            DamagedSegmentError, OSError: it cannot be read.
            ValueError: the selection needs what the feature lacks.
        """
        segment, record = index.record(position)
        file = self._files.file(segment)
        plan, values = self._plan(record)

        def damaged() -> OpenFeature:
            index.mark_stale(position)
            return again()

        return PackedFeature(plan, values, file, record, version, damaged)

    def open_many(
        self,
        index: Index,
        positions: Positions,
        version: Callable[[int], bytes | None],
        again: Callable[[int], OpenFeature],
        progress: Progress,
        numbers: Sequence[int],
    ) -> "list[VersionedFeature | None]":
        """Open the first of these records.

        Args:
            index: has them.
            positions: of the records.
            version: `version(n)` gives the version of the n-th file, see VersionedFeature.
            again: `again(n)` opens the n-th feature elsewhere, if its record is damaged.
            progress: to be kept up to date.
            numbers: of the files, by which `progress` knows them.

        Returns:
            What was opened, in order; None for records that cannot be read, which are STALE then,
            and for those that lack what the selection needs.
        """
        features: list[VersionedFeature | None] = []
        scratch = _Records(version)
        held: list[tuple[io.FileIO, Record, int]] = []
        used = 0
        segments, rows = index.locate(positions)
        for n, (number, row) in enumerate(zip(segments, rows, strict=True)):
            try:
                record = index.segments[number].record(row)
                file = self._files.file(index.segments[number])
            except (OSError, DamagedSegmentError) as error:
                if not isinstance(error, OSError) or isinstance(error, FileNotFoundError):
                    index.mark_stale(int(positions[n]))
                features.append(None)
                continue
            try:
                plan, values = self._plan(record)
            except ValueError:
                features.append(None)  # `open` says what is wrong
                continue
            if record.nbytes > _WHOLE:
                one = partial(self._again, index, positions, again, n)
                features.append(PackedFeature(plan, values, file, record, partial(version, n), one))
                continue
            if used + record.nbytes > SCRATCH_BYTES:
                break
            scratch.add(used, record.nbytes, n)
            features.append(
                ScratchFeature(plan, values, scratch, len(held), record.nbytes,
                               scratch.native is not None)
            )  # fmt: skip
            held.append((file, record, n))
            used += -(-record.nbytes // _ALIGNMENT) * _ALIGNMENT
        good = self._read(scratch, held, progress, numbers)
        for is_good, (_, _, n) in zip(good, held, strict=True):
            if is_good is None:  # the call has ended early
                return features[:n]
            if not is_good:
                index.mark_stale(int(positions[n]))
                features[n] = None
        return features

    def _again(
        self, index: Index, positions: Positions, again: Callable[[int], OpenFeature], n: int
    ) -> OpenFeature:
        index.mark_stale(int(positions[n]))
        return again(n)

    def _read(
        self,
        scratch: "_Records",
        held: Sequence[tuple[io.FileIO, Record, int]],
        progress: Progress,
        numbers: Sequence[int],
    ) -> list[bool | None]:
        """Whether each of these records is in scratch memory, and as it was written.

        None where that is not known, since the call ended early.
        """
        if not held:
            return []
        table = np.array(
            [
                (file.fileno(), record.start, record.nbytes, start, 0)
                for (file, record, _), start in zip(held, scratch.starts, strict=True)
            ],
            np.int64,
        )
        order = np.lexsort((table[:, native.START], table[:, native.DESCRIPTOR]))
        table = table[order]  # as they are on the disk
        progress.restart([numbers[held[k][2]] for k in order.tolist()])
        done = native.read(table, scratch.memory, progress)
        whole = (table[:done, native.GOT] == table[:done, native.COUNT]).tolist()
        good: list[bool | None] = [None] * len(held)
        for k, is_whole in zip(order[:done].tolist(), whole, strict=True):
            good[k] = is_whole and zlib.crc32(scratch.data(k)) == held[k][1].checksum
        return good

    def _plan(self, record: Record) -> tuple[ReadPlan, tuple[Any, ...]]:
        """The read plan of a record, and the plain values that are kept of it.

        Raises ValueError as Selection does.
        """
        layout = record.layout
        known = self._plans.get(id(layout))
        if known is None or known[0] is not layout:
            # The values of the plan are the positions of those that are kept.
            positions = tuple(range(layout.plain))
            extents: tuple[Extent, ...]
            if self._selection is None:
                extents = (Extent(0, 0, layout.span),) if layout.span else ()
                plan = ReadPlan(layout, positions, extents, ())
            else:
                extents = tuple([
                    Extent(leaf.offset, leaf.offset, leaf.nbytes)
                    for leaf in layout.leaves if leaf.nbytes
                ])  # fmt: skip
                plan = self._selection.plan(ReadPlan(layout, positions, extents, ()))
            if len(self._plans) >= _MAX_KNOWN:
                self._plans.clear()
            known = self._plans[id(layout)] = layout, plan
        plan = known[1]
        if not plan.values:
            return plan, ()
        return plan, tuple([record.values[position] for position in plan.values])


class PackedFeature:
    """An OpenFeature in a segment, which is read to its place.

    Args:
        plan: where its leaves are in the record.
        values: see OpenFeature.
        file: the segment.
        record: where it is in it.
        version: gives that of the file that was packed.
        damaged: opens the feature elsewhere; called if the record is not as it was written.
    """

    def __init__(
        self,
        plan: ReadPlan,
        values: tuple[Any, ...],
        file: io.FileIO,
        record: Record,
        version: Callable[[], bytes | None],
        damaged: Callable[[], OpenFeature],
    ) -> None:
        self.layout = plan.layout
        self.values = values
        self.bytes_read = record.nbytes
        self._plan = plan
        self._file = file
        self._record = record
        self._version = version
        self._damaged = damaged

    @property
    def version(self) -> bytes | None:
        """See VersionedFeature."""
        return self._version()

    def read_into(self, buffers: Sequence[memoryview]) -> None:
        """See OpenFeature. Raises OSError, or what opening the feature elsewhere raises."""
        if self.layout is self._record.layout:
            if self._read(cut(buffers, 0, self.layout.span)):
                return
        else:
            held = memoryview(bytearray(self._record.nbytes))
            if self._read([held]):
                fill(self._plan, held, buffers)
                return
        other = self._damaged()
        try:
            if other.layout is not self.layout or other.values != self.values:
                raise OSError("its record is damaged, and the file has changed: request it again")
            other.read_into(buffers)
        finally:
            other.close()

    def _read(self, parts: Sequence[memoryview]) -> bool:
        """Read the record from its beginning on. Whether it is as it was written."""
        start, checksum = self._record.start, 0
        for part in parts:
            for at in range(0, len(part), _PIECE):  # which is in the processor's cache afterwards
                piece = part[at : at + _PIECE]
                while piece:
                    count = os.preadv(self._file.fileno(), [piece], start)
                    if not count:
                        return False
                    checksum = zlib.crc32(piece[:count], checksum)
                    piece, start = piece[count:], start + count
        filling = self._record.start + self._record.nbytes - start
        return zlib.crc32(bytes(filling), checksum) == self._record.checksum

    def close(self) -> None:
        """See OpenFeature. The segment stays open for others."""


class _Records:
    """The records of one call, in scratch memory: see Scratch."""

    def __init__(self, version: Callable[[int], bytes | None]) -> None:
        self.native = native.native
        self.memory = borrow(self)
        self.starts: list[int] = []
        self._sizes: list[int] = []
        self._numbers: list[int] = []
        self._version = version

    def add(self, start: int, nbytes: int, number: int) -> None:
        self.starts.append(start)
        self._sizes.append(nbytes)
        self._numbers.append(number)

    def data(self, number: int) -> memoryview:
        """See Scratch."""
        start = self.starts[number]
        return self.memory.data[start : start + self._sizes[number]]

    def version(self, number: int) -> bytes | None:
        """See Scratch."""
        return self._version(self._numbers[number])

    def file_version(self, number: int) -> tuple[int, int] | None:
        """See Scratch. It need not be packed again."""
        return None
