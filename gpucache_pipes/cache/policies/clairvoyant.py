"""Belady's algorithm over the future that the pipelines announce."""

import heapq
from array import array
from collections.abc import Iterable, Iterator, Sequence

from gpucache_pipes.cache.policies.base import Key

_NEVER = 1 << 62


class _Future:
    """What one pipeline will request: for each key the position of its next use.

    A pipeline that was announced when `start` requests had been made in all is taken to make
    one of its requests for each further one, so that position p is due at `start + p`. With
    one pipeline that is exact; a pipeline that pauses seems overdue, and its features stay.
    """

    def __init__(self, keys: Sequence[Key], start: int) -> None:
        self.start = start
        # When it last came true, in requests to the store.
        self.last = start
        self.next_use: dict[Key, int] = {}
        # after[p]: where the key of position p comes next, found by walking backwards.
        self.after = array("q", bytes(8 * len(keys)))
        for position in range(len(keys) - 1, -1, -1):
            key = keys[position]
            self.after[position] = self.next_use.get(key, _NEVER)
            self.next_use[key] = position

    def due(self, key: Key) -> int:
        """When `key` is next requested by this pipeline, in requests to the store."""
        position = self.next_use.get(key, _NEVER)
        return position if position == _NEVER else self.start + position


class Clairvoyant:
    """The feature whose next use lies farthest ahead goes first; a new one that would be the
    farthest is not kept.

    With the whole future known no policy has fewer misses (Belady, "A study of replacement
    algorithms for a virtual-storage computer", IBM Systems Journal 1966; with bypass since a
    feature can be served without being kept). Pipelines announce the rest of their epoch and,
    where it is known, the next one. O(log n) for each request, paid when something is evicted.

    Where nothing is announced, epochs stand in for the future: what was not used for a whole
    epoch of every pipeline goes first, then what was used in this one, the longest ago first;
    what waits for its use stays. Over epochs that touch each file once this serves
    capacity/files of the requests, which is the most that is possible. Without epochs it is LRU.
    """

    def __init__(self) -> None:
        self._futures: dict[object, _Future] = {}
        self._requests = 0
        # Cached keys and the epoch of their last use, oldest first: those of this epoch, and
        # the others. Each is in exactly one.
        self._used: dict[Key, int] = {}
        self._older: dict[Key, int] = {}
        self._epoch = 0
        # Who begins epochs, and when last: a key waits for its use for as many epochs as there
        # are owners.
        self._owners: dict[object, int] = {}
        # (-due time, key), the farthest on top. An item counts while it is the one in _live;
        # the due time of keys in _moved may have changed since.
        self._heap: list[tuple[int, Key]] = []
        self._live: dict[Key, tuple[int, Key]] = {}
        self._moved: dict[Key, None] = {}

    def on_access(self, keys: Iterable[Key]) -> None:
        """See Policy."""
        for key in keys:
            self._requests += 1
            for future in self._futures.values():
                position = future.next_use.get(key)
                if position is not None:
                    future.last = self._requests
                    self._advance(future, key, position)
                    break
            if self._used.pop(key, None) is None and self._older.pop(key, None) is None:
                continue
            self._used[key] = self._epoch
            self._moved[key] = None

    @staticmethod
    def _advance(future: _Future, key: Key, position: int) -> None:
        following = future.after[position]
        if following == _NEVER:
            del future.next_use[key]
        else:
            future.next_use[key] = following

    def on_insert(self, key: Key) -> None:
        """See Policy."""
        self._used[key] = self._epoch
        self._moved[key] = None

    def on_remove(self, key: Key) -> None:
        """See Policy."""
        self._used.pop(key, None)
        self._older.pop(key, None)
        self._moved.pop(key, None)
        self._live.pop(key, None)

    def victims(self, key: Key) -> Iterator[Key]:
        """See Policy."""
        if self._futures:
            return self._farther_than(self._next_use(key))
        return self._oldest()

    def _oldest(self) -> Iterator[Key]:
        for key, epoch in self._older.items():
            if epoch >= self._epoch - max(1, len(self._owners)):
                break
            yield key
        yield from self._used

    def _farther_than(self, limit: int) -> Iterator[Key]:
        for key in self._moved:
            item = (-self._next_use(key), key)
            if self._live.get(key) != item:
                self._live[key] = item
                heapq.heappush(self._heap, item)
        self._moved.clear()
        if len(self._heap) > 2 * len(self._live) + 64:
            self._heap = list(self._live.values())
            heapq.heapify(self._heap)
        walked = []
        try:
            while self._heap and -self._heap[0][0] > limit:
                item = heapq.heappop(self._heap)
                if self._live.get(item[1]) is item:
                    walked.append(item)
                    yield item[1]
        finally:
            # What was passed over stays; what goes now is dropped by on_remove.
            for item in walked:
                heapq.heappush(self._heap, item)

    def _next_use(self, key: Key) -> int:
        return min((future.due(key) for future in self._futures.values()), default=_NEVER)

    def begin_epoch(self, owner: object) -> None:
        """See Policy."""
        self._epoch += 1
        self._older.update(self._used)
        self._used = {}
        self._owners[owner] = self._epoch
        # Who has not begun one for several rounds of the others is gone.
        patience = self._epoch - 3 * len(self._owners)
        self._owners = {o: epoch for o, epoch in self._owners.items() if epoch >= patience}

    def foresee(self, owner: object, keys: Sequence[Key]) -> None:
        """See Policy."""
        self._futures[owner] = _Future(keys, self._requests)
        # A pipeline that stands still while the others go through all they have announced will
        # hardly go on: what it waits for must not fill the cache.
        patience = self._requests - max(len(f.after) for f in self._futures.values())
        self._futures = {o: f for o, f in self._futures.items() if f.last >= patience}
        self._forget_due_times()

    def forget(self, owner: object) -> None:
        """See Policy."""
        if self._futures.pop(owner, None) is not None:
            self._forget_due_times()

    def _forget_due_times(self) -> None:
        self._heap.clear()
        self._live.clear()
        self._moved = dict.fromkeys((*self._older, *self._used))
