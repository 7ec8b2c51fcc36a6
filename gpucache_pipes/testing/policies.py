"""A contract that every policy keeps; inherit from it to test one of your own."""

from collections.abc import Callable, Container, Iterable, Sequence

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpucache_pipes.cache import AccessPlan
from gpucache_pipes.cache.policies import Key, Policy


def traces(keys: int = 8, max_size: int = 60) -> st.SearchStrategy[list[Key]]:
    """Sequences of requests over a few keys."""
    return st.lists(st.integers(0, keys - 1), max_size=max_size)


def simulate_policy(
    policy: Policy,
    trace: Iterable[Key],
    capacity: int,
    *,
    pinned: Callable[[Key], bool] | None = None,
    epochs: Container[int] = (),
) -> tuple[int, list[Key]]:
    """Serve `trace` from a cache of `capacity` keys; returns hits and, in order, what went.

    As the store does it: a key that comes in may push out one that is not pinned, or not be
    kept at all. An epoch begins at each position in `epochs`. For pins and for what went; else see
    `gpucache_pipes.simulate`.
    """
    cached: set[Key] = set()
    gone: list[Key] = []
    hits = 0
    for position, key in enumerate(trace):
        if position in epochs:
            policy.begin_epoch("somebody")
        policy.on_access([key], "somebody")
        if key in cached:
            hits += 1
            continue
        if len(cached) == capacity:
            victims = (v for v in policy.victims(key) if pinned is None or not pinned(v))
            victim = next(victims, None)
            if victim is None:
                continue
            assert victim in cached, f"{victim} is not cached"
            policy.on_remove(victim)
            cached.remove(victim)
            gone.append(victim)
        policy.on_insert(key)
        cached.add(key)
    return hits, gone


# One test, run once for each class that inherits it: nothing is shared between them.
_inherited = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.differing_executors, HealthCheck.function_scoped_fixture],
)


_CALLS = ["on_access", "on_insert", "on_remove", "victims", "announce", "retract", "begin_epoch"]


class PolicyContract:
    """What the store relies on. Inherit, and let `make` give a new policy."""

    def make(self) -> Policy:
        """A new policy."""
        raise NotImplementedError

    def test_is_a_policy(self) -> None:
        """It has the methods."""
        assert isinstance(self.make(), Policy)

    @_inherited
    @given(traces(), st.integers(1, 6))
    def test_only_cached_keys_go(self, trace: Sequence[Key], capacity: int) -> None:
        """Victims are cached, and each is named once in a walk, also when others ended early."""
        policy = self.make()
        cached: set[Key] = set()
        for number, key in enumerate(trace):
            policy.on_access([key], None)
            if key in cached:
                continue
            next(policy.victims(key), None)
            first = list(policy.victims(key))
            assert len(set(first)) == len(first)
            assert set(first) <= cached
            if len(cached) == capacity:
                if not first:
                    continue
                gone = first[number % len(first)]  # the others may have been pinned
                policy.on_remove(gone)
                cached.remove(gone)
            policy.on_insert(key)
            cached.add(key)

    @_inherited
    @given(st.data(), st.lists(st.sampled_from(_CALLS), max_size=40))
    def test_any_calls_in_any_order(self, data: st.DataObject, calls: list[str]) -> None:
        """Several owners, files that come without a request, releases, wrong plans."""
        policy = self.make()
        cached: set[Key] = set()
        keys, owners = st.integers(0, 7), st.sampled_from(["one", "two", None])
        for call in calls:
            if call == "on_access":
                policy.on_access(
                    data.draw(st.lists(keys, min_size=1, max_size=5)), data.draw(owners)
                )
            elif call == "on_insert":
                key = data.draw(keys)
                if key not in cached:
                    policy.on_insert(key)
                    cached.add(key)
            elif call == "on_remove" and cached:
                key = data.draw(st.sampled_from(sorted(cached)))
                policy.on_remove(key)
                cached.remove(key)
            elif call == "announce":
                plan = data.draw(traces(max_size=20))
                left = data.draw(st.integers(0, len(plan)))
                policy.announce(data.draw(owners), AccessPlan(plan, left))
            elif call in ("begin_epoch", "retract"):
                getattr(policy, call)(data.draw(owners))
            elif call == "victims":
                key = data.draw(keys)
                walk = list(policy.victims(key))
                assert len(set(walk)) == len(walk)
                assert set(walk) <= cached
                for victim in walk[: data.draw(st.integers(0, 3))]:
                    policy.on_remove(victim)
                    cached.remove(victim)

    @_inherited
    @given(traces(), st.integers(1, 6))
    def test_all_fit_all_hit(self, trace: Sequence[Key], capacity: int) -> None:
        """While there is room, every repeated request is a hit."""
        few = [key for key in trace if key < capacity]
        hits, gone = simulate_policy(self.make(), few, capacity)
        assert hits == len(few) - len(set(few))
        assert not gone

    @_inherited
    @given(traces(), st.integers(1, 6), st.lists(st.integers(0, 59), max_size=4))
    def test_epochs_and_hints_do_no_harm(
        self, trace: Sequence[Key], capacity: int, epochs: list[int]
    ) -> None:
        """Wrong hints cost hits, nothing else."""
        policy = self.make()
        policy.announce("somebody", AccessPlan(reversed(trace), len(trace) // 2))
        policy.announce("nobody", AccessPlan(trace))
        simulate_policy(policy, trace, capacity, epochs=epochs)
        policy.retract("somebody")
        policy.retract("nobody")
