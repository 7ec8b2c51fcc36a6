"""The structure of the package in figures: what imports what, and how far a batch walks.

    python benchmarks/structure.py
    python benchmarks/structure.py --detailed

A room is a folder of the package, or a module at its root other than `__init__` and `__main__`.
There is an arrow from one room to another if a module of it imports one of the other.

A move is a call of a function whose module is not the one that the thread was in. Counted in one
thread by `sys.setprofile`, for one batch of 16 files of a shuffled pipeline that is in its second
epoch (warm, all files cached), and for the reader thread that loads such a batch (cold).

The figures, and what they were before the folders, are in docs/design.md.
"""

import ast
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import gpucache_pipes
from gpucache_pipes import GPUCollator, GPUFeatureStore, GPUPrefetcher, PathLister

FILES, BATCH = 64, 16
PACKAGE = "gpucache_pipes"


def rooms() -> dict[str, set[str]]:
    """For each room, those that it imports from."""
    root = Path(gpucache_pipes.__file__).parent
    arrows: dict[str, set[str]] = {}
    for path in sorted(root.rglob("*.py")):
        room = path.relative_to(root).parts[0].removesuffix(".py")
        if room.startswith("__"):
            continue
        found = arrows.setdefault(room, set())
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            found |= {n.split(".")[1] for n in names if n.startswith(f"{PACKAGE}.")} - {room}
    return arrows


def chain(arrows: dict[str, set[str]], room: str) -> int:
    """How many rooms lie on the longest path of arrows from this one."""
    return 1 + max((chain(arrows, other) for other in arrows[room]), default=0)


class Walk:
    """Counts the moves of one thread."""

    def __init__(self) -> None:
        self.moves: Counter[tuple[str, str]] = Counter()
        self.modules: set[str] = set()
        self._at: list[str] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """See sys.setprofile."""
        name = frame.f_globals.get("__name__", "")
        if not name.startswith(PACKAGE):
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
        entered = len({name.split(".")[1] for name in self.modules})
        print(
            f"{what}: {self.moves.total()} moves between {len(self.modules)} modules "
            f"of {entered} rooms"
        )
        if detailed:
            for (start, end), count in self.moves.most_common():
                print(f"  {count:4}  {start} -> {end}".replace(f"{PACKAGE}.", ""))


def main(detailed: bool) -> None:
    """Measure both threads and print the figures."""
    arrows = rooms()
    loose = [room for room in arrows if not Path(gpucache_pipes.__file__).with_name(room).is_dir()]
    count = sum(map(len, arrows.values()))
    floors = max(chain(arrows, room) for room in arrows)
    print(
        f"{len(arrows)} rooms, {len(loose)} of them loose modules; {count} arrows; {floors} floors"
    )
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
