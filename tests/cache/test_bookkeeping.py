"""The bookkeeping by arrays: that it equals a step for each file, and that `check` sees damage."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpucache_pipes.cache import Cache, Ledger, check_cache, make_policy, runs_of
from gpucache_pipes.cache.places import first_pages, pages_in, scattered_among
from gpucache_pipes.cache.policy_log import PolicyLog
from gpucache_pipes.cache.states import ALLOWED, STATES, TRANSITIONS
from gpucache_pipes.testing.policies import traces

PAGE = 16


def new_cache(max_bytes: int | None, max_items: int | None, files: int, policy: Any) -> Cache:
    ledger = Ledger(max_bytes, max_items)
    ledger.page_bytes = PAGE
    cache = Cache(ledger, make_policy(policy), lambda needed, useful, known: needed)
    names = [f"/{n}" for n in range(files)]
    cache.entries.add(names, names)
    return cache


def load(cache: Cache, numbers: list[int], spans: list[int], together: bool) -> None:
    """Load these entries, all at once or one by one."""
    groups = [numbers] if together else [[number] for number in numbers]
    for group in groups:
        loading = cache.start_loading(np.array(group, np.intp))
        layouts = [
            cache.allocator.layout_number(n, ("of", spans[n]), spans[n], spans[n]) for n in loading
        ]
        errors = cache.allocator.allocate(np.array(loading, np.intp), np.array(layouts, np.intp))
        assert not errors
        filling = np.array(loading, np.intp)
        without = filling[cache.entries.state[filling] == 1]
        cache.fail_loading(without)
        filled = np.setdiff1d(filling, without)
        cache.finish_loading(filled, [()] * len(filled))
        check_cache(cache)


def contents(cache: Cache) -> tuple[Any, ...]:
    ledger = cache.ledger
    return (
        cache.entries.state[: len(cache.entries)].tolist(),
        ledger.cached_items,
        ledger.cached_bytes,
        ledger.cached_pages,
        ledger.bypassed_pages,
    )


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 70), min_size=8, max_size=8),
    st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=6), max_size=8),
    st.integers(0, 3),
)
def test_a_group_is_placed_as_one_by_one(
    spans: list[int], batches: list[list[int]], dropped: int
) -> None:
    """Without evictions: with them, which is taken first depends on the order of reading."""
    caches = [new_cache(1 << 20, 100, 8, "lru") for _ in range(2)]
    for batch in batches:
        opened = [cache.open_batch(np.array(batch), None) for cache in caches]
        for cache, together in zip(caches, (True, False), strict=True):
            load(cache, batch, spans, together)
        for cache, number in zip(caches, opened, strict=True):
            cache.release(np.array(batch[:dropped], np.intp))
            check_cache(cache)
            cache.close_batches([number])
            check_cache(cache)
        assert contents(caches[0]) == contents(caches[1])


def test_numbers_of_layouts_are_given_out_again_only_when_nothing_has_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Evicting the last feature of a layout for another one of the same layout, among many."""
    monkeypatch.setattr("gpucache_pipes.cache.layouts._MANY", 1)
    cache = new_cache(80, None, 40, "lru")
    for number in range(40):
        batch = cache.open_batch(np.array([number]), None)
        cache.layouts.tidy()
        load(cache, [number], [16 + number // 2] * 40, together=True)
        cache.close_batches([batch])
        check_cache(cache)
    assert cache.evictions > 30 and len(cache.layouts) < 12


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 70), min_size=8, max_size=8),
    st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=4), max_size=12),
    st.integers(70, 200),
    st.integers(1, 6),
    st.sampled_from(["lru", "clairvoyant", "keep", "sieve"]),
)
def test_no_step_breaks_an_invariant(
    spans: list[int], batches: list[list[int]], max_bytes: int, max_items: int, policy: str
) -> None:
    cache = new_cache(max_bytes, max_items, 8, policy)
    opened: list[int] = []
    for at, batch in enumerate(batches):
        opened.append(cache.open_batch(np.array(batch), at % 2))
        load(cache, batch, spans, together=True)
        if len(opened) > 2:
            cache.close_batches([opened.pop(0)])
            check_cache(cache)
    cache.close_batches(opened)
    check_cache(cache)
    assert not cache.bypassed


def pages(count: int) -> st.SearchStrategy[list[int]]:
    return st.permutations(range(count))


@given(st.lists(st.integers(0, 3), max_size=6), st.data())
def test_places_hold_all_pages(counts: list[int], data: st.DataObject) -> None:
    total = sum(counts)
    taken = np.array(data.draw(st.one_of(st.just(list(range(total))), pages(total))), np.int64)
    each = np.array(counts, np.int64)
    first, scattered = scattered_among(taken, each)
    places = first.copy()
    for at in scattered:
        places[at] = ~places[at]
    numbers = np.arange(len(counts))
    assert pages_in(places, each, numbers, scattered).tolist() == taken.tolist()
    begins, lengths = runs_of(places, each, numbers, scattered)
    runs = [page for b, n in zip(begins, lengths, strict=True) for page in range(b, b + n)]
    assert runs == taken.tolist()
    starts = np.cumsum(each) - each
    for at, count in enumerate(counts):
        own = taken[starts[at] : starts[at] + count].tolist()
        in_a_row = own == list(range(own[0], own[0] + count)) if count else True
        assert (at not in scattered) == in_a_row
        assert not count or first_pages(places)[at] == own[0]


# States


def test_only_what_the_table_has_is_allowed() -> None:
    allowed = {(before, after) for before, after, _ in TRANSITIONS}
    for before in STATES:
        for after in STATES:
            cache = new_cache(None, None, 2, "lru")
            cache.entries.state[0] = before
            assert ALLOWED[after, before] == ((before, after) in allowed)
            if (before, after) in allowed:
                cache.entries.move(np.array([0]), after)
                assert cache.entries.state[0] == after
            else:
                with pytest.raises(
                    AssertionError, match=f"{STATES[before][0]} -> {STATES[after][0]}"
                ):
                    cache.entries.move(np.array([0]), after)


def test_every_state_is_left_and_reached() -> None:
    assert {before for before, _, _ in TRANSITIONS} == set(STATES)
    assert {after for _, after, _ in TRANSITIONS} == set(STATES)


# What check() sees


def damaged(cache: Cache) -> dict[str, Callable[[], Any]]:
    entries, ledger = cache.entries, cache.ledger

    def to(table: Any, at: Any, value: Any) -> Callable[[], Any]:
        return lambda: table.__setitem__(at, value)

    return {
        "a state": to(entries.state, 0, 0),
        "a place": to(entries.place, 0, entries.place[1]),
        "a lost place": to(entries.place, 0, -(1 << 63)),
        "scattered": to(entries.scattered, 0, np.array([0, 2])),
        "a layout": to(cache.layouts.uses, 0, 9),
        "a total": lambda: setattr(ledger, "cached_bytes", 1),
        "items": lambda: setattr(ledger, "cached_items", 0),
        "pages": lambda: ledger.free(np.array([0])),
        "loading": lambda: setattr(cache, "loading", 1),
        "bypassed": lambda: setattr(cache, "bypassed", 1),
        "values": to(entries.values, 5, (1,)),
        "left over": lambda: cache.not_cached.add(0),
        "over budget": lambda: setattr(ledger, "max_bytes", 1),
    }


@pytest.mark.parametrize("damage", damaged(new_cache(None, None, 6, "lru")))
def test_damage_is_seen(damage: str) -> None:
    cache = new_cache(1000, None, 6, "lru")
    load(cache, [0, 1, 2], [32] * 6, together=True)
    check_cache(cache)
    damaged(cache)[damage]()
    with pytest.raises(AssertionError):
        check_cache(cache)


# The log


class Told:
    """A policy that writes down what it is told."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def on_access(self, keys: Any, owner: object) -> None:
        self.calls.append(("access", list(keys), owner))

    def on_insert(self, key: int) -> None:
        self.calls.append(("insert", key))

    def on_remove(self, key: int) -> None:
        self.calls.append(("remove", key))

    def victims(self, key: int) -> Any:
        return iter(())

    def begin_epoch(self, owner: object) -> None:
        self.calls.append(("begin", owner))

    def announce(self, owner: object, plan: Any) -> None:
        self.calls.append(("announce", owner, plan))

    def retract(self, owner: object) -> None:
        self.calls.append(("retract", owner))


class Announced:
    def __init__(self, plan: Any) -> None:
        self.plan = plan


def test_a_policy_is_told_in_order_and_of_the_last_announcement() -> None:
    cache = new_cache(None, 3, 6, Told())
    log, told = cache.log, cache.policy
    late = Announced(None)
    log.requested("a", np.array([1, 2]))
    log.announce("a", Announced("old"))
    log.inserted(np.array([1, 2]))
    log.begin_epoch("a")
    log.announce("a", Announced("new"))
    log.announce("b", late)
    log.removed(np.array([2]))
    log.retract("c")
    assert not told.calls and log.unbuilt() == [late] and len(log._announced) == 2
    log.report()
    assert told.calls == [
        ("access", [1, 2], "a"), ("insert", 1), ("insert", 2), ("begin", "a"),
        ("announce", "a", "new"), ("remove", 2), ("retract", "c"),
    ]  # fmt: skip
    log.report()
    assert len(told.calls) == 7 and log.unbuilt() == [late], "what has no plan waits"
    late.plan = "late"
    log.report()
    assert told.calls[7:] == [("announce", "b", "late")] and log.unbuilt() == []


def test_a_log_of_many_pipelines_does_not_grow_for_ever() -> None:
    cache = new_cache(None, 100, 8, Told())
    for owner in range(5000):
        cache.log.begin_epoch(owner)
        cache.log.announce(owner % 3, Announced(None))
        cache.log.requested(owner, np.arange(8))
        cache.log.retract(owner)
    assert len(cache.log._announced) <= 3 and len(cache.log._events) < 20_000
    begun = [call for call in cache.policy.calls if call[0] == "begin"]
    assert len(begun) > 4000


@given(traces(max_size=30), st.integers(1, 4))
def test_requests_are_dropped_and_changes_are_not(trace: list[int], factor: int) -> None:
    cache = new_cache(None, 100, 8, Told())
    log, told = cache.log, cache.policy
    many = np.zeros(70_000, np.intp)
    for key in trace:
        log.inserted(np.array([key]))
        log.requested("a", many)
        log.removed(np.array([key]))
    log.requested("a", np.array([1]))
    log.report()
    changes = [call for call in told.calls if call[0] != "access"]
    assert changes == [(what, key) for key in trace for what in ("insert", "remove")]
    accesses = [call for call in told.calls if call[0] == "access"]
    assert accesses[-1] == ("access", [1], "a") and len(accesses) <= 3


def test_a_log_of_releases_does_not_grow_for_ever() -> None:
    cache = new_cache(None, None, 8, Told())
    for _ in range(20_000):
        cache.log.inserted(np.arange(8))
        cache.log.removed(np.arange(8))
    assert len(cache.log._events) < 20_000
    cache.log.report()
    assert len(cache.policy.calls) == 20_000 * 16


def test_what_a_policy_was_not_told_stays() -> None:
    class Moody(Told):
        mood = ""

        def on_insert(self, key: int) -> None:
            if self.mood and key == 2:
                raise ValueError(self.mood)
            super().on_insert(key)

    cache = new_cache(None, 3, 6, Moody())
    cache.policy.mood = "not today"
    cache.log.inserted(np.array([1, 2, 3]))
    with pytest.raises(ValueError, match="not today"):
        cache.log.report()
    cache.policy.mood = ""
    cache.log.report()
    assert cache.policy.calls == [("insert", 1), ("insert", 2), ("insert", 3)]


def test_no_plan_is_wanted_by_a_policy_that_ignores_plans() -> None:
    for name, wants in (("keep", False), ("lru", False), ("clairvoyant", True)):
        assert PolicyLog(make_policy(name), new_cache(None, None, 1, "lru").entries).uses_plans is (
            wants
        )
