"""Measure a data set of a million files: listing, the first batch, warm epochs, evictions, memory.

1,000,000 hard links in one directory to 500 files of {"feature": f32[64], "label": int64[1]}, 2 KB,
through PathLister -> GPUPrefetcher -> GPUCollator in a torchdata Loader, in shuffled batches of
1,024, with a budget.

- listing: `PathLister(directory)`.
- first batch: from making the store to the first batch; listing is not included.
- first epoch, warm epoch: for each file. A warm epoch reads nothing.
- with room for 40% of the files: hits and evictions of two epochs after the first, for the default
  policy and for "keep", which never evicts.
- host memory for each file, by tracemalloc, in a process of its own. It counts what Python and
  NumPy allocate, so the pages that hold features are not in it. "paths" is what the lister takes;
  "store" what the store keeps beyond that; "plan" what a pipeline takes at the beginning of its
  second epoch; "link" what the store keeps for a symbolic link, measured on symbolic links.

    python benchmarks/million.py [--files 1000000] [--json FILE]
"""

import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import torchdata.nodes as tn
from _common import parser_for, save, temporary_directory, write_files

from gpucache_pipes import GPUCollator, GPUFeatureStore, GPUPrefetcher, PathLister

ORIGINALS = 500
WARM_EPOCHS = 3
ROOM = 0.4
Figures = dict[str, Any]


def link_files(directory: Path, count: int, symbolic: bool = False, width: int = 64) -> str:
    """Make `count` links to new files with f32[width]; returns the directory of the links."""
    originals = directory / "originals"
    links = directory / ("symbolic" if symbolic else "hard")
    links.mkdir()
    if not originals.exists():
        originals.mkdir()
        for path in write_files(originals, ORIGINALS, width):
            os.utime(path, (1, 1))  # the store reads a file again that was written just now
    link = os.symlink if symbolic else os.link
    targets = itertools.cycle(sorted(originals.iterdir()))
    for number, target in zip(range(count), targets, strict=False):
        link(target, links / f"{number:07d}.pt")
    return str(links)


def list_files(directory: str) -> PathLister:
    return PathLister(directory, batch_size=1024, shuffle=True, seed=0)


def loader(lister: PathLister, store: GPUFeatureStore) -> Any:
    return tn.Loader(GPUCollator(GPUPrefetcher(lister, store, depth=4)))


def seconds_of_epoch(batches: Any) -> float:
    start = time.perf_counter()
    for batch in batches:
        del batch
    return time.perf_counter() - start


def speed(directory: str, count: int) -> Figures:
    """Seconds of listing and of the first batch, microseconds a file of epochs, bytes cached."""
    start = time.perf_counter()
    lister = list_files(directory)
    listed = time.perf_counter()
    with GPUFeatureStore("cpu", max_cache_bytes=1024 * count) as store:
        batches = iter(loader(lister, store))
        next(batches)
        first_batch = time.perf_counter()
        for batch in batches:
            del batch
        first_epoch = time.perf_counter()
        batches = loader(lister, store)
        read = store.stats().files_read
        warm = [seconds_of_epoch(batches) for _ in range(WARM_EPOCHS)]
        stats = store.stats()
    if not read == stats.files_read == stats.items == count:
        raise RuntimeError(f"not all of {count} files were cached and read once: {stats}")
    return {
        "listing_seconds": listed - start,
        "first_batch_seconds": first_batch - listed,
        "first_epoch_us": (first_epoch - listed) / count * 1e6,
        "warm_epoch_us": statistics.median(warm) / count * 1e6,
        "cached_bytes": stats.cached_bytes,
    }


def evictions(directory: str, budget: int, policy: str) -> Figures:
    """Hits, evictions and seconds of two epochs after the first."""
    with GPUFeatureStore("cpu", max_cache_bytes=budget, policy=policy) as store:
        batches = loader(list_files(directory), store)
        seconds_of_epoch(batches)
        before = store.stats()
        seconds = seconds_of_epoch(batches) + seconds_of_epoch(batches)
        since = store.stats().since(before)
    return {"hits": since.hits, "evictions": since.evictions, "seconds": seconds}


def memory(*directories: str) -> list[Figures]:
    """Bytes for each file of each directory, by tracemalloc, in a process of its own."""
    command = [sys.executable, __file__, "--memory", *directories]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: list[Figures] = json.loads(run.stdout)
    return figures


def traced_memory(directory: str) -> Figures:
    def traced() -> int:
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    start = traced()
    lister = list_files(directory)
    paths = lister.paths
    count, listed = len(paths), traced()
    with GPUFeatureStore("cpu", max_cache_bytes=1024 * count) as store:
        batches = loader(lister, store)
        seconds_of_epoch(batches)
        second = iter(batches)
        next(second)
        planned = traced()
        del lister, batches, second
        store.stats()  # what was dropped is retracted by the next call of the store
        kept = traced()
    return {
        "paths": (listed - start) / count,
        "store": (kept - listed) / count,
        "plan": (planned - kept) / count,
    }


def measure(count: int) -> Figures:
    with temporary_directory() as directory:
        links = link_files(Path(directory), count)
        figures = speed(links, count)
        for policy in ("clairvoyant", "keep"):
            budget = int(ROOM * figures["cached_bytes"])
            figures[f"room for {ROOM:.0%}, {policy}"] = evictions(links, budget, policy)
        hard, symbolic = memory(links, link_files(Path(directory), count, symbolic=True))
        figures["bytes_a_file"] = {**hard, "link": symbolic["store"]}
    return figures


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--memory", nargs="+", metavar="DIRECTORY", help="only print the memory")
    args = parser.parse_args()
    if args.memory:
        print(json.dumps(list(map(traced_memory, args.memory))))
        return
    figures = measure(args.files)
    for name, value in figures.items():
        print(f"{name}: {value}")
    save(args.json, {"files": args.files, **figures})


if __name__ == "__main__":
    main()
