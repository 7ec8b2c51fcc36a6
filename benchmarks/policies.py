"""Compare the hit rates of the policies on common workloads, in simulation and with a real store.

2,000 files, 20 epochs, caches of 10 to 90% of the files. The hit rate is over all requests except
the first one of each file, which cannot hit. There are two references: Belady's rule with the whole
access plan, and Belady's rule with the plan that a pipeline announces, which is the rest of its
epoch and all of the next one.
`--store` replays every trace through PathLister, GPUPrefetcher and GPUFeatureStore.
`--ablate` leaves out one part of the default policy at a time.
`--cost` measures the time of the policies instead.
"""

import statistics
import time
from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from _ablation import ablate
from _common import parser_for, save
from _workloads import FILES, Epochs, Workload, belady, shuffled, workloads

from gpucache_pipes import GPUFeatureStore, GPUPrefetcher, PathLister, Trace, simulate
from gpucache_pipes.cache import AccessPlan
from gpucache_pipes.cache.policies import make_policy
from gpucache_pipes.cli.charts import line_style

SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)
OTHERS = ("lru", "sieve", "s3fifo", "w-tinylfu", "keep", "lfu", "fifo")


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


def serve(workload: Workload, places: int, known: bool, batch: int = 20) -> tuple[int, int]:
    """Hits and evictions of a GPUFeatureStore behind nodes, for the same requests."""
    pipelines = workload.pipelines
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
        for which, count in workload.turns:
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
        return store.stats().hits, store.stats().evictions


def _requests(node: GPUPrefetcher, epochs: Epochs, batch: int) -> Iterator[None]:
    """Yield once for each request, and take a batch when the first of its files is requested."""
    for epoch in epochs:
        node.reset()
        for position in range(len(epoch)):
            if position % batch == 0:
                next(node)
            yield


def compare(through_store: bool) -> dict[str, Any]:
    """Print and return hit rates, and evictions divided by requests."""
    rates: dict[str, dict[str, float]] = {}
    evicted: dict[str, dict[str, float]] = {}
    names = ("belady", "foresight", "known", "unknown", *OTHERS)
    cleared = ("belady", "foresight", "known", "unknown")
    print(f"{'':26}{'hits':>9}{'evictions':>{9 * len(names) + 4}}")
    print(" " * 26 + "".join(f"{name[:9]:>10}" for name in (*names, *cleared)))
    for name, workload in workloads().items():
        known, unknown = workload.trace(known=True), workload.trace(known=False)
        could = len(known) - len(known.names)
        for share in SHARES:
            places = int(share * len(known.names))
            counts = {
                "belady": belady(known, places, foresight=False),
                "foresight": belady(known, places, foresight=True),
                "known": simulated(known, places),
                "unknown": simulated(unknown, places),
            }
            if through_store and workload.distort is None:
                counts["known"] = serve(workload, places, known=True)
                counts["unknown"] = serve(workload, places, known=False)
            counts |= {policy: simulated(unknown, places, policy) for policy in OTHERS}
            case = f"{name}, {share:.0%}"
            rates[case] = {who: hits / could for who, (hits, _) in counts.items()}
            evicted[case] = {who: count / len(known) for who, (_, count) in counts.items()}
            cells = [rates[case][who] for who in names] + [evicted[case][who] for who in cleared]
            print(f"{name:22}{share:4.0%}" + "".join(f"{cell:10.3f}" for cell in cells), flush=True)
    distorted = {name for name, workload in workloads().items() if workload.distort is not None}
    best = ("lru", "sieve", "s3fifo", "w-tinylfu", "keep")
    followed = [rates[case] for case in rates if case.rpartition(",")[0] not in distorted]
    worst = {
        "known less foresight": min(r["known"] - r["foresight"] for r in followed),
        "foresight less belady": min(r["foresight"] - r["belady"] for r in followed),
        "unknown less the best of " + ", ".join(best): min(
            r["unknown"] - max(r[policy] for policy in best) for r in followed
        ),
    }
    for what, difference in worst.items():
        print(f"{what}: {100 * difference:+.1f} points at worst")
    return {"rates": rates, "evictions": evicted, "worst": worst}


def simulated(trace: Trace, places: int, policy: str = "clairvoyant") -> tuple[int, int]:
    result = simulate(trace, places, policy)
    return result.hits, result.evictions


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

    names = list(dict.fromkeys(case.rpartition(",")[0] for case in rates))[:8]
    figure, panels = plt.subplots(2, 4, figsize=(13, 6), sharex=True, layout="constrained")
    lines = {"known": "clairvoyant, order known", "unknown": "clairvoyant, order unknown"}
    lines |= {name: name for name in ("w-tinylfu", "sieve", "s3fifo", "keep", "lru")}
    for panel, name in zip(panels.flat, names, strict=True):
        for at, (contender, label) in enumerate(lines.items()):
            served = [100 * rates[f"{name}, {share:.0%}"][contender] for share in SHARES]
            style = line_style(at)
            if label != contender:  # the default: on top of those that are level with it
                style |= {"linewidth": 2.5, "zorder": 5 - at}
            panel.plot([100 * share for share in SHARES], served, label=label, **style)
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
    parser.add_argument("--ablate", action="store_true", help="what each part earns, instead")
    parser.add_argument("--cost", action="store_true", help="what the policies take, instead")
    parser.add_argument("--files", type=int, default=1_000_000, help="for --cost")
    parser.add_argument("--plot", help="draw the hit rates to this file")
    args = parser.parse_args()
    if args.ablate:
        figures = ablate(SHARES)
    else:
        figures = cost(args.files, args.rounds) if args.cost else compare(args.store)
    save(args.json, figures)
    if args.plot:
        draw(figures["rates"], args.plot)


if __name__ == "__main__":
    main()
