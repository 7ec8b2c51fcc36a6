"""Count the calls from one module of the package into another, for one batch.

    python benchmarks/moves.py [--detailed]

A move is a call of a function whose module differs from the module of its caller in this package.
`sys.setprofile` counts them in one thread, for one batch of 16 files: in the consumer's thread of a
shuffled pipeline with all files cached (warm), and in the reader thread that loads such a batch
(cold). docs/design.md has the figures.
"""

import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from gpucache_pipes import GPUCollator, GPUFeatureStore, GPUPrefetcher, PathLister

FILES, BATCH = 64, 16


class Walk:
    """Counts the moves of one thread."""

    def __init__(self) -> None:
        self.moves: Counter[tuple[str, str]] = Counter()
        self.modules: set[str] = set()
        self._at: list[str] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """See sys.setprofile."""
        name = frame.f_globals.get("__name__", "")
        if not name.startswith("gpucache_pipes"):
            return
        if event == "call":
            if self._at and self._at[-1] != name:
                self.moves[self._at[-1], name] += 1
            self.modules.add(name)
            self._at.append(name)
        elif event == "return" and self._at:
            self._at.pop()

    def describe(self, what: str, detailed: bool) -> None:
        """Print the figures, and with `detailed` each pair of modules."""
        print(f"{what}: {self.moves.total()} moves between {len(self.modules)} modules")
        if detailed:
            for (start, end), count in self.moves.most_common():
                print(f"  {count:4}  {start} -> {end}".replace("gpucache_pipes.", ""))


def main(detailed: bool) -> None:
    """Measure both threads and print the figures."""
    with tempfile.TemporaryDirectory() as directory:
        for number in range(FILES):
            torch.save({"x": torch.randn(64)}, Path(directory, f"{number:03}.pt"))
        readers = Walk()
        # Reader threads get the profiler when they start. There is one, and no batch is read ahead.
        threading.setprofile(readers)
        with GPUFeatureStore("cpu", reader_threads=1) as store:
            threading.setprofile(None)
            paths = sorted(map(str, Path(directory).iterdir()))
            for begin in range(0, FILES, BATCH):  # templates are known after the first
                readers.moves.clear()
                readers.modules.clear()
                store.get_batch(paths[begin : begin + BATCH])
            lister = PathLister(paths, batch_size=BATCH, shuffle=True)
            batches = GPUCollator(GPUPrefetcher(lister, store))
            batches.reset()
            consumer = Walk()
            next(batches)
            sys.setprofile(consumer)
            next(batches)
            sys.setprofile(None)
    consumer.describe("a warm batch, the consumer's thread", detailed)
    readers.describe("a cold batch, the reader's thread", detailed)


if __name__ == "__main__":
    main("--detailed" in sys.argv)
