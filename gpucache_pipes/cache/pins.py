"""Which entries pending batches need, so that they are not evicted."""

import weakref
from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np

from gpucache_pipes.cache.entries import Numbers, distinct


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
        ended: open batches that are to be closed, by number, and references to holders that have
            been collected: see `lost`.
    """

    def __init__(self) -> None:
        self.batches: dict[int, Numbers] = {}
        # Weak references to the objects that stand for batches. Their callback is a deque method,
        # so no Python code runs in it. A `__del__` would not do: Python swallows what a signal
        # handler raises inside one.
        self._holders: dict[int, _Holder] = {}
        self.ended: deque[int | _Holder] = deque()
        self._next = 0
        # The union of all batches, computed on demand.
        self._numbers: set[int] | None = None

    def open(self, numbers: Numbers) -> int:
        """Open a batch that names these entries (repeats allowed); returns its number."""
        batch = self._next
        self._next = batch + 1
        self.batches[batch] = numbers
        self._numbers = None
        return batch

    def hold(self, batch: int, holder: object) -> None:
        """Close the batch once `holder` has been collected: see `lost`."""
        reference = _Holder(holder, self.ended.append)
        reference.number = batch
        self._holders[batch] = reference

    def close(self, batches: Iterable[int]) -> list[Numbers]:
        """Close batches; returns the entries that each of them named. Ignores unknown numbers."""
        closed = []
        for batch in batches:
            numbers = self.batches.pop(batch, None)
            if numbers is not None:
                closed.append(numbers)
            self._holders.pop(batch, None)
        self._numbers = None
        return closed

    def holders(self) -> list[Any]:
        """The objects that stand for open batches."""
        held = [reference() for reference in self._holders.values()]
        return [holder for holder in held if holder is not None]

    def end(self, batches: Iterable[int]) -> None:
        """Have these batches closed by who asks for `lost` next. Takes no lock."""
        self.ended.extend(batches)

    def lost(self) -> list[int]:
        """Batches that have ended without a call of `close`, or whose holders were collected."""
        lost = []
        while self.ended:
            ended = self.ended.popleft()
            lost.append(ended if isinstance(ended, int) else ended.number)
        return lost

    def numbers(self) -> set[int]:
        """The numbers of all pinned entries."""
        if self._numbers is None:
            self._numbers = set()
            if self.batches:
                self._numbers.update(np.concatenate(list(self.batches.values())).tolist())
        return self._numbers

    def without_pins(self, numbers: Numbers) -> Numbers:
        """Those of `numbers` that no open batch names, each once, in order of number."""
        free = distinct(numbers)
        for pinned in self.batches.values():
            if not len(free):
                break
            free = free[~np.isin(free, pinned)]
        return free
