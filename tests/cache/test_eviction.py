"""Eviction through the real store and nodes, with and without announced access plans."""

import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchdata.nodes as tn
from hypothesis import given, settings
from hypothesis import strategies as st

from gpucache_pipes import (
    GPUCachedPathDataLoader,
    GPUCollator,
    GPUFeatureStore,
    GPUPrefetcher,
    PathLister,
)
from gpucache_pipes.cache import AccessPlan, Trace, make_policy, simulate
from gpucache_pipes.cache.policies import BasePolicy
from gpucache_pipes.store import Upcoming


def load(path: str) -> torch.Tensor:
    return torch.tensor([float(path.rpartition("/")[2])])


def names(files: int, start: int = 0) -> list[str]:
    return [f"/features/{number}" for number in range(start, start + files)]


class InThisOrder:
    """A sampler that gives a fixed order in each epoch."""

    def __init__(self, orders: Sequence[Sequence[int]]) -> None:
        self.orders = orders
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(self.orders[self.epoch % len(self.orders)])

    def __len__(self) -> int:
        return len(self.orders[0])


class Paths:
    """An iterable of batches that announces no access plan."""

    def __init__(self, orders: Sequence[Sequence[int]], batch_size: int) -> None:
        self.orders = iter(orders)
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[str]]:
        order = next(self.orders)
        paths = [f"/features/{number}" for number in order]
        return (paths[at : at + self.batch_size] for at in range(0, len(paths), self.batch_size))


def hits_of_epochs(store: GPUFeatureStore, node: Any, epochs: int) -> list[int]:
    hits = []
    for _ in range(epochs):
        before = store.stats().hits
        if isinstance(node, tn.BaseNode):
            node.reset()
        for _ in node:
            pass
        store.check()
        hits.append(store.stats().hits - before)
    return hits


def lister(orders: Sequence[Sequence[int]], batch_size: int) -> PathLister:
    files = names(len(orders[0]))
    return PathLister(files, sampler=InThisOrder(orders), batch_size=batch_size)


SOURCES: dict[str, Callable[[Sequence[Sequence[int]], int], Any]] = {
    "known": lister,
    "unknown": Paths,
}


@pytest.mark.parametrize("source", SOURCES)
@settings(deadline=None, max_examples=60)
@given(
    st.integers(2, 24).flatmap(
        lambda n: st.lists(st.permutations(range(n)), min_size=2, max_size=5)
    ),
    st.data(),
)
def test_any_epochs_at_any_depth_reach_the_ceiling(
    source: str, orders: list[list[int]], data: st.DataObject
) -> None:
    files = len(orders[0])
    places = data.draw(st.integers(1, files), label="places")
    depth = data.draw(st.integers(1, 4), label="depth")
    batch_size = data.draw(st.integers(1, 4), label="batch_size")
    in_flight = batch_size * (depth + 1)
    hits = {}
    for policy in ("clairvoyant", "keep"):
        with GPUFeatureStore(
            "cpu", max_cache_items=places, load_fn=load, asynchronous=False, policy=policy
        ) as store:
            node = GPUPrefetcher(SOURCES[source](orders, batch_size), store, depth=depth)
            hits[policy] = hits_of_epochs(store, node, len(orders))
    for ours, keeps in zip(hits["clairvoyant"][1:], hits["keep"][1:], strict=True):
        assert ours >= places - in_flight
        assert ours >= keeps


@pytest.mark.parametrize("source", SOURCES)
def test_readers_in_the_background_change_little(source: str) -> None:
    random_numbers = random.Random(0)
    orders = [random_numbers.sample(range(300), 300) for _ in range(6)]
    with GPUFeatureStore("cpu", max_cache_items=150, load_fn=load) as store:
        node = GPUPrefetcher(SOURCES[source](orders, 10), store, depth=2)
        hits = hits_of_epochs(store, node, 6)
    assert min(hits[1:]) >= 150 - 30


def test_the_store_serves_what_the_simulation_says() -> None:
    """With requests one at a time, hit for hit."""
    random_numbers = random.Random(1)
    weights = [1 / (rank + 1) for rank in range(100)]
    orders = [random_numbers.choices(range(100), weights, k=150) for _ in range(5)]
    every = [number for order in orders for number in order]
    for policy in ("clairvoyant", "lru", "fifo", "lfu", "sieve", "s3fifo", "w-tinylfu", "keep"):
        with GPUFeatureStore(
            "cpu", max_cache_items=30, load_fn=load, asynchronous=False, policy=policy
        ) as store:
            for path in names(100):  # numbers them, as the trace does
                assert path not in store
            for number in every:
                store.get(f"/features/{number}")
            simulated = simulate(Trace(every), 30, policy)
            assert store.stats().hits == simulated.hits, policy
            assert store.stats().evictions == simulated.evictions, policy


def test_direct_use_reaches_the_ceiling_too() -> None:
    random_numbers = random.Random(0)
    for declared in (True, False):
        with GPUFeatureStore("cpu", max_cache_items=50, load_fn=load) as store:
            for epoch in range(4):
                if declared:
                    store.begin_epoch()
                order = random_numbers.sample(names(100), 100)
                before = store.stats().hits
                for path in order:
                    store.get(path)
                assert store.stats().hits - before == (50 if epoch else 0)


def test_nodes_between_do_no_harm() -> None:
    paths = PathLister(names(200), shuffle=True)
    with GPUFeatureStore("cpu", max_cache_items=100, load_fn=load) as store:
        between = tn.ParallelMapper(tn.Batcher(paths, 20), list, num_workers=1)
        node = GPUCollator(GPUPrefetcher(between, store, depth=1))
        hits = hits_of_epochs(store, node, 4)
    assert min(hits[1:]) >= 100 - 40


def test_a_loader_without_an_access_plan_learns_from_its_epochs() -> None:
    loader = torch.utils.data.DataLoader(names(200), batch_size=10, shuffle=True)  # type: ignore[arg-type]
    with GPUCachedPathDataLoader(loader, max_cache_items=100, load_fn=load) as gpu_loader:
        hits = hits_of_epochs(gpu_loader.store, gpu_loader, 4)
    assert min(hits[1:]) >= 100 - 30


@pytest.mark.parametrize("kind", ["list", "generator", "lister"])
def test_a_new_pipeline_over_a_new_source_in_each_epoch(kind: str) -> None:
    random_numbers = random.Random(0)
    hits = []
    with GPUFeatureStore("cpu", max_cache_items=100, load_fn=load) as store:
        for epoch in range(8):
            paths = random_numbers.sample(names(200), 200)
            batches = [paths[at : at + 10] for at in range(0, 200, 10)]
            source: Any = batches if kind == "list" else (batch for batch in batches)
            if kind == "lister":
                source = PathLister(names(200), shuffle=True, seed=epoch, batch_size=10)
            hits += hits_of_epochs(store, GPUPrefetcher(source, store, depth=1), 1)
    assert min(hits[2:]) >= 100 - 20, hits


def test_positions_from_the_end(tmp_path: Path) -> None:
    for sampler in ([-1], [0, -1, 2], [[-2, 1], [0]]):
        with GPUFeatureStore("cpu", max_cache_items=2, load_fn=load) as store:
            paths = PathLister(names(5), sampler=sampler)
            node = GPUPrefetcher(paths, store)
            node.reset()
            assert list(paths.upcoming()) == 2 * [
                names(5)[i]
                for element in sampler
                for i in (element if isinstance(element, list) else [element])
            ]
            assert len(list(node)) == len(sampler)


def test_files_that_came_without_a_request_can_go() -> None:
    for policy in ("clairvoyant", "w-tinylfu"):
        random_numbers = random.Random(0)
        weights = [1 / (rank + 1) for rank in range(80)]
        with GPUFeatureStore(
            "cpu", max_cache_items=50, load_fn=load, asynchronous=False, policy=policy
        ) as store:
            store.announce(None, names(200))  # numbers them
            store.warm(names(30, 100), progress=False)
            for path in random_numbers.choices(names(80), weights, k=1000):
                store.get(path)
            store.check()


def test_resumed_pipelines_know_what_is_left() -> None:
    def pipeline(store: GPUFeatureStore) -> tuple[PathLister, GPUPrefetcher]:
        paths = PathLister(names(100), shuffle=True, batch_size=5)
        return paths, GPUPrefetcher(paths, store, depth=1)

    with GPUFeatureStore("cpu", max_cache_items=50, load_fn=load) as store:
        _, node = pipeline(store)
        node.reset()
        for _ in range(10):
            next(node)
        state = node.state_dict()
        node.shutdown()
        paths, resumed = pipeline(store)
        resumed.reset(state)
        assert paths.upcoming().left == 50
        assert sum(1 for _ in range(10) if next(resumed) is not None) == 10
        hits = hits_of_epochs(store, resumed, 3)
    assert min(hits[1:]) >= 50 - 10


def test_several_pipelines_and_several_stores() -> None:
    with (
        GPUFeatureStore("cpu", max_cache_items=60, load_fn=load) as first,
        GPUFeatureStore("cpu", max_cache_items=30, load_fn=load) as second,
    ):
        train = GPUPrefetcher(PathLister(names(100), shuffle=True, batch_size=5), first, depth=1)
        validation = GPUPrefetcher(PathLister(names(20, 100), batch_size=5), first, depth=1)
        other = GPUPrefetcher(PathLister(names(100), shuffle=True, batch_size=5), second, depth=1)
        served = []
        for _ in range(5):
            hits = hits_of_epochs(first, train, 1) + hits_of_epochs(first, validation, 1)
            served.append(sum(hits))
            hits_of_epochs(second, other, 1)
    assert min(served[2:]) >= 60 - 10
    assert second.stats().hits >= 4 * (30 - 10)


@given(
    st.lists(st.integers(0, 9), max_size=40),
    st.lists(st.lists(st.integers(0, 9), max_size=8), max_size=10),
    st.sampled_from(
        [list, partial(array, "i"), partial(np.array, dtype="i4"), partial(np.array, dtype="i8")]
    ),
    st.data(),
)
def test_an_access_plan_that_holds_knows_each_next_use(
    keys: list[int], others: list[list[int]], kind: Any, data: st.DataObject
) -> None:
    left = data.draw(st.integers(0, len(keys)))
    plan = AccessPlan(kind(keys), left)
    cached = data.draw(st.lists(st.integers(0, 12), unique=True))
    assert plan.split(cached) == (
        [key for key in cached if key in keys],
        [key for key in cached if key not in keys],
    )
    again = [at for at, key in enumerate(keys) if key in keys[at + 1 :]]
    assert plan.last_repeated == max(again, default=-1)
    assert plan.drops_keys == (left < len(keys) and len([at for at in again if at < left]) < left)
    at = marked = 0
    while at < len(keys):
        count = data.draw(st.integers(1, 6))
        assert plan.follow(keys[at : at + count])
        at += len(keys[at : at + count])
        for key in range(11):
            expected = keys.index(key, at) if key in keys[at:] else len(keys)
            assert plan.next_use(key) == expected
        if data.draw(st.booleans()):
            passed = range(marked, at)
            assert plan.mark_next_uses() == [keys[p] for p in passed if p not in again]
            marked = at
            farthest = plan.farthest()
            assert farthest >= max(
                (keys.index(k, at) for k in keys[:at] if k in keys[at:]), default=-1
            )
    # It gives valid answers after any other requests, too.
    plan = AccessPlan(keys, len(keys) // 2)
    for requested in others:
        plan.follow(requested)
        for key in range(11):
            position = plan.next_use(key)
            assert position == len(keys) or keys[position] == key


@given(st.sets(st.integers(0, 4000), min_size=1), st.sets(st.integers(0, 4000)))
def test_the_farthest_mark_is_found(marked: set[int], unmarked: set[int]) -> None:
    plan = AccessPlan([*range(4001)])
    for position in range(4001):
        plan.unmark(position)
    for position in marked:
        plan.mark(position)
    for position in unmarked:
        plan.unmark(position)
    assert plan.farthest() == max(marked - unmarked, default=-1)


@pytest.mark.parametrize("warm", [False, True])
def test_a_batch_of_misses_does_not_skip_its_own_keys_for_each_of_them(warm: bool) -> None:
    feature = torch.ones(4)
    random_numbers = random.Random(0)
    orders = [random_numbers.choices(range(2000), k=2000) for _ in range(4)]
    policy = make_policy("clairvoyant")
    victims, proposed, scans = policy.victims, 0, 0

    def counted(key: int) -> Iterator[int]:
        nonlocal proposed, scans
        scans += 1
        for victim in victims(key):
            proposed += 1
            yield victim

    policy.victims = counted  # type: ignore[method-assign]
    with GPUFeatureStore(
        "cpu",
        load_fn=lambda path: feature,
        max_cache_items=1000,
        asynchronous=False,
        policy=policy,
    ) as store:
        if warm:
            store.warm(names(2000), progress=False)
        hits_of_epochs(store, GPUPrefetcher(lister(orders, 100), store, depth=2), 4)
        assert store.stats().evictions > 1000
    assert 0 < proposed < 8 * scans


def test_epochs_that_touch_each_file_once_evict_nothing() -> None:
    for source in SOURCES.values():
        random_numbers = random.Random(0)
        orders = [random_numbers.sample(range(300), 300) for _ in range(6)]
        with GPUFeatureStore("cpu", max_cache_items=120, load_fn=load, asynchronous=False) as store:
            node = GPUPrefetcher(source(orders, 10), store, depth=2)
            assert hits_of_epochs(store, node, 6) == [0] + [120] * 5
            assert not store.stats().evictions


@pytest.mark.parametrize("policy", ["clairvoyant", "lru", "w-tinylfu"])
@pytest.mark.parametrize("hint", ["retract", "request", "begin_epoch", "announce"])
def test_a_wrong_owner_is_an_error_of_who_names_it(policy: str, hint: str) -> None:
    wrong: Any = []
    with GPUFeatureStore("cpu", load_fn=load, max_cache_items=2, policy=policy) as store:
        calls: dict[str, Callable[[], Any]] = {
            "retract": lambda: store.retract(wrong),
            "request": lambda: store.request(names(2), owner=wrong),
            "begin_epoch": lambda: store.begin_epoch(wrong),
            "announce": lambda: store.announce(wrong, names(3)),
        }
        with pytest.raises(TypeError, match=r"owner=\[\] must be hashable"):
            calls[hint]()
        for _ in range(3):  # the policy is not told
            assert [float(x) for x in store.get_batch(names(5))] == [0, 1, 2, 3, 4]
        store.check()


@pytest.mark.parametrize(
    ("order", "left"), [([0, 1], -3), ([0, 1], 3), ([0, 5], 1), ([-1, 0], 1), ([], 1)]
)
def test_a_wrong_order_is_an_error_of_who_announces_it(order: list[int], left: int) -> None:
    with pytest.raises(ValueError, match=r"order has positions|left="):
        Upcoming(names(3), order, left)
    with pytest.raises(ValueError, match=r"left=|is negative"):
        AccessPlan(order if order != [0, 5] else [0, -5], left)


def test_a_policy_that_fails_for_a_finalizer_fails_nobody_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Failing(BasePolicy):
        def on_insert(self, key: int) -> None: ...
        def on_remove(self, key: int) -> None: ...
        def victims(self, key: int) -> Iterator[int]:
            return iter(())

        def retract(self, owner: object) -> None:
            raise LookupError("of the policy")

    with GPUFeatureStore("cpu", load_fn=load, max_cache_items=2, policy=Failing()) as store:
        store.retract("somebody")
        for number in range(4):
            assert float(store.get(f"/features/{number}")) == number
        store.check()
    assert "of the policy" in caplog.text
