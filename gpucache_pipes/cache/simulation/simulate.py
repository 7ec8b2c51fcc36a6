"""Simulate a policy on a trace, without files, a device or torch."""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field

from gpucache_pipes.cache.access_plan import AccessPlan
from gpucache_pipes.cache.policies import Policy, make_policy
from gpucache_pipes.cache.policies.shadow import ShadowCache
from gpucache_pipes.cache.simulation.trace import Trace
from gpucache_pipes.units import parse_bytes


@dataclass
class Served:
    """Hits of a sequence of requests.

    Attributes:
        requests: the number of requests.
        hits: how many of these were served from the cache.
        requested: bytes requested; files, where the simulation has no sizes.
        read: bytes read because of misses; files, where the simulation has no sizes.
    """

    requests: int = 0
    hits: int = 0
    requested: int = 0
    read: int = 0

    @property
    def hit_rate(self) -> float:
        """Hits divided by requests; 0 without requests."""
        return self.hits / self.requests if self.requests else 0.0


@dataclass
class Simulation(Served):
    """The result of a simulation: sums over all requests, and each epoch.

    Attributes:
        epochs: each epoch, in the order in which they begin. Requests outside of epochs count only
            in the sums.
        evictions: the number of evicted files.
    """

    epochs: list[Served] = field(default_factory=list)
    evictions: int = 0


def simulate(
    trace: Trace | Iterable[Hashable],
    capacity: int | str,
    policy: str | Policy = "clairvoyant",
    *,
    sizes: Mapping[Hashable, int] | None = None,
) -> Simulation:
    """Serve `trace` from a simulated cache.

        >>> simulate(["a", "b", "a", "c"], 2, "lru").hits
        1
        >>> result = simulate(Trace.epochs([["a", "b", "c"], ["c", "a", "b"]]), 2)
        >>> [epoch.hits for epoch in result.epochs]
        [0, 2]
        >>> simulate("aba", "1KiB", "keep", sizes={"a": 1000, "b": 500}).read  # bytes of a and b
        1500

    Args:
        trace: a Trace, or the requested files in order, by any hashable names.
        capacity: in bytes, as a number or a string such as "8GiB"; in files, without `sizes`.
        policy: a name or a policy object, as for a GPUFeatureStore.
        sizes: bytes by file. None means that every file has size 1.

    Raises:
        ValueError: `capacity` is not positive, or `policy` is not a known policy.
        KeyError: `sizes` lacks a file.
    """
    capacity = parse_bytes("capacity", capacity)
    if not isinstance(trace, Trace):
        trace = Trace(trace)
    policy = make_policy(policy)
    by_key = None if sizes is None else [sizes[name] for name in trace.names]
    cache = ShadowCache(policy, capacity, by_key)
    result = Simulation()
    running: dict[object, Served] = {}
    everything: list[Served] = []
    for turn in trace.turns:
        if turn.begins:
            policy.begin_epoch(turn.owner)
        if turn.upcoming is not None:
            policy.announce(turn.owner, AccessPlan(turn.upcoming, turn.left))
        if turn.begins or turn.owner not in running:
            running[turn.owner] = Served()
            everything.append(running[turn.owner])
        served = running[turn.owner]
        if turn.begins:
            result.epochs.append(served)
        for key in turn.keys:
            size = 1 if by_key is None else by_key[key]
            hit = cache.request(key, turn.owner)
            served.requests += 1
            served.requested += size
            if hit:
                served.hits += 1
            else:
                served.read += size
        cache.report(turn.owner)
        if turn.ends:
            policy.retract(turn.owner)
    for served in everything:
        result.requests += served.requests
        result.hits += served.hits
        result.requested += served.requested
        result.read += served.read
    result.evictions = cache.evictions
    return result
