"""Helpers of the benchmarks: sample files, interleaved timing, tables."""

import argparse
import gc
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from gpucache_pipes.cli.bench.figures import environment


def write_files(directory: str | Path, count: int, width: int = 1024) -> list[str]:
    """`count` files of {"feature": f32[width], "label": int64[1]}; returns their paths."""
    random_numbers = torch.Generator().manual_seed(0)
    paths = []
    for number in range(count):
        path = Path(directory) / f"{number:06d}.pt"
        feature = torch.randn(width, generator=random_numbers)
        torch.save({"feature": feature, "label": torch.tensor([number])}, path)
        paths.append(str(path))
    return paths


def temporary_directory() -> "tempfile.TemporaryDirectory[str]":
    """A temporary directory, removed when the benchmark ends."""
    return tempfile.TemporaryDirectory(prefix="gpucache-bench-")


def interleaved(
    contenders: dict[str, Callable[[], Iterator[Any]]], rounds: int
) -> dict[str, list[float]]:
    """Measure the seconds for each item of each contender, which is called once in each round.

    The order of the contenders is random in each round, so that a machine that becomes slower does
    so for all. The first tenth of the rounds is warm-up and excluded. Garbage is collected before
    each turn, so that no contender pays for that of another. Objects that exist at the start are
    frozen, so the collector does not visit them.

    Args:
        contenders: by name, a function that returns the items of one turn.
        rounds: turns of each contender.

    Returns:
        For each name the seconds of all items.
    """
    gc.freeze()
    shuffle = random.Random(0).shuffle
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        shuffle(names)
        for name in names:
            gc.collect()
            items = contenders[name]()
            while True:
                start = time.perf_counter()
                item = next(items, None)
                seconds = time.perf_counter() - start
                if item is None:
                    break
                if number >= rounds // 10:
                    times[name].append(seconds)
                del item
    return times


def report(
    title: str, times: dict[str, list[float]], baseline: str, unit: float = 1e6, name: str = "us"
) -> dict[str, Any]:
    """Print a table, with ratios to `baseline` in the first column, and return its figures.

    Args:
        title: of the table.
        times: seconds by contender.
        baseline: the contender that ratios refer to.
        unit: printed units in a second.
        name: of that unit.
    """
    base = statistics.median(times[baseline])
    figures = {}
    print(f"\n{title} (ratio of medians to {baseline!r})")
    print(f"{'ratio':>7} {'median ' + name:>12} {'10%':>9} {'90%':>9}  contender")
    for contender, series in sorted(times.items(), key=lambda item: statistics.median(item[1])):
        low, *_, high = statistics.quantiles(series, n=10)
        middle = statistics.median(series)
        figures[contender] = {
            "ratio": middle / base,
            "median_seconds": middle,
            "fastest_tenth_seconds": low,
        }
        print(
            f"{middle / base:7.2f} {middle * unit:12.1f} {low * unit:9.1f} {high * unit:9.1f}"
            f"  {contender}"
        )
    return figures


def parser_for(doc: str, rounds: int | None = None) -> argparse.ArgumentParser:
    """A parser with the arguments that scripts share: `--json`, and `--rounds` if it is given."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--json", help="write the figures to this file")
    return parser


def save(path: str | None, figures: dict[str, Any]) -> None:
    """Write the figures and the environment as JSON to `path`, if it is given."""
    if path:
        text = json.dumps({**environment(), "figures": figures}, indent=1)
        Path(path).write_text(text + "\n")


class Files(Dataset[Any]):
    """What people write by hand."""

    def __init__(self, directory: str) -> None:
        self.paths = sorted(str(path) for path in Path(directory).iterdir())

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, at: int) -> Any:
        return torch.load(self.paths[at])
