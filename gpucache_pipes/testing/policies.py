"""The contract that every policy keeps, as tests; inherit it to test a policy of your own."""

from collections.abc import Callable, Container, Iterable, Sequence

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpucache_pipes.cache import AccessPlan
from gpucache_pipes.cache.policies import Key, Policy, make_policy


def traces(keys: int = 8, max_size: int = 60) -> st.SearchStrategy[list[Key]]:
    """A strategy for sequences of at most `max_size` requests, over keys from 0 to `keys` - 1."""
    return st.lists(st.integers(0, keys - 1), max_size=max_size)


def simulate_policy(
    policy: Policy,
    trace: Iterable[Key],
    capacity: int,
    *,
    pinned: Callable[[Key], bool] | None = None,
    epochs: Container[int] = (),
) -> tuple[int, list[Key]]:
    """Serve `trace` from a cache of `capacity` keys, one request at a time.

    It calls the policy as the store does: a new key evicts the first victim that is not pinned, or
    is bypassed. For tests of pins and of the order of evictions; `gpucache_pipes.simulate` does
    everything else.

    Args:
        policy: a new policy. Former method names are accepted, as by `make_policy`.
        trace: the requested keys. All requests are made by the owner "somebody".
        capacity: how many keys fit.
        pinned: tells whether a key is pinned at the current request; None means that no key is.
        epochs: positions in the trace at which an epoch begins.

    Returns:
        The number of hits, and the evicted keys in order.

    Raises:
        AssertionError: the policy proposes a key that is not cached.
    """
    policy = make_policy(policy)
    cached: set[Key] = set()
    evicted: list[Key] = []
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
            evicted.append(victim)
        policy.on_insert(key)
        cached.add(key)
    return hits, evicted


# Each class that inherits a test runs it on its own; nothing is shared between the runs.
_inherited = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.differing_executors, HealthCheck.function_scoped_fixture],
)


_CALLS = ["on_access", "on_insert", "on_remove", "victims", "announce", "retract", "begin_epoch"]


class PolicyContract:
    """Tests of what the store relies on. A subclass defines `make`.

    A policy with the former method names passes, too: it is tested as `make_policy` adapts it.
    """

    def make(self) -> Policy:
        """Return a new policy."""
        raise NotImplementedError

    def _policy(self) -> Policy:
        return make_policy(self.make())

    def test_is_a_policy(self) -> None:
        """It has all methods of Policy."""
        assert isinstance(self._policy(), Policy)

    @_inherited
    @given(traces(), st.integers(1, 6))
    def test_only_cached_keys_go(self, trace: Sequence[Key], capacity: int) -> None:
        """Victims are cached, and a scan proposes each once, also after scans that were stopped."""
        policy = self._policy()
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
                victim = first[number % len(first)]  # the others may have been pinned
                policy.on_remove(victim)
                cached.remove(victim)
            policy.on_insert(key)
            cached.add(key)

    @_inherited
    @given(st.data(), st.lists(st.sampled_from(_CALLS), max_size=40))
    def test_any_calls_in_any_order(self, data: st.DataObject, calls: list[str]) -> None:
        """Several owners, insertions without a request, releases, wrong access plans."""
        policy = self._policy()
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
                scan = list(policy.victims(key))
                assert len(set(scan)) == len(scan)
                assert set(scan) <= cached
                for victim in scan[: data.draw(st.integers(0, 3))]:
                    policy.on_remove(victim)
                    cached.remove(victim)

    @_inherited
    @given(traces(), st.integers(1, 6))
    def test_all_fit_all_hit(self, trace: Sequence[Key], capacity: int) -> None:
        """While there is room, every repeated request hits, and nothing is evicted."""
        few = [key for key in trace if key < capacity]
        hits, evicted = simulate_policy(self._policy(), few, capacity)
        assert hits == len(few) - len(set(few))
        assert not evicted

    @_inherited
    @given(traces(), st.integers(1, 6), st.lists(st.integers(0, 59), max_size=4))
    def test_epochs_and_hints_do_no_harm(
        self, trace: Sequence[Key], capacity: int, epochs: list[int]
    ) -> None:
        """Wrong access plans cost hits and nothing else."""
        policy = self._policy()
        policy.announce("somebody", AccessPlan(reversed(trace), len(trace) // 2))
        policy.announce("other", AccessPlan(trace))
        simulate_policy(policy, trace, capacity, epochs=epochs)
        policy.retract("somebody")
        policy.retract("other")
