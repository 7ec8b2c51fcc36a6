"""Caches one below the other: what the simulation of tiers promises."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpucache_pipes.cache import Trace, make_policy, simulate
from gpucache_pipes.cache.simulation.tiers import Tiers

POLICIES = ["clairvoyant", "keep", "lru", "fifo", "lfu", "sieve", "s3fifo", "w-tinylfu"]
CAPACITIES = st.lists(st.integers(1, 6), min_size=1, max_size=3)


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Epochs that use each file once, or repeat and leave out some; of one or two pipelines."""
    files = draw(st.integers(1, 12))
    once = st.permutations(range(files))
    epoch = once if draw(st.booleans()) else st.lists(st.integers(0, files - 1), max_size=20)
    first = draw(st.lists(epoch, min_size=1, max_size=5))
    known = draw(st.booleans())
    if draw(st.booleans()):
        return Trace.epochs(first, known=known)
    second = draw(st.lists(epoch, min_size=1, max_size=5))
    turns = draw(st.lists(st.tuples(st.integers(0, 1), st.none() | st.integers(1, 9)), max_size=12))
    return Trace.pipelines([first, second], turns, known=known)


@settings(max_examples=300, deadline=None)
@given(traces(), CAPACITIES, st.sampled_from(POLICIES), st.data())
def test_the_top_tier_serves_what_it_serves_alone(
    trace: Trace, capacities: list[int], policy: str, data: st.DataObject
) -> None:
    sizes: Any = None
    if data.draw(st.booleans()):
        drawn = st.lists(st.integers(1, 4), min_size=len(trace.names), max_size=len(trace.names))
        sizes = dict(zip(trace.names, data.draw(drawn), strict=True))
    alone = simulate(trace, capacities[0], policy, sizes=sizes)
    tiers = simulate(trace, capacities, policy, sizes=sizes)
    assert tiers.tier_hits[0] == alone.hits and tiers.tier_bytes[0] == alone.tier_bytes[0]
    assert sum(tiers.tier_hits) == tiers.hits >= alone.hits
    assert tiers.read == tiers.requested - sum(tiers.tier_bytes) <= alone.read
    assert tiers.demoted[0] == 0
    for together, epoch in zip(tiers.epochs, alone.epochs, strict=True):
        assert together.tier_hits[0] == epoch.hits


@given(st.data())
def test_the_sum_of_the_tiers_counts(data: st.DataObject) -> None:
    """Over epochs that use each file once, by a policy that replaces nothing there."""
    files = data.draw(st.integers(1, 20))
    epochs = data.draw(st.lists(st.permutations(range(files)), min_size=2, max_size=5))
    capacities = data.draw(CAPACITIES)
    policy = data.draw(st.sampled_from(["clairvoyant", "keep"]))
    result = simulate(Trace.epochs(epochs), capacities, policy)
    held = files
    for epoch in result.epochs[1:]:
        left = files
        for capacity, hits in zip(capacities, epoch.tier_hits, strict=True):
            assert hits == min(capacity, left)
            left -= hits
        held = min(held, epoch.hits)
    assert held == min(files, sum(capacities))
    assert result.evictions == 0 and not any(result.demoted)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 11), max_size=60),
    st.lists(st.integers(1, 8), min_size=1, max_size=3),
    st.sampled_from(POLICIES),
    st.lists(st.integers(1, 3), min_size=12, max_size=12),
)
def test_a_key_is_in_one_tier(
    requests: Sequence[int], capacities: list[int], policy: str, sizes: list[int]
) -> None:
    tiers = Tiers([make_policy(policy) for _ in capacities], capacities, sizes.__getitem__)
    for key in requests:
        before = [at for at, tier in enumerate(tiers.tiers) if key in tier.cached]
        assert tiers.request(key, None) == (before[0] if before else None)
        everything = [key for tier in tiers.tiers for key in tier.cached]
        assert len(everything) == len(set(everything))
        for tier, capacity in zip(tiers.tiers, capacities, strict=True):
            assert tier.used == sum(tier.cached.values()) <= capacity
            assert all(tier.cached[key] == sizes[key] for key in tier.cached)
        if before:  # it moves up or stays
            assert any(key in tier.cached for tier in tiers.tiers[: before[0] + 1])


def test_what_is_often_used_moves_up() -> None:
    trace = Trace.epochs([["a", "b"], ["b"] * 5 + ["a"], ["b"] * 5], known=True)
    result = simulate(trace, [1, 1], "lru")
    assert result.tier_hits == [9, 2]  # b, and a and b when they come back
    assert result.demoted == [0, 3]


def test_each_tier_has_its_own_policy() -> None:
    with pytest.raises(ValueError, match="give the name of one"):
        simulate(["a"], [1, 1], make_policy("lru"))
    assert simulate(["a", "a"], [1], make_policy("lru")).hits == 1
    with pytest.raises(ValueError, match="capacity=0"):
        simulate(["a"], [1, 0])
