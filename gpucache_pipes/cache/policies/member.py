"""One of several pipelines that share a store."""

from collections.abc import Iterator

from gpucache_pipes.cache.policies.base import Key
from gpucache_pipes.cache.policies.pipeline import Pipeline
from gpucache_pipes.cache.policies.schedule import Clock, Schedule

LATE, UNKNOWN, NEVER = 1e300, 1e301, 1e302
"""Later than any estimate; the time of a use that is not announced; of one that is not expected."""

_PATIENCE = 2
"""A pipeline that was silent for this many times the longest epoch is over."""


class Member(Pipeline):
    """A pipeline with estimates of when its keys are used. Times are counted in requests of all.

    Args:
        clock: the time of all pipelines.
    """

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock
        self.schedule = Schedule(clock)

    def begin_epoch(self, owner: object = None) -> None:
        """See Policy."""
        super().begin_epoch()
        self.schedule.begin_epoch()

    def is_over(self) -> bool:
        """Whether it was silent for so long that it is not expected to come back."""
        return self.schedule.silence > _PATIENCE * self._clock.longest

    def announces(self, key: Key) -> bool:
        """Whether its plan has a use of a key."""
        return self.plan is not None and self.plan.next_use(key) < self.plan.end

    def time_until_use(self, key: Key) -> float:
        """The estimated time until it uses a key that it has just used."""
        if self.plan is not None:
            return self._time_until(self.plan.next_use(key))
        return LATE if self.schedule.pause is None else self.schedule.period

    def _time_until(self, position: int) -> float:
        plan = self.plan
        assert plan is not None
        if position >= plan.end:
            return UNKNOWN if position == plan.end else NEVER
        left = max(plan.left - plan.position, 0)
        return self.schedule.time_until(max(position - plan.position, 0), left)

    def time_until_last_repeat(self) -> float:
        """The time until the last announced request whose key is announced again."""
        if self.plan is None or self.plan.last_repeated < self.plan.position:
            return 0
        return self._time_until(self.plan.last_repeated)

    def time_until_last_equal(self) -> float:
        """The time until the last announced request that counts as equal to those before it."""
        return self._time_until(self.last_equal())

    def candidates(self, key: Key | None, limit: float) -> Iterator[tuple[float, Key]]:
        """Its cached keys and the times until their next uses, the longest first.

        Args:
            key: what to evict for, if that belongs to this pipeline.
            limit: end with the keys that are not needed later than this.
        """
        if self.is_over():
            yield from ((NEVER, candidate) for candidate in self.cached)
        elif self.plan is not None:
            for position, candidate in self.farthest():
                if (wait := self._time_until(position)) <= limit:
                    return
                yield wait, candidate
        elif key is not None:
            yield from ((NEVER, candidate) for candidate in self.by_epoch.victims(key))
        else:
            stale = set()
            for candidate in self.by_epoch.stale():
                stale.add(candidate)
                yield NEVER, candidate
            if (period := self.schedule.period) > limit:
                yield from ((period, key) for key in self.cached if key not in stale)
