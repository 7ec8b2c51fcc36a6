"""A cache without contents: what a policy would do with it."""

from collections.abc import Sequence

from gpucache_pipes.cache.policies.base import Key, Policy


class ShadowCache:
    """Serves requests from a cache of so many bytes that holds nothing but names.

    As the store does it: requests are reported in bundles, what comes in may push out others or
    not be kept at all, and nothing goes in vain.

    Args:
        sizes: by key; None: each key has size 1, and `capacity` counts keys.
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
        """Whether it was there. Call `report` before another owner's turn."""
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
        """Tell the policy what was requested, by `owner`."""
        if self._unreported:
            self.policy.on_access(self._unreported, owner)
            self._unreported = []

    def _make_room(self, key: Key, size: int) -> bool:
        room = self.capacity - self.used
        if room >= size:
            return True
        if size > self.capacity:
            return False
        going = []
        for victim in self.policy.victims(key):
            going.append(victim)
            room += self.cached[victim]
            if room >= size:
                break
        else:
            return False
        for victim in going:
            self.used -= self.cached.pop(victim)
            self.evictions += 1
            self.policy.on_remove(victim)
        return True
