"""Replaying requests without files, device or torch."""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field

from gpucache_pipes.cache.access_plan import AccessPlan
from gpucache_pipes.cache.policies import Policy, make_policy
from gpucache_pipes.cache.policies.shadow import ShadowCache
from gpucache_pipes.cache.simulation.trace import Trace
from gpucache_pipes.units import parse_bytes


@dataclass
class Served:
    """What became of requests; sizes in bytes, or in files where no sizes were given."""

    requests: int = 0
    hits: int = 0
    requested: int = 0
    read: int = 0

    @property
    def hit_rate(self) -> float:
        """Hits for each request; 0 without requests."""
        return self.hits / self.requests if self.requests else 0.0


@dataclass
class Simulation(Served):
    """What a policy makes of a trace.

    Attributes:
        epochs: the same for each epoch, in the order of their beginnings; what is requested
            outside of epochs is in the sums only.
        evictions: how often something went.
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
    """Serve `trace` from a cache of `capacity` bytes that `policy` orders.

        simulate(Trace.epochs([["a", "b", "c"], ["c", "a", "b"]]), 2).hits

    Args:
        trace: a Trace, or any requests in order.
        capacity: in bytes, as a number or a string; in files where there are no `sizes`.
        policy: as for a GPUFeatureStore.
        sizes: bytes of each file.

    Raises:
        ValueError: capacity is not positive; the policy is not known.
        KeyError: a file without a size.
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
    for served in everything:
        result.requests += served.requests
        result.hits += served.hits
        result.requested += served.requested
        result.read += served.read
    result.evictions = cache.evictions
    return result
