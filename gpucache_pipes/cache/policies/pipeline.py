"""What the default policy knows of one pipeline."""

from collections import OrderedDict
from collections.abc import Iterable

from gpucache_pipes.cache.access_plan import AccessPlan
from gpucache_pipes.cache.policies.base import Key
from gpucache_pipes.cache.policies.schedule import Schedule
from gpucache_pipes.cache.policies.set_dueling import SetDueling

NEVER = float("inf")


class Pipeline:
    """One pipeline: its plan, its schedule, and the cached keys filed under it.

    A cached key whose next use is announced is marked in a plan. Any other cached key is filed
    under exactly one pipeline: in `no_next_use` while that pipeline has a plan, in `dueling` while
    it has none. Times and durations are counted in requests of all pipelines.

    Args:
        now: the number of requests that all pipelines have made so far.

    Attributes:
        schedule: when it makes its requests.
        plan: the plan that it has announced, or None.
        ignored_announcements: how many announcements the policy still ignores, because one was
            wrong.
        retracted: whether it has retracted its plan and made no request since. A pipeline that
            ends does so.
        out_of_order: keys that were not requested as announced, and whose next use has not been
            updated since.
        no_next_use: cached keys without a known next use, the least recently used first.
        dueling: the policy that orders its keys while it has no plan.
        next_request: the estimated time until its next request.
        pause: the estimated duration of its pause between two epochs.
    """

    def __init__(self, now: int) -> None:
        self.schedule = Schedule(now)
        self.plan: AccessPlan | None = None
        self.ignored_announcements = 0
        self.retracted = False
        self.out_of_order: set[Key] = set()
        self.no_next_use: OrderedDict[Key, None] = OrderedDict()
        self.dueling = SetDueling()
        self.next_request = self.pause = 0.0

    def is_empty(self) -> bool:
        """Whether it has neither a plan nor cached keys."""
        return self.plan is None and not len(self.dueling.by_epoch)

    def remaining(self) -> int:
        """The number of requests left in its epoch, as far as known."""
        if self.plan is not None:
            return max(self.plan.left - self.plan.position, 0)
        return max(self.schedule.epoch_length - self.schedule.requests, 0)

    def time_until(self, position: int) -> float:
        """The estimated time until it reaches a position of its plan."""
        plan, schedule = self.plan, self.schedule
        assert plan is not None
        ahead = max(position - plan.position, 0)
        pause = self.pause if plan.position < plan.left <= position else 0
        return self.next_request + schedule.duration(ahead) + pause

    def add_key(self, key: Key) -> None:
        """File a cached key without a known next use under this pipeline."""
        if self.plan is None:
            self.dueling.on_insert(key)
        else:
            self.no_next_use[key] = None

    def remove_key(self, key: Key) -> None:
        """Remove a key that was filed under this pipeline."""
        if key in self.no_next_use:
            del self.no_next_use[key]
        else:
            self.dueling.on_remove(key)

    def victim_groups(self, key: Key) -> list[tuple[float, Iterable[Key]]]:
        """The keys filed under it, in groups, each with the estimated time until their use.

        The first group is the one that `key` would belong to if it were cached.
        """
        if self.plan is not None:
            return [(NEVER, self.no_next_use)]
        dueling, schedule, remaining = self.dueling, self.schedule, self.remaining()
        dueling.update_shadows()
        by_epoch = dueling.by_epoch
        if dueling.leader is not by_epoch:
            wait = schedule.duration(len(by_epoch) / (dueling.hit_rate or 1))
            return [(self.next_request + wait, dueling.victims(key))]
        # On average, keys used in this epoch are used again in the middle of the next one, and
        # keys that still wait for their use, in the middle of the rest of this one.
        next_epoch = remaining + (schedule.epoch_length or schedule.requests) / 2
        return [
            (self.next_request + schedule.duration(next_epoch) + self.pause, by_epoch.used),
            (self.next_request + schedule.duration(remaining / 2), by_epoch.waiting),
            (NEVER, by_epoch.stale),
        ]
