"""First in, first out."""

from collections import OrderedDict
from collections.abc import Iterator

from gpucache_pipes.cache.policies.base import BasePolicy, Key


class FIFO(BasePolicy):
    """Evicts the key that was inserted first, however often it was used. O(1) per insertion."""

    def __init__(self) -> None:
        # Not a dict: finding the first key of a dict takes a step for each deleted key before it.
        self._order: OrderedDict[Key, None] = OrderedDict()

    def on_insert(self, key: Key) -> None:
        """See Policy."""
        self._order[key] = None

    def on_remove(self, key: Key) -> None:
        """See Policy."""
        del self._order[key]

    def victims(self, key: Key) -> Iterator[Key]:
        """See Policy."""
        return iter(self._order)
