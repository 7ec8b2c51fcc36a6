"""Models of the published algorithms, with lists, and every step as the papers write it.

Each returns the number of hits, and the evicted keys in order.
"""

import math
from collections.abc import Sequence


def lru(trace: Sequence[int], places: int) -> tuple[int, list[int]]:
    stack: list[int] = []
    evicted_keys, hits = [], 0
    for key in trace:
        if key in stack:
            hits += 1
            stack.remove(key)
        elif len(stack) == places:
            evicted_keys.append(stack.pop(0))
        stack.append(key)
    return hits, evicted_keys


def fifo(trace: Sequence[int], places: int) -> tuple[int, list[int]]:
    line: list[int] = []
    evicted_keys, hits = [], 0
    for key in trace:
        if key in line:
            hits += 1
            continue
        if len(line) == places:
            evicted_keys.append(line.pop(0))
        line.append(key)
    return hits, evicted_keys


def keep(trace: Sequence[int], places: int) -> tuple[int, list[int]]:
    kept = list(dict.fromkeys(trace))[:places]
    return sum(key in kept for key in trace) - len(kept), []


def lfu(trace: Sequence[int], places: int) -> tuple[int, list[int]]:
    """Stores for each key the number of uses and the time of the last one."""
    cached: dict[int, tuple[int, int]] = {}
    evicted_keys, hits = [], 0
    for now, key in enumerate(trace):
        if key in cached:
            hits += 1
        elif len(cached) == places:
            evicted_keys.append(min(cached, key=lambda k: cached[k]))
            del cached[evicted_keys[-1]]
        cached[key] = (cached.get(key, (0, 0))[0] + 1, now)
    return hits, evicted_keys


def sieve(trace: Sequence[int], places: int) -> tuple[int, list[int]]:
    """Algorithm 1 of the paper; the queue is newest first, the hand is the index of a key in it."""
    queue: list[int] = []
    visited: dict[int, bool] = {}
    hand: int | None = None  # a key
    evicted_keys, hits = [], 0
    for key in trace:
        if key in queue:
            hits += 1
            visited[key] = True
            continue
        if len(queue) == places:
            at = len(queue) - 1 if hand is None else queue.index(hand)
            while visited[queue[at]]:
                visited[queue[at]] = False
                at = at - 1 if at > 0 else len(queue) - 1
            hand = queue[at - 1] if at > 0 else None
            evicted_keys.append(queue.pop(at))
        queue.insert(0, key)
        visited[key] = False
    return hits, evicted_keys


def s3fifo(trace: Sequence[int], places: int) -> tuple[int, list[int]]:
    """As in the paper, with the sizes of libCacheSim; queues are oldest first."""
    small: list[int] = []
    main: list[int] = []
    ghosts: list[int] = []
    uses: dict[int, int] = {}
    evicted_keys, hits = [], 0
    small_places = int(0.1 * places)
    warm = False
    for key in trace:
        if key in small or key in main:
            hits += 1
            uses[key] += 1
            continue
        returns = key in ghosts
        if returns:
            ghosts.remove(key)
        evicted = len(small) + len(main) < places
        while not evicted:
            warm = True
            if len(main) > places - small_places or not small:
                oldest = main.pop(0)
                if uses[oldest] > 0:
                    uses[oldest] = min(uses[oldest], 3) - 1
                    main.append(oldest)
                    continue
            else:
                oldest = small.pop(0)
                if uses[oldest] >= 2:
                    uses[oldest] = 0
                    main.append(oldest)
                    continue
                ghosts.append(oldest)
                if len(ghosts) > int(0.9 * places):
                    ghosts.pop(0)
            evicted_keys.append(oldest)
            evicted = True
        if returns or (not warm and len(small) >= small_places):
            main.append(key)
        else:
            small.append(key)
        uses[key] = 0
    return hits, evicted_keys


def w_tinylfu(trace: Sequence[int], places: int) -> tuple[int, list[int]]:
    """A window of 1% of what is cached, a main region in two segments; oldest first."""
    window: list[int] = []
    probation: list[int] = []
    protected: list[int] = []
    counts: dict[int, int] = {}
    counted = 0
    evicted_keys, hits = [], 0
    for key in trace:
        counts[key] = min(15, counts.get(key, 0) + 1)
        counted += 1
        if key in window:
            hits += 1
            window.remove(key)
            window.append(key)
            continue
        if key in protected:
            hits += 1
            protected.remove(key)
            protected.append(key)
            continue
        if key in probation:
            hits += 1
            probation.remove(key)
            protected.append(key)
            if len(protected) > 0.8 * (len(protected) + len(probation)):
                probation.append(protected.pop(0))
            continue
        total = len(window) + len(probation) + len(protected)
        if total == places:
            if counted >= 10 * total:
                counts = {k: count // 2 for k, count in counts.items()}
                counted //= 2
            candidate = window[0] if len(window) >= max(1, total // 100) else None
            victim = (probation + protected + [None])[0]
            loser = candidate
            if candidate is None or (victim is not None and counts[candidate] > counts[victim]):
                loser = victim
            assert loser is not None
            evicted_keys.append(loser)
            for region in (window, probation, protected):
                if loser in region:
                    region.remove(loser)
        window.append(key)
        total = len(window) + len(probation) + len(protected)
        if len(window) > max(1, total // 100):
            probation.append(window.pop(0))
    return hits, evicted_keys


def belady(
    trace: Sequence[int],
    places: int,
    pinned: Sequence[set[int]] | None = None,
    *,
    sparing: bool = False,
) -> tuple[int, list[int]]:
    """Belady's rule with bypass, by a search for the next use each time.

    The keys `pinned[i]` cannot be evicted at request i. Of keys without a next use, the least
    recently used one is evicted first. With `sparing`, a key without a next use replaces nothing,
    and next uses count as equal if no key is used twice from the nearer one on.
    """
    cached: dict[int, int] = {}  # with the time of the last use
    evicted_keys, hits = [], 0
    for now, key in enumerate(trace):

        def next_use(k: int, now: int = now) -> float:
            return next((i for i in range(now + 1, len(trace)) if trace[i] == k), math.inf)

        if key in cached:
            hits += 1
        elif len(cached) == places:
            free = [k for k in cached if pinned is None or k not in pinned[now]]
            # The farthest first; of those without a next use, the least recently used one.
            candidates = sorted(free, key=lambda k: (-next_use(k), cached[k]))
            nearest = next_use(key)
            rest = trace[int(nearest) :] if nearest < math.inf else ()
            if sparing and len(set(rest)) == len(rest):
                candidates = [k for k in candidates if next_use(k) == math.inf > nearest]
            elif nearest < math.inf:
                candidates = [k for k in candidates if next_use(k) > nearest]
            else:
                candidates = [k for k in candidates if next_use(k) == math.inf]
            if not candidates:
                continue
            evicted_keys.append(candidates[0])
            del cached[candidates[0]]
        cached[key] = now
    return hits, evicted_keys
