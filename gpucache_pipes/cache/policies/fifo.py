"""First in, first out."""

from collections import OrderedDict
from collections.abc import Iterator

from gpucache_pipes.cache.policies.base import BasePolicy, Key


class FIFO(BasePolicy):
    """What came first goes first, however often it was used since. O(1) for each insertion."""

    def __init__(self) -> None:
        # Not a dict: finding its first key takes a step for each that was deleted before it.
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
