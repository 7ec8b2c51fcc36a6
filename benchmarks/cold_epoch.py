"""The first epoch: every file is read, the page cache warm. Against what people use today.

4,000 files of {"feature": f32[1024], "label": int64[1]} in batches of 256, and 64 files of 4 MB in
batches of 8, on the CPU, in shuffled order. Everybody gives the same batches, stacked.

- DataLoader with 0 and 2 workers, a Dataset that calls torch.load.
- torchdata: ParallelMapper of batches of paths, torch.load and stack, 2 threads.
- SPDL, if it is installed: the same in a pipeline with 2 threads.
- gpucache_pipes: PathLister -> GPUPrefetcher -> GPUCollator over a new store.

    python benchmarks/cold_epoch.py [--json FILE]
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torchdata.nodes as tn
from _common import interleaved, parser_for, report, save, temporary_directory, write_files
from torch.utils.data import DataLoader, Dataset, default_collate

from gpucache_pipes import GPUCollator, GPUFeatureStore, GPUPrefetcher, PathLister

try:
    from spdl.pipeline import PipelineBuilder
except ImportError:
    PipelineBuilder = None

Batch = dict[str, torch.Tensor]


class TorchLoad(Dataset[Any]):
    """What most people write."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        return torch.load(self.paths[index])


def load_batch(paths: Sequence[str]) -> Any:
    return default_collate([torch.load(path) for path in paths])


def contenders(directory: str, batch_size: int) -> dict[str, Any]:
    lister = PathLister(directory, batch_size=batch_size, shuffle=True)
    lister.reset()
    batches = list(lister)
    paths = [path for batch in batches for path in batch]

    def dataloader(workers: int) -> Any:
        loader = DataLoader(TorchLoad(paths), batch_size=batch_size, num_workers=workers)
        return lambda: _whole(loader)

    def torchdata() -> Iterator[int]:
        node = tn.ParallelMapper(tn.IterableWrapper(batches), load_batch, num_workers=2)
        return _whole(tn.Loader(node))

    def spdl() -> Iterator[int]:
        builder = PipelineBuilder().add_source(batches).pipe(load_batch, concurrency=2).add_sink(4)
        pipeline = builder.build(num_threads=2)
        with pipeline.auto_stop():
            yield from _whole(pipeline)

    def ours() -> Iterator[int]:
        with GPUFeatureStore("cpu") as store:
            lister = PathLister(directory, batch_size=batch_size, shuffle=True)
            yield from _whole(GPUCollator(GPUPrefetcher(lister, store, depth=2)))

    found = {
        "DataLoader, 0 workers": dataloader(0),
        "DataLoader, 2 workers": dataloader(2),
        "torchdata ParallelMapper": torchdata,
        "gpucache_pipes": ours,
    }
    return found if PipelineBuilder is None else {**found, "SPDL": spdl}


def _whole(batches: Any) -> Iterator[int]:
    """One item for the whole epoch: the sum of the labels, which is the same for all."""
    yield sum(int(batch["label"].sum()) for batch in batches)


def main() -> None:
    args = parser_for(__doc__, rounds=7).parse_args()
    figures = {}
    for count, width, batch_size in ((4000, 1024, 256), (64, 1 << 20, 8)):
        with temporary_directory() as directory:
            write_files(directory, count, width)
            epochs = contenders(directory, batch_size)
            sums = {name: next(epoch()) for name, epoch in epochs.items()}
            assert set(sums.values()) == {count * (count - 1) // 2}, sums
            title = f"cold epoch, {count} files of {width * 4 // 1024} KiB"
            times = interleaved(epochs, args.rounds)
            figures[title] = rows = report(title, times, "DataLoader, 0 workers", 1.0, "s")
            best = min(row["ratio"] for name, row in rows.items() if name != "gpucache_pipes")
            gain = best / rows["gpucache_pipes"]["ratio"]
            print(f"gpucache_pipes is {gain:.1f} times as fast as the best of the others")
    save(args.json, figures)


if __name__ == "__main__":
    main()
