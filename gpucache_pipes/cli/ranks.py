"""`plan --ranks`: what the caches of several ranks serve, shared and not, by simulation."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gpucache_pipes.cache import Trace, simulate
from gpucache_pipes.nodes import PathLister
from gpucache_pipes.peers import Owners, Positions, Schedule
from gpucache_pipes.units import format_bytes

WAYS = ("shared", "epoch", "static")
"""One cache of all ranks; a cache each, with other files in each epoch; a cache each, with the same
files in each epoch."""

_PARTS = (0.25, 0.5, 0.75, 1, 2, 4)
"""Sizes of a rank's cache, in parts of what each rank needs so that all together hold
everything."""

_BATCH = 64


def plan_ranks(
    sizes: Sequence[int], ranks: int, memory: int, *, scale: float, epochs: int, shuffle: bool,
    seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Simulate one of several ranks, with caches of several sizes and the default policy.

    Args:
        sizes: bytes of the features that are simulated.
        ranks: how many there are.
        memory: bytes of the cache of each rank, to simulate in addition.
        scale: bytes of these features, in parts of those of all features.
        epochs: how many to simulate. The first one is excluded.
        shuffle: whether each epoch has a new order.
        seed: of the orders.

    Returns:
        `ranks`, and in `rows`, for one size of each rank's cache, the hit rate and the bytes that
        all ranks read in an epoch, in parts of all bytes, for each of WAYS.

    Raises:
        ValueError: there are fewer files than ranks.
    """
    if not 1 < ranks <= len(sizes):
        raise ValueError(f"--ranks {ranks} must be from 2 to the number of files, {len(sizes)}")
    total = sum(sizes) / scale
    capacities = {int(total * part / ranks) for part in _PARTS if part <= ranks}
    by_file: Mapping[Hashable, int] = dict(enumerate(sizes))
    orders = {
        shard: [*_orders(len(sizes), ranks, shard, shuffle, seed, epochs)]
        for shard in ("epoch", "static")
    }
    traces = {shard: Trace.epochs([each[0] for each in orders[shard]]) for shard in orders}
    traces["shared"] = Trace.epochs([*_served(orders["epoch"], len(sizes))])
    rows = []
    for capacity in sorted(capacities | {min(memory, int(total))}):
        row: dict[str, Any] = {"cache_bytes": capacity}
        for way in WAYS:
            result = simulate(traces[way], max(1, int(capacity * scale)), sizes=by_file)
            later = result.epochs[1:]
            row[way] = {
                "hit_rate": sum(one.hits for one in later) / sum(one.requests for one in later),
                "read_fraction": sum(one.read for one in later)
                / sum(one.requested for one in later),
            }
        rows.append(row)
    return {"ranks": ranks, "memory": memory, "rows": rows}


def _orders(
    files: int, ranks: int, shard: str, shuffle: bool, seed: int, epochs: int
) -> Iterator[Positions]:
    """[ranks, requests] of each epoch."""
    names = [str(number) for number in range(files)]
    listers = [
        PathLister(
            names, batch_size=_BATCH, shuffle=shuffle, seed=seed, num_shards=ranks,
            shard_index=rank, shard=shard,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    for _ in range(epochs):
        for lister in listers:
            lister.reset()
        yield np.array([[int(n) for batch in lister for n in batch] for lister in listers])


def _served(orders: Sequence[Positions], files: int) -> Iterator[list[int]]:
    """What rank 0 serves in each epoch, if the caches are shared."""
    owners = Owners([str(number) for number in range(files)])
    for each in orders:
        owners.ranks = owners.assigned(each, _BATCH)
        yield Schedule(each, _BATCH, owners.ranks, 0).all_served().tolist()


def ranks_as_text(report: dict[str, Any], total: int) -> str:
    """A table of a report of `plan_ranks` over features of `total` bytes."""
    ranks = report["ranks"]
    lines = [
        f"{ranks} ranks: hit rate after the first epoch, and what all of them read in an epoch",
        f"{'cache of a rank':>16}"
        + "".join(f"{name:>24}" for name in ("shared", 'alone, "epoch"', 'alone, "static"')),
    ]
    for row in report["rows"]:
        line = f"{format_bytes(row['cache_bytes']):>16}"
        for way in WAYS:
            read = format_bytes(int(row[way]["read_fraction"] * total))
            line += f"{row[way]['hit_rate']:12.0%}, {read:>10}"
        lines.append(line + (" <" if row["cache_bytes"] == min(report["memory"], total) else ""))
    lines.append(
        'shared: process_group= of the store. "static" (shard= of PathLister) needs no exchange, '
        "but\nsamples of different ranks never meet in a batch."
    )
    return "\n".join(lines)
