"""Which policy suits a pipeline: several are tried in shadow, the best one decides."""

from collections.abc import Iterator, Sequence

from gpucache_pipes.cache.policies.base import BasePolicy, Key, Policy
from gpucache_pipes.cache.policies.by_epoch import ByEpoch
from gpucache_pipes.cache.policies.lru import LRU
from gpucache_pipes.cache.policies.shadow import ShadowCache
from gpucache_pipes.cache.policies.wtinylfu import WTinyLFU

_SAMPLED = 512
_FEW_REPEATS = 0.02
_MARGIN = 1.02


class SetDueling(BasePolicy):
    """By epochs, as long as these touch each file once; where files repeat within an epoch,
    whichever of ByEpoch, LRU and W-TinyLFU would have served most of late.

    Each of the three is tried on a sample of the keys, with a cache that is smaller in the same
    proportion (Waldspurger, Saemundsson, Ahmad and Park, "Cache modeling and optimization using
    miniature simulations", USENIX ATC 2017). It is the change of the decider that costs, so it
    must be better by a fiftieth. Without repeats ByEpoch cannot be beaten, and nothing is tried.
    """

    def __init__(self) -> None:
        self.by_epoch = ByEpoch()
        self.leader: Policy = self.by_epoch
        # This one alone, or with the others while there is a contest; then all of them in shadow,
        # too, and the hits of these.
        self._policies: list[Policy] = [self.by_epoch]
        self._shadows: list[ShadowCache] = []
        self._hits = [0.0, 0.0, 0.0]
        self._tried = 0.0
        self._sample = 0

    @property
    def hit_rate(self) -> float:
        """That of the best one of late, estimated; 0 without a contest."""
        return max(self._hits) / self._tried if self._tried else 0.0

    def on_access(self, keys: Sequence[Key], owner: object = None) -> None:
        """See Policy."""
        for policy in self._policies:
            policy.on_access(keys, owner)
        if self._shadows:
            for key in keys:
                if key * 2654435761 % (1 << 32) < self._sample:
                    self._try(key)

    def _try(self, key: Key) -> None:
        for number, shadow in enumerate(self._shadows):
            self._hits[number] += shadow.request(key, None)
            shadow.report(None)
        self._tried += 1
        # What counts is an epoch or so.
        if self._tried * (1 << 32) > 2 * self._sample * self.by_epoch.known:
            self._hits = [hits / 2 for hits in self._hits]
            self._tried /= 2
        best = max(range(len(self._policies)), key=self._hits.__getitem__)
        now = self._policies.index(self.leader)
        if self._hits[best] > _MARGIN * self._hits[now] + 8:
            self.leader = self._policies[best]

    def on_insert(self, key: Key) -> None:
        """See Policy."""
        for policy in self._policies:
            policy.on_insert(key)

    def on_remove(self, key: Key) -> None:
        """See Policy."""
        for policy in self._policies:
            policy.on_remove(key)

    def victims(self, key: Key) -> Iterator[Key]:
        """See Policy."""
        self.consider()
        return self.leader.victims(key)

    def consider(self) -> None:
        """Begin a contest if files repeat; something is about to go."""
        if not self._shadows:
            if self.by_epoch.repeats <= max(8, _FEW_REPEATS * self.by_epoch.requests):
                return
            rivals: list[Policy] = [LRU(), WTinyLFU()]
            for group in (self.by_epoch.stale, self.by_epoch.waiting, self.by_epoch.used):
                for key in group:
                    for rival in rivals:
                        rival.on_insert(key)
            self._policies = [self.by_epoch, *rivals]
            self._sample = min(1 << 32, (_SAMPLED << 32) // (len(self.by_epoch) or 1))
            self._shadows = [ShadowCache(policy, 1) for policy in (ByEpoch(), LRU(), WTinyLFU())]
        for shadow in self._shadows:
            shadow.capacity = max(1, len(self.by_epoch) * self._sample >> 32)

    def begin_epoch(self, owner: object = None) -> None:
        """See Policy."""
        requests = self.by_epoch.requests
        if requests and self.by_epoch.repeats <= _FEW_REPEATS * requests:
            self._policies, self._shadows = [self.by_epoch], []
            self._hits, self._tried = [0.0, 0.0, 0.0], 0.0
            self.leader = self.by_epoch
        self.by_epoch.begin_epoch()
        for shadow in self._shadows:
            shadow.policy.begin_epoch(None)
