"""The requests that a pipeline has announced, and how far it has followed them."""

from array import array
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BLOCK = 1024
"""Positions for each byte of the coarse index of marks."""


class AccessPlan:
    """The announced requests of one pipeline, and the pipeline's position in them.

    The plan answers when a key is requested next. It takes 9 bytes for each request and 4 for each
    file: the sequence, the next position of the same key, and a mark. Following a batch that
    is requested as announced costs one comparison of arrays. A pipeline that omits or delays
    requests is followed key by key.

    A policy may mark positions at which cached keys are requested next; `farthest` finds the last
    one. The plan does not interpret the marks.

        >>> plan = AccessPlan([3, 1, 2, 3], left=3)
        >>> plan.next_use(3), plan.next_use(2)
        (0, 2)
        >>> plan.follow([3, 1])
        True
        >>> plan.position, plan.next_use(3)
        (2, 3)
        >>> plan.next_use(1) == plan.end  # not announced again
        True

    Args:
        keys: the keys that the pipeline will request, in order.
        left: how many of these belong to the current epoch; the rest belong to the next one. None
            means all.

    Raises:
        ValueError: `left` is not between 0 and the number of keys, or a key is negative.

    Attributes:
        keys: the announced sequence.
        end: the number of announced requests. As a next use it means that none is known.
        left: as given.
        last_repeated: the last position whose key is requested again later, or -1.
        drops_keys: whether the next epoch is announced, and lacks keys of this one.
        position: one past the farthest announced request that the pipeline has made.
        unannounced: unannounced requests minus announced ones; negative while the plan holds.
    """

    # Single items are read from arrays of the module `array`, which is several times as fast as
    # from NumPy's; `_view` gives NumPy the same memory.

    def __init__(
        self, keys: "Iterable[int] | NDArray[np.integer]", left: int | None = None
    ) -> None:
        if isinstance(keys, np.ndarray):
            self.keys = array("i", keys.astype(np.intc).tobytes())
        else:
            self.keys = keys if isinstance(keys, array) else array("i", keys)
        sequence = _view(self.keys)
        self.end = len(sequence)
        self.left = self.end if left is None else left
        if not 0 <= self.left <= self.end:
            raise ValueError(f"left={left} must be between 0 and {self.end}, the number of keys")
        if (least := int(sequence.min(initial=0))) < 0:
            raise ValueError(f"key {least} is negative; keys are file numbers from 0 on")
        self.position = 0
        self.unannounced = 0
        # The largest distance seen between a request and `position`: 0 while requests are made in
        # the announced order. An announced request that lies farther behind is taken as omitted.
        self._max_displacement = 0
        # By key: a lower bound of its next use, advanced when `next_use` is called. By position:
        # the next position of the same key.
        self._next_by_key = array("i", [self.end]) * (int(sequence.max(initial=-1)) + 1)
        self._next_by_position = array("i", bytes(sequence.nbytes))
        self._link(self.left, self.end)
        self._link(0, self.left)
        (repeated,) = np.nonzero(_view(self._next_by_position) < self.end)
        self.last_repeated = int(repeated[-1]) if len(repeated) else -1
        recurring = int(np.searchsorted(repeated, self.left))
        self.drops_keys = self.left < self.end and recurring < self.left
        # By position: 1 if it is marked. By block of positions: 0 if it has no marks. Both have
        # room for `end`, the next use of keys that have none, which is never marked.
        self._marks = bytearray(self.end + 1)
        self._blocks = bytearray(b"\1") * (self.end // _BLOCK + 1)
        _view(self._marks, np.uint8)[_view(self._next_by_key)] = 1
        self._marks[self.end] = 0
        # `mark_next_uses` has processed the requests before this position.
        self._marked_before = 0

    def _link(self, begin: int, end: int) -> None:
        """Find the next position of the same key, for each position from `begin` to `end`.

        Moves `_next_by_key` from `end` to `begin`; the positions after `end` must be linked.
        """
        keys, first = _view(self.keys)[begin:end], _view(self._next_by_key)
        following = _view(self._next_by_position)[begin:end]
        positions = np.arange(begin, end, dtype=np.intc)
        following[:] = first[keys]
        first[keys[::-1]] = positions[::-1]  # of equal keys the first one counts
        if (first[keys] != positions).any():  # keys repeat; sorting them takes most of the time
            order = np.argsort(keys, kind="stable")
            (again,) = np.nonzero(keys[order[1:]] == keys[order[:-1]])
            following[order[again]] = positions[order[again + 1]]

    def follow(self, keys: Sequence[int]) -> bool:
        """Note that the pipeline has requested `keys`, in this order.

        Returns whether these were exactly the next announced requests.
        """
        begin = self.position
        end = begin + len(keys)
        if not self._max_displacement and self.keys[begin:end] == array("i", keys):
            self.position = end
            self.unannounced -= len(keys)
            return True
        for key in keys:
            position = self.next_use(key)
            if position == self.end or position >= self.left >= self.position:
                # Not announced for this epoch. Once the pipeline has passed the end of the plan,
                # its requests do not count as unannounced: the plan says nothing about them.
                self.unannounced += self.position < self.end
                continue
            self.unannounced -= 1
            self._next_by_key[key] = self._next_by_position[position]
            if position != self.position:
                # The requests between the two positions were omitted, or are made later.
                self._max_displacement = max(self._max_displacement, abs(position - self.position))
            self.position = max(self.position, position + 1)
        return False

    def next_use(self, key: int) -> int:
        """The position at which `key` is requested next, or `end` if none is known."""
        if key >= len(self._next_by_key):
            return self.end
        position = self._next_by_key[key]
        earliest = self.position - self._max_displacement
        if position < earliest:
            following = self._next_by_position
            while position < earliest:
                position = following[position]
            self._next_by_key[key] = position
        return position

    def split(self, keys: Collection[int]) -> tuple[list[int], list[int]]:
        """The ones among `keys` that the plan has, and the others.

        Some of the first may have no next use any more.
        """
        given, first = np.fromiter(keys, np.intc, len(keys)), _view(self._next_by_key)
        announced = given < len(first)
        announced[announced] = first[given[announced]] < self.end
        return given[announced].tolist(), given[~announced].tolist()

    def mark_next_uses(self) -> list[int]:
        """Mark the next uses of the keys at the positions passed since the last call.

        Returns the keys among these that have no next use, in the order of their requests.
        """
        if self._marked_before == self.position:
            return []
        passed = slice(self._marked_before, self.position)
        self._marked_before = self.position
        following = _view(self._next_by_position)[passed]
        self._mark_all(following)
        last_uses: list[int] = _view(self.keys)[passed][following == self.end].tolist()
        return last_uses

    def _mark_all(self, positions: NDArray[np.intc]) -> None:
        _view(self._marks, np.uint8)[positions] = 1
        self._marks[self.end] = 0
        _view(self._blocks, np.uint8)[positions // _BLOCK] = 1

    def mark(self, position: int) -> None:
        """Mark a position, so that `farthest` finds it."""
        self._marks[position] = 1
        self._blocks[position // _BLOCK] = 1

    def unmark(self, position: int) -> None:
        """Remove the mark of a position, if it has one."""
        self._marks[position] = 0

    def farthest(self) -> int:
        """The last marked position, or -1. Searches bytes by blocks: well under a microsecond."""
        while (block := self._blocks.rfind(1)) >= 0:
            position = self._marks.rfind(1, block * _BLOCK, (block + 1) * _BLOCK)
            if position >= 0:
                return position
            self._blocks[block] = 0
        return -1


def _view(values: "array[int] | bytearray", dtype: type = np.intc) -> NDArray[Any]:
    """A NumPy array over the same memory."""
    return np.frombuffer(values, dtype)
