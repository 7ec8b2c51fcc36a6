"""S3-FIFO."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from gpucache_pipes.cache.policies.base import BasePolicy, Key

_SMALL = 0.1
_GHOSTS = 0.9
_OFTEN = 2
_MOST = 3


class S3FIFO(BasePolicy):
    """Three first-in-first-out queues: new keys pass a small one, with a tenth of the places; the
    main one takes those that were used twice there, and those that come back soon, which a queue
    of ghosts, names without features, remembers. A used key goes round again in the main one.

    Yang, Zhang, Qiu, Yue and Rashmi, "FIFO queues are all you need for cache eviction" (SOSP
    2023), with the sizes, thresholds and warm-up of its authors' libCacheSim. O(1) amortised: a key
    goes round at most three times for three uses. The number of places is taken to be that of the
    cached keys when something must go.
    """

    def __init__(self) -> None:
        self._small: OrderedDict[Key, None] = OrderedDict()
        self._main: OrderedDict[Key, None] = OrderedDict()
        self._ghosts: OrderedDict[Key, None] = OrderedDict()
        self._uses: dict[Key, int] = {}
        # Requested while they were ghosts, and not inserted since.
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
            while len(self._ghosts) > int(_GHOSTS * (len(self._uses) + 1)):
                self._ghosts.popitem(last=False)

    def victims(self, key: Key) -> Iterator[Key]:
        """See Policy."""
        places = len(self._uses)
        if not self._warm:
            # What came while there was room, when it was not known how much, and the small one
            # would have been full.
            self._warm = True
            for late in list(self._small)[int(_SMALL * places) :]:
                del self._small[late]
                self._main[late] = None
        named: set[Key] = set()
        named_of_small = named_of_main = 0
        while len(named) < places:
            # Those that were named and passed over have gone to the end of their queue.
            main_is_next = len(self._main) > places - int(_SMALL * places)
            if named_of_main == len(self._main):
                main_is_next = False
            elif named_of_small == len(self._small):
                main_is_next = True
            queue = self._main if main_is_next else self._small
            candidate = next(iter(queue))
            queue.move_to_end(candidate)
            uses = self._uses[candidate]
            if main_is_next and uses > 0:
                self._uses[candidate] = min(uses, _MOST) - 1
            elif not main_is_next and uses >= _OFTEN:
                del self._small[candidate]
                self._main[candidate] = None
                self._uses[candidate] = 0
            elif candidate not in named:
                named.add(candidate)
                named_of_main += main_is_next
                named_of_small += not main_is_next
                yield candidate
