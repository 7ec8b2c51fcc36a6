"""EvictionScans over marks: what a walk has named, and what stays out of sight after it."""

from collections.abc import Container

from gpucache_pipes.cache.access_plan import AccessPlan
from gpucache_pipes.cache.policies.base import Key

Named = dict[Key, tuple[AccessPlan, int]]
"""Keys that a walk has named, and the marks by which they are found."""


class EvictionScans:
    """Marks of keys that walks have passed over, out of sight until there are new requests.

    Batches in flight need most of what a walk passes over, and the next walk would name it again,
    to no avail: a batch of which many files are new would take the square of its size.
    """

    def __init__(self, cached: Container[Key]) -> None:
        self._cached = cached
        self._passed: Named = {}
        # Whether it was shown again since the last request because nobody could be taken.
        self._shown = False

    def walk(self) -> "EvictionScan":
        """For the body of a walk, which unmarks what it names and adds it to what this gives."""
        return EvictionScan(self)

    def ended_early(self, named: Named) -> None:
        """A walk has ended before its end: the last that it has named was taken.

        Those before are taken as well, or batches in flight need them: they stay out of sight until
        something is requested, and with it batches change.
        """
        if named:
            _, (plan, position) = named.popitem()
            plan.mark(position)
        # A walk may be closed late: what was taken is not there any more.
        self._passed.update(item for item in named.items() if item[0] in self._cached)
        named.clear()

    def took_nobody(self) -> None:
        """What was passed over before may be free by now.

        It is shown once between two requests: or batches that cannot take anybody would walk past
        all of them each time.
        """
        if not self._shown:
            self.show()
            self._shown = True

    def show(self) -> None:
        """What was passed over can be found again."""
        _mark(self._passed)
        self._passed.clear()
        self._shown = False

    def forget(self, key: Key) -> None:
        """The key is not cached any more."""
        self._passed.pop(key, None)


class EvictionScan:
    """One walk. No contextmanager: there is one for each file that misses."""

    def __init__(self, walks: EvictionScans) -> None:
        self._scans = walks
        self._named: Named = {}

    def __enter__(self) -> Named:
        return self._named

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is GeneratorExit:
            self._scans.ended_early(self._named)
        elif kind is None:
            self._scans.took_nobody()
        _mark(self._named)


def _mark(named: Named) -> None:
    for plan, position in named.values():
        plan.mark(position)
