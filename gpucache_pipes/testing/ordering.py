"""Vector clocks: whether one access to device memory is certain to come before another.

Lamport (1978) and Mattern (1989), for streams: each stream counts its operations; an event carries
what its stream knew when it was recorded, and whoever waits for it knows that as well. What the
host has seen to be finished comes before all that it issues afterwards, in whatever thread.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

Clock = dict[int, int]
"""How many operations of each stream (by its number) are certain to be done."""

HOST = -1
"""The host, in place of the number of a stream."""

Interval = tuple[int, int, int]
"""(memory, start, end): bytes start .. end - 1 of a piece of memory."""


class UnorderedAccessError(RuntimeError):
    """Two accesses to the same bytes, one of them a write, that nothing brings in order."""


class Access(NamedTuple):
    """What one operation reads or writes."""

    stream: int
    nth: int
    what: str
    writes: bool
    intervals: Sequence[Interval]


def join(clock: Clock, other: Clock) -> None:
    """Add to `clock` what `other` knows."""
    for stream, count in other.items():
        if count > clock.get(stream, 0):
            clock[stream] = count


class OrderChecker:
    """Remembers accesses, and refuses one that is not ordered behind those it conflicts with."""

    def __init__(self) -> None:
        # By memory; those that the host has seen to be finished are forgotten.
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
        """Operation `count` of `stream`, which has waited for what is `known`, is issued.

        Raises UnorderedAccessError, with both operations.
        """
        for intervals, is_write in ((list(reads), False), (list(writes), True)):
            if not intervals:
                continue
            access = Access(stream, count, what, is_write, intervals)
            for earlier in self._conflicting(access):
                if known.get(earlier.stream, 0) < earlier.nth:
                    raise UnorderedAccessError(
                        f"{_describe(access)} is not ordered behind {_describe(earlier)}"
                    )
            for memory in {memory for memory, _, _ in intervals}:
                self._accesses.setdefault(memory, []).append(access)

    def forget(self, finished: Clock) -> None:
        """Accesses that everybody knows to be finished, since the host does, need no check."""
        for memory, accesses in list(self._accesses.items()):
            left = [a for a in accesses if finished.get(a.stream, 0) < a.nth]
            if left:
                self._accesses[memory] = left
            else:
                del self._accesses[memory]

    def _conflicting(self, access: Access) -> Iterable[Access]:
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
    who = "the host" if access.stream == HOST else f"stream {access.stream}"
    more = f" and {len(access.intervals) - 1} more" if len(access.intervals) > 1 else ""
    return f"{access.what} on {who}, {verb} bytes {start} to {end} of memory {memory}{more},"
