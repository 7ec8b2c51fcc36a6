"""Each policy equals a model written from its definition, victim for victim."""

import random
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import models
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpucache_pipes.cache import AccessPlan, Trace, simulate
from gpucache_pipes.cache.policies import (
    FIFO,
    LFU,
    LRU,
    S3FIFO,
    BasePolicy,
    Clairvoyant,
    Keep,
    Key,
    Policy,
    Sieve,
    WTinyLFU,
    make_policy,
    register,
)
from gpucache_pipes.cache.policies.by_epoch import ByEpoch
from gpucache_pipes.testing import PolicyContract, simulate_policy
from gpucache_pipes.testing.policies import traces

LONG = traces(keys=40, max_size=400)


def modelled(policy: Callable[[], Policy], model: Callable[..., tuple[int, list[int]]]) -> type:
    class Test(PolicyContract):
        def make(self) -> Policy:
            return policy()

        @settings(deadline=None)
        @given(LONG, st.integers(1, 30))
        def test_equals_its_model(self, trace: Sequence[Key], places: int) -> None:
            assert simulate_policy(policy(), trace, places) == model(trace, places)

    return Test


TestLRU = modelled(LRU, models.lru)
TestFIFO = modelled(FIFO, models.fifo)
TestKeep = modelled(Keep, models.keep)
TestLFU = modelled(LFU, models.lfu)
TestSieve = modelled(Sieve, models.sieve)
TestS3FIFO = modelled(S3FIFO, models.s3fifo)
TestWTinyLFU = modelled(WTinyLFU, models.w_tinylfu)


class TestByEpoch(PolicyContract):
    def make(self) -> Policy:
        return ByEpoch()

    @given(st.lists(traces(max_size=8), max_size=8), st.sets(st.integers(0, 7)), st.data())
    def test_batches_equal_single_requests(
        self, batches: list[list[Key]], cached: set[Key], data: st.DataObject
    ) -> None:
        policies = ByEpoch(), ByEpoch()
        for batch in batches:
            begins = data.draw(st.booleans())
            for policy in policies:
                if begins:
                    policy.begin_epoch()
            policies[0].on_access(batch)
            for key in batch:
                policies[1].on_access([key])
            for key in sorted(cached):
                for policy in policies:
                    policy.on_insert(key)
            cached = set()
            states = [{k: v for k, v in vars(p).items() if k != "_by_frequency"} for p in policies]
            assert states[0] == states[1]


def orders(files: int, most: int = 5) -> st.SearchStrategy[list[list[Key]]]:
    """Epochs that touch each file once."""
    return st.lists(st.permutations(range(files)), min_size=2, max_size=most)


class TestClairvoyant(PolicyContract):
    def make(self) -> Policy:
        return Clairvoyant()

    @settings(deadline=None)
    @given(traces(keys=12, max_size=80), st.integers(1, 10), st.data())
    def test_known_access_plan_equals_belady(
        self, trace: Sequence[Key], places: int, data: st.DataObject
    ) -> None:
        """Hit for hit, with no more evictions."""
        policy = Clairvoyant()
        epoch = data.draw(st.integers(0, len(trace)))
        policy.announce("somebody", AccessPlan(trace, epoch))
        hits, evicted = simulate_policy(policy, trace, places)
        drops_keys = any(key not in trace[at + 1 :] for at, key in enumerate(trace[:epoch]))
        if not drops_keys or epoch == len(trace):  # else late uses are worth less; see Pipeline
            assert (hits, evicted) == models.belady(trace, places, sparing=True)
        best, most = models.belady(trace, places)
        assert hits == best
        assert len(evicted) <= len(most)

    @settings(deadline=None)
    @given(traces(keys=12, max_size=80), st.integers(1, 10), st.data())
    def test_known_access_plan_equals_belady_with_pins(
        self, trace: Sequence[Key], places: int, data: st.DataObject
    ) -> None:
        few = st.sets(st.integers(0, 11), max_size=4)
        pinned = data.draw(st.lists(few, min_size=len(trace), max_size=len(trace)))
        policy = Clairvoyant()
        policy.announce("somebody", AccessPlan(trace))
        now: set[Key] = set()

        def requests() -> Iterable[Key]:
            for key, these in zip(trace, pinned, strict=True):
                now.clear()
                now.update(these)
                yield key

        got = simulate_policy(policy, requests(), places, pinned=now.__contains__)
        assert got == models.belady(trace, places, pinned, sparing=True)

    @settings(deadline=None)
    @given(st.integers(1, 10).flatmap(orders), st.integers(1, 10), st.booleans(), st.booleans())
    def test_epochs_reach_their_ceiling(
        self, epochs: list[list[Key]], places: int, known: bool, announced: bool
    ) -> None:
        """Known in advance, only their beginnings known, or not even these; without evictions."""
        files = len(epochs[0])
        trace = (
            Trace.epochs(epochs, known=known)
            if announced
            else Trace(key for epoch in epochs for key in epoch)
        )
        result = simulate(trace, min(places, files))
        assert result.hits == min(places, files) * (len(epochs) - 1)
        assert not result.evictions
        if announced:
            assert all(e.hits == min(places, files) for e in result.epochs[1:])

    def test_what_was_not_used_for_an_epoch_goes_first(self) -> None:
        trace = [0, 1, 2, 1, 2, 3]
        _, evicted = simulate_policy(Clairvoyant(), trace, 3, epochs=[1, 3, 5])
        assert evicted == [0]

    def test_an_epoch_that_is_broken_off_makes_nothing_stale(self) -> None:
        policy = Clairvoyant()
        epochs = [*range(8)], [1], [*range(8)]
        trace = [key for epoch in epochs for key in epoch]
        hits, evicted = simulate_policy(policy, trace, 4, epochs=[0, 8, 9])
        assert (hits, evicted) == (5, [])

    @pytest.mark.parametrize("others", [(), ("validation",)])
    def test_an_interrupt_within_a_scan_loses_nothing(self, others: Sequence[str]) -> None:
        policy = Clairvoyant()
        for owner in ("training", *others):
            policy.announce(owner, AccessPlan([*range(6)] * 2))
        for key in range(4):
            policy.on_insert(key)
        scan = policy.victims(0)
        proposed = [next(scan), next(scan)]
        with pytest.raises(KeyboardInterrupt):
            scan.throw(KeyboardInterrupt())
        assert proposed == [3, 2]
        policy.on_access([0], "training")
        assert list(policy.victims(1)) == ([3, 2] if others else [0, 3, 2])

    def test_skipped_victims_are_found_again(self) -> None:
        policy = Clairvoyant()
        policy.announce("training", AccessPlan([*range(6)] * 2))
        for key in range(4):
            policy.on_insert(key)
        scan = policy.victims(0)
        assert [next(scan), next(scan)] == [3, 2]
        scan.close()  # 2 is evicted, 3 is pinned by a pending batch
        policy.on_remove(2)
        assert list(policy.victims(0)) == [1]  # 3 is hidden for now
        assert list(policy.victims(0)) == [3, 1]  # restored, since nothing could be evicted
        assert not list(policy.victims(0))  # but only once
        policy.on_access([0], "training")
        assert list(policy.victims(1)) == [0, 3]

    def test_two_pipelines_each_have_their_own_access_plan(self) -> None:
        policy = Clairvoyant()
        policy.announce("somebody", AccessPlan([0, 1, 2, 0, 1, 2], 3))
        policy.announce("validation", AccessPlan([9]))
        hits, evicted = simulate_policy(policy, [0, 1, 2], 2)
        assert (hits, evicted) == (0, [])  # 2 is needed last when it is requested: bypassed
        policy.retract("somebody")
        policy.retract("validation")
        for _ in range(2):
            policy.begin_epoch("somebody")
            policy.on_access([5, 6, 7], "somebody")
        policy.begin_epoch("somebody")
        assert set(policy.victims(2)) == {0, 1}

    def test_keys_that_both_plans_announce_belong_to_the_nearer_one(self) -> None:
        policy = Clairvoyant()
        policy.announce("a", AccessPlan([0, 1, 2, 3, 0, 1, 2, 3], 4))
        policy.announce("b", AccessPlan([3, 2, 1, 0, 3, 2, 1, 0], 4))
        for key in range(3):
            policy.on_insert(key)
        assert list(policy.victims(3)) == [1, 2]  # 0 and 3 are needed at once
        policy.retract("b")
        assert list(policy.victims(0)) == [2, 1]

    def test_wrong_announcements_are_not_believed_for_long(self) -> None:
        """As with a node behind the lister that maps paths to others."""
        files = range(200)
        random_numbers = random.Random(0)
        epochs = [random_numbers.sample(files, 200) for _ in range(6)]
        trace = Trace.epochs(epochs)
        for number, turn in enumerate(trace.turns):
            assert turn.upcoming is not None
            wrong = array("i", [key + 200 for key in turn.upcoming])
            trace.turns[number] = type(turn)(turn.owner, turn.keys, True, wrong, turn.left)
        result = simulate(trace, 100)
        assert [epoch.hits for epoch in result.epochs[2:]] == [100] * 4

    @pytest.mark.parametrize("late", [False, True])
    def test_a_node_between_that_leaves_out_or_shuffles(self, late: bool) -> None:
        random_numbers = random.Random(0)
        epochs = [random_numbers.sample(range(1000), 1000) for _ in range(6)]
        trace = Trace.epochs(epochs)
        for number, turn in enumerate(trace.turns):
            keys = list(turn.keys)
            if late:
                keys = [k for at in range(0, 1000, 50) for k in sorted(keys[at : at + 50])]
            else:
                keys = [key for key in keys if random_numbers.random() < 0.8]
            trace.turns[number] = type(turn)(
                turn.owner, array("i", keys), True, turn.upcoming, turn.left
            )
        result = simulate(trace, 500)
        assert result.hits >= 0.97 * simulate(trace, 500, "keep").hits

    def test_an_announcement_that_is_too_short_is_no_lie(self) -> None:
        policy = Clairvoyant()
        policy.announce("somebody", AccessPlan(range(10)))
        policy.on_access([*range(200)], "somebody")
        policy.announce("somebody", AccessPlan([2, 1, 0, 2]))
        for key in (1, 0):
            policy.on_insert(key)
        assert list(policy.victims(2)) == [0, 1]

    def test_two_access_plans_over_the_same_files_propose_each_once(self) -> None:
        policy = Clairvoyant()
        policy.announce("a", AccessPlan([0, 1, 2, 0, 1, 2]))
        policy.on_access([0, 1], "a")
        policy.on_insert(0)
        policy.on_insert(1)
        policy.announce("b", AccessPlan([2, 1, 0, 2, 1, 0]))
        assert sorted(policy.victims(2)) == [0, 1]

    def test_pipelines_that_come_and_go_are_forgotten(self) -> None:
        policy = Clairvoyant()
        for number in range(50):
            policy.begin_epoch(number)
            for key in range(20):
                policy.on_access([key], number)
        assert len(policy._pipelines) < 10

    def test_who_never_comes_back_leaves_no_trace(self) -> None:
        """Even if it has announced that it would."""
        for known in (True, False):
            first, train = [[*range(45)], [*range(45)]], [[*range(45, 145)]] * 8
            trace = Trace.pipelines([first, train], [(0, None)] + [(1, None)] * 8, known=known)
            result = simulate(trace, 50)
            assert [epoch.hits for epoch in result.epochs[4:]] == [50] * 5, known


def shuffled(files: Sequence[Key], epochs: int, seed: int = 0) -> list[list[Key]]:
    random_numbers = random.Random(seed)
    return [random_numbers.sample(files, len(files)) for _ in range(epochs)]


@pytest.mark.parametrize("known", [True, False])
def test_training_and_validation_share_what_there_is(known: bool) -> None:
    train, validation = shuffled(range(160), 10), shuffled(range(160, 200), 10)
    trace = Trace.pipelines(
        [train, validation], [(which, None) for _ in range(10) for which in (0, 1)], known=known
    )
    for places in (20, 100, 180):
        assert simulate(trace, places).hits >= 0.99 * places * 9


@pytest.mark.parametrize("known", [True, False])
def test_interleaved_pipelines(known: bool) -> None:
    """The smaller set is requested more often, so caching a file of it is worth more."""
    large, small = shuffled(range(120), 12), shuffled(range(120, 180), 24)
    turns = [(which, 4) for _ in range(400) for which in (0, 1)]
    trace = Trace.pipelines([large, small], turns, known=known)
    hits = simulate(trace, 60).hits
    every = [key for turn in trace.turns for key in turn.keys]
    best, _ = models.belady(every, 60)
    assert hits >= (0.98 if known else 0.85) * best
    assert hits > simulate(trace, 60, "keep").hits


def weighted(files: int, epochs: int, exponent: float) -> list[list[Key]]:
    weights = [1 / (rank + 1) ** exponent for rank in range(files)]
    return [random.Random(e).choices(range(files), weights, k=files) for e in range(epochs)]


def test_repeats_within_epochs_are_noticed() -> None:
    """At most three points below the best of the other policies."""
    trace = Trace.epochs(weighted(500, 20, 0.8), known=False)
    for places in (50, 125, 250, 375):
        others = [
            simulate(trace, places, p).hit_rate for p in ("lru", "keep", "sieve", "w-tinylfu")
        ]
        assert simulate(trace, places).hit_rate >= max(others) - 0.03


def test_a_working_set_that_moves_is_noticed() -> None:
    epochs = [random.Random(e).sample(range(e * 20, e * 20 + 125), 125) for e in range(20)]
    for trace in (Trace.epochs(epochs, known=False), Trace(k for e in epochs for k in e)):
        moved = simulate(trace, 250)
        assert moved.hits == moved.requests - 505
        assert simulate(trace, 250, "keep").hits < 0.7 * moved.hits


def test_golden_hit_counts() -> None:
    """A change of behaviour shows up here."""
    shuffled_ = Trace.epochs(shuffled(range(400), 10), known=False)
    zipf = Trace.epochs(weighted(400, 10, 0.8), known=False)
    names = ["clairvoyant", "fifo", "keep", "lfu", "lru", "s3fifo", "sieve", "w-tinylfu"]
    golden = {name: [simulate(t, 100, name).hits for t in (shuffled_, zipf)] for name in names}
    assert golden == GOLDEN


GOLDEN = {
    "clairvoyant": [900, 2418],
    "fifo": [147, 1968],
    "keep": [900, 2157],
    "lfu": [397, 2374],
    "lru": [133, 2175],
    "s3fifo": [586, 2374],
    "sieve": [397, 2388],
    "w-tinylfu": [583, 2428],
}


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


class FormerNames:
    """A policy written for the former method names."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def on_access(self, keys: Sequence[Key], owner: object) -> None: ...
    def on_insert(self, key: Key) -> None: ...
    def on_remove(self, key: Key) -> None: ...
    def begin_epoch(self, owner: object) -> None: ...

    def victims(self, key: Key) -> Iterable[Key]:
        return iter([7])

    def foresee(self, owner: object, future: AccessPlan) -> None:
        self.calls.append(("foresee", owner, future))

    def forget(self, owner: object) -> None:
        self.calls.append(("forget", owner))


class FormerNamesOverBase(BasePolicy):
    on_insert = on_remove = FormerNames.on_insert
    victims = FormerNames.victims  # type: ignore[assignment]

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def foresee(self, owner: object, future: AccessPlan) -> None:
        super().foresee(owner, future)
        self.calls.append(("foresee", owner, future))

    def forget(self, owner: object) -> None:
        super().forget(owner)
        self.calls.append(("forget", owner))


@pytest.mark.parametrize("kind", [FormerNames, FormerNamesOverBase])
@pytest.mark.parametrize("registered", [False, True])
def test_former_method_names_are_called(kind: Callable[[], Any], registered: bool) -> None:
    mine, plan = kind(), AccessPlan([1])
    if registered:
        register("former names", lambda: mine)
    policy = make_policy("former names" if registered else mine)
    assert isinstance(policy, Policy)
    policy.announce("training", plan)
    policy.retract("training")
    assert mine.calls == [("foresee", "training", plan), ("forget", "training")]
    assert [*policy.victims(0)] == [7]
    assert repr(policy) == repr(mine)
    mine.calls.clear()
    simulate(Trace.epochs([[0, 1, 2]]), 3, mine)
    assert [call[0] for call in mine.calls] == ["foresee", "forget"]


def test_a_former_name_may_be_overridden_alone() -> None:
    """Also in a subclass of a policy that has the present names."""

    class Mine(Clairvoyant):
        def foresee(self, owner: object, future: AccessPlan) -> None:
            super().foresee(owner, AccessPlan(reversed(future.keys)))

    policy = make_policy(Mine())
    policy.announce("training", AccessPlan([2, 0, 1, 2]))
    for key in range(3):
        policy.on_insert(key)
    assert [*policy.victims(3)] == []
    assert [*policy.victims(2)] == [0, 1]
    policy.retract("training")
    assert [*policy.victims(2)] == []


def test_present_names_come_before_former_ones() -> None:
    class Mine(Keep):
        announced = False

        def announce(self, owner: object, plan: AccessPlan) -> None:
            self.announced = True

        def forget(self, key: Key) -> None:  # type: ignore[override]
            raise AssertionError("of the policy's own use")

    mine = Mine()
    policy = make_policy(mine)
    assert policy is mine
    policy.announce("training", AccessPlan([1]))
    policy.retract("training")
    assert mine.announced


def test_former_names_do_not_make_a_policy() -> None:
    class OnlyOne(FormerNames):
        forget = None  # type: ignore[assignment]

    class Incomplete:
        foresee, forget = FormerNames.foresee, FormerNames.forget

    for wrong in (OnlyOne(), Incomplete(), FormerNames):
        with pytest.raises(ValueError, match="policy="):
            make_policy(wrong)  # type: ignore[arg-type]
