"""Belady's algorithm over the access plans of pipelines."""

from collections.abc import Container, Iterator, Sequence

from gpucache_pipes.cache.access_plan import AccessPlan
from gpucache_pipes.cache.policies.base import BasePolicy, Key
from gpucache_pipes.cache.policies.eviction_scan import Proposed, SkippedVictims
from gpucache_pipes.cache.policies.pipeline import NEVER, Pipeline

_MAX_UNANNOUNCED = 64
"""Drop a plan when unannounced requests exceed announced ones by more than this many."""

_IGNORED_ANNOUNCEMENTS = 8
"""Ignore this many announcements after that: each trial disturbs the order of an epoch."""


class Clairvoyant(BasePolicy):
    """Evicts the feature whose next use is farthest ahead, and bypasses a new feature if its own
    next use is farther still.

    With all requests known in advance no policy has fewer misses (Belady, "A study of replacement
    algorithms for a virtual-storage computer", IBM Systems Journal 1966; with bypass, since a
    feature can be served without being cached). Pipelines announce the rest of their epoch and,
    where it is known, the next one. Where several pipelines share a store, their schedules so far
    tell when each of them makes its next requests; see Schedule.

    Without an announcement the policy expects each file once an epoch (ByEpoch). Where files repeat
    within an epoch, it takes the policy that would have had the most hits recently (SetDueling).
    All cached keys are compared by the estimated time until their next use. O(log n) amortised for
    each request, with a very small constant for pipelines that follow their plan; see
    AccessPlan. A comment in eviction_scan.py explains how victims are found while some are pinned.

    Sizes play no part. A byte of the cache saves a byte of reading each time it is needed, so what
    is needed farthest ahead is worth least for each byte, be it large or small. A policy that
    prefers small features would have more hits and read more bytes.

        >>> policy = Clairvoyant()
        >>> policy.announce("training", AccessPlan([0, 1, 2, 2, 1, 0]))
        >>> policy.on_access([0, 1, 2], "training")
        >>> policy.on_insert(0)
        >>> policy.on_insert(1)
        >>> list(policy.victims(2))  # 0 is needed after 1
        [0, 1]
    """

    def __init__(self) -> None:
        # The number of requests of all pipelines; and its value when next uses were last updated
        # and when schedules were last estimated.
        self._now = self._updated_at = self._estimated_at = 0
        self._pipelines: dict[object, Pipeline] = {}
        # The pipeline, if there is exactly one.
        self._only: Pipeline | None = None
        # The pipeline of the latest request.
        self._latest: Pipeline | None = None
        # The pipeline that each cached key is filed under; None if its next use is marked in a
        # plan instead.
        self._cached: dict[Key, Pipeline | None] = {}
        self._skipped = SkippedVictims(self._cached)

    def _pipeline(self, owner: object) -> Pipeline:
        pipeline = self._pipelines.get(owner)
        if pipeline is None:
            pipeline = self._pipelines[owner] = Pipeline(self._now)
            self._update_only()
        return pipeline

    def _update_only(self) -> None:
        pipelines = list(self._pipelines.values())
        self._only = pipelines[0] if len(pipelines) == 1 else None

    def _remove_silent_pipelines(self) -> None:
        """Remove pipelines that have no plan and no cached keys, and are silent for long."""
        patience = 4 * max(p.schedule.epoch_duration for p in self._pipelines.values())
        for owner, pipeline in list(self._pipelines.items()):
            if pipeline.is_empty() and pipeline.schedule.silence(self._now) > patience:
                del self._pipelines[owner]
        self._update_only()

    def _resume_ended(self, new: Pipeline, owner: object, keys: Sequence[Key]) -> Pipeline:
        """Continue an ended pipeline under a new owner, if it has used the same files.

        Some training loops create another pipeline, over another source, for each epoch. `keys` are
        the first requests of `owner`. Returns the ended pipeline, or `new` if there is none.
        """
        for other, old in self._pipelines.items():
            seen = old.dueling.by_epoch.has_seen
            if old.retracted and old.plan is None and 2 * sum(map(seen, keys)) > len(keys):
                del self._pipelines[other]
                self._pipelines[owner] = old
                self._update_only()
                old.retracted = False
                old.schedule.begin_epoch(self._now - len(keys))
                old.schedule.request(self._now - len(keys), len(keys))
                old.dueling.begin_epoch()
                return old
        return new

    # Events

    def on_access(self, keys: Sequence[Key], owner: object) -> None:
        """See Policy."""
        self._skipped.restore()
        pipeline = self._latest = self._pipeline(owner)
        pipeline.retracted = False
        pipeline.schedule.request(self._now, len(keys))
        self._now += len(keys)
        if pipeline.plan is not None:
            if not pipeline.plan.follow(keys):
                pipeline.out_of_order.update(keys)
                if pipeline.plan.unannounced > _MAX_UNANNOUNCED:
                    pipeline.ignored_announcements = _IGNORED_ANNOUNCEMENTS
                    self.retract(owner)
            return
        is_new = not pipeline.dueling.by_epoch.known and pipeline.is_empty()
        if is_new and len(self._pipelines) > 1:
            pipeline = self._latest = self._resume_ended(pipeline, owner, keys)
        if len(self._pipelines) > 1:
            for key in keys:
                holder = self._cached.get(key)
                if holder is not None and holder is not pipeline:
                    holder.remove_key(key)
                    pipeline.add_key(key)
                    self._cached[key] = pipeline
        pipeline.dueling.on_access(keys)

    def on_insert(self, key: Key) -> None:
        """See Policy."""
        self._cached[key] = None
        plan = None if self._only is None else self._only.plan
        if plan is not None and (position := plan.next_use(key)) < plan.end:
            plan.mark(position)
        else:
            self._file_under_next_use(key, self._last_user(key))

    def on_remove(self, key: Key) -> None:
        """See Policy."""
        holder = self._cached.pop(key)
        self._skipped.discard(key)
        if holder is not None:
            holder.remove_key(key)

    def begin_epoch(self, owner: object) -> None:
        """See Policy."""
        self._skipped.restore()
        pipeline = self._pipeline(owner)
        pipeline.schedule.begin_epoch(self._now)
        pipeline.dueling.begin_epoch()
        self._estimated_at = -1
        self._remove_silent_pipelines()

    def announce(self, owner: object, plan: AccessPlan) -> None:
        """See Policy."""
        self._skipped.restore()
        pipeline = self._pipeline(owner)
        if pipeline.ignored_announcements:
            pipeline.ignored_announcements -= 1
            return
        self._update_next_uses()
        self._estimated_at = -1
        pipeline.plan = plan
        for key, holder in self._cached.items():
            if holder is not None:
                self._file_under_next_use(key, holder)
            elif plan.next_use(key) == plan.end:
                self._file_under_next_use(key, pipeline)
        # For example the pipeline that stood for files loaded by a warm-up.
        for other, old in list(self._pipelines.items()):
            if old is not pipeline and old.is_empty() and not old.schedule.has_requested:
                del self._pipelines[other]
        self._update_only()

    def retract(self, owner: object) -> None:
        """See Policy."""
        self._skipped.restore()
        pipeline = self._pipelines.get(owner)
        if pipeline is None:
            return
        pipeline.retracted = True
        if pipeline.plan is None:
            return
        self._update_next_uses()
        self._estimated_at = -1
        pipeline.plan = None
        for key in pipeline.no_next_use:
            pipeline.dueling.on_insert(key)
        pipeline.no_next_use.clear()
        for key, holder in self._cached.items():
            if holder is None:
                self._file_under_next_use(key, pipeline)

    # Eviction scans

    def victims(self, key: Key) -> Iterator[Key]:
        """See Policy."""
        self._update_next_uses()
        # A single pipeline needs no estimates, which takes a third of the time.
        if self._only is None:
            return self._victims_of_all(key)
        if self._only.plan is None:
            return self._only.dueling.victims(key)
        return self._victims_of_one(self._only, self._only.plan, key)

    def _victims_of_one(self, pipeline: Pipeline, plan: AccessPlan, key: Key) -> Iterator[Key]:
        limit = plan.next_use(key)
        with self._skipped.scan() as proposed:
            yield from pipeline.no_next_use
            while (position := plan.farthest()) > limit:
                plan.unmark(position)
                candidate = plan.keys[position]
                if candidate in self._cached and candidate not in proposed:
                    if plan.next_use(candidate) == position:
                        proposed[candidate] = plan, position
                        yield candidate
                    else:
                        self._file_under_next_use(candidate, pipeline)

    def _victims_of_all(self, key: Key) -> Iterator[Key]:
        self._estimate_schedules()
        limit, pipeline, _ = self._next_use(key)
        known = pipeline is not None
        if not known:
            limit = self._last_user(key).victim_groups(key)[0][0]
        groups = [group for p in self._pipelines.values() for group in p.victim_groups(key)]
        groups.sort(key=lambda group: -group[0])
        with self._skipped.scan() as proposed:
            for wait, keys in groups:
                if wait < limit or (known and wait == limit):
                    break
                yield from self._victims_needed_after(wait, proposed)
                yield from keys
            yield from self._victims_needed_after(limit, proposed)

    def _victims_needed_after(self, limit: float, proposed: Proposed) -> Iterator[Key]:
        """Cached keys with a known next use later than `limit`, the latest first."""
        pipelines = [p for p in self._pipelines.values() if p.plan is not None]
        while True:
            candidates = [
                (p.time_until(at), p.plan, at)
                for p in pipelines
                if (at := self._farthest_next_use(p, proposed)) >= 0
            ]
            if not candidates:
                return
            wait, plan, position = max(candidates, key=lambda candidate: candidate[0])
            if wait <= limit:
                return
            assert plan is not None
            plan.unmark(position)
            victim = plan.keys[position]
            proposed[victim] = (plan, position)
            yield victim

    def _farthest_next_use(self, pipeline: Pipeline, proposed: Container[Key]) -> int:
        """The last position of the plan that is the nearest next use of a cached key, or -1.

        Keys that are already proposed do not count. Marks on the way that are out of date are
        removed.
        """
        plan = pipeline.plan
        assert plan is not None
        while (position := plan.farthest()) >= 0:
            key = plan.keys[position]
            eligible = key in self._cached and key not in proposed
            if eligible:
                _, nearest, at = self._next_use(key)
                if nearest is pipeline and at == position:
                    return position
            plan.unmark(position)
            if eligible:
                self._file_under_next_use(key, pipeline)
        return -1

    # Next uses

    def _update_next_uses(self) -> None:
        """Mark the next uses of the keys that were requested since the last call."""
        if self._updated_at == self._now:
            return
        self._updated_at = self._now
        for pipeline in self._pipelines.values():
            if pipeline.plan is not None:
                for key in pipeline.plan.mark_next_uses(self._cached):
                    self._file_under_next_use(key, pipeline)
                for key in pipeline.out_of_order & self._cached.keys():
                    self._file_under_next_use(key, pipeline)
                pipeline.out_of_order.clear()

    def _file_under_next_use(self, key: Key, user: Pipeline) -> None:
        """Mark the nearest next use of a cached key; file it under `user` if it has none."""
        holder = self._cached[key]
        if holder is not None:
            holder.remove_key(key)
        _, pipeline, position = self._next_use(key)
        if pipeline is None:
            user.add_key(key)
            self._cached[key] = user
        else:
            assert pipeline.plan is not None
            pipeline.plan.mark(position)
            self._cached[key] = None

    def _next_use(self, key: Key) -> tuple[float, Pipeline | None, int]:
        """The nearest announced use of a key: the time until then, the pipeline, the position.

        (NEVER, None, -1) if no plan has one.
        """
        nearest: tuple[float, Pipeline | None, int] = (NEVER, None, -1)
        for pipeline in self._pipelines.values():
            plan = pipeline.plan
            if plan is not None and (position := plan.next_use(key)) != plan.end:
                wait = pipeline.time_until(position)
                if wait < nearest[0]:
                    nearest = (wait, pipeline, position)
        return nearest

    def _last_user(self, key: Key) -> Pipeline:
        """The pipeline to file a key under that no plan announces.

        One that has requested it, if that is known; else the pipeline of the latest request.
        """
        if self._only is not None:
            return self._only
        for pipeline in self._pipelines.values():
            if pipeline.plan is None and pipeline.dueling.by_epoch.has_seen(key):
                return pipeline
        return self._latest or self._pipeline(None)

    def _estimate_schedules(self) -> None:
        """Estimate when each pipeline makes its next request, and how long it pauses."""
        if self._estimated_at == self._now:
            return
        self._estimated_at = self._now
        pipelines = list(self._pipelines.values())
        remaining = [pipeline.remaining() for pipeline in pipelines]
        for pipeline, own in zip(pipelines, remaining, strict=True):
            schedule = pipeline.schedule
            others = [
                (p.schedule, r)
                for p, r in zip(pipelines, remaining, strict=True)
                if p is not pipeline
            ]
            # Until its pause has been seen: the longest epoch of those that have ended theirs,
            # which are expected to take a turn first.
            turns = (s.epoch_duration for s, r in others if r == 0)
            pipeline.pause = max(turns, default=0) if schedule.pause is None else schedule.pause
            busy = max(s.duration(r) for s, r in others)
            pipeline.next_request = schedule.time_until_next(self._now, pipeline.pause, own, busy)
