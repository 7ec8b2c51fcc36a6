"""SIEVE."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from gpucache_pipes.cache.policies.base import BasePolicy, Key


class Sieve(BasePolicy):
    """A hand goes from the oldest key to the newest and round again; it spares each key that was
    used since it passed there last, and evicts the first that was not.

    Zhang, Yang, Yue, Vigfusson and Rashmi, "SIEVE is simpler than LRU: an efficient turn-key
    eviction algorithm for web caches" (NSDI 2024). Keys stay in the order in which they came,
    so that new ones are sifted out soon and old ones that are used stay. O(1) amortised: the
    hand passes a key only once for each use.
    """

    def __init__(self) -> None:
        # By age: those that the hand has passed in this round, and from the hand on to the newest.
        self._passed: OrderedDict[Key, None] = OrderedDict()
        self._coming: OrderedDict[Key, None] = OrderedDict()
        self._used: set[Key] = set()

    def on_access(self, keys: Sequence[Key], owner: object) -> None:
        """See Policy."""
        self._used.update(key for key in keys if key in self._coming or key in self._passed)

    def on_insert(self, key: Key) -> None:
        """See Policy."""
        self._coming[key] = None

    def on_remove(self, key: Key) -> None:
        """See Policy."""
        self._used.discard(key)
        if key in self._passed:
            del self._passed[key]
        else:
            del self._coming[key]
            self._wrap()

    def victims(self, key: Key) -> Iterator[Key]:
        """See Policy."""
        named: set[Key] = set()
        while len(named) < len(self._coming) + len(self._passed):
            candidate = next(iter(self._coming))
            if candidate in self._used:
                self._used.remove(candidate)
            elif candidate not in named:
                named.add(candidate)
                yield candidate
            del self._coming[candidate]
            self._passed[candidate] = None
            self._wrap()

    def _wrap(self) -> None:
        """Begin the next round at once: what comes now is behind the oldest, not before it."""
        if not self._coming:
            self._coming, self._passed = self._passed, self._coming
