"""What a policy has not been told yet."""

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from logging import getLogger
from typing import Any, Protocol

import numpy as np

from gpucache_pipes.cache.access_plan import AccessPlan
from gpucache_pipes.cache.entries import Entries, Numbers
from gpucache_pipes.cache.policies import BasePolicy, Policy

_log = getLogger("gpucache_pipes")

_FEW = 1 << 16
"""So many requests are kept in any case, and as many insertions and removals."""

_MANY = 4096
"""So many other events are reported, whether or not a victim must be chosen."""


class Announcement(Protocol):
    """What a pipeline will request: a plan, once somebody has built it."""

    plan: AccessPlan | None


class PolicyLog:
    """Keeps the events of a policy until it must choose a victim, and then reports them in order.

    So a cache that never has to evict pays one append for a batch, and no plan is built. As long as
    nothing has to be chosen, only the last requests count: of those beyond one for each known file
    the oldest are dropped. Other events are never dropped; where many come together, they are
    reported.
    """

    def __init__(self, policy: Policy, entries: Entries) -> None:
        self._policy = policy
        self._entries = entries
        self._events: deque[tuple[Callable[..., Any], Any, Any]] = deque()
        # In the log: requests, insertions and removals, and other events.
        self._requests = self._changes = self._others = 0
        # By owner the latest announcement, with its number, which the event has.
        self._announced: dict[object, tuple[int, Announcement]] = {}
        self._announcements = 0
        self.uses_plans = getattr(type(policy), "announce", None) is not BasePolicy.announce

    def requested(self, owner: object, numbers: Numbers) -> None:
        """`owner` has requested these entries."""
        self._events.append((self._access, owner, numbers))
        self._requests += len(numbers)
        if self._requests > 2 * _FEW + len(self._entries):
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        keep: deque[tuple[Callable[..., Any], Any, Any]] = deque()
        most = _FEW + len(self._entries)
        for event in self._events:
            if event[0] == self._access and self._requests > most:
                self._requests -= len(event[2])
            else:
                keep.append(event)
        self._events = keep

    def inserted(self, numbers: Numbers) -> None:
        """These entries are cached now."""
        self._events.append((self._insert, None, numbers.astype(np.int32)))
        self._changes += len(numbers)

    def removed(self, numbers: Numbers) -> None:
        """These entries are not cached any more."""
        if len(numbers):
            self._events.append((self._remove, None, numbers.astype(np.int32)))
            self._changes += len(numbers)
            if self._changes > _FEW + 2 * len(self._entries):
                self._report_many()

    def begin_epoch(self, owner: object) -> None:
        """`owner` begins a new pass over its data."""
        self._add(self._begin_epoch, owner)

    def announce(self, owner: object, announcement: Announcement) -> None:
        """`owner` announces its next requests, in place of what it announced before."""
        self._announcements += 1
        self._announced[owner] = self._announcements, announcement
        self._add(self._announce, owner, self._announcements)

    def retract(self, owner: object) -> None:
        """`owner` takes back what it announced."""
        self._announced.pop(owner, None)
        self._add(self._retract, owner)

    def _add(self, report: Callable[..., Any], owner: object, what: Any = None) -> None:
        self._events.append((report, owner, what))
        self._others += 1
        if self._others > _MANY:
            self._report_many()

    def _report_many(self) -> None:
        with suppress(Exception):  # of the policy: the next choice of a victim raises it
            self.report()

    def unbuilt(self) -> list[Any]:
        """The announcements that the policy should get, and that have no plan yet."""
        return [a for _, a in list(self._announced.values()) if a.plan is None]

    def report(self) -> None:
        """Report all events. An announcement without a plan stays in the log.

        Raises what the policy raises. Insertions and removals that it was not told stay in the log.
        """
        while self._events:
            report, owner, what = self._events.popleft()
            report(owner, what)
        waiting = [(self._announce, owner, n) for owner, (n, _) in self._announced.items()]
        self._events.extend(waiting)
        self._changes = self._others = 0

    def _access(self, owner: object, numbers: Numbers) -> None:
        self._requests -= len(numbers)
        self._policy.on_access(self._entries.files(numbers), owner)

    def _insert(self, _: object, numbers: Numbers) -> None:
        self._each(self._insert, self._policy.on_insert, numbers)

    def _remove(self, _: object, numbers: Numbers) -> None:
        self._each(self._remove, self._policy.on_remove, numbers)

    def _each(
        self, event: Callable[..., Any], report: Callable[[int], None], numbers: Numbers
    ) -> None:
        done = 0
        try:
            for file in self._entries.files(numbers):
                report(file)
                done += 1
        finally:
            if done < len(numbers):
                self._events.appendleft((event, None, numbers[done:]))

    def _begin_epoch(self, owner: object, _: object) -> None:
        self._policy.begin_epoch(owner)

    def _announce(self, owner: object, number: int) -> None:
        latest, announcement = self._announced.get(owner, (0, None))
        if latest == number and announcement is not None and announcement.plan is not None:
            del self._announced[owner]
            self._policy.announce(owner, announcement.plan)

    def _retract(self, owner: object, _: object) -> None:
        try:
            self._policy.retract(owner)
        except Exception:  # a finalizer has asked for it: it does not concern who needs a victim
            _log.exception("%r cannot retract", self._policy)
