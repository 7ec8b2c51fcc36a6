"""SIEVE."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from gpucache_pipes.cache.policies.base import BasePolicy, Key


class Sieve(BasePolicy):
    """A hand moves from the oldest key to the newest and starts again at the oldest. It spares each
    key that was used since its last pass, and evicts the first one that was not.

    Zhang, Yang, Yue, Vigfusson and Rashmi, "SIEVE is simpler than LRU: an efficient turn-key
    eviction algorithm for web caches" (NSDI 2024). Keys stay in the order of insertion, so that
    unused new keys are evicted soon and used old keys stay. O(1) amortised: the hand spares a key
    only once for each use.
    """

    def __init__(self) -> None:
        # In order of insertion: the keys that the hand has passed in this round, and the others.
        self._passed: OrderedDict[Key, None] = OrderedDict()
        self._ahead: OrderedDict[Key, None] = OrderedDict()
        self._used: set[Key] = set()

    def on_access(self, keys: Sequence[Key], owner: object) -> None:
        """See Policy."""
        self._used.update(key for key in keys if key in self._ahead or key in self._passed)

    def on_insert(self, key: Key) -> None:
        """See Policy."""
        self._ahead[key] = None

    def on_remove(self, key: Key) -> None:
        """See Policy."""
        self._used.discard(key)
        if key in self._passed:
            del self._passed[key]
        else:
            del self._ahead[key]
            self._wrap()

    def victims(self, key: Key) -> Iterator[Key]:
        """See Policy."""
        proposed: set[Key] = set()
        while len(proposed) < len(self._ahead) + len(self._passed):
            candidate = next(iter(self._ahead))
            if candidate in self._used:
                self._used.remove(candidate)
            elif candidate not in proposed:
                proposed.add(candidate)
                yield candidate
            del self._ahead[candidate]
            self._passed[candidate] = None
            self._wrap()

    def _wrap(self) -> None:
        """Begin the next round as soon as one ends: new keys then lie ahead, after the oldest."""
        if not self._ahead:
            self._ahead, self._passed = self._passed, self._ahead
