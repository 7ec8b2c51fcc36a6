"""W-TinyLFU."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import chain

from gpucache_pipes.cache.policies.base import BasePolicy, Key

_WINDOW_FRACTION = 0.01
"""Size of the window, as a fraction of the cache."""

_PROTECTED_FRACTION = 0.8
"""Size of the protected segment, as a fraction of the main region."""

_MAX_COUNT = 15
"""Requests of a key are counted up to this many."""

_REQUESTS_PER_KEY = 10
"""All counts are halved after this many requests for each cached key."""

_HALVES = bytes(count // 2 for count in range(256))


class WTinyLFU(BasePolicy):
    """New keys enter a small LRU window. Once the cache is full, a key moves from there to the main
    region only if it was requested more often than the victim that it replaces.

    Einziger, Friedman and Manes, "TinyLFU: a highly efficient cache admission policy" (ACM
    Transactions on Storage, 2017): a window of 1% and a segmented LRU of which four fifths are
    protected. Requests are counted up to 15, and all counts are halved after ten requests for
    each cached key. Counts take a byte for each file that was ever requested, where the paper has a
    sketch: the number of files is bounded here. O(1) amortised. In the simulations of
    docs/benchmarks.md it is the best all-rounder among the policies that use no access plan.
    """

    def __init__(self) -> None:
        self._window: OrderedDict[Key, None] = OrderedDict()
        self._probation: OrderedDict[Key, None] = OrderedDict()
        self._protected: OrderedDict[Key, None] = OrderedDict()
        self._counts = bytearray()
        self._counted = 0

    def on_access(self, keys: Sequence[Key], owner: object) -> None:
        """See Policy."""
        for key in keys:
            self._count(key)
            if key in self._window:
                self._window.move_to_end(key)
            elif key in self._protected:
                self._protected.move_to_end(key)
            elif key in self._probation:
                del self._probation[key]
                self._protected[key] = None
                if len(self._protected) > _PROTECTED_FRACTION * (self._size() - len(self._window)):
                    demoted, _ = self._protected.popitem(last=False)
                    self._probation[demoted] = None

    def _reserve_count(self, key: Key) -> None:
        if key >= len(self._counts):
            self._counts.extend(bytes(key + 1 + key // 8 - len(self._counts)))

    def _count(self, key: Key) -> None:
        self._reserve_count(key)
        if self._counts[key] < _MAX_COUNT:
            self._counts[key] += 1
        self._counted += 1

    def on_insert(self, key: Key) -> None:
        """See Policy."""
        self._reserve_count(key)  # it may be inserted without a request
        self._window[key] = None
        if len(self._window) > self._window_size():
            oldest, _ = self._window.popitem(last=False)
            self._probation[oldest] = None

    def on_remove(self, key: Key) -> None:
        """See Policy."""
        for region in (self._window, self._probation, self._protected):
            region.pop(key, None)

    def victims(self, key: Key) -> Iterator[Key]:
        """See Policy."""
        if self._counted >= _REQUESTS_PER_KEY * self._size():
            self._counts = self._counts.translate(_HALVES)
            self._counted //= 2
        # The key that `key` displaces from the window competes with the victim of the main region.
        window_candidates = iter(self._window if len(self._window) >= self._window_size() else ())
        main_victims = chain(self._probation, self._protected)
        candidate, victim = next(window_candidates, None), next(main_victims, None)
        while candidate is not None or victim is not None:
            if victim is None or (
                candidate is not None and self._counts[candidate] <= self._counts[victim]
            ):
                assert candidate is not None
                yield candidate
                candidate = next(window_candidates, None)
            else:
                yield victim
                victim = next(main_victims, None)

    def _size(self) -> int:
        return len(self._window) + len(self._probation) + len(self._protected)

    def _window_size(self) -> int:
        return max(1, int(_WINDOW_FRACTION * self._size()))
