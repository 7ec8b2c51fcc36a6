"""The policy protocol, and the registry of policies by name."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

from gpucache_pipes.cache.access_plan import AccessPlan
from gpucache_pipes.cache.policies.renamed import with_present_names

Key = int
"""The number of a file. The store numbers files from 0 in the order in which it first sees them, so
a policy may use a key as the index of an array."""


@runtime_checkable
class Policy(Protocol):
    """Orders keys for eviction. It counts no bytes, takes no locks and never touches the device.

    The store calls every method with its lock held, one call at a time, from any thread. No method
    may call the store. Everything is reported in the order in which it happens, but late: before
    the next eviction scan. While none is needed, old requests may never be reported.

        >>> policy = make_policy("lru")
        >>> for key in (1, 2, 3):
        ...     policy.on_access([key], owner="training")
        ...     policy.on_insert(key)
        >>> policy.on_access([1], owner="training")
        >>> list(policy.victims(4))
        [2, 3, 1]
    """

    def on_access(self, keys: Sequence[Key], owner: object) -> None:
        """`owner` has requested these keys, in this order; some may not be cached.

        An owner is a hashable object that names a pipeline, or None for direct use of the store.
        """

    def on_insert(self, key: Key) -> None:
        """`key` has been added to the cache. It was not cached before."""

    def on_remove(self, key: Key) -> None:
        """`key` has been removed from the cache: evicted, released or cleared. It was cached."""

    def victims(self, key: Key) -> Iterator[Key]:
        """Cached keys that are worth less than `key`, the first to be evicted first.

        One call is one eviction scan. The store takes victims until there is room for `key` and
        skips those that are pinned. It calls no other method during the scan, and removes the
        victims that it has taken right after it. If the scan ends before there is room, the store
        evicts none of them and bypasses `key`. Where a pending batch must have pages on a full
        device, the store takes the victims first and then any key that is not pinned. A scan must
        not propose a key twice.
        """

    def begin_epoch(self, owner: object) -> None:
        """`owner` begins a new pass over its data."""

    def announce(self, owner: object, plan: AccessPlan) -> None:
        """`owner` gives the access plan of its requests from now on; it replaces an earlier one.

        A plan is a hint: a wrong one costs hits and nothing else. The policy owns the plan.
        """

    def retract(self, owner: object) -> None:
        """`owner` takes back its access plan. The policy ignores unknown owners."""


class BasePolicy:
    """Empty implementations of the methods that many policies do not need.

    A subclass defines `on_insert`, `on_remove` and `victims`. It must not use the names `foresee`
    and `forget` for other purposes, unless it also defines `announce` or `retract`.
    """

    def on_access(self, keys: Sequence[Key], owner: object) -> None:
        """See Policy."""

    def begin_epoch(self, owner: object) -> None:
        """See Policy."""

    def announce(self, owner: object, plan: AccessPlan) -> None:
        """See Policy."""

    def retract(self, owner: object) -> None:
        """See Policy."""

    def foresee(self, owner: object, plan: AccessPlan) -> None:
        """The former name of `announce`, for subclasses and wrappers that call it."""
        self.announce(owner, plan)

    def forget(self, owner: object) -> None:
        """The former name of `retract`, for subclasses and wrappers that call it."""
        self.retract(owner)


_METHODS = ("on_insert", "on_access", "on_remove", "victims", "begin_epoch", "announce", "retract")

_REGISTRY: dict[str, Callable[[], Policy]] = {}


def register(name: str, factory: Callable[[], Policy]) -> None:
    """Make `policy=name` known to stores and simulations.

    Args:
        name: replaces a policy that is registered under the same name.
        factory: returns a new policy; called once for each store or simulation.

    Raises:
        ValueError: the factory cannot be called, such as a policy in its place.
    """
    if not callable(factory):
        raise ValueError(f"{factory!r} is no factory of policies: register the class")
    _REGISTRY[name] = factory


def make_policy(policy: "str | Policy") -> Policy:
    """Return a new policy of a registered name, or the given policy itself.

    A policy that defines the former names `foresee` and `forget` instead of `announce` and
    `retract` is returned in an adapter; see with_present_names.

    Raises:
        ValueError: the name is not registered, or the object is not a policy.
    """
    if isinstance(policy, str):
        factory = _REGISTRY.get(policy)
        if factory is None:
            known = ", ".join(sorted(_REGISTRY))
            raise ValueError(f"policy={policy!r} is not known; the known policies are: {known}")
        made: Policy = with_present_names(factory())
        return made
    adapted = None if isinstance(policy, type) else with_present_names(policy)
    if not isinstance(adapted, Policy):
        lacks = [name for name in _METHODS if not callable(getattr(adapted, name, None))]
        raise ValueError(
            f"policy={policy!r} must be a name or an object with the methods of "
            f"gpucache_pipes.cache.Policy; it lacks {', '.join(lacks)}"
            + (" (give an object of the class, not the class)" if isinstance(policy, type) else "")
        )
    return adapted
