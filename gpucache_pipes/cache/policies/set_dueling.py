"""Set dueling: several policies run in shadow caches, and the best one orders the keys."""

from collections.abc import Iterator, Sequence

from gpucache_pipes.cache.policies.base import BasePolicy, Key, Policy
from gpucache_pipes.cache.policies.by_epoch import ByEpoch
from gpucache_pipes.cache.policies.lru import LRU
from gpucache_pipes.cache.policies.shadow import ShadowCache
from gpucache_pipes.cache.policies.wtinylfu import WTinyLFU

_SAMPLED_KEYS = 512
"""A shadow cache has room for about this many keys."""

_MAX_REPEAT_RATE = 0.02
"""An epoch with at most this share of repeats counts as touching each file once."""

_MIN_GAIN = 1.02
"""A policy takes over when its hits exceed those of the leader by this factor, and by 8 more."""


class SetDueling(BasePolicy):
    """ByEpoch, as long as epochs touch each file once. Where files repeat within an epoch, set
    dueling: the one of ByEpoch, LRU and W-TinyLFU that would have had the most hits recently.

    Each of the three runs on a sample of the keys, in a shadow cache that is smaller in the same
    proportion (Waldspurger, Saemundsson, Ahmad and Park, "Cache modeling and optimization using
    miniature simulations", USENIX ATC 2017). A change of the leader costs hits, so the new one
    must be better by a fiftieth. Without repeats no policy beats ByEpoch, and no shadow cache runs.

    Attributes:
        by_epoch: the policy for epochs without repeats. It is kept up to date in a duel.
        leader: the policy that orders the keys: `by_epoch` or a rival of it.
    """

    def __init__(self) -> None:
        self.by_epoch = ByEpoch()
        self.leader: Policy = self.by_epoch
        # `by_epoch` alone; or during a duel all three policies, and for each of them a shadow
        # cache and its hits.
        self._policies: list[Policy] = [self.by_epoch]
        self._shadows: list[ShadowCache] = []
        self._hits = [0.0, 0.0, 0.0]
        self._sampled_requests = 0.0
        # A key is in the sample if its hash, of 32 bits, is less.
        self._sample_threshold = 0

    @property
    def hit_rate(self) -> float:
        """The estimated recent hit rate of the best policy; 0 without a duel."""
        return max(self._hits) / self._sampled_requests if self._sampled_requests else 0.0

    def on_access(self, keys: Sequence[Key], owner: object = None) -> None:
        """See Policy."""
        for policy in self._policies:
            policy.on_access(keys, owner)
        if self._shadows:
            for key in keys:
                if key * 2654435761 % (1 << 32) < self._sample_threshold:
                    self._request_in_shadows(key)

    def _request_in_shadows(self, key: Key) -> None:
        for number, shadow in enumerate(self._shadows):
            self._hits[number] += shadow.request(key, None)
            shadow.report(None)
        self._sampled_requests += 1
        # The counts cover the last one or two epochs; older hits count less.
        if self._sampled_requests * (1 << 32) > 2 * self._sample_threshold * self.by_epoch.known:
            self._hits = [hits / 2 for hits in self._hits]
            self._sampled_requests /= 2
        best = max(range(len(self._policies)), key=self._hits.__getitem__)
        leading = self._policies.index(self.leader)
        if self._hits[best] > _MIN_GAIN * self._hits[leading] + 8:
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
        self.update_shadows()
        return self.leader.victims(key)

    def update_shadows(self) -> None:
        """Start the duel if files repeat, and fit the shadow caches to the number of cached keys.

        Called before an eviction, when the cache is full.
        """
        if not self._shadows:
            if self.by_epoch.repeats <= max(8, _MAX_REPEAT_RATE * self.by_epoch.requests):
                return
            rivals: list[Policy] = [LRU(), WTinyLFU()]
            for group in (self.by_epoch.stale, self.by_epoch.waiting, self.by_epoch.used):
                for key in group:
                    for rival in rivals:
                        rival.on_insert(key)
            self._policies = [self.by_epoch, *rivals]
            self._sample_threshold = min(
                1 << 32, (_SAMPLED_KEYS << 32) // (len(self.by_epoch) or 1)
            )
            self._shadows = [ShadowCache(policy, 1) for policy in (ByEpoch(), LRU(), WTinyLFU())]
        for shadow in self._shadows:
            shadow.capacity = max(1, len(self.by_epoch) * self._sample_threshold >> 32)

    def begin_epoch(self, owner: object = None) -> None:
        """See Policy."""
        requests = self.by_epoch.requests
        if requests and self.by_epoch.repeats <= _MAX_REPEAT_RATE * requests:
            self._policies, self._shadows = [self.by_epoch], []
            self._hits, self._sampled_requests = [0.0, 0.0, 0.0], 0.0
            self.leader = self.by_epoch
        self.by_epoch.begin_epoch()
        for shadow in self._shadows:
            shadow.policy.begin_epoch(None)
