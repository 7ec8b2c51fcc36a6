"""`python -m gpucache_pipes plan`: hit rates over cache sizes and policies, by simulation."""

import random
import statistics
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

from gpucache_pipes.cache import Trace, simulate
from gpucache_pipes.cli.ranks import plan_ranks
from gpucache_pipes.files import AnyFiles
from gpucache_pipes.store.progress import progress_bar
from gpucache_pipes.units import format_bytes

POLICIES = ("clairvoyant", "keep", "w-tinylfu", "sieve", "s3fifo", "lfu", "fifo", "lru")
"""In the order of the tables. The default policy is the first."""

_FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_MOST_FILES = 2000
"""Files that are simulated."""

_OPENED = 64
"""Files that are opened, to estimate the bytes of tensors of all files."""


def plan(
    paths: Sequence[str],
    *,
    memory: int | None = None,
    below: Sequence[tuple[str, int]] = (),
    epochs: int = 5,
    shuffle: bool = True,
    seed: int = 0,
    weights_only: bool = True,
    progress: bool = True,
    storage_options: Mapping[str, Any] | None = None,
    ranks: int = 1,
) -> dict[str, Any]:
    """Simulate each policy with caches of several sizes.

    If there are more than 2,000 files, a random sample of them is simulated with caches in
    proportion. The bytes of tensors of a file are estimated: its size, less the median overhead of
    up to 64 files that are opened. The first epoch, which reads everything, is excluded.

    Args:
        paths: all files.
        memory: bytes of a cache to simulate in addition; None means half of the data.
        below: name and bytes of each tier below a cache of `memory` bytes, from the top.
        epochs: number of epochs to simulate, at least 2.
        shuffle: whether each epoch has a new order; if not, every epoch has that of `paths`.
        seed: of the orders and of the sample.
        weights_only: as in `torch.load`, for the files that are opened.
        progress: show a progress bar on stderr.
        storage_options: see GPUFeatureStore.
        ranks: how many share the files; with several, each has a cache of `memory` bytes.

    Returns:
        A report that `json.dumps` accepts. Each of its `rows` holds, for one size of the cache, the
        hit rate and the fraction of bytes read from files for each policy. With tiers, `tiers` says
        for each policy what each of them serves: see `_tiers`. With ranks, `ranks` is that of
        `plan_ranks`.

    Raises:
        ValueError: `epochs` is less than 2, `ranks` more than the files, or one of the opened files
            cannot be read.
    """
    if epochs < 2:
        raise ValueError(
            f"epochs={epochs}: at least 2 are needed, since the first one reads everything"
        )
    sizes = _feature_bytes(paths, weights_only, storage_options)
    total = sum(sizes)
    sample = sizes
    if len(sizes) > _MOST_FILES:
        sample = random.Random(seed).sample(sizes, _MOST_FILES)
    scale = sum(sample) / total
    by_file: dict[Hashable, int] = dict(enumerate(sample))
    traces = {known: _trace(len(sample), epochs, shuffle, seed, known) for known in (True, False)}
    memory = total // 2 if memory is None else memory
    capacities = sorted({int(total * f) for f in _FRACTIONS} | {min(memory, total)})
    rows = []
    with progress_bar(
        total=len(capacities) * len(POLICIES), desc="simulating", shown=progress
    ) as bar:
        for capacity in capacities:
            row: dict[str, Any] = {"cache_bytes": capacity, "policies": {}}
            for policy in POLICIES:
                row["policies"][policy] = _served(
                    traces[policy == "clairvoyant"], max(1, int(capacity * scale)), policy, by_file
                )
                bar.update()
            rows.append(row)
    tiers = [("GPU", min(memory, total)), *((name, min(size, total)) for name, size in below)]
    of_ranks = None
    if ranks != 1:
        of_ranks = plan_ranks(
            sample, ranks, memory, scale=scale, epochs=epochs, shuffle=shuffle, seed=seed
        )
    return {
        "ranks": of_ranks,
        "tiers": _tiers(tiers, traces, by_file, scale, epochs) if below else None,
        "files": len(sizes),
        "simulated_files": len(sample),
        "feature_bytes": total,
        "epochs": epochs,
        "shuffle": shuffle,
        "memory": memory,
        "rows": rows,
    }


def _feature_bytes(
    paths: Sequence[str], weights_only: bool, storage_options: Mapping[str, Any] | None
) -> list[int]:
    """Bytes of tensors of each file: its size, less the median overhead of `_OPENED` files."""
    files = AnyFiles(weights_only=weights_only, storage_options=storage_options)
    overheads = []
    for path in paths[:: -(-len(paths) // _OPENED)]:
        try:
            feature, _ = files.probe(path)
        except Exception as error:
            raise ValueError(f"{path!r} cannot be read: {error}") from error
        feature.close()
        overheads.append(files.size(path) - feature.layout.span)
    overhead = int(statistics.median(overheads))
    return [max(1, files.size(path) - overhead) for path in paths]


def _trace(files: int, epochs: int, shuffle: bool, seed: int, known: bool) -> Trace:
    """All epochs of one pipeline. With `known`, it announces its access plan."""
    random_numbers = random.Random(seed)
    orders: Iterator[Sequence[int]] = (
        random_numbers.sample(range(files), files) if shuffle else range(files)
        for _ in range(epochs)
    )
    return Trace.epochs(list(orders), known=known)


def _served(
    trace: Trace, capacity: int, policy: str, sizes: Mapping[Hashable, int]
) -> dict[str, float]:
    """What one cache serves after the first epoch."""
    result = simulate(trace, capacity, policy, sizes=sizes)
    later = result.epochs[1:]
    requested = sum(epoch.requested for epoch in later)
    return {
        "hit_rate": sum(epoch.hits for epoch in later) / sum(epoch.requests for epoch in later),
        "read_fraction": sum(epoch.read for epoch in later) / requested,
    }


def _tiers(
    tiers: Sequence[tuple[str, int]],
    traces: Mapping[bool, Trace],
    sizes: Mapping[Hashable, int],
    scale: float,
    epochs: int,
) -> dict[str, Any]:
    """What tiers one below the other serve after the first epoch.

    Returns:
        `names` and `bytes` of the tiers; for each policy in `policies` the hit rate of each tier
        (`hit_rates`), and in bytes of an epoch what each of them serves (`served`), which all but
        the first send up, what is read from files (`read`), and what tiers take from those above
        (`demoted`, a mean over all epochs).
    """
    capacities = [max(1, int(size * scale)) for _, size in tiers]
    policies: dict[str, Any] = {}
    for policy in POLICIES:
        result = simulate(traces[policy == "clairvoyant"], capacities, policy, sizes=sizes)
        later = result.epochs[1:]
        requests = sum(epoch.requests for epoch in later)
        each = scale * len(later)
        hits = [sum(epoch.tier_hits[at] for epoch in later) for at in range(len(tiers))]
        served = [sum(epoch.tier_bytes[at] for epoch in later) for at in range(len(tiers))]
        policies[policy] = {
            "hit_rates": [count / requests for count in hits],
            "served": [int(count / each) for count in served],
            "read": int(sum(epoch.read for epoch in later) / each),
            "demoted": [int(count / scale / epochs) for count in result.demoted],
        }
    return {
        "names": [name for name, _ in tiers],
        "bytes": [size for _, size in tiers],
        "policies": policies,
    }


def advice(report: dict[str, Any]) -> str:
    """Sentences on the cache of `report["memory"]` bytes.

    Args:
        report: of `plan`.

    >>> print(advice({"feature_bytes": 4096, "memory": 8192, "rows": []}))
    With 8 KiB, all 4 KiB fit: after the first epoch every read comes from the GPU.
    """
    total, memory = report["feature_bytes"], report["memory"]
    if memory >= total:
        return (
            f"With {format_bytes(memory)}, all {format_bytes(total)} fit: after the first epoch "
            "every read comes from the GPU."
        )
    each = " of each rank, alone," if report.get("ranks") else ""
    [row] = [row for row in report["rows"] if row["cache_bytes"] == memory]
    ours, lru = row["policies"]["clairvoyant"], row["policies"]["lru"]
    rate = f"{ours['hit_rate']:.0%}"
    fits = f"With {format_bytes(memory)}{each or ','} {rate} of reads come from the GPU"
    return (
        f"{fits} after the first epoch, and an epoch reads "
        f"{format_bytes(int(ours['read_fraction'] * total))}; LRU would give {lru['hit_rate']:.0%}"
        f", and read {format_bytes(int(lru['read_fraction'] * total))}. "
        f"{format_bytes(total)} would hold all." + _advice_on_tiers(report["tiers"])
    )


def _advice_on_tiers(tiers: dict[str, Any] | None) -> str:
    if tiers is None:
        return ""
    figures = tiers["policies"]["clairvoyant"]
    below = zip(tiers["names"], tiers["bytes"], figures["hit_rates"], strict=True)
    parts = [f"{format_bytes(size)} of {name} serve {rate:.0%}" for name, size, rate in below][1:]
    return (
        f"\nBelow it, {' and '.join(parts)}, and an epoch reads {format_bytes(figures['read'])} "
        "from files."
    )
