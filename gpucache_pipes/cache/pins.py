"""What must stay because a batch on its way needs it."""

import weakref
from collections import deque
from collections.abc import Iterable, Sequence


class _Holder(weakref.ref[object]):
    __slots__ = ("ticket",)

    ticket: int


class Pins:
    """Open tickets, and the entries that they name.

    A pin is not a counter: an entry is pinned while an open ticket names it. So pins cannot leak or
    go below zero, pinning a batch costs one dict insertion whatever its size, and the set is
    computed only when something must go.
    """

    def __init__(self) -> None:
        # By ticket, the numbers of entries.
        self.tickets: dict[int, Sequence[int]] = {}
        # Weak references to who holds them, where that is known; and those whose object is gone.
        # The callback is a method of deque, which takes no step of Python: a `__del__` would
        # swallow what a signal handler raises in it.
        self._holders: dict[int, _Holder] = {}
        self._gone: deque[_Holder] = deque()
        self._next = 0
        # What they name together, once somebody has asked.
        self._numbers: set[int] | None = None

    def open(self, numbers: Sequence[int]) -> int:
        """A ticket that names these entries; repeats allowed."""
        ticket = self._next
        self._next = ticket + 1
        self.tickets[ticket] = numbers
        self._numbers = None
        return ticket

    def hold(self, ticket: int, holder: object) -> None:
        """Note who has the ticket: once that object is gone, nobody will close it."""
        reference = _Holder(holder, self._gone.append)
        reference.ticket = ticket
        self._holders[ticket] = reference

    def close(self, tickets: Iterable[int]) -> list[Sequence[int]]:
        """The entries that each of these named. Unknown tickets are ignored."""
        closed = []
        for ticket in tickets:
            closed.append(self.tickets.pop(ticket, ()))
            self._holders.pop(ticket, None)
        self._numbers = None
        return closed

    def lost(self) -> list[int]:
        """Tickets whose holders are gone, each once. Takes 50 ns where there are none."""
        lost = []
        while self._gone:
            lost.append(self._gone.popleft().ticket)
        return lost

    def numbers(self) -> set[int]:
        """The numbers of the entries that open tickets name."""
        if self._numbers is None:
            self._numbers = set().union(*self.tickets.values())
        return self._numbers
