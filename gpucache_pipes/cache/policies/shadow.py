"""A shadow cache: a cache of keys without bytes."""

from collections.abc import Sequence

from gpucache_pipes.cache.policies.base import Key, Policy


class ShadowCache:
    """A cache of keys without bytes, which tells how many hits a policy would have.

    It calls the policy as the store does: requests are reported in bundles, a new key may evict
    others or be bypassed, and nothing is evicted if that does not make enough room.

    Args:
        policy: a new policy.
        capacity: in bytes, or in keys if there are no sizes.
        sizes: bytes by key; None means that each key has size 1.

    Attributes:
        cached: the size of each cached key.
        used: the sum of these sizes.
        evictions: the number of evicted keys.
    """

    def __init__(self, policy: Policy, capacity: int, sizes: Sequence[int] | None = None) -> None:
        self.policy = policy
        self.capacity = capacity
        self.cached: dict[Key, int] = {}
        self.used = 0
        self.evictions = 0
        self._sizes = sizes
        self._unreported: list[Key] = []

    def request(self, key: Key, owner: object) -> bool:
        """Serve one request and return whether it hits. Call `report` before the owner changes."""
        self._unreported.append(key)
        if key in self.cached:
            return True
        self.report(owner)
        size = 1 if self._sizes is None else self._sizes[key]
        if self._make_room(key, size):
            self.cached[key] = size
            self.used += size
            self.policy.on_insert(key)
        return False

    def report(self, owner: object) -> None:
        """Report the requests since the last report to the policy, as made by `owner`."""
        if self._unreported:
            self.policy.on_access(self._unreported, owner)
            self._unreported = []

    def _make_room(self, key: Key, size: int) -> bool:
        room = self.capacity - self.used
        if room >= size:
            return True
        if size > self.capacity:
            return False
        victims = []
        for victim in self.policy.victims(key):
            victims.append(victim)
            room += self.cached[victim]
            if room >= size:
                break
        else:
            return False
        for victim in victims:
            self.used -= self.cached.pop(victim)
            self.evictions += 1
            self.policy.on_remove(victim)
        return True
