"""Simulated caches of keys without bytes, one below the other."""

from collections.abc import Callable, Sequence

from gpucache_pipes.cache.access_plan import AccessPlan
from gpucache_pipes.cache.policies import Policy
from gpucache_pipes.cache.policies.base import Key


class Tier:
    """One cache. It asks its policy as the store does.

    A new key may evict others or be refused, and nothing is evicted if that does not make enough
    room.

    Args:
        policy: a new policy.
        capacity: in bytes, or in keys if there are no sizes.

    Attributes:
        cached: the size of each cached key.
        used: the sum of these sizes.
        evictions: the number of evicted keys.
        demoted: the size of the keys that have come from the tier above.
    """

    def __init__(self, policy: Policy, capacity: int) -> None:
        self.policy = policy
        self.capacity = capacity
        self.cached: dict[Key, int] = {}
        self.used = 0
        self.evictions = 0
        self.demoted = 0

    def victims(self, key: Key, size: int) -> list[Key] | None:
        """The keys to evict for a key of this size, which are worth less; None if it is refused."""
        room = self.capacity - self.used
        chosen: list[Key] = []
        if room >= size:
            return chosen
        if size > self.capacity:
            return None
        for victim in self.policy.victims(key):
            chosen.append(victim)
            room += self.cached[victim]
            if room >= size:
                return chosen
        return None

    def insert(self, key: Key, size: int) -> None:
        """Add a key for which there is room."""
        self.cached[key] = size
        self.used += size
        self.policy.on_insert(key)

    def remove(self, key: Key) -> int:
        """Remove a cached key; its size."""
        size = self.cached.pop(key)
        self.used -= size
        self.policy.on_remove(key)
        return size


class Tiers:
    """Caches one below the other, each of which has a policy of its own, by one rule.

    A key is in one of them at most. All policies know all requests and all access plans. A new key
    is offered to the tiers from the top; the first one takes it whose policy finds room for it. A
    key that a request finds in a tier is offered to those above in the same way, since it moves up
    anyway. What a tier evicts for another key is offered to those below.

    Why this rule: in the top tier no request is served less often than if it were alone, since
    nothing below it changes what its policy is told or asked. And over epochs that use each
    file once policies that replace nothing there move nothing: the tiers keep a partition of the
    files. docs/eviction.md has figures.

    Args:
        policies: new policies, one for each tier from the top.
        capacities: of the tiers.
        size_of: the size of a key.
    """

    def __init__(
        self,
        policies: Sequence[Policy],
        capacities: Sequence[int],
        size_of: Callable[[Key], int],
    ) -> None:
        pairs = zip(policies, capacities, strict=True)
        self.tiers = [Tier(policy, capacity) for policy, capacity in pairs]
        self._size_of = size_of
        self._unreported: list[Key] = []

    def request(self, key: Key, owner: object) -> int | None:
        """Serve one request; which tier had the key. Call `report` before the owner changes."""
        self._unreported.append(key)
        for at, tier in enumerate(self.tiers):
            if key in tier.cached:
                if at:
                    self.report(owner)
                    self._promote(key, at)
                return at
        self.report(owner)
        self._place(key, self._size_of(key), 0)
        return None

    def report(self, owner: object) -> None:
        """Report the requests since the last report to all policies, as made by `owner`."""
        if self._unreported:
            for tier in self.tiers:
                tier.policy.on_access(self._unreported, owner)
            self._unreported = []

    def begin_epoch(self, owner: object) -> None:
        """See Policy."""
        for tier in self.tiers:
            tier.policy.begin_epoch(owner)

    def announce(self, owner: object, plan: Callable[[], AccessPlan]) -> None:
        """See Policy. Each policy owns a plan of its own."""
        for tier in self.tiers:
            tier.policy.announce(owner, plan())

    def retract(self, owner: object) -> None:
        """See Policy."""
        for tier in self.tiers:
            tier.policy.retract(owner)

    def _promote(self, key: Key, at: int) -> None:
        size = self.tiers[at].cached[key]
        for above in range(at):
            victims = self.tiers[above].victims(key, size)
            if victims is not None:
                self.tiers[at].remove(key)
                self._replace(above, victims, key, size)
                return

    def _place(self, key: Key, size: int, first: int) -> int | None:
        """Offer a key to the tiers from this one on; which one has taken it."""
        for at in range(first, len(self.tiers)):
            victims = self.tiers[at].victims(key, size)
            if victims is not None:
                self._replace(at, victims, key, size)
                return at
        return None

    def _replace(self, at: int, victims: Sequence[Key], key: Key, size: int) -> None:
        tier = self.tiers[at]
        sizes = [tier.remove(victim) for victim in victims]
        tier.evictions += len(victims)
        tier.insert(key, size)
        for victim, freed in zip(victims, sizes, strict=True):
            taken = self._place(victim, freed, at + 1)
            if taken is not None:
                self.tiers[taken].demoted += freed
