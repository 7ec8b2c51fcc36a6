"""Vector clocks: whether one access to device memory is certain to precede another.

The clocks of Lamport (1978) and Mattern (1989), applied to streams. Each stream counts its
operations. An event carries the clock that its stream had when it was recorded, and a stream that
waits for the event joins that clock into its own. Operations that the host has seen to be finished
precede all operations that the host issues afterwards, in any thread.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

Clock = dict[int, int]
"""By number of a stream: how many of its operations are certain to be finished."""

HOST = -1
"""The number that stands for the host instead of a stream."""

Interval = tuple[int, int, int]
"""(memory, start, end): the bytes from start to end, excluding end, of the allocation `memory`."""


class UnorderedAccessError(RuntimeError):
    """Two accesses to the same bytes, at least one of them a write, that nothing orders."""


class Access(NamedTuple):
    """What one operation reads, or what it writes.

    Attributes:
        stream: number of its stream, or HOST.
        nth: count of the operation on that stream, from 1.
        what: name of the operation.
        writes: whether it writes.
        intervals: the bytes.
    """

    stream: int
    nth: int
    what: str
    writes: bool
    intervals: Sequence[Interval]


def join(clock: Clock, other: Clock) -> None:
    """Raise each count of `clock` to that of `other`, in place.

    >>> clock = {0: 3, 1: 5}
    >>> join(clock, {1: 2, 2: 4})
    >>> clock
    {0: 3, 1: 5, 2: 4}
    """
    for stream, count in other.items():
        if count > clock.get(stream, 0):
            clock[stream] = count


class OrderChecker:
    """Records accesses, and rejects one that is not ordered after those it conflicts with.

    Not thread-safe: the caller holds the lock of the simulated device.
    """

    def __init__(self) -> None:
        # By allocation. `forget` removes accesses that the host has seen to be finished.
        self._accesses: dict[int, list[Access]] = {}

    def check(
        self,
        stream: int,
        count: int,
        known: Clock,
        what: str,
        reads: Iterable[Interval],
        writes: Iterable[Interval],
    ) -> None:
        """Record that an operation is issued.

        Args:
            stream: number of its stream, or HOST.
            count: count of the operation on that stream.
            known: clock of the stream: the operations that are certain to precede this one.
            what: name of the operation.
            reads: bytes that it reads.
            writes: bytes that it writes.

        Raises:
            UnorderedAccessError: an earlier access conflicts with this one, and is not in `known`.
                The text names both.
        """
        for intervals, is_write in ((list(reads), False), (list(writes), True)):
            if not intervals:
                continue
            access = Access(stream, count, what, is_write, intervals)
            for earlier in self._conflicting(access):
                if known.get(earlier.stream, 0) < earlier.nth:
                    raise UnorderedAccessError(
                        f"{_describe(access)} is not ordered after {_describe(earlier)}"
                    )
            for memory in {memory for memory, _, _ in intervals}:
                self._accesses.setdefault(memory, []).append(access)

    def forget(self, finished: Clock) -> None:
        """Drop the accesses in `finished`, the clock of the host. Later operations follow them."""
        for memory, accesses in list(self._accesses.items()):
            left = [a for a in accesses if finished.get(a.stream, 0) < a.nth]
            if left:
                self._accesses[memory] = left
            else:
                del self._accesses[memory]

    def _conflicting(self, access: Access) -> Iterable[Access]:
        """The recorded accesses to the same bytes, of which one or both are writes."""
        for memory in {memory for memory, _, _ in access.intervals}:
            for earlier in self._accesses.get(memory, ()):
                if (access.writes or earlier.writes) and _overlap(access, earlier):
                    yield earlier


def _overlap(one: Access, other: Access) -> bool:
    return any(
        memory == other_memory and start < other_end and other_start < end
        for memory, start, end in one.intervals
        for other_memory, other_start, other_end in other.intervals
    )


def _describe(access: Access) -> str:
    verb = "writing" if access.writes else "reading"
    memory, start, end = access.intervals[0]
    place = "the host" if access.stream == HOST else f"stream {access.stream}"
    more = f" and {len(access.intervals) - 1} more" if len(access.intervals) > 1 else ""
    return f"{access.what} on {place}, {verb} bytes {start} to {end} of memory {memory}{more},"
