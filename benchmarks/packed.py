"""First epochs over packed features: a disk cache that an earlier run has filled, and `pack`.

All contenders make the same batches, shuffled, in turns, each with a loader of its own; opening and
listing are included. The page cache is warm, unless --cold drops the files from it before each turn
(posix_fadvise; a bare sequential read of the same bytes is measured likewise). With --packing:
the time until the last batch of an epoch over the files, with and without filling a disk cache.

    python benchmarks/packed.py [--only small|ragged|large] [--rounds 5] [--cold | --packing]
        [--json FILE]
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from _common import Files, save, temporary_directory
from torch.utils.data import DataLoader

from gpucache_pipes import GPUCachedPathDataLoader, GPUFeatureStore, PathLister
from gpucache_pipes.files.packed import packed_directory
from gpucache_pipes.files.packed.packing import pack

Collate = Callable[[list[Any]], Any]


def padded(features: list[Any]) -> Any:
    pad = torch.nn.utils.rnn.pad_sequence([f["feature"] for f in features], batch_first=True)
    return {"feature": pad, "label": torch.stack([f["label"] for f in features])}


def small(n: int) -> Any:
    return {"feature": torch.randn(1024), "label": torch.tensor([n])}


def ragged(n: int) -> Any:
    return {"feature": torch.randn(16 + n * 7 % 33, 64), "label": torch.tensor([n])}


def large(n: int) -> Any:
    return {"feature": torch.randn(1 << 20), "label": torch.tensor([n])}


SETS: dict[str, tuple[int, int, Callable[[int], Any], Collate | None, dict[str, Any]]] = {
    "small": (4000, 256, small, None, {}),
    "ragged": (4000, 256, ragged, padded, {"ragged": {"feature": "pad"}}),
    "large": (64, 8, large, None, {}),
}


class Case:
    """A data set: as files, packed, and in a disk cache."""

    def __init__(self, root: str, name: str) -> None:
        self.files, self.batch, make, self.collate, self.options = SETS[name]
        self.source, self.packed, self.cache = f"{root}/source", f"{root}/packed", f"{root}/cache"
        os.mkdir(self.source)
        for n in range(self.files):
            path = f"{self.source}/{n:06d}.pt"
            torch.save(make(n), path)
            os.utime(path, (1e9, 1e9))
        pack(self.source, self.packed)
        for _ in self.ours(self.source, disk_cache=self.cache):
            pass
        self.finish()
        self.fresh = 0
        self.root = root

    def ours(self, directory: str, **store_options: Any) -> Iterable[Any]:
        """An epoch of a new store, which `finish` closes."""
        lister = PathLister(directory, batch_size=self.batch, shuffle=True)
        self.store = GPUFeatureStore("cpu", max_cache_bytes="2GiB", **store_options)
        yield from GPUCachedPathDataLoader(lister, store=self.store, **self.options)

    def finish(self) -> None:
        """Close the last store, and forget the packed directory, as a new process would."""
        self.store.close()
        packed_directory._known.clear()

    def packing(self, **store_options: Any) -> Iterable[Any]:
        """An epoch that also fills a new disk cache; closing the store completes it."""
        self.fresh += 1
        cache = f"{self.root}/fresh{self.fresh}"
        return self.ours(self.source, disk_cache=cache, **store_options)

    def contenders(self) -> dict[str, Callable[[], Iterable[Any]]]:
        """What is compared, by name."""
        return {
            "DataLoader, 0 workers": lambda: DataLoader(
                Files(self.source), self.batch, shuffle=True, collate_fn=self.collate
            ),
            "files": lambda: self.ours(self.source),
            "disk cache, stat": lambda: self.ours(self.source, disk_cache=self.cache),
            "disk cache, never": lambda: self.ours(
                self.source, disk_cache=self.cache, disk_cache_check="never"
            ),
            "packed directory": lambda: self.ours(self.packed),
        }

    def packers(self) -> dict[str, Callable[[], Iterable[Any]]]:
        """What shows what packing costs: epochs with and without it."""
        return {
            "DataLoader, 0 workers": self.contenders()["DataLoader, 0 workers"],
            "files": lambda: self.ours(self.source),
            "files, packing": self.packing,
            "load_fn=torch.load": lambda: self.ours(self.source, load_fn=torch.load),
            "the same, packing": lambda: self.packing(load_fn=torch.load, disk_cache_key="1"),
        }

    def forget(self) -> None:
        """Drop all files from the page cache."""
        os.sync()
        for directory, _, names in os.walk(self.root):
            for name in names:
                fd = os.open(os.path.join(directory, name), os.O_RDONLY)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(fd)

    def bare_read(self) -> float:
        """Seconds of a sequential read of the packed directory."""
        buffer = bytearray(4 << 20)
        begin = time.perf_counter()
        for path in Path(self.packed).iterdir():
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        return time.perf_counter() - begin


def measure(case: Case, rounds: int, cold: bool, packing: bool) -> dict[str, dict[str, float]]:
    """Medians of all rounds: seconds, and times as fast as a DataLoader in the same round."""
    times: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        for name, make in (case.packers() if packing else case.contenders()).items():
            if cold:
                case.forget()
            begin = time.perf_counter()
            labels = torch.cat([batch["label"].view(-1) for batch in make()])
            took = time.perf_counter() - begin
            case.finish()
            assert sorted(labels.tolist()) == list(range(case.files))
            if number:  # the first round warms up
                times.setdefault(name, []).append(took)
        if cold:
            case.forget()
        if number:
            times.setdefault("bare sequential read", []).append(case.bare_read())
    base = times["DataLoader, 0 workers"]
    return {
        name: {
            "seconds": statistics.median(found),
            "ratio": statistics.median(b / f for b, f in zip(base, found, strict=True)),
        }
        for name, found in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(SETS), action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--packing", action="store_true", help="measure what packing costs")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    report = {}
    for name in args.only or SETS:
        with temporary_directory() as root:
            report[name] = measure(Case(root, name), args.rounds, args.cold, args.packing)
        print(f"{name}{', page cache dropped' if args.cold else ''}")
        for contender, figures in report[name].items():
            print(f"  {contender:24} {1000 * figures['seconds']:8.1f} ms {figures['ratio']:8.1f}")
    save(args.json, report)


if __name__ == "__main__":
    main()
