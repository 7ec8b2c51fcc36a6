"""What must stay because a batch on its way needs it."""

from collections.abc import Callable, Iterable, Sequence


class Pins:
    """Open tickets, and the entries that they name.

    A pin is not a counter: an entry is pinned while an open ticket names it. So pins cannot leak or
    go below zero, pinning a batch costs one dict insertion whatever its size, and the set is
    computed only when something must go.
    """

    def __init__(self) -> None:
        # By ticket, the numbers of entries.
        self.tickets: dict[int, Sequence[int]] = {}
        # Who holds them, where that is known.
        self._holders: dict[int, Callable[[], object]] = {}
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

    def hold(self, ticket: int, holder: Callable[[], object]) -> None:
        """A weak reference to who has the ticket: once that is gone, nobody will close it."""
        self._holders[ticket] = holder

    def close(self, tickets: Iterable[int]) -> list[Sequence[int]]:
        """The entries that each of these named. Unknown tickets are ignored."""
        closed = []
        for ticket in tickets:
            closed.append(self.tickets.pop(ticket, ()))
            self._holders.pop(ticket, None)
        self._numbers = None
        return closed

    def lost(self) -> list[int]:
        """Tickets that nobody holds, as after an interrupt in a finalizer."""
        return [ticket for ticket, holder in self._holders.items() if holder() is None]

    def numbers(self) -> set[int]:
        """The numbers of the entries that open tickets name."""
        if self._numbers is None:
            self._numbers = set().union(*self.tickets.values())
        return self._numbers
