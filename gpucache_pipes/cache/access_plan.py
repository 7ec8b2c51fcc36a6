"""What a pipeline will request, and when it comes to each file."""

from array import array
from collections import deque
from collections.abc import Container, Iterable, Sequence
from itertools import compress, repeat

_BLOCK = 1024


class AccessPlan:
    """The requests that one pipeline has announced, and how far it has come.

    Takes 9 bytes for each request and 4 for each file: the sequence, for each position the next
    one of the same key, and a mark. Following a pipeline that does as announced is one comparison
    of arrays for a batch; one that leaves requests out, or comes to them later, is followed key
    by key.

    Args:
        keys: what it will request, in order.
        left: how many of these belong to the epoch that is under way; None is all.

    Raises:
        ValueError: `left` is not from 0 to the number of keys, or a key is negative.

    Attributes:
        end: one past the last position; as a next use: none is known.
        position: one past the farthest request that has come true.
        left: as given.
        unannounced: requests that were not announced, less those that were.
    """

    def __init__(self, keys: Iterable[int], left: int | None = None) -> None:
        self.keys = keys if isinstance(keys, array) else array("i", keys)
        self.end = len(self.keys)
        self.left = self.end if left is None else left
        if not 0 <= self.left <= self.end:
            raise ValueError(f"left={left} must be from 0 to {self.end}, the number of keys")
        if min(self.keys, default=0) < 0:
            raise ValueError(f"{min(self.keys)} is no key: keys are numbers from 0 on")
        self.position = 0
        self.unannounced = 0
        # How far from `position` a request has come at most: what lies farther behind and has
        # not come true will not.
        self._late = 0
        # By key: where it comes first, as far as anybody has looked. By position: where the
        # same key comes next.
        self._first = array("i", [self.end]) * (max(self.keys, default=-1) + 1)
        self._after = array("i")
        for begin, end in ((self.left, self.end), (0, self.left)):
            self._after = self._next_uses(begin, end) + self._after
        # Positions at which cached keys may be waited for, and blocks that may have some. One
        # more for the first use of keys that have none.
        self._marks = bytearray(self.end + 1)
        self._blocks = bytearray(b"\1") * (self.end // _BLOCK + 1)
        _set_all(self._marks, self._first, repeat(1))
        self._marks[self.end] = 0
        # Up to where `moved` has marked what comes after.
        self._marked = 0

    def _next_uses(self, begin: int, end: int) -> "array[int]":
        """For these positions the next ones of their keys, where all behind them are in _first."""
        keys, first = self.keys[begin:end].tolist(), self._first
        seen = bytearray(len(first))
        _set_all(seen, keys, repeat(1))
        if seen.count(1) == len(keys):  # each file once: no step of Python for each of them
            after = array("i", map(first.__getitem__, keys))
            _set_all(first, keys, range(begin, end))
            return after
        after = array("i", bytes(4 * len(keys)))
        for at in range(len(keys) - 1, -1, -1):
            key = keys[at]
            after[at] = first[key]
            first[key] = begin + at
        return after

    def follow(self, keys: Sequence[int]) -> bool:
        """These have been requested. Returns whether just these were to come next."""
        begin = self.position
        end = begin + len(keys)
        if not self._late and self.keys[begin:end] == array("i", keys):
            self.position = end
            self.unannounced -= len(keys)
            return True
        for key in keys:
            position = self.next_use(key)
            if position == self.end or position >= self.left >= self.position:
                # Not announced for this epoch; or after all, about which nothing was said.
                self.unannounced += self.position < self.end
                continue
            self.unannounced -= 1
            self._first[key] = self._after[position]
            if position != self.position:
                # What lies between was left out, or comes later.
                self._late = max(self._late, abs(position - self.position))
            self.position = max(self.position, position + 1)
        return False

    def next_use(self, key: int) -> int:
        """The position at which `key` is requested next, or `end`."""
        if key >= len(self._first):
            return self.end
        position = self._first[key]
        passed = self.position - self._late
        if position < passed:
            after = self._after
            while position < passed:
                position = after[position]
            self._first[key] = position
        return position

    def mark_moved(self, cached: Container[int]) -> Sequence[int]:
        """Mark the next uses of `cached` keys that were requested as expected since the last time.

        Returns those that have none.
        """
        begin, end = self._marked, self.position
        if begin == end:
            return ()
        self._marked = end
        keys, after = self.keys[begin:end], self._after[begin:end]
        there = list(compress(after, map(cached.__contains__, keys)))
        self._mark_all(there)
        if self.end not in there:
            return ()
        return [k for k, at in zip(keys, after, strict=True) if at == self.end and k in cached]

    def _mark_all(self, positions: Sequence[int]) -> None:
        _set_all(self._marks, positions, repeat(1))
        self._marks[self.end] = 0
        for block in {position // _BLOCK for position in positions}:
            self._blocks[block] = 1

    def mark(self, position: int) -> None:
        """Let `farthest` find this position."""
        self._marks[position] = 1
        self._blocks[position // _BLOCK] = 1

    def unmark(self, position: int) -> None:
        """The opposite."""
        self._marks[position] = 0

    def farthest(self) -> int:
        """The last marked position, or -1. Searches bytes by blocks: well under a microsecond."""
        while (block := self._blocks.rfind(1)) >= 0:
            position = self._marks.rfind(1, block * _BLOCK, (block + 1) * _BLOCK)
            if position >= 0:
                return position
            self._blocks[block] = 0
        return -1


def _set_all(
    target: "array[int] | bytearray", positions: Iterable[int], values: Iterable[int]
) -> None:
    """target[position] = value, for all of them."""
    deque(map(target.__setitem__, positions, values), maxlen=0)
