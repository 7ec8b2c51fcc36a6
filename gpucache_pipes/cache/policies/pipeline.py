"""One pipeline: Belady's rule over its access plan, or eviction by epochs."""

from collections.abc import Iterator, Sequence

from gpucache_pipes.cache.access_plan import AccessPlan
from gpucache_pipes.cache.policies.base import BasePolicy, Key
from gpucache_pipes.cache.policies.by_epoch import ByEpoch

# Belady's rule with pins
#
# The rule is short: evict the cached key whose next use is farthest ahead. The access plan has
# marks at the next uses of cached keys, and the last mark gives the victim. What does not work:
#
# - Exact marks. A mark is a hint that a scan checks when it meets it. A key may have several marks,
#   some out of date, and so may keys that are not cached. But one mark of a cached key must lie at
#   its next use or beyond it, or a scan would find the key too late. So before each scan the next
#   uses of all keys requested since the last one are marked, cached or not, in one operation.
#
# - Replacing what is needed a little later. Each of the two keys has one hit, if it stays until its
#   next use. A replacement gains the time between the two uses: after the nearer one, the place is
#   free for a key that is used twice before the farther one. After the last announced request
#   whose key is announced again, no key is used twice. So next uses that lie beyond it count as
#   equal, and epochs that touch each file once evict nothing. There are two exceptions. Where
#   epochs are broken off, a nearer use is more likely to happen. Where the next epoch lacks keys of
#   this one, a key that has its last use while the epoch ends is pinned too long to be replaced in
#   this epoch, so that uses in the last part of the epoch are worth less.
#
# - Proposing the same victims in every scan. The store skips pinned keys. Most of these belong to
#   pending batches, and their next uses are often far. There is one scan for each miss, so a batch
#   with many misses would take the square of its size. So a scan removes the marks of what it
#   has proposed when it goes on: that is evicted or pinned. It leaves the mark of the last
#   proposal, since a caller may look at a victim and not evict it.
#
# - Hiding pinned keys until they are unpinned. Policies are not told of pins. Pending batches
#   change with requests, so the next request restores the marks. If a batch is closed without a
#   request, a scan may find too few victims; it then restores them, but only once between two
#   requests, or batches for which nothing can be evicted would skip all of them each time.

_MAX_UNANNOUNCED = 64
"""Drop a plan when unannounced requests exceed announced ones by more than this many."""

_NEARLY_ALL = 0.9
"""An epoch that has made less than this share of its announced requests is broken off."""

_LATE = 8
"""One part of an epoch in this many is its last part; see above."""


class Pipeline(BasePolicy):
    """The policy for one pipeline: Belady's rule while it has a plan, else ByEpoch.

    With all requests known in advance no policy has fewer misses (Belady, "A study of replacement
    algorithms for a virtual-storage computer", IBM Systems Journal 1966; with bypass, since a
    feature can be served without being cached). Among the victims that are equally good it prefers
    to evict none. O(1) amortised for each request.

    Attributes:
        plan: the plan that it has announced, or None.
        by_epoch: the policy without a plan. It is told of all events.
        cached: the cached keys that belong to the pipeline.
        breaks_off: whether an epoch was broken off, and the next one announced.
    """

    def __init__(self) -> None:
        self.plan: AccessPlan | None = None
        self.by_epoch = ByEpoch()
        self.cached = self.by_epoch.cached
        self.breaks_off = False
        # Cached keys without a next use, the least recently used first: those that the plan never
        # had, and those that had their last use.
        self._strangers: dict[Key, None] = {}
        self._done: dict[Key, None] = {}
        # Positions whose marks scans have removed since the last request, and whether a scan that
        # found too few victims has restored them since.
        self._skipped: list[int] = []
        self._restored = False

    def on_access(self, keys: Sequence[Key], owner: object = None) -> None:
        """See Policy."""
        self.by_epoch.on_access(keys)
        if self.plan is None:
            return
        self.restore()
        if not self.plan.follow(keys):
            if self.plan.unannounced > _MAX_UNANNOUNCED:
                self.retract()
                return
            for key in keys:
                if key in self.cached:
                    self._mark(key)

    def on_insert(self, key: Key) -> None:
        """See Policy."""
        self.by_epoch.on_insert(key)
        if self.plan is not None:
            self._mark(key)

    def on_remove(self, key: Key) -> None:
        """See Policy."""
        self.by_epoch.on_remove(key)
        self._strangers.pop(key, None)
        self._done.pop(key, None)

    def begin_epoch(self, owner: object = None) -> None:
        """See Policy."""
        self.by_epoch.begin_epoch()

    def announce(self, owner: object, plan: AccessPlan) -> None:
        """See Policy."""
        if self.plan is not None:
            self.breaks_off |= self.plan.position < _NEARLY_ALL * self.plan.left
        self.retract()
        self.plan = plan
        self._strangers = dict.fromkeys(plan.split(self.cached)[1])

    def retract(self, owner: object = None) -> None:
        """See Policy."""
        self.plan = None
        self._strangers.clear()
        self._done.clear()
        self._skipped.clear()

    def victims(self, key: Key) -> Iterator[Key]:
        """See Policy."""
        plan = self.plan
        if plan is None:
            yield from self.by_epoch.victims(key)
            return
        limit = plan.next_use(key)
        if limit == plan.end and plan.unannounced > 0:
            return  # the plan does not hold so far
        if plan.last_repeated < limit < plan.end:
            limit = max(limit, self.last_equal())
        for _, victim in self.farthest(limit):
            yield victim
        self.scan_failed()

    def last_equal(self) -> int:
        """The last position that counts as equal to others after the last repeat, or -1."""
        plan = self.plan
        if plan is None or self.breaks_off:
            return -1
        late = (plan.end - plan.left) // _LATE if plan.drops_keys else 0
        return plan.end - 1 - late

    def farthest(self, limit: int = -1) -> Iterator[tuple[int, Key]]:
        """The cached keys with next uses beyond `limit`, and these, the farthest first.

        The next use is `plan.end` if the key had its last use, and one more if the plan never had
        it: then it is worth less than any key that the epoch uses.
        """
        plan = self.plan
        assert plan is not None
        self._update()
        for key in self._strangers:
            yield plan.end + 1, key
        if limit < plan.end:
            yield from ((plan.end, key) for key in self._done)
        while (position := plan.farthest()) > limit:
            key = plan.keys[position]
            if key in self.cached:
                next_use = plan.next_use(key)
                if next_use == position:
                    yield position, key
                    self._skipped.append(position)
                elif next_use < position:
                    plan.mark(next_use)
            plan.unmark(position)

    def _update(self) -> None:
        """Mark the next uses of the keys that were requested since the last call."""
        assert self.plan is not None
        for key in self.plan.mark_next_uses():
            if key in self.cached:
                self._done[key] = None

    def _mark(self, key: Key) -> None:
        """Mark the next use of a cached key."""
        plan = self.plan
        assert plan is not None
        self._update()
        self._strangers.pop(key, None)
        self._done.pop(key, None)
        if (position := plan.next_use(key)) == plan.end:
            self._done[key] = None
        else:
            plan.mark(position)

    def scan_failed(self) -> None:
        """A scan has proposed all that it found, and the caller evicts none of it."""
        if not self._restored:
            self.restore()
            self._restored = True

    def restore(self) -> None:
        """Let scans find again what they went past."""
        for position in self._skipped:
            assert self.plan is not None
            self.plan.mark(position)
        self._skipped.clear()
        self._restored = False
