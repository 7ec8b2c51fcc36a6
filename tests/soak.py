"""Hours of use in minutes: threads, faults, small budgets, and stores that come and go.

    python tests/soak.py --minutes 10 --json soak.json

Eight consumers share three stores, which get a random budget and policy each time they are opened.
One read in a hundred fails, before or in the middle of it. Every byte that comes out is compared.
Ends with figures, or with what went wrong: a wrong byte, an error that nobody injected, a thread
that stands still, something left behind.
"""

import argparse
import errno
import faulthandler
import gc
import json
import os
import random
import resource
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from gpucache_pipes import GPUCollator, GPUFeatureStore, GPUPrefetcher, PathLister
from gpucache_pipes.device import AcceleratorBackend, InOrderRuntime
from gpucache_pipes.files import LocalFiles

FILES = 400
CONSUMERS = 8
POLICIES = ["clairvoyant", "keep", "lru", "fifo", "lfu", "sieve", "s3fifo", "w-tinylfu"]
FAULTS: list[Callable[[], BaseException]] = [
    lambda: OSError(errno.EIO, "injected"),
    lambda: OSError(errno.ENOSPC, "injected"),
    lambda: FileNotFoundError(errno.ENOENT, "injected"),
    lambda: MemoryError("injected"),
    lambda: ValueError("injected"),
]


def feature_of(number: int) -> Any:
    return {
        "x": torch.arange(40 * (1 + number % 7), dtype=torch.int32).view(-1, 8) + number,
        "deep": [torch.tensor([number, -number])],
        "name": str(number),
    }


def is_right(feature: Any, number: int) -> bool:
    expected = feature_of(number)
    return (
        torch.equal(feature["x"], expected["x"])
        and torch.equal(feature["deep"][0], expected["deep"][0])
        and feature["name"] == expected["name"]
    )


class FaultyFiles(LocalFiles):
    """A source of which one file in a hundred fails: when it is opened, or half read."""

    def __init__(self, soak: "Soak", load_fn: Any = None) -> None:
        super().__init__(load_fn)
        self.soak = soak

    def open(self, key: str, path: str) -> Any:
        fault = self.soak.draw_fault()
        if fault == "open":
            raise random.choice(FAULTS)()
        opened = super().open(key, path)
        return HalfRead(opened) if fault == "read" else opened


class HalfRead:
    def __init__(self, opened: Any) -> None:
        self.opened = opened
        self.layout, self.values, self.bytes_read = opened.layout, opened.values, 0

    def read_into(self, buffers: Sequence[memoryview]) -> None:
        for buffer in buffers[: len(buffers) // 2 + 1]:
            buffer[:] = b"\xee" * len(buffer)
        raise random.choice(FAULTS)()

    def close(self) -> None:
        self.opened.close()


class Slot:
    """A place for a store, which is closed and opened again now and then."""

    def __init__(self, kind: str, soak: "Soak") -> None:
        self.kind, self.soak = kind, soak
        self.lock = threading.Lock()
        self.store = self.open()

    def open(self) -> GPUFeatureStore:
        device: Any = "cpu"
        if self.kind == "staged":
            device = AcceleratorBackend(InOrderRuntime(torch.device("cpu")))
        options: dict[str, Any] = {
            "max_cache_bytes": random.choice([None, 2000, 20_000, 100_000, 400_000]),
            "max_cache_items": random.choice([None, None, 1, 30, 200]),
            "policy": random.choice(POLICIES),
            "reader_threads": random.choice([1, 2, 3]),
            "page_bytes": random.choice([None, None, 256]),
            "revalidate": random.random() < 0.2,
        }
        if self.kind == "load_fn":
            options |= {"asynchronous": random.random() < 0.8}
        options["source"] = FaultyFiles(self.soak, torch.load if self.kind == "load_fn" else None)
        return GPUFeatureStore(device, **options)

    def reopen(self) -> None:
        with self.lock:
            self.store.close()
            self.store = self.open()


class Soak:
    """The run and its figures."""

    def __init__(self, directory: Path, seed: int) -> None:
        random.seed(seed)
        self.paths = []
        for number in range(FILES):
            path = directory / f"{number:04d}.pt"
            torch.save(feature_of(number), path)
            self.paths.append(str(path))
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.progress = [0] * CONSUMERS
        self.slots = [Slot(kind, self) for kind in ("host", "staged", "load_fn")]

    def draw_fault(self) -> str | None:
        drawn = random.random()
        if drawn >= 0.01:
            return None
        self.counts["faults injected"] += 1
        return "open" if drawn < 0.006 else "read"

    def consume(self, who: int, go_on: Callable[[int], bool]) -> None:
        draw = random.Random(random.random())
        torch.set_num_threads(1)
        while go_on(self.progress[who]) and not self.wrong:
            slot = draw.choice(self.slots)
            name, operation = draw.choices(OPERATIONS, WEIGHTS)[0]
            try:
                operation(self, slot, draw)
                self.counts[name] += 1
            except Exception as error:
                text = str(error)
                if "injected" in text:
                    self.counts["errors that reached a consumer"] += 1
                elif "closed" in text:
                    self.counts["met a closed store"] += 1
                elif isinstance(error, MemoryError) and "max_cache_bytes" in text:
                    self.counts["larger than the budget"] += 1
                else:
                    self.wrong.append(f"{name}: {error!r}")
            self.progress[who] += 1

    def verify(self, feature: Any, path: str) -> None:
        self.counts["features compared"] += 1
        if not is_right(feature, int(path[-7:-3])):
            self.wrong.append(f"wrong bytes of {path}")

    def some(self, draw: random.Random, most: int) -> list[str]:
        # Some files more often than others, so that there are hits.
        return [self.paths[int(FILES * draw.random() ** 2)] for _ in range(draw.randint(1, most))]

    # What consumers do

    def batch(self, slot: Slot, draw: random.Random) -> None:
        paths = self.some(draw, 32)
        batch = slot.store.get_batch(paths)
        for feature, path in zip(batch, paths, strict=True):
            self.verify(feature, path)
            feature["x"].fill_(-1)  # results are the consumer's own
        self.counts["batches served"] += 1

    def pipeline(self, slot: Slot, draw: random.Random) -> None:
        paths = sorted({*self.some(draw, 60)})
        lister = PathLister(
            paths, batch_size=draw.randint(1, 9), shuffle=True, seed=draw.randint(0, 9)
        )
        on_error: Any = draw.choice(
            ["raise", "skip", lambda path, error: feature_of(int(path[-7:-3]))]
        )
        node = GPUPrefetcher(lister, slot.store, depth=draw.randint(1, 6), on_error=on_error)
        most = draw.choice([1, 3, 1000])
        for _ in range(most):
            try:
                batch = next(node)
            except StopIteration:
                break
            for feature, path in zip(batch, batch.paths, strict=True):
                self.verify(feature, path)
            self.counts["batches served"] += 1
        if draw.random() < 0.5:
            node.shutdown()

    def ragged(self, slot: Slot, draw: random.Random) -> None:
        paths = self.some(draw, 16)
        collator = GPUCollator(GPUPrefetcher([paths], slot.store), ragged={"['x']": "pad"})
        [batch] = collator
        for at, path in enumerate(paths):
            expected = feature_of(int(path[-7:-3]))["x"]
            self.counts["features compared"] += 1
            if not torch.equal(batch["x"].values[at, : len(expected)], expected):
                self.wrong.append(f"wrong bytes of {path}, padded")
        self.counts["batches served"] += 1

    def prefetch(self, slot: Slot, draw: random.Random) -> None:
        slot.store.prefetch(self.some(draw, 100))

    def drop_batches(self, slot: Slot, draw: random.Random) -> None:
        pending = [slot.store.request(self.some(draw, 8)) for _ in range(3)]
        pending[0].cancel()

    def release(self, slot: Slot, draw: random.Random) -> None:
        slot.store.release(self.some(draw, 50))

    def clear(self, slot: Slot, draw: random.Random) -> None:
        slot.store.clear()

    def reopen(self, slot: Slot, draw: random.Random) -> None:
        slot.reopen()

    def look(self, slot: Slot, draw: random.Random) -> None:
        slot.store.check()
        slot.store.stats()

    # The run

    def run(self, go_on: Callable[[int], bool], patience: float) -> None:
        """Until `go_on(operations of a consumer)` says no. AssertionError for what is wrong."""
        threads = [
            threading.Thread(
                target=self.consume, args=(who, go_on), name=f"consumer-{who}", daemon=True
            )
            for who in range(CONSUMERS)
        ]
        for thread in threads:
            thread.start()
        seen, since = list(self.progress), time.monotonic()
        while any(thread.is_alive() for thread in threads):
            threads[0].join(0.1) if threads[0].is_alive() else time.sleep(0.1)
            if self.progress != seen:
                seen, since = list(self.progress), time.monotonic()
            if time.monotonic() - since > patience:
                faulthandler.dump_traceback(all_threads=True)
                raise AssertionError(f"nobody gets on: {self.progress}")
        for slot in self.slots:
            if not self.wrong:
                slot.store.check()
            slot.store.close()
        assert not self.wrong, self.wrong[:5]
        gc.collect()
        left = [t.name for t in threading.enumerate() if t.name.startswith("gpucache")]
        assert not left, f"threads left behind: {left}"


OPERATIONS: list[tuple[str, Callable[[Soak, Slot, random.Random], None]]] = [
    ("get_batch", Soak.batch),
    ("pipelines", Soak.pipeline),
    ("ragged batches", Soak.ragged),
    ("prefetches", Soak.prefetch),
    ("pending dropped", Soak.drop_batches),
    ("releases", Soak.release),
    ("clears", Soak.clear),
    ("reopenings", Soak.reopen),
    ("checks", Soak.look),
]
WEIGHTS = [50, 12, 8, 5, 5, 5, 2, 1, 5]


def open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0


def peak_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    faulthandler.enable()
    with tempfile.TemporaryDirectory() as directory:
        files_before = open_files()
        soak = Soak(Path(directory), args.seed)
        begun = time.monotonic()
        peaks: list[float] = []

        def go_on(_: int) -> bool:
            done = (time.monotonic() - begun) / (60 * args.minutes)
            if len(peaks) < 4 * done:
                peaks.append(round(peak_mib()))
            return done < 1

        soak.run(go_on, patience=60)
        assert open_files() <= files_before, "file descriptors left behind"
    figures = {
        "minutes": args.minutes,
        "seed": args.seed,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "consumers": CONSUMERS,
        "stores": len(soak.slots),
        "wrong bytes": 0,
        "peak MiB by quarter": peaks,
        **dict(sorted(soak.counts.items())),
    }
    for name, value in figures.items():
        print(f"{name:32} {value}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
