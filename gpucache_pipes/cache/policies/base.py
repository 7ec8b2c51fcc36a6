"""What a policy is, and how one is found by its name."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

from gpucache_pipes.cache.access_plan import AccessPlan

Key = int
"""A file: the store numbers files from 0 on, as it meets them. So an array may have its place."""


@runtime_checkable
class Policy(Protocol):
    """Orders keys for eviction. Counts nothing, locks nothing, and never touches the device.

    Every method is called with the lock of the store held, from any thread, one at a time;
    none may call the store. Requests are reported in the order in which they were made, but
    late: in bundles, before the next insertion, removal or choice of victims.
    """

    def on_access(self, keys: Sequence[Key], owner: object) -> None:
        """`owner` requested these, in this order; some may not be in the cache.

        An owner is a pipeline, or None for who uses the store directly.
        """

    def on_insert(self, key: Key) -> None:
        """`key` is in the cache now. It was not before."""

    def on_remove(self, key: Key) -> None:
        """`key` has left the cache: evicted, released or cleared. It was in it."""

    def victims(self, key: Key) -> Iterator[Key]:
        """Cached keys that should rather go than `key` not come in, the first to go first.

        The store walks it until there is room, passing over keys that in-flight batches need.
        Nothing else is called during the walk; what was chosen is removed right after it. Where
        the walk ends before there is room, nothing is evicted and `key` is served without being
        kept. No key may be named twice in a walk.
        """

    def begin_epoch(self, owner: object) -> None:
        """`owner` begins a new pass over its data."""

    def announce(self, owner: object, plan: AccessPlan) -> None:
        """What `owner` will request from now on; replaces what it said before.

        A hint: wrong ones cost hits and nothing else.
        """

    def retract(self, owner: object) -> None:
        """`owner` takes back what it foresaw. Unknown owners are ignored."""


class BasePolicy:
    """Does nothing where a policy has nothing to do."""

    def on_access(self, keys: Sequence[Key], owner: object) -> None:
        """See Policy."""

    def begin_epoch(self, owner: object) -> None:
        """See Policy."""

    def announce(self, owner: object, plan: AccessPlan) -> None:
        """See Policy."""

    def retract(self, owner: object) -> None:
        """See Policy."""


_REGISTRY: dict[str, Callable[[], Policy]] = {}


def register(name: str, factory: Callable[[], Policy]) -> None:
    """Make `policy=name` work for stores. `factory()` gives a new policy for one store."""
    _REGISTRY[name] = factory


def make_policy(policy: "str | Policy") -> Policy:
    """The policy of that name, new, or the one given. Raises ValueError with the known names."""
    if isinstance(policy, str):
        factory = _REGISTRY.get(policy)
        if factory is None:
            known = ", ".join(sorted(_REGISTRY))
            raise ValueError(f"policy={policy!r} is not known; there are: {known}")
        return factory()
    if isinstance(policy, type) or not isinstance(policy, Policy):
        raise ValueError(
            f"policy={policy!r} must be a name or an object with the methods of "
            "gpucache_pipes.cache.policies.Policy"
        )
    return policy
