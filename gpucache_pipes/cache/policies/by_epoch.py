"""What epochs tell of a plan that nobody announces."""

from array import array
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from itertools import chain, repeat

from gpucache_pipes.cache.policies.base import BasePolicy, Key

_ALL = 0.9


class ByEpoch(BasePolicy):
    """For one pipeline that uses each file once an epoch: what was used in this epoch will not be
    needed before the next one, and what was not will still come.

    Over epochs that touch each file once this serves capacity/files of the requests, and nothing
    can serve more, since between two uses of a file lies a boundary of epochs at which it is cached
    or not. First goes what was not used for a whole epoch: the set of files has moved.

    Who never says where epochs begin is taken to begin one when nearly all known files have been
    used and one comes again. O(1) for each request, and 4 bytes for each file ever requested.

    Attributes:
        stale: cached keys that were not used for a whole epoch, the longest ago first.
        used: those that were used in this epoch, likewise.
        waiting: those that were used in the last one, and not yet in this one.
        requests: of this epoch.
        repeats: how many of these were for files that it had used already.
        known: files that were ever requested.
    """

    def __init__(self) -> None:
        self.stale: OrderedDict[Key, None] = OrderedDict()
        self.used: OrderedDict[Key, None] = OrderedDict()
        self.waiting: OrderedDict[Key, None] = OrderedDict()
        self.requests = self.repeats = self.known = 0
        self._epoch = 1
        self._declared = False
        # The last epoch that was no fragment: how many requests it had.
        self._length = 0
        # By key: the epoch of its last request; 0 is none.
        self._last = array("i")

    def __len__(self) -> int:
        return len(self.stale) + len(self.used) + len(self.waiting)

    def has_seen(self, key: Key) -> bool:
        """Whether it was ever requested."""
        return key < len(self._last) and self._last[key] > 0

    def on_access(self, keys: Sequence[Key], owner: object = None) -> None:
        """See Policy."""
        if (missing := max(keys, default=-1) + 1 - len(self._last)) > 0:
            self._last.extend(array("i", [0]) * (missing + len(self._last) // 8))
        expected = set(keys)
        if len(expected) == len(keys) and expected <= self.waiting.keys():
            # The usual case, without a step of Python for each key.
            self.known += list(map(self._last.__getitem__, keys)).count(0)
            deque(map(self.waiting.__delitem__, keys), maxlen=0)
            deque(map(self._last.__setitem__, keys, repeat(self._epoch)), maxlen=0)
            self.used.update(dict.fromkeys(keys))
            self.requests += len(keys)
            return
        last = self._last
        for key in keys:
            if last[key] == self._epoch:
                if not self._declared and self.requests - self.repeats >= _ALL * self.known:
                    self._begin()
                else:
                    self.repeats += 1
            elif not last[key]:
                self.known += 1
            last[key] = self._epoch
            self.requests += 1
            if key in self.waiting:
                del self.waiting[key]
            elif key in self.used:
                del self.used[key]
            elif key in self.stale:
                del self.stale[key]
            else:
                continue
            self.used[key] = None

    def on_insert(self, key: Key) -> None:
        """See Policy."""
        self.used[key] = None

    def on_remove(self, key: Key) -> None:
        """See Policy."""
        for group in (self.used, self.waiting, self.stale):
            if key in group:
                del group[key]

    def victims(self, key: Key) -> Iterator[Key]:
        """See Policy."""
        return chain(self.stale, self.used)

    def begin_epoch(self, owner: object = None) -> None:
        """See Policy."""
        self._declared = True
        self._begin()

    def _begin(self) -> None:
        if 2 * self.requests < self._length:
            # Broken off: what was not reached is not stale for that.
            self.waiting.update(self.used)
        else:
            self.stale.update(self.waiting)
            self.waiting = self.used
            self._length = self.requests
        self.used = OrderedDict()
        self._epoch += 1
        self.requests = self.repeats = 0
