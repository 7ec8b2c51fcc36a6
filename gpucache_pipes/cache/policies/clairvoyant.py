"""Belady's algorithm over the plan that the pipelines announce."""

from collections.abc import Container, Iterator, Sequence

from gpucache_pipes.cache.access_plan import AccessPlan
from gpucache_pipes.cache.policies.base import Key
from gpucache_pipes.cache.policies.eviction_scan import EvictionScans, Named
from gpucache_pipes.cache.policies.pipeline import NEVER, Pipeline

_MOST_UNANNOUNCED = 64
"""So many more requests that were not announced than were show that an announcement is wrong."""

_DISTRUST = 8
"""So many announcements are not believed after that: each trial disturbs the order of an epoch."""


class Clairvoyant:
    """The feature whose next use lies farthest ahead goes first; a new one that would be the
    farthest is not kept.

    With the whole plan known no policy has fewer misses (Belady, "A study of replacement
    algorithms for a virtual-storage computer", IBM Systems Journal 1966; with bypass since a
    feature can be served without being kept). Pipelines announce the rest of their epoch and,
    where it is known, the next one; of several pipelines their rhythm tells who comes when.

    Where nothing is announced, epochs stand in for the future, and where there are none, what would
    have served best of late: see ByEpoch and SetDueling. All of these are compared by when they are
    likely needed. O(log n) amortised for each request, with a very small constant where
    pipelines do as they announced: see AccessPlan.

    Sizes play no part. A byte of the cache saves a byte of reading each time it is needed, so that
    what is needed farthest ahead is worth least for each byte, be it large or small; a policy
    that prefers small features would have more hits and read more.
    """

    def __init__(self) -> None:
        self._now = self._settled = self._looked = 0
        self._pipelines: dict[object, Pipeline] = {}
        # If there is just one.
        self._only: Pipeline | None = None
        self._latest: Pipeline | None = None
        # Who holds a cached key; None: its next use is marked in a plan.
        self._cached: dict[Key, Pipeline | None] = {}
        self._scans = EvictionScans(self._cached)

    def _pipeline(self, owner: object) -> Pipeline:
        pipeline = self._pipelines.get(owner)
        if pipeline is None:
            pipeline = self._pipelines[owner] = Pipeline(self._now)
            self._note_only()
        return pipeline

    def _note_only(self) -> None:
        pipelines = list(self._pipelines.values())
        self._only = pipelines[0] if len(pipelines) == 1 else None

    def _forget_the_gone(self) -> None:
        """Forget pipelines that left nothing behind and have been silent for long."""
        patience = 4 * max(pipeline.schedule.epoch for pipeline in self._pipelines.values())
        for owner, pipeline in list(self._pipelines.items()):
            if pipeline.holds_nothing() and pipeline.schedule.silence(self._now) > patience:
                del self._pipelines[owner]
        self._note_only()

    def _heir(self, new: Pipeline, owner: object, keys: Sequence[Key]) -> Pipeline:
        """The pipeline to take for one that is new: one that has ended, if it used the same files.

        Some make another pipeline, over another source, for each epoch.
        """
        for other, old in self._pipelines.items():
            seen = old.habits.by_epoch.has_seen
            if old.retracted and old.plan is None and 2 * sum(map(seen, keys)) > len(keys):
                del self._pipelines[other]
                self._pipelines[owner] = old
                self._note_only()
                old.retracted = False
                old.schedule.begin_epoch(self._now - len(keys))
                old.schedule.request(self._now - len(keys), len(keys))
                old.habits.begin_epoch()
                return old
        return new

    # What happens

    def on_access(self, keys: Sequence[Key], owner: object) -> None:
        """See Policy."""
        self._scans.show()
        pipeline = self._latest = self._pipeline(owner)
        pipeline.retracted = False
        pipeline.schedule.request(self._now, len(keys))
        self._now += len(keys)
        if pipeline.plan is not None:
            if not pipeline.plan.follow(keys):
                pipeline.moved.update(keys)
                if pipeline.plan.unannounced > _MOST_UNANNOUNCED:
                    pipeline.distrust = _DISTRUST
                    self.retract(owner)
            return
        if not pipeline.habits.by_epoch.known and len(self._pipelines) > 1:
            pipeline = self._latest = self._heir(pipeline, owner, keys)
        if len(self._pipelines) > 1:
            for key in keys:
                holder = self._cached.get(key)
                if holder is not None and holder is not pipeline:
                    holder.drop(key)
                    pipeline.hold(key)
                    self._cached[key] = pipeline
        pipeline.habits.on_access(keys)

    def on_insert(self, key: Key) -> None:
        """See Policy."""
        self._cached[key] = None
        plan = None if self._only is None else self._only.plan
        if plan is not None and (position := plan.next_use(key)) < plan.end:
            plan.mark(position)
        else:
            self._place(key, self._user(key))

    def on_remove(self, key: Key) -> None:
        """See Policy."""
        holder = self._cached.pop(key)
        self._scans.forget(key)
        if holder is not None:
            holder.drop(key)

    def begin_epoch(self, owner: object) -> None:
        """See Policy."""
        self._scans.show()
        pipeline = self._pipeline(owner)
        pipeline.schedule.begin_epoch(self._now)
        pipeline.habits.begin_epoch()
        self._looked = -1
        self._forget_the_gone()

    def announce(self, owner: object, plan: AccessPlan) -> None:
        """See Policy."""
        self._scans.show()
        pipeline = self._pipeline(owner)
        if pipeline.distrust:
            pipeline.distrust -= 1
            return
        self._settle()
        self._looked = -1
        pipeline.plan = plan
        for key, holder in self._cached.items():
            if holder is not None:
                self._place(key, holder)
            elif plan.next_use(key) == plan.end:
                self._place(key, pipeline)
        # Such as the one that stood for files that were loaded in advance.
        for other, old in list(self._pipelines.items()):
            if old is not pipeline and old.holds_nothing() and not old.schedule.begun:
                del self._pipelines[other]
        self._note_only()

    def retract(self, owner: object) -> None:
        """See Policy."""
        self._scans.show()
        pipeline = self._pipelines.get(owner)
        if pipeline is None:
            return
        pipeline.retracted = True
        if pipeline.plan is None:
            return
        self._settle()
        self._looked = -1
        pipeline.plan = None
        for key in pipeline.beyond:
            pipeline.habits.on_insert(key)
        pipeline.beyond.clear()
        for key, holder in self._cached.items():
            if holder is None:
                self._place(key, pipeline)

    # What goes

    def victims(self, key: Key) -> Iterator[Key]:
        """See Policy."""
        self._settle()
        # The same in a third of the time, where there is just one pipeline.
        if self._only is None:
            return self._victims_of_all(key)
        if self._only.plan is None:
            return self._only.habits.victims(key)
        return self._victims_of_one(self._only, self._only.plan, key)

    def _victims_of_one(self, pipeline: Pipeline, plan: AccessPlan, key: Key) -> Iterator[Key]:
        limit = plan.next_use(key)
        with self._scans.walk() as named:
            yield from pipeline.beyond
            while (position := plan.farthest()) > limit:
                plan.unmark(position)
                candidate = plan.keys[position]
                if candidate in self._cached and candidate not in named:
                    if plan.next_use(candidate) == position:
                        named[candidate] = plan, position
                        yield candidate
                    else:
                        self._place(candidate, pipeline)

    def _victims_of_all(self, key: Key) -> Iterator[Key]:
        self._look_around()
        limit, pipeline, _ = self._next_use(key)
        known = pipeline is not None
        if not known:
            limit = self._user(key).groups(key)[0][0]
        groups = [group for p in self._pipelines.values() for group in p.groups(key)]
        groups.sort(key=lambda group: -group[0])
        with self._scans.walk() as named:
            for due, keys in groups:
                if due < limit or (known and due == limit):
                    break
                yield from self._due_after(due, named)
                yield from keys
            yield from self._due_after(limit, named)

    def _due_after(self, limit: float, named: Named) -> Iterator[Key]:
        """Cached keys whose next use is known, and farther ahead than `limit`; farthest first."""
        pipelines = [p for p in self._pipelines.values() if p.plan is not None]
        while True:
            tops = [
                (p.due(at), p.plan, at) for p in pipelines if (at := self._farthest(p, named)) >= 0
            ]
            if not tops:
                return
            due, plan, position = max(tops, key=lambda top: top[0])
            if due <= limit:
                return
            assert plan is not None
            plan.unmark(position)
            candidate = plan.keys[position]
            named[candidate] = (plan, position)
            yield candidate

    def _farthest(self, pipeline: Pipeline, named: Container[Key]) -> int:
        """The last position at which a cached key that is not named is needed next, or -1.

        A key may have several marks, also some that are out of date: what is found is looked at.
        """
        plan = pipeline.plan
        assert plan is not None
        while (position := plan.farthest()) >= 0:
            key = plan.keys[position]
            wanted = key in self._cached and key not in named
            if wanted:
                _, nearest, at = self._next_use(key)
                if nearest is pipeline and at == position:
                    return position
            plan.unmark(position)
            if wanted:
                self._place(key, pipeline)
        return -1

    # Where keys belong

    def _settle(self) -> None:
        """Look at the next uses of what was requested since the last time."""
        if self._settled == self._now:
            return
        self._settled = self._now
        for pipeline in self._pipelines.values():
            if pipeline.plan is not None:
                for key in pipeline.plan.mark_moved(self._cached):
                    self._place(key, pipeline)
                for key in pipeline.moved & self._cached.keys():
                    self._place(key, pipeline)
                pipeline.moved.clear()

    def _place(self, key: Key, user: Pipeline) -> None:
        """Mark the next use of a cached key, or give it to `user` if none is known."""
        holder = self._cached[key]
        if holder is not None:
            holder.drop(key)
        _, pipeline, position = self._next_use(key)
        if pipeline is None:
            user.hold(key)
            self._cached[key] = user
        else:
            assert pipeline.plan is not None
            pipeline.plan.mark(position)
            self._cached[key] = None

    def _next_use(self, key: Key) -> tuple[float, Pipeline | None, int]:
        """When a key is needed next, by whom and at which position; never, where it is unknown."""
        nearest: tuple[float, Pipeline | None, int] = (NEVER, None, -1)
        for pipeline in self._pipelines.values():
            plan = pipeline.plan
            if plan is not None and (position := plan.next_use(key)) != plan.end:
                due = pipeline.due(position)
                if due < nearest[0]:
                    nearest = (due, pipeline, position)
        return nearest

    def _user(self, key: Key) -> Pipeline:
        """Who has requested a key that nobody is known to request again."""
        if self._only is not None:
            return self._only
        for pipeline in self._pipelines.values():
            if pipeline.plan is None and pipeline.habits.by_epoch.has_seen(key):
                return pipeline
        return self._latest or self._pipeline(None)

    def _look_around(self) -> None:
        """Work out when each pipeline makes its next request, and how long it pauses then."""
        if self._looked == self._now:
            return
        self._looked = self._now
        pipelines = list(self._pipelines.values())
        rests = [pipeline.rest() for pipeline in pipelines]
        for pipeline, rest in zip(pipelines, rests, strict=True):
            schedule = pipeline.schedule
            others = [
                (p.schedule, r) for p, r in zip(pipelines, rests, strict=True) if p is not pipeline
            ]
            # As long as nobody knows: until those that have ended an epoch have had their turn.
            turns = (s.epoch for s, r in others if r == 0)
            pipeline.pause = max(turns, default=0) if schedule.pause is None else schedule.pause
            busy = max(s.lasts(r) for s, r in others)
            pipeline.start = schedule.resumes(self._now, pipeline.pause, rest, busy)
