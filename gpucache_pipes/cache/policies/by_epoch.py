"""Eviction by epochs, for pipelines that announce no access plan."""

from array import array
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from itertools import chain, repeat

from gpucache_pipes.cache.policies.base import BasePolicy, Key

_NEARLY_ALL = 0.9
"""Without `begin_epoch`, an epoch starts at a repeat after this share of known files was used."""


class ByEpoch(BasePolicy):
    """Evicts keys that were used in this epoch before keys that still wait for their use.

    Made for one pipeline that uses each file once an epoch. A file used in this epoch is not
    needed before the next one; a file not used yet is needed in this one. Keys that were not used
    for a whole epoch are evicted first, since the set of files has moved.

    Over epochs that touch each file once this serves capacity/files of the requests. No policy can
    serve more, since between two uses of a file lies a boundary of epochs at which it is cached or
    not.

    If `begin_epoch` is never called, an epoch begins when a file repeats after nearly all known
    files have been used. O(1) for each request, and 4 bytes for each file ever requested.

        >>> policy = ByEpoch()
        >>> for key in (0, 1, 2):
        ...     policy.on_access([key])
        ...     policy.on_insert(key)
        >>> policy.begin_epoch()
        >>> policy.on_access([1])
        >>> list(policy.victims(3))  # 0 and 2 still wait for their use
        [1]

    Attributes:
        stale: cached keys that were not used for a whole epoch, the least recently used first.
        used: cached keys that were used in this epoch, the least recently used first.
        waiting: cached keys that were used in the last epoch and not yet in this one.
        requests: the number of requests in this epoch.
        repeats: how many of these were for files that this epoch had used already.
        known: the number of files that were ever requested.
    """

    def __init__(self) -> None:
        self.stale: OrderedDict[Key, None] = OrderedDict()
        self.used: OrderedDict[Key, None] = OrderedDict()
        self.waiting: OrderedDict[Key, None] = OrderedDict()
        self.requests = self.repeats = self.known = 0
        self._epoch = 1
        self._declared = False
        # The number of requests in the last epoch that was not cut short.
        self._epoch_length = 0
        # By key: the epoch of its last request, or 0.
        self._last_epoch = array("i")

    def __len__(self) -> int:
        return len(self.stale) + len(self.used) + len(self.waiting)

    def has_seen(self, key: Key) -> bool:
        """Whether `key` was ever requested."""
        return key < len(self._last_epoch) and self._last_epoch[key] > 0

    def on_access(self, keys: Sequence[Key], owner: object = None) -> None:
        """See Policy."""
        if (missing := max(keys, default=-1) + 1 - len(self._last_epoch)) > 0:
            self._last_epoch.extend(array("i", [0]) * (missing + len(self._last_epoch) // 8))
        expected = set(keys)
        if len(expected) == len(keys) and expected <= self.waiting.keys():
            # The usual case, without a Python step for each key.
            self.known += list(map(self._last_epoch.__getitem__, keys)).count(0)
            deque(map(self.waiting.__delitem__, keys), maxlen=0)
            deque(map(self._last_epoch.__setitem__, keys, repeat(self._epoch)), maxlen=0)
            self.used.update(dict.fromkeys(keys))
            self.requests += len(keys)
            return
        last_epoch = self._last_epoch
        for key in keys:
            if last_epoch[key] == self._epoch:
                if not self._declared and self.requests - self.repeats >= _NEARLY_ALL * self.known:
                    self._begin()
                else:
                    self.repeats += 1
            elif not last_epoch[key]:
                self.known += 1
            last_epoch[key] = self._epoch
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
        if 2 * self.requests < self._epoch_length:
            # The epoch was cut short: keys that it did not reach are not stale.
            self.waiting.update(self.used)
        else:
            self.stale.update(self.waiting)
            self.waiting = self.used
            self._epoch_length = self.requests
        self.used = OrderedDict()
        self._epoch += 1
        self.requests = self.repeats = 0
