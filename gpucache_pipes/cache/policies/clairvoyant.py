"""The default policy: each pipeline on its own, and what several on one store add."""

from collections.abc import Iterator, Sequence
from heapq import merge

from gpucache_pipes.cache.access_plan import AccessPlan
from gpucache_pipes.cache.policies.base import BasePolicy, Key
from gpucache_pipes.cache.policies.member import Member
from gpucache_pipes.cache.policies.schedule import Clock

_SIMILAR = 1.25
"""Without plans, periods of pipelines count as equal if they differ by less than this factor."""


class Clairvoyant(BasePolicy):
    """Evicts the feature whose next use is farthest ahead, and bypasses a new feature if its own
    next use is farther still, or if the replacement would bring no hit.

    Pipelines announce the rest of their epoch and, where it is known, the next one. Without an
    announcement the policy expects each file once an epoch. Pipeline and ByEpoch have the rules for
    one pipeline.

    Where several pipelines share a store, a cached key belongs to the pipeline that is expected to
    use it next; if no plan announces it, to the one that used it last. Keys of different pipelines
    are compared by the time until their next use, which Member estimates.

    Sizes play no part. A byte of the cache saves a byte of reading each time it is needed, so what
    is needed farthest ahead is worth least for each byte, be it large or small. A policy that
    prefers small features would have more hits and read more bytes.

        >>> policy = Clairvoyant()
        >>> policy.announce("training", AccessPlan([0, 1, 2, 2, 2, 1, 0]))
        >>> policy.on_access([0, 1, 2], "training")
        >>> policy.on_insert(0)
        >>> policy.on_insert(1)
        >>> list(policy.victims(2))  # which is used twice before them; 0 is needed after 1
        [0, 1]
    """

    def __init__(self) -> None:
        self._clock = Clock()
        self._pipelines: dict[object, Member] = {}
        # The pipeline of the latest request.
        self._latest: Member | None = None

    def _pipeline(self, owner: object) -> Member:
        pipelines = self._pipelines
        if owner not in pipelines:
            if self._latest is None and [*pipelines] == [None] and pipelines[None].plan is None:
                # It stood for files that were loaded before any request.
                pipelines[owner] = pipelines.pop(None)
            else:
                pipelines[owner] = Member(self._clock)
        return pipelines[owner]

    def on_access(self, keys: Sequence[Key], owner: object) -> None:
        """See Policy."""
        pipeline = self._latest = self._pipeline(owner)
        pipeline.schedule.request(len(keys))
        self._clock.now += len(keys)
        pipeline.on_access(keys)
        if len(self._pipelines) > 1:
            self._clock.longest = max(p.schedule.busy for p in self._pipelines.values())
            for other in self._pipelines.values():
                if other is not pipeline:
                    other.restore()
                    announced = () if other.plan is None else other.plan.split(keys)[0]
                    self._sort([*filter(other.cached.__contains__, keys), *announced], pipeline)

    def on_insert(self, key: Key) -> None:
        """See Policy."""
        (self._next_user(key) or self._latest or self._pipeline(None)).on_insert(key)

    def on_remove(self, key: Key) -> None:
        """See Policy."""
        holder = self._holder(key)
        assert holder is not None
        holder.on_remove(key)

    def begin_epoch(self, owner: object) -> None:
        """See Policy."""
        pipeline = self._pipeline(owner)
        pipeline.begin_epoch()
        for other, old in list(self._pipelines.items()):
            if old is not pipeline and old.is_over() and old.plan is None and not old.cached:
                del self._pipelines[other]

    def announce(self, owner: object, plan: AccessPlan) -> None:
        """See Policy."""
        pipeline = self._pipeline(owner)
        pipeline.announce(owner, plan)
        if len(self._pipelines) > 1:
            for holder in self._pipelines.values():
                announced, others = plan.split(holder.cached)
                self._sort(others if holder is pipeline else announced, holder)

    def retract(self, owner: object) -> None:
        """See Policy."""
        if (pipeline := self._pipelines.get(owner)) is not None:
            pipeline.retract()
            if len(self._pipelines) > 1:
                self._sort(list(pipeline.cached), pipeline)

    def victims(self, key: Key) -> Iterator[Key]:
        """See Policy."""
        if len(self._pipelines) == 1:
            (only,) = self._pipelines.values()
            return only.victims(key)
        return self._victims_of_all(key)

    # Several pipelines

    def _holder(self, key: Key) -> Member | None:
        """The pipeline that a cached key belongs to."""
        for pipeline in self._pipelines.values():
            if key in pipeline.cached:
                return pipeline
        return None

    def _next_user(self, key: Key) -> Member | None:
        """The pipeline whose plan has the nearest use of a key, if one has any."""
        if len(self._pipelines) == 1:
            return next(iter(self._pipelines.values()))
        announced = [p for p in self._pipelines.values() if p.announces(key)]
        return min(announced, key=lambda p: p.time_until_use(key), default=None)

    def _sort(self, keys: Sequence[Key], user: Member) -> None:
        """Give the cached ones of `keys` to the pipelines that use them next, or else to `user`."""
        for key in keys:
            if (holder := self._holder(key)) is not None:
                new = self._next_user(key) or user
                if new is not holder:
                    holder.on_remove(key)
                    new.on_insert(key)

    def _victims_of_all(self, key: Key) -> Iterator[Key]:
        pipelines = self._pipelines.values()
        user = self._next_user(key) or self._latest or self._pipeline(None)
        limit = own_limit = user.time_until_use(key)
        if user.plan is None:
            limit *= _SIMILAR
        elif (
            sum(p.announces(key) for p in pipelines) == 1
            and max(p.time_until_last_repeat() for p in pipelines) < limit
        ):
            own_limit = max(limit, user.time_until_last_equal())  # as in Pipeline.victims
        candidates = [
            p.candidates(key, own_limit) if p is user else p.candidates(None, limit)
            for p in pipelines
        ]
        for _, victim in merge(*candidates, key=lambda candidate: candidate[0], reverse=True):
            yield victim
        for pipeline in pipelines:
            pipeline.scan_failed()
