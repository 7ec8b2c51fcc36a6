"""A first epoch over files that take a while to open, as those of network storage do.

A preloaded library (slow_storage.c, compiled by `cc`) delays each open of a feature file, by
whatever library, in all processes. All contenders make the same batches, in turns; opening and
listing are included. Linux only.

    python benchmarks/slow_storage.py [--microseconds 3000] [--files 1024] [--batch-size 64]
        [--rounds 3] [--json FILE]
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _common import Files, save, temporary_directory
from torch.utils.data import DataLoader

from gpucache_pipes import GPUCachedPathDataLoader, GPUFeatureStore, PathLister


def by_dataloader(directory: str, size: int, workers: int) -> Iterator[Any]:
    yield from DataLoader(Files(directory), batch_size=size, shuffle=True, num_workers=workers)


def by_store(directory: str, size: int, **options: Any) -> Iterator[Any]:
    with GPUFeatureStore("cpu", max_cache_bytes="1GiB", **options) as store:
        lister = PathLister(directory, batch_size=size, shuffle=True)
        yield from GPUCachedPathDataLoader(lister, store=store)
        readers.append(store.stats().reader_threads)


readers: list[int] = []

CONTENDERS: dict[str, Callable[[str, int], Iterator[Any]]] = {
    "gpucache_pipes": by_store,
    **{
        f"gpucache_pipes, reader_threads={n}": lambda d, b, n=n: by_store(d, b, reader_threads=n)
        for n in (1, 2, 4, 8, 16)
    },
    "gpucache_pipes, load_fn=torch.load": lambda d, b: by_store(d, b, load_fn=torch.load),
    "the same, reader_threads=16": lambda d, b: by_store(
        d, b, load_fn=torch.load, reader_threads=16
    ),
    "DataLoader, 8 workers": lambda d, b: by_dataloader(d, b, 8),
    "DataLoader, 0 workers": lambda d, b: by_dataloader(d, b, 0),
}


def seconds(batches: Iterator[Any], files: int) -> float:
    """How long an epoch takes. Raises AssertionError if it lacks files."""
    begin = time.perf_counter()
    labels = torch.cat([batch["label"].view(-1) for batch in batches])
    took = time.perf_counter() - begin
    assert sorted(labels.tolist()) == list(range(files))
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--microseconds", type=int, default=3000, help="of each open")
    parser.add_argument("--files", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    if "SLOW_DIRECTORY" not in os.environ:
        with temporary_directory() as directory:
            raise SystemExit(run_slowly(Path(directory), args.microseconds))
    directory = os.environ["SLOW_DIRECTORY"]
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(args.rounds):
        for name, make in CONTENDERS.items():
            times[name].append(seconds(make(directory, args.batch_size), args.files))
    base = statistics.median(times["DataLoader, 8 workers"])
    rows = []
    for name, found in times.items():
        middle = statistics.median(found)
        rows.append({"name": name, "seconds": found, "times_dataloader_8": base / middle})
        print(f"{name:40} {middle:7.3f} s   {base / middle:5.2f} times DataLoader, 8 workers")
    print(f"reader threads found: {readers[0]}")
    save(args.json, {"options": vars(args), "rows": rows, "reader_threads": readers[0]})


def run_slowly(directory: Path, microseconds: int) -> int:
    """Write the files, and run this program again with the library preloaded."""
    library, features = directory / "slow_storage.so", directory / "features"
    source = Path(__file__).with_name("slow_storage.c")
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    features.mkdir()
    files = sys.argv[sys.argv.index("--files") + 1] if "--files" in sys.argv else "1024"
    for number in range(int(files)):
        feature = {"feature": torch.randn(1024), "label": torch.tensor([number])}
        torch.save(feature, features / f"{number:06d}.pt")
    environment = os.environ | {
        "LD_PRELOAD": str(library),
        "SLOW_DIRECTORY": str(features),
        "SLOW_MICROSECONDS": str(microseconds),
    }
    return subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode


if __name__ == "__main__":
    main()
