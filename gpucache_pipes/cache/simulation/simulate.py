"""Simulate a policy on a trace, without files, a device or torch."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from gpucache_pipes.cache.access_plan import AccessPlan
from gpucache_pipes.cache.policies import Policy, make_policy
from gpucache_pipes.cache.simulation.tiers import Tiers
from gpucache_pipes.cache.simulation.trace import Trace
from gpucache_pipes.units import parse_bytes


@dataclass
class Served:
    """Hits of a sequence of requests.

    Attributes:
        requests: the number of requests.
        hits: how many of these were served from the cache, of whatever tier.
        requested: bytes requested; files, where the simulation has no sizes.
        read: bytes read because of misses; files, where the simulation has no sizes.
        tier_hits: hits of each tier, from the top.
        tier_bytes: what each tier has served; of all but the top this is what its link carries up.
    """

    requests: int = 0
    hits: int = 0
    requested: int = 0
    read: int = 0
    tier_hits: list[int] = field(default_factory=list)
    tier_bytes: list[int] = field(default_factory=list)

    @property
    def hit_rate(self) -> float:
        """Hits divided by requests; 0 without requests."""
        return self.hits / self.requests if self.requests else 0.0

    def add(self, other: "Served") -> None:
        """Add another sequence of requests."""
        self.requests += other.requests
        self.hits += other.hits
        self.requested += other.requested
        self.read += other.read
        self.tier_hits = [a + b for a, b in zip(self.tier_hits, other.tier_hits, strict=True)]
        self.tier_bytes = [a + b for a, b in zip(self.tier_bytes, other.tier_bytes, strict=True)]


@dataclass
class Simulation(Served):
    """The result of a simulation: sums over all requests, and each epoch.

    Attributes:
        epochs: each epoch, in the order in which they begin. Requests outside of epochs count only
            in the sums.
        evictions: how often a file was evicted from a tier, whether or not another one took it.
        demoted: what each tier has taken that was evicted above; bytes, or files. Of the top 0.
    """

    epochs: list[Served] = field(default_factory=list)
    evictions: int = 0
    demoted: list[int] = field(default_factory=list)


def simulate(
    trace: Trace | Iterable[Hashable],
    capacity: int | str | Sequence[int | str],
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
        >>> simulate(Trace.epochs([["a", "b", "c"], ["c", "a", "b"]]), [1, 1]).tier_hits
        [1, 1]

    Args:
        trace: a Trace, or the requested files in order, by any hashable names.
        capacity: in bytes, as a number or a string such as "8GiB"; in files, without `sizes`. Or
            those of several tiers, from the top: device memory, host memory, local disk. Each has
            a policy of its own; see `simulation.tiers.Tiers` for what moves when.
        policy: a name or, for one tier, a policy object, as for a GPUFeatureStore.
        sizes: bytes by file. None means that every file has size 1.

    Raises:
        ValueError: a capacity is not positive, or is a string without `sizes`; `policy` is not a
            known policy, or is an object and there are several tiers.
        KeyError: `sizes` lacks a file.
    """
    given = [capacity] if isinstance(capacity, (int, float, str)) else capacity
    if sizes is None and any(isinstance(size, str) for size in given):
        raise ValueError(f"capacity={capacity!r} is in bytes, which needs sizes=")
    capacities = [parse_bytes("capacity", size) for size in given]
    if not isinstance(trace, Trace):
        trace = Trace(trace)
    if len(capacities) > 1 and not isinstance(policy, str):
        raise ValueError("each tier has a policy of its own: give the name of one")
    policies = [make_policy(policy) for _ in capacities]
    by_key = None if sizes is None else [sizes[name] for name in trace.names]
    size_of = (lambda key: 1) if by_key is None else by_key.__getitem__
    cache = Tiers(policies, capacities, size_of)
    nothing = [0] * len(capacities)
    result = Simulation(tier_hits=nothing, tier_bytes=nothing)
    running: dict[object, Served] = {}
    everything: list[Served] = []
    for turn in trace.turns:
        if turn.begins:
            cache.begin_epoch(turn.owner)
        if turn.upcoming is not None:
            cache.announce(turn.owner, partial(AccessPlan, turn.upcoming, turn.left))
        if turn.begins or turn.owner not in running:
            running[turn.owner] = Served(tier_hits=nothing.copy(), tier_bytes=nothing.copy())
            everything.append(running[turn.owner])
        served = running[turn.owner]
        if turn.begins:
            result.epochs.append(served)
        for key in turn.keys:
            size = 1 if by_key is None else by_key[key]
            tier = cache.request(key, turn.owner)
            served.requests += 1
            served.requested += size
            if tier is None:
                served.read += size
            else:
                served.hits += 1
                served.tier_hits[tier] += 1
                served.tier_bytes[tier] += size
        cache.report(turn.owner)
        if turn.ends:
            cache.retract(turn.owner)
    for served in everything:
        result.add(served)
    result.evictions = sum(tier.evictions for tier in cache.tiers)
    result.demoted = [tier.demoted for tier in cache.tiers]
    return result
