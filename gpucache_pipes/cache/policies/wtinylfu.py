"""W-TinyLFU."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import chain

from gpucache_pipes.cache.policies.base import BasePolicy, Key

_WINDOW = 0.01
_PROTECTED = 0.8
_MOST = 15
_SAMPLE = 10
_HALVES = bytes(count // 2 for count in range(256))


class WTinyLFU(BasePolicy):
    """New keys pass a small LRU window; to get from there into the main region, a key must have
    been requested more often than the one that would go for it.

    Einziger, Friedman and Manes, "TinyLFU: a highly efficient cache admission policy" (ACM
    Transactions on Storage, 2017): a window of 1% and a segmented LRU of which four fifths are
    protected. Requests are counted up to 15, and all counts are halved after ten requests for
    each place. There is a byte for each file that was ever requested, where the paper has a sketch:
    the number of files is bounded here. O(1) amortised. The best all-rounder among the policies
    that know no plan, in the simulations of docs/benchmarks.md.
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
                if len(self._protected) > _PROTECTED * (self._places() - len(self._window)):
                    demoted, _ = self._protected.popitem(last=False)
                    self._probation[demoted] = None

    def _make_place(self, key: Key) -> None:
        if key >= len(self._counts):
            self._counts.extend(bytes(key + 1 + key // 8 - len(self._counts)))

    def _count(self, key: Key) -> None:
        self._make_place(key)
        if self._counts[key] < _MOST:
            self._counts[key] += 1
        self._counted += 1

    def on_insert(self, key: Key) -> None:
        """See Policy."""
        self._make_place(key)  # it may have come without a request
        self._window[key] = None
        if len(self._window) > self._window_places():
            oldest, _ = self._window.popitem(last=False)
            self._probation[oldest] = None

    def on_remove(self, key: Key) -> None:
        """See Policy."""
        for region in (self._window, self._probation, self._protected):
            region.pop(key, None)

    def victims(self, key: Key) -> Iterator[Key]:
        """See Policy."""
        if self._counted >= _SAMPLE * self._places():
            self._counts = self._counts.translate(_HALVES)
            self._counted //= 2
        # Who must leave the window for `key`, and who would have to go from the main region.
        leaving = iter(self._window if len(self._window) >= self._window_places() else ())
        going = chain(self._probation, self._protected)
        candidate, victim = next(leaving, None), next(going, None)
        while candidate is not None or victim is not None:
            if victim is None or (
                candidate is not None and self._counts[candidate] <= self._counts[victim]
            ):
                assert candidate is not None
                yield candidate
                candidate = next(leaving, None)
            else:
                yield victim
                victim = next(going, None)

    def _places(self) -> int:
        return len(self._window) + len(self._probation) + len(self._protected)

    def _window_places(self) -> int:
        return max(1, int(_WINDOW * self._places()))
