"""S3-FIFO."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from gpucache_pipes.cache.policies.base import BasePolicy, Key

_SMALL_FRACTION = 0.1
"""Size of the small queue, as a fraction of the cache."""

_GHOST_FRACTION = 0.9
"""Size of the ghost queue, as a fraction of the cache."""

_PROMOTION_USES = 2
"""Uses in the small queue after which a key moves to the main one."""

_MAX_USES = 3
"""Uses are counted up to this many in the main queue."""


class S3FIFO(BasePolicy):
    """Evicts by three first-in-first-out queues: small, main and ghost.

    New keys enter the small queue, a tenth of the cache. A key that was used twice there moves to
    the main queue; any other is evicted, and the ghost queue remembers it. A key requested while
    it is a ghost enters the main queue. A used key is reinserted at the end of the main queue.

    Yang, Zhang, Qiu, Yue and Rashmi, "FIFO queues are all you need for cache eviction" (SOSP
    2023), with the sizes, thresholds and warm-up of its authors' libCacheSim. O(1) amortised: a key
    is reinserted at most three times for three uses. The policy takes the number of cached keys at
    an eviction scan as the size of the cache.
    """

    def __init__(self) -> None:
        self._small: OrderedDict[Key, None] = OrderedDict()
        self._main: OrderedDict[Key, None] = OrderedDict()
        self._ghosts: OrderedDict[Key, None] = OrderedDict()
        self._uses: dict[Key, int] = {}
        # Keys that were requested while they were ghosts, and not inserted since.
        self._returning: set[Key] = set()
        self._warm = False

    def on_access(self, keys: Sequence[Key], owner: object) -> None:
        """See Policy."""
        uses = self._uses
        for key in keys:
            if key in uses:
                uses[key] += 1
            elif key in self._ghosts:
                del self._ghosts[key]
                self._returning.add(key)

    def on_insert(self, key: Key) -> None:
        """See Policy."""
        self._uses[key] = 0
        if key in self._returning:
            self._returning.remove(key)
            self._main[key] = None
        else:
            self._small[key] = None

    def on_remove(self, key: Key) -> None:
        """See Policy."""
        del self._uses[key]
        self._main.pop(key, None)
        if key in self._small:
            del self._small[key]
            self._ghosts[key] = None
            while len(self._ghosts) > int(_GHOST_FRACTION * (len(self._uses) + 1)):
                self._ghosts.popitem(last=False)

    def victims(self, key: Key) -> Iterator[Key]:
        """See Policy."""
        size = len(self._uses)
        if not self._warm:
            # While the cache was filling up, its size was not known. Keys that were inserted when
            # the small queue would have been full belong in the main one.
            self._warm = True
            for late in list(self._small)[int(_SMALL_FRACTION * size) :]:
                del self._small[late]
                self._main[late] = None
        proposed: set[Key] = set()
        proposed_of_small = proposed_of_main = 0
        while len(proposed) < size:
            # Proposed keys that the store has skipped are at the end of their queue.
            main_is_next = len(self._main) > size - int(_SMALL_FRACTION * size)
            if proposed_of_main == len(self._main):
                main_is_next = False
            elif proposed_of_small == len(self._small):
                main_is_next = True
            queue = self._main if main_is_next else self._small
            candidate = next(iter(queue))
            queue.move_to_end(candidate)
            uses = self._uses[candidate]
            if main_is_next and uses > 0:
                self._uses[candidate] = min(uses, _MAX_USES) - 1
            elif not main_is_next and uses >= _PROMOTION_USES:
                del self._small[candidate]
                self._main[candidate] = None
                self._uses[candidate] = 0
            elif candidate not in proposed:
                proposed.add(candidate)
                proposed_of_main += main_is_next
                proposed_of_small += not main_is_next
                yield candidate
