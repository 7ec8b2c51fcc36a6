"""Which entries pending batches need, so that they are not evicted."""

import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any


class _Holder(weakref.ref[object]):
    __slots__ = ("number",)

    number: int


class Pins:
    """The open pending batches, by number, and the entries that each of them names.

    An entry is pinned while an open batch names it. There is no counter for each entry: so pins
    cannot leak or become negative, pinning a batch is one dict insertion whatever its size, and the
    set of pinned entries is computed only when something must be evicted.

    Attributes:
        batches: by the number of each open batch, the numbers of its entries.
        gone: references to holders that have been collected: see `lost`.
    """

    def __init__(self) -> None:
        self.batches: dict[int, Sequence[int]] = {}
        # Weak references to the objects that stand for batches. Their callback is a deque method,
        # so no Python code runs in it. A `__del__` would not do: Python swallows what a signal
        # handler raises inside one.
        self._holders: dict[int, _Holder] = {}
        self.gone: deque[_Holder] = deque()
        self._next = 0
        # The union of all batches, computed on demand.
        self._numbers: set[int] | None = None

    def open(self, numbers: Sequence[int]) -> int:
        """Open a batch that names these entries (repeats allowed); returns its number."""
        batch = self._next
        self._next = batch + 1
        self.batches[batch] = numbers
        self._numbers = None
        return batch

    def hold(self, batch: int, holder: object) -> None:
        """Close the batch once `holder` has been collected: see `lost`."""
        reference = _Holder(holder, self.gone.append)
        reference.number = batch
        self._holders[batch] = reference

    def close(self, batches: Iterable[int]) -> list[Sequence[int]]:
        """Close batches; returns the entries that each of them named. Ignores unknown numbers."""
        closed = []
        for batch in batches:
            closed.append(self.batches.pop(batch, ()))
            self._holders.pop(batch, None)
        self._numbers = None
        return closed

    def holders(self) -> list[Any]:
        """The objects that stand for open batches."""
        held = [reference() for reference in self._holders.values()]
        return [holder for holder in held if holder is not None]

    def lost(self) -> list[int]:
        """Batches whose holders have been collected, each once."""
        lost = []
        while self.gone:
            lost.append(self.gone.popleft().number)
        return lost

    def numbers(self) -> set[int]:
        """The numbers of all pinned entries."""
        if self._numbers is None:
            self._numbers = set().union(*self.batches.values())
        return self._numbers
