"""Least recently used."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from gpucache_pipes.cache.policies.base import BasePolicy, Key


class LRU(BasePolicy):
    """Evicts the key that was used longest ago. O(1) for each request.

    It has at most k times the misses of an optimal policy, where both have room for k keys (Sleator
    and Tarjan, "Amortized efficiency of list update and paging rules", CACM 1985). Over shuffled
    epochs it is far from optimal, since the keys used longest ago are needed next: 15% of hits
    where 50% is possible with half of the data cached, and none at all in sequential order.

        >>> policy = LRU()
        >>> policy.on_insert(1)
        >>> policy.on_insert(2)
        >>> policy.on_access([1], owner=None)
        >>> next(policy.victims(3))
        2
    """

    def __init__(self) -> None:
        self._order: OrderedDict[Key, None] = OrderedDict()

    def on_access(self, keys: Sequence[Key], owner: object) -> None:
        """See Policy."""
        order = self._order
        for key in keys:
            if key in order:
                order.move_to_end(key)

    def on_insert(self, key: Key) -> None:
        """See Policy."""
        self._order[key] = None

    def on_remove(self, key: Key) -> None:
        """See Policy."""
        del self._order[key]

    def victims(self, key: Key) -> Iterator[Key]:
        """See Policy."""
        return iter(self._order)
