"""Measure the Python of a batch that is cached: the time of `next()` less that of the gather.

32,768 files of {"feature": f32[4], "label": int64[1]}, all cached, with a budget, shuffled, through
PathLister -> GPUPrefetcher -> GPUCollator. "gather" is one `index_select` into a new tensor for
each leaf, with the rows at hand. Features are this small so that it takes a few microseconds, and
the difference does not depend on the memory of the machine. An epoch has at least 32 batches: the
first `next()` requests several, and the last ones request none. Batch sizes take turns. The
figures are medians over all batches, and a line through them: what a batch costs, and what each of
its files adds. "epoch" is a whole epoch in batches of 256, its reset included, over its files.

    python benchmarks/overhead.py [--rounds 30] [--json FILE]
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from _common import interleaved, parser_for, save, temporary_directory
from million import link_files

from gpucache_pipes import GPUCollator, GPUFeatureStore, GPUPrefetcher, PathLister

SIZES = (32, 256, 1024)
FILES = 32_768
Epoch = Callable[[], Iterator[Any]]


def measure(rounds: int) -> dict[str, Any]:
    """The figures in microseconds: by batch size, of the line through them, and of an epoch."""
    with (
        temporary_directory() as directory,
        GPUFeatureStore("cpu", max_cache_bytes="1GiB") as store,
    ):
        paths = PathLister(link_files(Path(directory), FILES, width=4)).paths
        resident = [torch.zeros(FILES, 4), torch.zeros(FILES, 1, dtype=torch.int64)]
        store.warm(paths, progress=False)
        contenders: dict[str, Epoch] = {"epoch": whole(pipeline(store, paths, 256))}
        for size in SIZES:
            contenders[f"next {size}"] = pipeline(store, paths, size)
            contenders[f"gather {size}"] = gathers(resident, size)
        times = interleaved(contenders, rounds)
    median = {name: statistics.median(series) * 1e6 for name, series in times.items()}
    figures: dict[str, Any] = {}
    for size in SIZES:
        next_, gather = median[f"next {size}"], median[f"gather {size}"]
        figures[f"batch {size}"] = {"next": next_, "gather": gather, "ours": next_ - gather}
    ours = [figures[f"batch {size}"]["ours"] for size in SIZES]
    figures["file"], figures["batch"] = statistics.linear_regression(SIZES, ours)
    return figures | {"epoch, a file": median["epoch"] / FILES}


def pipeline(store: GPUFeatureStore, paths: Sequence[str], size: int) -> Epoch:
    lister = PathLister(paths, batch_size=size, shuffle=True)
    node = GPUCollator(GPUPrefetcher(lister, store, depth=4))

    def epoch() -> Iterator[Any]:
        node.reset()
        return node

    return epoch


def whole(begin: Epoch) -> Epoch:
    """All batches as one item."""

    def epoch() -> Iterator[Any]:
        for batch in begin():
            del batch
        yield True

    return epoch


def gathers(resident: list[torch.Tensor], size: int) -> Epoch:
    chosen = torch.randperm(FILES).split(size)
    return lambda: ([leaf.index_select(0, rows) for leaf in resident] for rows in chosen)


def main() -> None:
    args = parser_for(__doc__, rounds=30).parse_args()
    figures = measure(args.rounds)
    for name, value in figures.items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        print(f"{name:16}" + "".join(f"{part:>8} {us:9.3f} us" for part, us in parts))
    save(args.json, figures)


if __name__ == "__main__":
    main()
