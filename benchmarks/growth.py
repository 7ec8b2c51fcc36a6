"""Measure the cost of a feature over number of files, batch size, leaves, depth and reader threads.

- files: 1,000 to 1,000,000 entries of f32[16] from a synthetic `load_fn`, batches of 256, shuffled:
  with a budget for twice of it, and for half of it.
- batch size, leaves: everything cached. The leaves of a feature are f32[16] each.
- depth: a first epoch of 2,000 files of 6 KB, in batches of 64.
- threads: the same; 64 files of 4 MB in batches of 8; and 1,000 files with a `load_fn` that waits
  1 ms for each, as remote storage does.

The points of a curve take turns. The figures are medians in microseconds for each feature.

    python benchmarks/growth.py [--rounds 7] [--most 1000000] [--json FILE] [--plot docs/growth.svg]
"""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _common import interleaved, parser_for, save, temporary_directory, write_files

from gpucache_pipes import GPUCollator, GPUFeatureStore, GPUPrefetcher, PathLister
from gpucache_pipes.cli.charts import line_style, require_matplotlib

Point = Callable[[], Iterator[Any]]
Curve = dict[int, float]


def measure(points: dict[int, Point], features: Callable[[int], int], rounds: int) -> Curve:
    """Microseconds for each feature at each x. One item of a point has `features(x)` features."""
    times = interleaved({str(x): point for x, point in points.items()}, rounds)
    return {x: statistics.median(times[str(x)]) / features(x) * 1e6 for x in points}


def tensors(leaves: int = 1) -> Callable[[str], Any]:
    """A `load_fn` that returns a feature without reading."""
    feature = {f"leaf{number}": torch.ones(16) for number in range(leaves)}
    return lambda path: feature


def batches(store: GPUFeatureStore, count: int, size: int, most: int) -> Point:
    """At most `most` shuffled batches of `size` out of `count` files."""
    lister = PathLister([f"/{n}" for n in range(count)], batch_size=size, shuffle=True)
    pipeline = GPUCollator(GPUPrefetcher(lister, store))
    begun = False

    def some() -> Iterator[Any]:
        nonlocal begun
        if not begun:
            pipeline.reset()
            begun = True
        for _ in range(most):
            try:
                yield next(pipeline)
            except StopIteration:
                pipeline.reset()
                yield next(pipeline)

    return some


def by_files(most: int, rounds: int) -> dict[str, Curve]:
    counts = [count for count in (1000, 10_000, 100_000, 1_000_000) if count <= most]
    curves = {}
    for name, share in (("all cached", 2.0), ("half cached", 0.5)):
        points, stores = {}, []
        for count in counts:
            budget = int(share * count) * 64
            store = GPUFeatureStore("cpu", load_fn=tensors(), max_cache_bytes=budget, page_bytes=64)
            store.warm([f"/{n}" for n in range(count)], progress=False)
            points[count] = batches(store, count, 256, 60)
            stores.append(store)
        curves[name] = measure(points, lambda _: 256, rounds)
        for store in stores:
            store.close()
    return curves


def by_batch_size(rounds: int) -> dict[str, Curve]:
    with GPUFeatureStore("cpu", load_fn=tensors(), max_cache_bytes="1GiB") as store:
        store.warm([f"/{n}" for n in range(20_000)], progress=False)
        sizes = [4**power for power in range(7)]
        points = {size: batches(store, 20_000, size, min(100, 20_000 // size)) for size in sizes}
        return {"all cached": measure(points, lambda size: size, rounds)}


def by_leaves(rounds: int) -> dict[str, Curve]:
    points, stores = {}, []
    for leaves in (1, 2, 4, 8, 16, 32, 64):
        store = GPUFeatureStore("cpu", load_fn=tensors(leaves), max_cache_bytes="1GiB")
        store.warm([f"/{n}" for n in range(2000)], progress=False)
        points[leaves] = batches(store, 2000, 256, 30)
        stores.append(store)
    curve = measure(points, lambda _: 256, rounds)
    for store in stores:
        store.close()
    return {"all cached, batches of 256": curve}


def epoch(paths: list[str], batch_size: int, depth: int = 2, **options: Any) -> Point:
    """A first epoch with a new store."""

    def whole() -> Iterator[Any]:
        with GPUFeatureStore("cpu", max_cache_bytes="1GiB", **options) as store:
            lister = PathLister(paths, batch_size=batch_size)
            for batch in GPUCollator(GPUPrefetcher(lister, store, depth=depth)):
                del batch
            yield True

    return whole


def by_depth(rounds: int) -> dict[str, Curve]:
    with temporary_directory() as directory:
        paths = write_files(directory, 2000)
        points = {depth: epoch(paths, 64, depth) for depth in (1, 2, 4, 8, 16)}
        return {"files of 6 KB": measure(points, lambda _: len(paths), rounds)}


def wait(path: str) -> torch.Tensor:
    time.sleep(1e-3)
    return torch.ones(16)


def by_threads(rounds: int) -> dict[str, Curve]:
    curves = {}
    threads = (1, 2, 4, 8, 16)
    for name, count, width, size in (
        ("files of 6 KB", 2000, 1024, 64),
        ("files of 4 MB", 64, 1 << 20, 8),
    ):
        with temporary_directory() as directory:
            paths = write_files(directory, count, width)
            points = {n: epoch(paths, size, reader_threads=n) for n in threads}
            curves[name] = measure(points, lambda _, paths=paths: len(paths), rounds)
    far = [f"/{n}" for n in range(1000)]
    points = {n: epoch(far, 64, load_fn=wait, reader_threads=n) for n in threads}
    curves["a reader that waits 1 ms"] = measure(points, lambda _: len(far), min(rounds, 3))
    return curves


AXES = {
    "files": "files of the store",
    "batch size": "features in a batch",
    "leaves of a feature": "tensors in a feature",
    "depth": "batches that are requested ahead",
    "reader threads": "reader threads",
}
"""What is measured, and what the axis says."""


def draw(figures: dict[str, dict[str, Curve]], path: str) -> None:
    plt = require_matplotlib()
    plt.rcParams["svg.hashsalt"] = "growth"
    figure, panels = plt.subplots(2, 3, figsize=(12, 7.5), layout="constrained")
    for axes, (what, curves) in zip(panels.flat, figures.items(), strict=False):
        for at, (name, curve) in enumerate(curves.items()):
            axes.plot(list(curve), list(curve.values()), label=name, **line_style(at))
        values = [us for curve in curves.values() for us in curve.values()]
        axes.set(xscale="log", xlabel=AXES[what], ylabel="microseconds for each feature")
        alone = next(iter(curves)) if len(curves) == 1 else ""
        axes.set_title(f"{what}: {alone}" if alone else what, loc="left", fontsize=10)
        if max(values) > 10 * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
        else:
            axes.set_ylim(0, 1.15 * max(values))
        axes.set_xticks(list(curve), [f"{x:,}" for x in curve])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        if not alone:  # next to the title, where no data are
            corner = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.2}
            axes.legend(fontsize=8, frameon=False, **corner)
    for axes in panels.flat[len(figures) :]:
        axes.set_axis_off()
    figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)


def main() -> None:
    parser = parser_for(__doc__, rounds=7)
    parser.add_argument("--most", type=int, default=1_000_000, help="entries of a store")
    parser.add_argument("--plot", help="draw the curves to this file")
    args = parser.parse_args()
    figures = {
        "files": by_files(args.most, args.rounds),
        "batch size": by_batch_size(args.rounds),
        "leaves of a feature": by_leaves(args.rounds),
        "depth": by_depth(args.rounds),
        "reader threads": by_threads(args.rounds),
    }
    for title, curves in figures.items():
        print(f"\n{title}: us for a feature")
        for name, curve in curves.items():
            cells = "".join(f"{x:>10,}: {us:<8.3g}" for x, us in curve.items())
            print(f"  {name:28}{cells}")
    save(args.json, figures)
    if args.plot:
        draw(figures, args.plot)


if __name__ == "__main__":
    main()
