"""What the default policy knows of one pipeline."""

from collections import OrderedDict
from collections.abc import Iterable

from gpucache_pipes.cache.access_plan import AccessPlan
from gpucache_pipes.cache.policies.base import Key
from gpucache_pipes.cache.policies.schedule import Schedule
from gpucache_pipes.cache.policies.set_dueling import SetDueling

NEVER = float("inf")


class Pipeline:
    """What is known of one pipeline, and of the cached keys that it used last.

    Attributes:
        schedule: its rhythm.
        plan: what it has announced.
        distrust: announcements not to believe, since one has not come true.
        retracted: whether it has taken back what it announced, as those do that end.
        moved: requested against what it announced, and not looked at since.
        beyond: cached keys that it is not known to use again, the longest unused first.
        habits: what it holds while it announces nothing.
        start, pause: when it makes its next request, and how long it pauses between epochs, in
            requests of all pipelines.
    """

    def __init__(self, now: int) -> None:
        self.schedule = Schedule(now)
        self.plan: AccessPlan | None = None
        self.distrust = 0
        self.retracted = False
        self.moved: set[Key] = set()
        self.beyond: OrderedDict[Key, None] = OrderedDict()
        self.habits = SetDueling()
        self.start = self.pause = 0.0

    def holds_nothing(self) -> bool:
        """Whether there is no reason to remember it."""
        return self.plan is None and not len(self.habits.by_epoch)

    def rest(self) -> int:
        """Requests that are left in this epoch, as far as is known."""
        if self.plan is not None:
            return max(self.plan.left - self.plan.position, 0)
        return max(self.schedule.length - self.schedule.requests, 0)

    def due(self, position: int) -> float:
        """When it comes to this position of its plan, in requests of all pipelines."""
        plan, schedule = self.plan, self.schedule
        assert plan is not None
        ahead = max(position - plan.position, 0)
        pause = self.pause if plan.position < plan.left <= position else 0
        return self.start + schedule.lasts(ahead) + pause

    def hold(self, key: Key) -> None:
        """Take a cached key whose next use is not known."""
        if self.plan is None:
            self.habits.on_insert(key)
        else:
            self.beyond[key] = None

    def drop(self, key: Key) -> None:
        """The opposite."""
        if key in self.beyond:
            del self.beyond[key]
        else:
            self.habits.on_remove(key)

    def groups(self, key: Key) -> list[tuple[float, Iterable[Key]]]:
        """What it holds, each with the time when it is likely needed; that of a new key first."""
        if self.plan is not None:
            return [(NEVER, self.beyond)]
        habits, schedule, rest = self.habits, self.schedule, self.rest()
        habits.consider()
        by_epoch = habits.by_epoch
        if habits.leader is not by_epoch:
            wait = schedule.lasts(len(by_epoch) / (habits.hit_rate or 1))
            return [(self.start + wait, habits.victims(key))]
        following = rest + (schedule.length or schedule.requests) / 2
        return [
            (self.start + schedule.lasts(following) + self.pause, by_epoch.used),
            (self.start + schedule.lasts(rest / 2), by_epoch.waiting),
            (NEVER, by_epoch.stale),
        ]
