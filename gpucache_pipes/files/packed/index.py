"""Which record of which segment a name has, for any number of segments."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gpucache_pipes.files.packed.segment import Record, Segment

UNCHECKED, CURRENT, STALE = 0, 1, 2
"""What is known of a record: nothing, that its file is as it was packed, or that it must not be
used: the file has changed, or the record is damaged."""

Positions = npt.NDArray[np.int64]


class Index:
    """Finds records by the hashes of names. Takes 73 bytes of host memory a file, all in all.

    It does not change, but for `states`: threads may set items of that without a lock. Of several
    records of one name the last segment's is found.

    Args:
        segments: from the oldest to the newest.
        before: an index over some of them, whose states are carried over.

    Attributes:
        segments: see above.
        versions: of all records, int64 [n, 2].
        states: of all records, uint8.
    """

    def __init__(self, segments: Sequence[Segment] = (), before: "Index | None" = None) -> None:
        self.segments = list(segments)
        none = np.empty((0, 2), np.int64)
        self._bounds = np.cumsum([0, *[len(segment) for segment in segments]], dtype=np.int64)
        self.versions: npt.NDArray[np.int64] = np.concatenate(
            [none, *[segment.versions for segment in segments]]
        )
        hashes = np.concatenate([none.view(np.uint64), *[one.hashes for one in segments]])
        # Stable, and from the newest on: the first of equal hashes is the newest.
        order = np.argsort(hashes[::-1, 0], kind="stable")
        self._order = len(hashes) - 1 - order
        self._first = hashes[self._order, 0]
        self._second = hashes[:, 1]
        self.states = np.zeros(len(hashes), np.uint8)
        for segment, begin, end in self._parts():  # which need no arrays of their own any more
            segment.hashes, segment.versions = hashes[begin:end], self.versions[begin:end]
        if before is not None:
            slices = {segment: before.states[begin:end] for segment, begin, end in before._parts()}
            for segment, begin, end in self._parts():
                if segment in slices:
                    self.states[begin:end] = slices[segment]

        self.carry_over()

    def mark_stale(self, position: int) -> None:
        """A record must not be used, neither by this index nor by those that follow."""
        [number], [row] = self.locate(np.array([position]))
        self.segments[number].stale.add(row)
        self.states[position] = STALE

    def mark_current(self, segment: Segment) -> None:
        """The files of all records of a segment are known to be those that were packed."""
        for other, begin, end in self._parts():
            if other is segment:
                states = self.states[begin:end]
                states[states == UNCHECKED] = CURRENT

    def forget(self, hashes: npt.NDArray[np.uint64] | None) -> None:
        """It is not known any more whether these records are current; None is all."""
        at = np.arange(len(self)) if hashes is None else self.find(hashes)
        at = at[at >= 0]
        self.states[at[self.states[at] == CURRENT]] = UNCHECKED

    def carry_over(self) -> None:
        """Note what other indices have been told of records that must not be used."""
        for segment, begin, _ in self._parts():
            for row in segment.stale.copy():
                self.states[begin + row] = STALE

    def _parts(self) -> list[tuple[Segment, int, int]]:
        bounds = self._bounds.tolist()
        return list(zip(self.segments, bounds, bounds[1:], strict=False))

    def __len__(self) -> int:
        return len(self.states)

    def find(self, hashes: npt.NDArray[np.uint64]) -> Positions:
        """The positions of the records of names, -1 for those that there are not."""
        if not len(self._first):
            return np.full(len(hashes), -1, np.int64)
        at = np.searchsorted(self._first, hashes[:, 0])
        at[at == len(self._first)] = 0
        found = self._order[at]
        same = (self._first[at] == hashes[:, 0]) & (self._second[found] == hashes[:, 1])
        return np.where(same, found, -1)

    def has(
        self, hashes: npt.NDArray[np.uint64], versions: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.bool_]:
        """Whether there are records of these names and versions that can be used."""
        found = self.find(hashes)
        if not len(self):
            return found >= 0
        same = (self.versions[found] == versions).all(axis=1)
        usable: npt.NDArray[np.bool_] = same & (found >= 0) & (self.states[found] != STALE)
        return usable

    def locate(self, positions: Positions) -> tuple[list[int], list[int]]:
        """The numbers of the segments of these records, and their rows."""
        numbers, rows = self.places(positions)
        return numbers.tolist(), rows.tolist()

    def places(self, positions: Positions) -> tuple[Positions, Positions]:
        """The same as arrays."""
        numbers = np.searchsorted(self._bounds, positions, side="right") - 1
        return numbers, positions - self._bounds[numbers]

    def record(self, position: int) -> tuple[Segment, Record]:
        """The segment of a record, and where it is in it. Raises DamagedSegmentError."""
        [number], [row] = self.locate(np.array([position]))
        segment = self.segments[number]
        return segment, segment.record(row)
