"""Least frequently used."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from gpucache_pipes.cache.policies.base import BasePolicy, Key


class _Frequency:
    """Keys that were used equally often: a node of a linked list in order of the number of uses."""

    __slots__ = ("above", "below", "keys", "uses")

    def __init__(self, uses: int) -> None:
        self.uses = uses
        self.keys: OrderedDict[Key, None] = OrderedDict()
        self.below = self.above = self

    def next(self) -> "_Frequency":
        """The node for one more use; it is created if the list has none."""
        if self.above.uses == self.uses + 1:
            return self.above
        new = _Frequency(self.uses + 1)
        new.below, new.above = self, self.above
        self.above.below = self.above = new
        return new

    def unlink(self) -> None:
        self.below.above, self.above.below = self.above, self.below


class LFU(BasePolicy):
    """Evicts the key with the fewest uses since its insertion; of these, the one that has had this
    number of uses longest.

    O(1) for each request, by a list of frequencies that each have a list of keys (Shah, Mitra and
    Matani, "An O(1) algorithm for implementing the LFU cache eviction scheme", 2010). Where
    requests are independent of each other, counting is the best that can be done without knowing
    the future (Coffman and Denning, "Operating Systems Theory", 1973). But a key that was once used
    often stays forever, and new keys evict each other.
    """

    def __init__(self) -> None:
        self._root = _Frequency(0)  # closes the list to a ring; it has no keys
        self._frequency: dict[Key, _Frequency] = {}

    def on_access(self, keys: Sequence[Key], owner: object) -> None:
        """See Policy."""
        for key in keys:
            old = self._frequency.get(key)
            if old is not None:
                new = old.next()
                self._leave(key, old)
                self._join(key, new)

    def on_insert(self, key: Key) -> None:
        """See Policy."""
        self._join(key, self._root.next())

    def on_remove(self, key: Key) -> None:
        """See Policy."""
        self._leave(key, self._frequency.pop(key))

    def _join(self, key: Key, frequency: _Frequency) -> None:
        frequency.keys[key] = None
        self._frequency[key] = frequency

    @staticmethod
    def _leave(key: Key, frequency: _Frequency) -> None:
        del frequency.keys[key]
        if not frequency.keys:
            frequency.unlink()

    def victims(self, key: Key) -> Iterator[Key]:
        """See Policy."""
        frequency = self._root.above
        while frequency is not self._root:
            yield from frequency.keys
            frequency = frequency.above
