"""Eviction scans over the marks of access plans."""

from collections.abc import Container

from gpucache_pipes.cache.access_plan import AccessPlan
from gpucache_pipes.cache.policies.base import Key

# Belady's rule with pins
#
# The rule is short: evict the cached key whose next use is farthest ahead. Each access plan has
# marks at the next uses of cached keys, and the last mark gives the victim. What does not work:
#
# - Exact marks. Several pipelines may announce the same key, each with its own next use, so each
#   eviction and each request would have to update several plans. Instead a mark is a hint that
#   a scan checks when it meets it. A key may have several marks, some out of date, and evicted keys
#   keep theirs. But one mark must lie at the nearest next use or beyond it, or a scan would
#   find the key too late. A request moves a next use farther, so the policy marks the next uses
#   of all requested keys before each scan. A mark that is too far costs one removal.
#
# - Proposing the same victims in every scan. The store skips pinned keys. Most of these belong to
#   pending batches, and in epochs that touch each file once, the next use of a key just requested
#   is farther than that of any key still to come. There is one scan for each miss, so a batch with
#   many misses would take the square of its size. So later scans do not see skipped victims.
#
# - Hiding them until they are unpinned. Policies are not told of pins. Pending batches change with
#   requests, so the next request restores hidden victims. If a batch is closed without a request,
#   a scan may find too few victims; it then restores them, but only once between two requests, or
#   batches for which nothing can be evicted would skip all of them each time.
#
# - Treating all ends of a scan alike. If the caller stops a scan, the victims before the last are
#   evicted or pinned: hide those that are still cached (a stopped generator may be closed late).
#   The last one keeps its mark, since a caller may look at a victim and not evict it. If the scan
#   runs out, the caller evicts nothing. If it fails, for example by an interrupt, nothing is
#   known. In both cases every mark is put back.
#
# - Repairing a wrong announcement. Keys requested out of order are marked anew, but a plan with
#   too many unannounced requests is dropped as a whole, since epochs serve as well without it. The
#   next announcements of the pipeline are ignored: each trial disturbs the order of an epoch.

Proposed = dict[Key, tuple[AccessPlan, int]]
"""Keys that a scan has proposed, each with the plan and the position of its mark."""


class SkippedVictims:
    """Victims that the store has skipped. Scans do not find them until the next request.

    Args:
        cached: the keys that are cached, as the policy updates them.
    """

    def __init__(self, cached: Container[Key]) -> None:
        self._cached = cached
        self._skipped: Proposed = {}
        # Whether a scan without success has restored them since the last request.
        self._restored = False

    def scan(self) -> "EvictionScan":
        """A context for one eviction scan; it gives the dict of proposed keys.

        The scan removes the mark of each key that it proposes, and adds it to the dict.
        """
        return EvictionScan(self)

    def scan_stopped(self, proposed: Proposed) -> None:
        """The caller has stopped a scan: hide what it proposed, except for the last key.

        The others are evicted, or pinned by pending batches. Leaves `proposed` empty.
        """
        if proposed:
            _, (plan, position) = proposed.popitem()
            plan.mark(position)
        # A scan may be closed late, after the victims have been removed.
        self._skipped.update(item for item in proposed.items() if item[0] in self._cached)
        proposed.clear()

    def scan_exhausted(self) -> None:
        """A scan has proposed all that it found, and the caller evicts none of it.

        Skipped victims may be unpinned by now. They are restored once between two requests, or
        batches for which nothing can be evicted would skip all of them each time.
        """
        if not self._restored:
            self.restore()
            self._restored = True

    def restore(self) -> None:
        """Mark all skipped victims again, so that scans find them."""
        _mark_all(self._skipped)
        self._skipped.clear()
        self._restored = False

    def discard(self, key: Key) -> None:
        """The key is not cached any more."""
        self._skipped.pop(key, None)


class EvictionScan:
    """The context of one scan. A class, since a scan per miss is too many for `contextmanager`."""

    def __init__(self, skipped: SkippedVictims) -> None:
        self._skipped = skipped
        self._proposed: Proposed = {}

    def __enter__(self) -> Proposed:
        return self._proposed

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is GeneratorExit:
            self._skipped.scan_stopped(self._proposed)
        elif kind is None:
            self._skipped.scan_exhausted()
        _mark_all(self._proposed)


def _mark_all(proposed: Proposed) -> None:
    for plan, position in proposed.values():
        plan.mark(position)
