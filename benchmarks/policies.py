"""Compare the hit rates of the policies on common workloads, in simulation and with a real store.

2,000 files, 20 epochs, caches of 10 to 90% of the files. The hit rate is over all requests except
the first one of each file, which cannot hit. There are two references: Belady's rule with the whole
access plan, and Belady's rule with the plan that a pipeline announces, which is the rest of its
epoch and all of the next one.
`--store` replays every trace through PathLister, GPUPrefetcher and GPUFeatureStore.
`--cost` measures the time of the policies instead.
"""

import heapq
import random
import statistics
import time
from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from _common import parser_for, save

from gpucache_pipes import GPUFeatureStore, GPUPrefetcher, PathLister, Trace, simulate
from gpucache_pipes.cache import AccessPlan
from gpucache_pipes.cache.policies import make_policy

FILES = 2000
EPOCHS = 20
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)
OTHERS = ("lru", "sieve", "s3fifo", "w-tinylfu", "keep", "lfu", "fifo")
NEVER = 1 << 60

Epochs = list[list[int]]
Turns = list[tuple[int, int | None]]


def shuffled(seed: int, files: range, epochs: int = EPOCHS) -> Epochs:
    numbers = random.Random(seed)
    return [numbers.sample(files, len(files)) for _ in range(epochs)]


def weighted(seed: int, exponent: float) -> Epochs:
    numbers = random.Random(seed)
    files = numbers.sample(range(FILES), FILES)
    weights = [1 / (rank + 1) ** exponent for rank in range(FILES)]
    return [numbers.choices(files, weights, k=FILES) for _ in range(EPOCHS)]


def curriculum(seed: int, window: int) -> Epochs:
    """Epochs over a shuffled window of the files, which slides from the first to the last one."""
    numbers = random.Random(seed)
    starts = [round((FILES - window) * epoch / (EPOCHS - 1)) for epoch in range(EPOCHS)]
    return [numbers.sample(range(start, start + window), window) for start in starts]


def scenarios() -> dict[str, tuple[list[Epochs], Turns]]:
    """The epochs of each pipeline, and how they take turns."""
    alone: Turns = [(0, None)] * EPOCHS
    large, small = range(FILES * 2 // 3), range(FILES * 2 // 3, FILES)
    train, validation = range(FILES * 4 // 5), range(FILES * 4 // 5, FILES)
    return {
        "shuffled": ([shuffled(1, range(FILES))], alone),
        "sequential": ([[[*range(FILES)]] * EPOCHS], alone),
        "zipf 0.8": ([weighted(2, 0.8)], alone),
        "zipf 1.0": ([weighted(3, 1.0)], alone),
        "curriculum, half": ([curriculum(4, FILES // 2)], alone),
        "curriculum, quarter": ([curriculum(4, FILES // 4)], alone),
        "two interleaved": (
            [shuffled(5, large), shuffled(6, small, 2 * EPOCHS)],
            [(turn % 2, 64) for turn in range(2 * EPOCHS * (len(large) // 64 + 1))],
        ),
        "train + validation": (
            [shuffled(7, train), shuffled(8, validation)],
            [(turn % 2, None) for turn in range(2 * EPOCHS)],
        ),
    }


def belady(trace: Trace, places: int, foresight: bool) -> int:
    """Hits of Belady's rule with bypass.

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

    hits = 0
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
        cached[key] = due
        heapq.heappush(heap, (-due, key))
    return hits


class Orders:
    """A sampler, or with `batch` an iterable of batches, that has a given order in each epoch."""

    def __init__(self, epochs: Epochs, batch: int | None = None) -> None:
        self.epochs = epochs
        self.batch = batch
        self.epoch = 0
        self.iterated = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order, as for a DistributedSampler."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        if self.batch is None:
            return iter(self.epochs[self.epoch % len(self.epochs)])
        paths = [f"/{number}" for number in self.epochs[self.iterated]]
        self.iterated += 1
        return (paths[at : at + self.batch] for at in range(0, len(paths), self.batch))


def serve(pipelines: list[Epochs], turns: Turns, places: int, known: bool, batch: int = 20) -> int:
    """Hits of a GPUFeatureStore behind nodes, for the same requests."""
    store = GPUFeatureStore(
        "cpu", max_cache_items=places, asynchronous=False, load_fn=lambda _: torch.zeros(1)
    )
    files = [f"/{number}" for number in range(FILES)]
    running: list[Iterator[None]] = []
    for epochs in pipelines:
        source: Any = Orders(epochs, None if known else batch)
        if known:
            source = PathLister(files, sampler=source, batch_size=batch)
        running.append(_requests(GPUPrefetcher(source, store, depth=2), epochs, batch))
    at = [0] * len(pipelines)
    with store:
        for which, count in turns:
            epochs = pipelines[which]
            epoch, position = divmod(at[which], len(epochs[0]))
            if epoch == len(epochs):
                continue
            rest = len(epochs[0]) - position
            step = rest if count is None else min(count, rest)
            at[which] += step
            for _ in range(position, position + step):
                next(running[which], None)
        store.check()
        return store.stats().hits


def _requests(node: GPUPrefetcher, epochs: Epochs, batch: int) -> Iterator[None]:
    """Yield once for each request, and take a batch when the first of its files is requested."""
    for epoch in epochs:
        node.reset()
        for position in range(len(epoch)):
            if position % batch == 0:
                next(node)
            yield


def compare(through_store: bool) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    names = ("belady", "foresight", "known", "unknown", *OTHERS)
    print(f"{'':24}" + "".join(f"{name:>10}" for name in names))
    for name, (pipelines, turns) in scenarios().items():
        known = Trace.pipelines(pipelines, turns, known=True)
        unknown = Trace.pipelines(pipelines, turns, known=False)
        could = len(known) - len(known.names)
        for share in SHARES:
            places = int(share * len(known.names))
            hits = {
                "belady": belady(known, places, foresight=False),
                "foresight": belady(known, places, foresight=True),
                "known": simulate(known, places).hits,
                "unknown": simulate(unknown, places).hits,
            }
            if through_store:
                hits["known"] = serve(pipelines, turns, places, known=True)
                hits["unknown"] = serve(pipelines, turns, places, known=False)
            hits |= {policy: simulate(unknown, places, policy).hits for policy in OTHERS}
            rates = {contender: count / could for contender, count in hits.items()}
            figures[f"{name}, {share:.0%}"] = rates
            cells = "".join(f"{rates[contender]:10.3f}" for contender in names)
            print(f"{name:20}{share:4.0%}{cells}", flush=True)
    best = ("lru", "sieve", "s3fifo", "w-tinylfu", "keep")
    worst = {
        "known less foresight": min(r["known"] - r["foresight"] for r in figures.values()),
        "foresight less belady": min(r["foresight"] - r["belady"] for r in figures.values()),
        "unknown less the best of " + ", ".join(best): min(
            r["unknown"] - max(r[policy] for policy in best) for r in figures.values()
        ),
    }
    for what, difference in worst.items():
        print(f"{what}: {100 * difference:+.1f} points at worst")
    return {"rates": figures, "worst": worst}


def cost(files: int, rounds: int) -> dict[str, Any]:
    """Measure the nanoseconds of a hit and of a miss, in batches of 256 as the store makes them."""
    orders = shuffled(0, range(files), 3)
    contenders = [("clairvoyant, known", True), ("clairvoyant", False)]
    contenders += [(name, False) for name in OTHERS]
    times: dict[str, dict[str, list[float]]] = {"hit": {}, "miss": {}}
    for _ in range(rounds):
        for name, known in contenders:
            policy = name.partition(",")[0]
            hit, miss = _time_hits(policy, known, orders), _time_misses(policy, known, orders)
            times["hit"].setdefault(name, []).append(hit)
            times["miss"].setdefault(name, []).append(miss)
    start = time.perf_counter()
    plan = AccessPlan(array("i", [*orders[0], *orders[1]]), files)
    build = time.perf_counter() - start
    held = (plan.keys, plan._next_by_key, plan._next_by_position, plan._marks, plan._blocks)
    taken = sum(memoryview(part).nbytes for part in held)
    figures: dict[str, Any] = {"future_seconds": build, "future_bytes_per_file": taken / files}
    print(f"{files} files: a plan takes {build:.2f} s and {taken / files:.0f} bytes a file")
    for what, series in times.items():
        base = statistics.median(series["lru"])
        print(f"ns for each {what} (ratio to lru)")
        for name, values in series.items():
            middle = statistics.median(values)
            figures[f"{what}: {name}"] = {"nanoseconds": middle, "ratio": middle / base}
            print(f"{middle:9.0f} ({middle / base:.2f})  {name}")
    return figures


def _time_hits(name: str, known: bool, orders: Epochs) -> float:
    policy = make_policy(name)
    policy.begin_epoch(0)
    policy.on_access(orders[2], 0)
    for key in orders[2]:
        policy.on_insert(key)
    policy.begin_epoch(0)
    if known:
        policy.announce(0, AccessPlan([*orders[0], *orders[1]], len(orders[0])))
    start = time.perf_counter()
    for at in range(0, len(orders[0]), 256):
        policy.on_access(orders[0][at : at + 256], 0)
    next(policy.victims(0), None)  # includes deferred work
    return (time.perf_counter() - start) / len(orders[0]) * 1e9


def _time_misses(name: str, known: bool, orders: Epochs) -> float:
    """Nanoseconds of a miss, with a full cache of half of the files."""
    policy = make_policy(name)
    places, cached = len(orders[0]) // 2, set[int]()
    seconds, misses = 0.0, 0
    for order, following in pairwise(orders):
        policy.begin_epoch(0)
        if known:
            policy.announce(0, AccessPlan([*order, *following], len(order)))
        for at in range(0, len(order), 256):
            batch = order[at : at + 256]
            policy.on_access(batch, 0)
            absent = [key for key in batch if key not in cached]
            start, full = time.perf_counter(), len(cached) == places
            _insert(policy, absent, cached, places)
            if full:
                seconds += time.perf_counter() - start
                misses += len(absent)
    return seconds / misses * 1e9


def _insert(policy: Any, keys: Sequence[int], cached: set[int], places: int) -> None:
    for key in keys:
        if len(cached) == places:
            victim = next(policy.victims(key), None)
            if victim is None:
                continue
            policy.on_remove(victim)
            cached.remove(victim)
        policy.on_insert(key)
        cached.add(key)


def draw(rates: dict[str, dict[str, float]], path: str) -> None:
    """Draw a panel for each workload."""
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(case.rpartition(",")[0] for case in rates))
    figure, panels = plt.subplots(2, 4, figsize=(13, 6), sharex=True, layout="constrained")
    lines = {"known": "clairvoyant, order known", "unknown": "clairvoyant, order unknown"}
    lines |= {name: name for name in ("w-tinylfu", "sieve", "s3fifo", "keep", "lru")}
    for panel, name in zip(panels.flat, names, strict=True):
        for contender, label in lines.items():
            served = [100 * rates[f"{name}, {share:.0%}"][contender] for share in SHARES]
            style = {"known": "-", "unknown": "--"}.get(contender, ":")
            width = 2.5 if label != contender else 1.3
            shares = [100 * share for share in SHARES]
            panel.plot(shares, served, style, label=label, linewidth=width)
        panel.set(title=name, ylim=(-3, 103))
        panel.grid(alpha=0.3)
    for panel in panels[1]:
        panel.set_xlabel("cache, % of the files")
    for row in panels:
        row[0].set_ylabel("hits, % of what could hit")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=7)
    figure.savefig(path)


def main() -> None:
    parser = parser_for(__doc__, rounds=5)
    parser.add_argument("--store", action="store_true", help="through the real store and nodes")
    parser.add_argument("--cost", action="store_true", help="what the policies take, instead")
    parser.add_argument("--files", type=int, default=1_000_000, help="for --cost")
    parser.add_argument("--plot", help="draw the hit rates to this file")
    args = parser.parse_args()
    figures = cost(args.files, args.rounds) if args.cost else compare(args.store)
    save(args.json, figures)
    if args.plot:
        draw(figures["rates"], args.plot)


if __name__ == "__main__":
    main()
