"""Compare the store with a plain gather, for batches with all files cached.

4,000 files of {"feature": f32[1024], "label": int64[1]}, batches of 256 in shuffled order, on the
CPU, with a budget that holds all files. The contenders run epoch by epoch in a random order; each
has lists of paths and data of its own.

- index_select: two resident tensors, with the row of each path from a dict. The limit.
- stack: a dict of features by path, torch.stack over each leaf, as people write by hand.
- store: `store.get_batch(paths).collate()`.
- store, revalidate: the same with `revalidate=True`: a stat for each file of each batch.
- pipeline: PathLister -> GPUPrefetcher -> GPUCollator. Its time includes listing; the others get
  lists of paths.

    python benchmarks/warm_batch.py [--batch-size 256] [--no-budget] [--json FILE]
"""

import os
from collections.abc import Callable, Iterator

import torch
from _common import interleaved, parser_for, report, save, temporary_directory, write_files

from gpucache_pipes import GPUCollator, GPUFeatureStore, GPUPrefetcher, PathLister

Batch = dict[str, torch.Tensor]


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--files", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--no-budget", action="store_true")
    args = parser.parse_args()

    with temporary_directory() as directory:
        write_files(directory, args.files)

        def new_lister() -> PathLister:
            options = {"batch_size": args.batch_size, "drop_last": True, "shuffle": True}
            return PathLister(directory, **options)

        def over_lists(serve: Callable[[list[str]], Batch]) -> Callable[[], Iterator[Batch]]:
            lister = new_lister()

            def epoch() -> Iterator[Batch]:
                lister.reset()
                return map(serve, list(lister))

            return epoch

        paths = new_lister().paths
        number = {path: n for n, path in enumerate(paths)}
        by_path = {path: torch.load(path) for path in paths}
        features = torch.stack([by_path[path]["feature"] for path in paths])
        labels = torch.stack([by_path[path]["label"] for path in paths])

        def index_select(batch: list[str]) -> Batch:
            rows = torch.tensor(list(map(number.__getitem__, batch)))
            return {
                "feature": features.index_select(0, rows),
                "label": labels.index_select(0, rows),
            }

        def stack(batch: list[str]) -> Batch:
            items = [by_path[path] for path in batch]
            return {
                "feature": torch.stack([item["feature"] for item in items]),
                "label": torch.stack([item["label"] for item in items]),
            }

        for path in paths:
            os.utime(path, (1, 1))  # otherwise the store reads files written just now again

        def new_store(revalidate: bool = False) -> GPUFeatureStore:
            budget = None if args.no_budget else "1GiB"
            store = GPUFeatureStore("cpu", max_cache_bytes=budget, revalidate=revalidate)
            store.warm(new_lister().paths, progress=False)
            return store

        store, wary = new_store(), new_store(revalidate=True)
        pipeline = GPUCollator(GPUPrefetcher(new_lister(), new_store()))

        def pipeline_epoch() -> Iterator[Batch]:
            pipeline.reset()
            return pipeline

        contenders = {
            "index_select": over_lists(index_select),
            "stack": over_lists(stack),
            "store": over_lists(lambda batch: store.get_batch(batch).collate()),
            "store, revalidate": over_lists(lambda batch: wary.get_batch(batch).collate()),
            "pipeline": pipeline_epoch,
        }
        # All contenders give the same batches in the first epoch, which has the same seed.
        for batches in zip(*(epoch() for epoch in contenders.values()), strict=True):
            for other in batches[1:]:
                assert torch.equal(other["label"], batches[0]["label"])
                assert torch.equal(other["feature"], batches[0]["feature"])

        times = interleaved(contenders, args.epochs)
        figures = report(f"warm batch of {args.batch_size}", times, "index_select")
        ratio = figures["pipeline"]["ratio"] / figures["stack"]["ratio"]
        print(f"pipeline / stack: {ratio:.2f}")
        save(args.json, {"warm_batch": figures})


if __name__ == "__main__":
    main()
