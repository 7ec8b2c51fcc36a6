"""Each policy against a model written from its definition, request by request."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpucache_pipes.cache.policies import (
    FIFO,
    LRU,
    Clairvoyant,
    Keep,
    Policy,
    make_policy,
    register,
)
from gpucache_pipes.testing import PolicyContract, simulate_policy
from gpucache_pipes.testing.policies import traces


class TestLRU(PolicyContract):
    def make(self) -> Policy:
        return LRU()

    @given(traces(), st.integers(1, 6))
    def test_equals_model(self, trace: Sequence[str], capacity: int) -> None:
        stack: list[str] = []
        gone, hits = [], 0
        for key in trace:
            if key in stack:
                hits += 1
                stack.remove(key)
            elif len(stack) == capacity:
                gone.append(stack.pop(0))
            stack.append(key)
        assert simulate_policy(LRU(), trace, capacity) == (hits, gone)


class TestFIFO(PolicyContract):
    def make(self) -> Policy:
        return FIFO()

    @given(traces(), st.integers(1, 6))
    def test_equals_model(self, trace: Sequence[str], capacity: int) -> None:
        line: list[str] = []
        gone, hits = [], 0
        for key in trace:
            if key in line:
                hits += 1
                continue
            if len(line) == capacity:
                gone.append(line.pop(0))
            line.append(key)
        assert simulate_policy(FIFO(), trace, capacity) == (hits, gone)


class TestKeep(PolicyContract):
    def make(self) -> Policy:
        return Keep()

    @given(traces(), st.integers(1, 6))
    def test_equals_model(self, trace: Sequence[str], capacity: int) -> None:
        kept = list(dict.fromkeys(trace))[:capacity]
        hits = sum(key in kept for key in trace) - len(kept)
        assert simulate_policy(Keep(), trace, capacity) == (hits, [])


def belady_hits(trace: Sequence[str], capacity: int) -> int:
    """The most hits that are possible: Belady's rule with bypass, by looking ahead each time."""

    def next_use(key: str, now: int) -> int:
        return next((i for i in range(now, len(trace)) if trace[i] == key), len(trace))

    cached: set[str] = set()
    hits = 0
    for now, key in enumerate(trace):
        if key in cached:
            hits += 1
            continue
        cached.add(key)
        if len(cached) > capacity:
            cached.remove(max(cached, key=lambda k: next_use(k, now + 1)))
    return hits


class TestClairvoyant(PolicyContract):
    def make(self) -> Policy:
        return Clairvoyant()

    @given(traces(), st.integers(1, 6))
    def test_known_future_equals_belady(self, trace: Sequence[str], capacity: int) -> None:
        policy = Clairvoyant()
        policy.foresee("pipeline", trace)
        hits, _ = simulate_policy(policy, trace, capacity)
        assert hits == belady_hits(trace, capacity)

    @given(st.data(), st.integers(1, 10), st.integers(1, 5))
    def test_epochs_without_a_future_reach_their_ceiling(
        self, data: st.DataObject, files: int, rounds: int
    ) -> None:
        names = [str(n) for n in range(files)]
        capacity = data.draw(st.integers(1, files))
        orders = [data.draw(st.permutations(names)) for _ in range(rounds)]
        starts = range(0, files * rounds, files)
        trace = [key for order in orders for key in order]
        hits, _ = simulate_policy(Clairvoyant(), trace, capacity, epochs=starts)
        assert hits == capacity * (rounds - 1)

    @given(traces(), st.integers(1, 6))
    def test_without_epochs_it_is_lru(self, trace: Sequence[str], capacity: int) -> None:
        assert simulate_policy(Clairvoyant(), trace, capacity) == simulate_policy(
            LRU(), trace, capacity
        )

    def test_what_was_not_used_for_an_epoch_goes_first(self) -> None:
        policy = Clairvoyant()
        trace = ["old", "a", "b", "a", "b", "new"]
        _, gone = simulate_policy(policy, trace, 3, epochs=[1, 3, 5])
        assert gone == ["old"]

    def test_two_pipelines_each_know_their_own_future(self) -> None:
        policy = Clairvoyant()
        policy.foresee("train", ["a", "b", "c", "a", "b", "c"])
        policy.foresee("validate", ["v"])
        hits, gone = simulate_policy(policy, ["a", "b", "c"], 2)
        assert list(policy.victims("x")) == []  # x has no future: it may push out nothing
        assert (hits, gone) == (0, [])  # c is the farthest when it comes: not kept
        policy.forget("train")
        assert set(policy.victims("v")) == {"a", "b"}

    def test_pinned_keys_stay_in_the_heap(self) -> None:
        policy = Clairvoyant()
        policy.foresee("p", ["a", "b", "c", "c", "b", "a"])
        _, gone = simulate_policy(policy, ["a", "b", "c"], 2, pinned=lambda key: key == "a")
        assert gone == ["b"]
        assert list(policy.victims("c"))[:1] == ["a"]


def test_names() -> None:
    assert isinstance(make_policy("lru"), LRU)
    mine = Keep()
    assert make_policy(mine) is mine
    register("mine", Keep)
    assert isinstance(make_policy("mine"), Keep)


@pytest.mark.parametrize("policy", ["best", 3, LRU, object()])
def test_wrong_policies(policy: object) -> None:
    with pytest.raises(ValueError, match="policy="):
        make_policy(policy)  # type: ignore[arg-type]


def test_a_pipeline_that_never_goes_on_does_not_fill_the_cache() -> None:
    policy = Clairvoyant()
    idle = [f"i{n}" for n in range(45)]
    train = [f"t{n}" for n in range(100)]
    policy.foresee("idle", [*idle, *idle])
    hits, _ = simulate_policy(policy, idle, 50)
    assert hits == 0
    cached = set(idle)
    served = 0
    for epoch in range(6):
        policy.foresee("train", [*train, *train])
        for key in train:
            policy.on_access([key])
            if key in cached:
                served += epoch == 5
            elif len(cached) < 50:
                policy.on_insert(key)
                cached.add(key)
            elif (victim := next(policy.victims(key), None)) is not None:
                policy.on_remove(victim)
                cached.remove(victim)
                policy.on_insert(key)
                cached.add(key)
    assert served == 50


def test_pipelines_that_alternate_keep_their_files_without_a_future() -> None:
    policy = Clairvoyant()
    train, validate = [f"t{n}" for n in range(60)], [f"v{n}" for n in range(20)]
    cached: set[str] = set()
    hits = 0
    for epoch in range(8):
        for owner, keys in (("train", train), ("validate", validate)):
            policy.begin_epoch(owner)
            for key in keys:
                policy.on_access([key])
                if key in cached:
                    hits += epoch >= 4
                    continue
                if len(cached) == 48:
                    victim = next(policy.victims(key), None)
                    if victim is None:
                        continue
                    policy.on_remove(victim)
                    cached.remove(victim)
                policy.on_insert(key)
                cached.add(key)
    assert hits >= 4 * 48 * 0.95  # 80 files, 48 places
