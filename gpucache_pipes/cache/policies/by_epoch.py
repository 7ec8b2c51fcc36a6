"""Eviction by epochs, for pipelines that announce no access plan."""

from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import repeat

from gpucache_pipes.cache.policies.base import BasePolicy, Key
from gpucache_pipes.cache.policies.wtinylfu import WTinyLFU

_NEARLY_ALL = 0.9
"""Without `begin_epoch`, an epoch starts at a repeat after this share of known files was used."""

_FEW_REPEATS = 0.02
"""An epoch with at most this share of repeats counts as touching each file once."""

_FEW_NEW = 0.04
"""After an epoch with at most this share of new files, the set of files counts as constant."""


class ByEpoch(BasePolicy):
    """Evicts keys that were not used for a whole epoch.

    Made for one pipeline that uses each file once an epoch. Then one file is worth as much as
    another: between two uses lies a boundary of epochs at which it is cached or not. So no policy
    serves more than capacity/files of the requests, and it gains nothing to replace a file that is
    still in use.

    While the set of files moves, that is, while epochs bring new files, newer files are in use for
    longer. Then keys that were used in this epoch are evicted as well, the first ones first. Where
    files repeat within an epoch, W-TinyLFU orders the keys that are in use.

    If `begin_epoch` is never called, an epoch begins when a file repeats after nearly all known
    files have been used, or after twice as many requests as the last epoch used files.

    A request takes a few C calls, and 4 bytes for each file ever requested; where files repeat,
    what W-TinyLFU takes in addition.

        >>> policy = ByEpoch()
        >>> for key in (0, 1, 2):
        ...     policy.on_access([key])
        ...     policy.on_insert(key)
        >>> for used in ([1, 2], [2]):
        ...     policy.begin_epoch()
        ...     policy.on_access(used)
        >>> list(policy.victims(3))  # not used in the last epoch
        [0]

    Attributes:
        cached: the cached keys, in the order in which they were inserted.
        requests: the number of requests in this epoch.
        repeats: how many of these were for files that this epoch had used already.
        known: the number of files that were ever requested or cached.
    """

    def __init__(self) -> None:
        self.cached: dict[Key, None] = {}
        self.requests = self.repeats = self.known = 0
        self._declared = False
        # By key: the epoch of its last request, or 0. Epochs are counted from 2 on. Keys that were
        # last used before `_oldest` are stale.
        self._last_epoch = array("i")
        self._epoch, self._oldest = 2, 0
        # The number of requests in the last epoch that was not cut short.
        self._epoch_length = 0
        # The keys that were stale when a scan first looked for them in this epoch, the first to be
        # evicted at the end; None before that. Scans skip those that are not stale any more.
        self._stale: list[Key] | None = None
        self._known_before = 0  # this epoch
        self._distinct = 0  # files that the last epoch used
        self._moves = False
        # While the set of files moves: the cached keys used in this epoch, the first ones first.
        self._used: dict[Key, None] = {}
        self._by_frequency: WTinyLFU | None = None

    def on_access(self, keys: Sequence[Key], owner: object = None) -> None:
        """See Policy."""
        self._reserve(max(keys, default=-1))
        self._use(keys)
        if self._by_frequency is not None:
            self._by_frequency.on_access(keys, owner)

    def _use(self, keys: Sequence[Key]) -> None:
        last_epoch = self._last_epoch
        before = list(dict(zip(keys, map(last_epoch.__getitem__, keys), strict=True)).values())
        repeats = len(keys) - len(before) + before.count(self._epoch)
        if repeats and not self._declared:
            if len(keys) > 1:
                for key in keys:
                    self._use([key])
                return
            nearly_all = self.requests - self.repeats >= _NEARLY_ALL * self.known
            if nearly_all or self.requests >= 2 * self._distinct > 0:
                self._begin()
                repeats = 0
        self.known += before.count(0)
        self.repeats += repeats
        self.requests += len(keys)
        deque(map(last_epoch.__setitem__, keys, repeat(self._epoch)), maxlen=0)
        if self._moves:
            self._used.update(dict.fromkeys(filter(self.cached.__contains__, keys)))

    def _reserve(self, key: Key) -> None:
        if (missing := key + 1 - len(self._last_epoch)) > 0:
            self._last_epoch.extend(array("i", [0]) * (missing + len(self._last_epoch) // 8))

    def on_insert(self, key: Key) -> None:
        """See Policy."""
        self.cached[key] = None
        self._reserve(key)
        if not self._last_epoch[key]:  # inserted without a request
            self._last_epoch[key] = self._epoch - 1
            self.known += 1
        if self._moves and self._last_epoch[key] == self._epoch:
            self._used[key] = None
        if self._by_frequency is not None:
            self._by_frequency.on_insert(key)

    def on_remove(self, key: Key) -> None:
        """See Policy."""
        del self.cached[key]
        self._used.pop(key, None)
        if self._by_frequency is not None:
            self._by_frequency.on_remove(key)

    def victims(self, key: Key) -> Iterator[Key]:
        """See Policy."""
        if self._by_frequency is None and self.repeats > max(8, _FEW_REPEATS * self.requests):
            self._by_frequency = WTinyLFU()
            for cached in self.cached:
                self._by_frequency.on_insert(cached)
        if self._by_frequency is None:
            yield from self.stale()
            yield from self._used
        elif not self._moves:
            yield from self._by_frequency.victims(key)
        else:
            yield from self.stale()
            in_use = self._by_frequency.victims(key)
            yield from (victim for victim in in_use if self._last_epoch[victim] >= self._oldest)

    def stale(self) -> Iterator[Key]:
        """Cached keys that were not used for a whole epoch, the least recently used first."""
        last_epoch, oldest = self._last_epoch, self._oldest
        if self._stale is None:
            found = [key for key in self.cached if last_epoch[key] < oldest]
            self._stale = sorted(found, key=last_epoch.__getitem__, reverse=True)
        stale = self._stale
        for at in range(len(stale) - 1, -1, -1):
            if stale[at] in self.cached and last_epoch[stale[at]] < oldest:
                yield stale[at]
            elif at == len(stale) - 1:
                stale.pop()

    def begin_epoch(self, owner: object = None) -> None:
        """See Policy."""
        self._declared = True
        self._begin()

    def _begin(self) -> None:
        if not self.requests:
            return
        if self.repeats <= _FEW_REPEATS * self.requests:
            self._by_frequency = None
        if 2 * self.requests >= self._epoch_length:
            self._oldest, self._epoch_length = self._epoch, self.requests
        # Else the epoch was cut short: keys that it did not reach are not stale.
        new = self.known - self._known_before if self._known_before else 0
        self._moves = new > _FEW_NEW * self.requests
        self._known_before = self.known
        self._distinct = self.requests - self.repeats
        self._epoch += 1
        self.requests = self.repeats = 0
        self._used = {}
        self._stale = None
