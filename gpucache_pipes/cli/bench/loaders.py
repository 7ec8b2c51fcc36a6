"""Contenders without further requirements: gpucache_pipes, loaders of torch, a dict."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torchdata.nodes as tn
from torch.utils.data import DataLoader, Dataset

from gpucache_pipes.cli.bench.contender import Contender, Opener, Run
from gpucache_pipes.cli.bench.work import Work, load
from gpucache_pipes.nodes import GPUCollator, GPUPrefetcher
from gpucache_pipes.store import GPUFeatureStore

_README_BUDGET = 8 << 30
"""Bytes that the example of the README may cache."""


def gpucache_pipes(
    work: Work,
    share: float,
    own_collate: bool = False,
    readers: int | None = None,
    paths: Sequence[str] | None = None,
) -> Iterator[Run]:
    """The pipeline of the README, with a budget that holds everything or `share` of the data.

    With `own_collate` batches are made by the function that other contenders call as well. With
    `readers` there are that many reader threads. `paths` are read in place of those of `work`.
    """
    collation = (
        {"collate_fn": work.collation.by_hand} if own_collate else work.collation.for_nodes()
    )
    budget = max(_README_BUDGET, 2 * work.budget(1)) if share == 1 else work.budget(share)
    with GPUFeatureStore(
        work.device,
        max_cache_bytes=budget,
        weights_only=work.weights_only,
        reader_threads=readers,
        storage_options=work.storage_options,
    ) as store:
        batches = tn.Loader(GPUCollator(GPUPrefetcher(work.lister(paths), store), **collation))
        after_first = store.stats()

        def epoch(number: int) -> Iterable[Any]:
            nonlocal after_first
            if number == 1:
                after_first = store.stats()
            return batches

        yield Run(epoch, lambda: store.stats().since(after_first).hit_rate)


class Files(Dataset[Any]):
    """The data set that most training scripts have, indexed by path."""

    def __init__(self, weights_only: bool, mmap: bool = False) -> None:
        self.weights_only = weights_only
        self.mmap = mmap

    def __getitem__(self, path: str) -> Any:
        return load(path, self.weights_only, self.mmap)


class Batches:
    """A batch sampler that yields the batches in `chosen`."""

    def __init__(self) -> None:
        self.chosen: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        return iter(self.chosen)

    def __len__(self) -> int:
        return len(self.chosen)


def dataloader(
    workers: int, dataset_of: Callable[[Work], Dataset[Any]], context: str | None = None
) -> Opener:
    """A DataLoader with this many workers over a data set of single features.

    Args:
        workers: processes; 0 loads in the consumer's.
        dataset_of: makes the data set, which is indexed by path.
        context: how processes are started; None is the default of the system.
    """

    def run(work: Work, share: float) -> Iterator[Run]:
        sampler = Batches()
        stacked = work.collation.mode == "stack"
        loader = DataLoader(
            dataset_of(work),
            batch_sampler=sampler,
            num_workers=workers,
            persistent_workers=workers > 0,
            multiprocessing_context=context if workers else None,
            pin_memory=work.on_accelerator,
            # The default collation writes to shared memory directly when it runs in a worker.
            collate_fn=None if stacked else work.collation.by_hand,
        )

        def epoch(number: int) -> Iterable[Any]:
            sampler.chosen = work.batches[number]
            return map(work.upload, loader)

        yield Run(epoch)

    return run


def _over_files(workers: int, mmap: bool = False) -> Opener:
    return dataloader(workers, lambda work: Files(work.weights_only, mmap))


def _torchdata(work: Work, share: float) -> Iterator[Run]:
    def epoch(number: int) -> Iterable[Any]:
        batches = tn.IterableWrapper(work.batches[number])
        mapped = tn.ParallelMapper(batches, work.load_batch, num_workers=work.threads)
        return map(work.upload, tn.Loader(tn.Prefetcher(mapped, 4)))

    yield Run(epoch)


def _dictionary(work: Work, share: float) -> Iterator[Run]:
    """Keep the first features in a dict until `share` of the files are kept."""
    kept: dict[str, Any] = {}
    room = round(share * len(work.paths))

    def fetch(path: str) -> Any:
        feature = kept.get(path)
        if feature is None:
            feature = work.upload(work.load(path))
            if len(kept) < room:
                kept[path] = feature
        return feature

    def epoch(number: int) -> Iterable[Any]:
        for batch in work.batches[number]:
            yield work.collation.by_hand([fetch(path) for path in batch])

    yield Run(epoch)


def with_readers(threads: int) -> Contender:
    """gpucache_pipes with a given number of reader threads, for first epochs."""
    return Contender(
        f"gpucache_pipes, reader_threads={threads}",
        "ours",
        partial(gpucache_pipes, readers=threads),
        caches=True,
        cases=("first", "partial", "overlap"),
    )


OURS = Contender("gpucache_pipes", "ours", gpucache_pipes, caches=True)
BASELINE = Contender("DataLoader, 0 workers", "peer", _over_files(0))
LOADERS = [
    OURS,
    Contender(
        "GPUCollator with a collate_fn",
        "ours",
        partial(gpucache_pipes, own_collate=True),
        caches=True,
    ),
    BASELINE,
    Contender("DataLoader, torch.load(mmap=True)", "peer", _over_files(0, mmap=True)),
    *(
        Contender(f"DataLoader, {workers} workers", "peer", _over_files(workers))
        for workers in (2, 4, 8)
    ),
    Contender("torchdata ParallelMapper", "peer", _torchdata),
    Contender("dict of features, never evicts", "peer", _dictionary, caches=True),
]
