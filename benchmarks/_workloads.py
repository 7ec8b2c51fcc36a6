"""The workloads that policies are compared on, and Belady's rule as their ceiling."""

import heapq
import random
from array import array
from collections.abc import Callable
from dataclasses import dataclass, replace

from gpucache_pipes import Trace
from gpucache_pipes.cache.simulation import Turn

FILES = 2000
EPOCHS = 20
NEVER = 1 << 60

Epochs = list[list[int]]
Turns = list[tuple[int, int | None]]


@dataclass(frozen=True)
class Workload:
    """The epochs of each pipeline, how they take turns, and what happens to a turn on the way.

    With `distort` requests differ from what was announced, so that a store cannot replay it.
    """

    pipelines: list[Epochs]
    turns: Turns
    distort: Callable[[int, Turn], Turn] | None = None

    def trace(self, known: bool) -> Trace:
        trace = Trace.pipelines(self.pipelines, self.turns, known=known)
        if self.distort is not None:
            trace.turns = [self.distort(number, turn) for number, turn in enumerate(trace.turns)]
        return trace


def shuffled(seed: int, files: range, epochs: int = EPOCHS) -> Epochs:
    numbers = random.Random(seed)
    return [numbers.sample(files, len(files)) for _ in range(epochs)]


def weighted(seed: int, exponent: float, files: range = range(FILES)) -> Epochs:
    numbers = random.Random(seed)
    order = numbers.sample(files, len(files))
    weights = [1 / (rank + 1) ** exponent for rank in range(len(files))]
    return [numbers.choices(order, weights, k=len(files)) for _ in range(EPOCHS)]


def curriculum(seed: int, window: int, repeats: bool = False) -> Epochs:
    """Epochs over a shuffled window of the files, which slides from the first to the last one.

    With `repeats` files are drawn from the window with replacement, the middle of it most often.
    """
    numbers = random.Random(seed)
    starts = [round((FILES - window) * epoch / (EPOCHS - 1)) for epoch in range(EPOCHS)]
    if repeats:
        return [
            [start + int(window * numbers.triangular(0, 1)) for _ in range(window)]
            for start in starts
        ]
    return [numbers.sample(range(start, start + window), window) for start in starts]


def rank_of(seed: int, ranks: int) -> Epochs:
    """What a DistributedSampler gives one of several ranks: a random share of the files."""
    return [order[::ranks] for order in shuffled(seed, range(FILES), ranks * EPOCHS)]


def broken_off(number: int, turn: Turn) -> Turn:
    """Every third epoch is left after a third of it, and the next one begins."""
    return replace(turn, keys=turn.keys[: len(turn.keys) // 3]) if number % 3 == 2 else turn


def moved(turn: Turn, distance: int) -> Turn:
    """Requests come up to this many positions later or earlier than announced."""
    numbers = random.Random(len(turn.keys))
    due = [at + numbers.uniform(0, distance) for at in range(len(turn.keys))]
    order = sorted(range(len(due)), key=due.__getitem__)
    return replace(turn, keys=array("i", [turn.keys[at] for at in order]))


def wrong(turn: Turn) -> Turn:
    """The announced files are other ones than those that are requested."""
    upcoming = turn.upcoming
    return replace(turn, upcoming=upcoming and array("i", [key + FILES for key in upcoming]))


def workloads() -> dict[str, Workload]:
    """By name. The first eight are drawn in docs/hit-rates.svg."""
    alone: Turns = [(0, None)] * EPOCHS
    large, small = range(FILES * 2 // 3), range(FILES * 2 // 3, FILES)
    train, validation = range(FILES * 4 // 5), range(FILES * 4 // 5, FILES)
    in_turns: Turns = [(turn % 2, None) for turn in range(2 * EPOCHS)]
    interleaved: Turns = [(turn % 2, 64) for turn in range(4 * EPOCHS * (FILES // 64 + 1))]
    quarters: Turns = [(0, len(train) // 4), (1, None)] * (4 * EPOCHS)
    fifths: Turns = [(0, None), (0, None), (0, None), (0, None), (0, None), (1, None)] * 4
    every = shuffled(1, range(FILES))
    return {
        "shuffled": Workload([every], alone),
        "sequential": Workload([[[*range(FILES)]] * EPOCHS], alone),
        "zipf 0.8": Workload([weighted(2, 0.8)], alone),
        "zipf 1.0": Workload([weighted(3, 1.0)], alone),
        "curriculum, half": Workload([curriculum(4, FILES // 2)], alone),
        "curriculum, quarter": Workload([curriculum(4, FILES // 4)], alone),
        "two interleaved": Workload(
            [shuffled(5, large), shuffled(6, small, 2 * EPOCHS)],
            [(turn % 2, 64) for turn in range(2 * EPOCHS * (len(large) // 64 + 1))],
        ),
        "train + validation": Workload([shuffled(7, train), shuffled(8, validation)], in_turns),
        "a rank of two": Workload([rank_of(9, 2)], [(0, None)] * 2 * EPOCHS),
        "weighted curriculum": Workload([curriculum(10, FILES // 2, repeats=True)], alone),
        "two over the same": Workload([shuffled(11, range(FILES)), every], interleaved),
        "batches of 64 and 16": Workload(
            [weighted(2, 0.8, large), shuffled(6, small, 10)], [(0, 64), (1, 16)] * 420
        ),
        "zipf + validation": Workload(
            [weighted(12, 0.8, train), shuffled(8, validation)], in_turns
        ),
        "validation, quarters": Workload(
            [shuffled(13, train), shuffled(14, validation, 4 * EPOCHS)], quarters
        ),
        "validation, rarely": Workload([shuffled(15, train), shuffled(16, validation, 4)], fifths),
        "epochs broken off": Workload([every], alone, broken_off),
        "new source each time": Workload([[e] for e in every], [(n, None) for n in range(EPOCHS)]),
        "order moved by a node": Workload([every], alone, lambda _, turn: moved(turn, 100)),
        "zipf, moved by a node": Workload([weighted(2, 0.8)], alone, lambda _, t: moved(t, 100)),
        "a pass over others first": Workload(
            [shuffled(17, validation, 2), shuffled(18, train)], [(0, None), *[(1, None)] * EPOCHS]
        ),
        "files named by a node": Workload([every], alone, lambda _, turn: wrong(turn)),
        "curriculum, named by a node": Workload(
            [curriculum(5, FILES // 4)], alone, lambda _, turn: wrong(turn)
        ),
    }


def belady(trace: Trace, places: int, foresight: bool) -> tuple[int, int]:
    """Hits and evictions of Belady's rule with bypass.

    With `foresight`, the rule knows only the requests of this epoch and of the next one.
    """
    keys, owners, epochs = [], [], []
    epoch_of: dict[object, int] = {}
    for turn in trace.turns:
        epoch_of[turn.owner] = epoch_of.get(turn.owner, -1) + turn.begins
        for key in turn.keys:
            keys.append(key)
            owners.append(turn.owner)
            epochs.append(epoch_of[turn.owner])
    following = [NEVER] * len(keys)
    last: dict[int, int] = {}
    for at in range(len(keys) - 1, -1, -1):
        following[at] = last.get(keys[at], NEVER)
        last[keys[at]] = at
    now_in: dict[object, int] = {}

    def visible(at: int) -> int:
        known = at < NEVER and epochs[at] <= now_in.get(owners[at], -1) + 1
        return at if known or not foresight else NEVER

    hits = evictions = 0
    next_use: dict[int, int] = {}
    cached: dict[int, int] = {}
    heap: list[tuple[int, int]] = []
    for at, key in enumerate(keys):
        if now_in.get(owners[at]) != epochs[at]:
            now_in[owners[at]] = epochs[at]
            cached = {k: visible(next_use[k]) for k in cached}
            heap = [(-due, k) for k, due in cached.items()]
            heapq.heapify(heap)
        next_use[key] = following[at]
        due = visible(following[at])
        if key in cached:
            hits += 1
        elif len(cached) == places:
            while cached.get(heap[0][1]) != -heap[0][0]:
                heapq.heappop(heap)
            if -heap[0][0] <= due:
                continue
            del cached[heapq.heappop(heap)[1]]
            evictions += 1
        cached[key] = due
        heapq.heappush(heap, (-due, key))
    return hits, evictions
