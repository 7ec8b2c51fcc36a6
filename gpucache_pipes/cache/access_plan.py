"""The requests that a pipeline has announced, and how far it has followed them."""

from array import array
from collections import deque
from collections.abc import Container, Iterable, Sequence
from itertools import compress, repeat

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
        position: one past the farthest announced request that the pipeline has made.
        unannounced: unannounced requests minus announced ones; negative while the plan holds.
    """

    def __init__(self, keys: Iterable[int], left: int | None = None) -> None:
        self.keys = keys if isinstance(keys, array) else array("i", keys)
        self.end = len(self.keys)
        self.left = self.end if left is None else left
        if not 0 <= self.left <= self.end:
            raise ValueError(f"left={left} must be between 0 and {self.end}, the number of keys")
        if min(self.keys, default=0) < 0:
            raise ValueError(f"key {min(self.keys)} is negative; keys are file numbers from 0 on")
        self.position = 0
        self.unannounced = 0
        # The largest distance seen between a request and `position`: 0 while requests are made in
        # the announced order. An announced request that lies farther behind is taken as omitted.
        self._max_displacement = 0
        # By key: a lower bound of its next use, advanced when `next_use` is called. By position:
        # the next position of the same key.
        self._next_by_key = array("i", [self.end]) * (max(self.keys, default=-1) + 1)
        self._next_by_position = array("i")
        for begin, end in ((self.left, self.end), (0, self.left)):
            self._next_by_position = self._link(begin, end) + self._next_by_position
        # By position: 1 if it is marked. By block of positions: 0 if it has no marks. Both have
        # room for `end`, the next use of keys that have none, which is never marked.
        self._marks = bytearray(self.end + 1)
        self._blocks = bytearray(b"\1") * (self.end // _BLOCK + 1)
        _set_all(self._marks, self._next_by_key, repeat(1))
        self._marks[self.end] = 0
        # `mark_next_uses` has processed the requests before this position.
        self._marked_before = 0

    def _link(self, begin: int, end: int) -> "array[int]":
        """The next position of the same key, for each position from `begin` to `end`.

        Advances `_next_by_key` from `end` to `begin`; the positions after `end` must be linked.
        """
        keys, first = self.keys[begin:end].tolist(), self._next_by_key
        seen = bytearray(len(first))
        _set_all(seen, keys, repeat(1))
        if seen.count(1) == len(keys):  # no key repeats: avoids a Python step for each key
            following = array("i", map(first.__getitem__, keys))
            _set_all(first, keys, range(begin, end))
            return following
        following = array("i", bytes(4 * len(keys)))
        for at in range(len(keys) - 1, -1, -1):
            key = keys[at]
            following[at] = first[key]
            first[key] = begin + at
        return following

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

    def mark_next_uses(self, cached: Container[int]) -> Sequence[int]:
        """Mark the next uses of `cached` keys at positions passed since the last call.

        Returns the keys among these that have no next use.
        """
        begin, end = self._marked_before, self.position
        if begin == end:
            return ()
        self._marked_before = end
        keys, following = self.keys[begin:end], self._next_by_position[begin:end]
        next_uses = list(compress(following, map(cached.__contains__, keys)))
        self._mark_all(next_uses)
        if self.end not in next_uses:
            return ()
        return [k for k, at in zip(keys, following, strict=True) if at == self.end and k in cached]

    def _mark_all(self, positions: Sequence[int]) -> None:
        _set_all(self._marks, positions, repeat(1))
        self._marks[self.end] = 0
        for block in {position // _BLOCK for position in positions}:
            self._blocks[block] = 1

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


def _set_all(
    target: "array[int] | bytearray", positions: Iterable[int], values: Iterable[int]
) -> None:
    """`target[position] = value` for each pair, without a Python step for each."""
    deque(map(target.__setitem__, positions, values), maxlen=0)
