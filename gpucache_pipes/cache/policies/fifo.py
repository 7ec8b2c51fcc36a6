"""First in, first out."""

from collections.abc import Iterator

from gpucache_pipes.cache.policies.base import BasePolicy, Key


class FIFO(BasePolicy):
    """What came first goes first, however often it was used since. O(1) for each insertion."""

    def __init__(self) -> None:
        self._order: dict[Key, None] = {}

    def on_insert(self, key: Key) -> None:
        """See Policy."""
        self._order[key] = None

    def on_remove(self, key: Key) -> None:
        """See Policy."""
        del self._order[key]

    def victims(self, key: Key) -> Iterator[Key]:
        """See Policy."""
        return iter(self._order)
