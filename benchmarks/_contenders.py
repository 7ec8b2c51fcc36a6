"""Contenders for machines with a device and many cores, in addition to those of `bench`."""

import os
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from _device import Device, Figures

from gpucache_pipes import GPUCollator, GPUFeatureStore, GPUPrefetcher
from gpucache_pipes.cli.bench import CONTENDERS, Contender, Work
from gpucache_pipes.cli.bench.contender import Run
from gpucache_pipes.cli.bench.loaders import Batches, Files
from gpucache_pipes.files import file_size
from gpucache_pipes.testing.contracts import in_threads


def with_readers(threads: int) -> Contender:
    """gpucache_pipes with a number of reader threads."""

    def run(work: Work, share: float) -> Iterator[Run]:
        with GPUFeatureStore(work.device, reader_threads=threads) as store:
            prefetcher = GPUPrefetcher(work.lister(), store, depth=4)
            node = GPUCollator(prefetcher, **work.collation.for_nodes())

            def epoch(number: int) -> Iterable[Any]:
                node.reset()
                return node

            yield Run(epoch)

    return Contender(f"gpucache_pipes, {threads} readers", "ours", run, caches=True)


def data_loader(workers: int) -> Contender:
    """DataLoader with worker processes and pinned memory."""

    def run(work: Work, share: float) -> Iterator[Run]:
        sampler = Batches()
        loader = torch.utils.data.DataLoader(
            Files(work.weights_only),
            batch_sampler=sampler,
            num_workers=workers,
            persistent_workers=True,
            pin_memory=work.on_accelerator,
            collate_fn=None if work.collation.mode == "stack" else work.collation.by_hand,
        )

        def epoch(number: int) -> Iterable[Any]:
            sampler.chosen = work.batches[number]
            return map(work.upload, loader)

        yield Run(epoch)

    return Contender(f"DataLoader, {workers} workers", "peer", run)


def pinned_copies(threads: int) -> Contender:
    """The limit of reading: threads that read files into pinned memory and copy it to the device.

    Each thread takes every so many-th batch. It has two buffers, so that it reads one while the
    device copies the other.
    """

    def run(work: Work, share: float) -> Iterator[Run]:
        sizes = work.prepared("sizes", lambda: {path: file_size(path) for path in work.paths})
        largest = max(sum(sizes[p] for p in batch) for epoch in work.batches for batch in epoch)

        def make() -> list[list[torch.Tensor]]:
            pinned = work.on_accelerator
            return [
                [torch.zeros(largest, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
                for _ in range(threads)
            ]

        buffers = work.prepared(f"buffers of {threads} threads", make)
        target = torch.empty(largest, dtype=torch.uint8, device=work.device)

        def copy_batches(batches: Sequence[Sequence[str]], number: int) -> None:
            busy: list[Any] = [None, None]
            stream = torch.Stream(work.device) if work.on_accelerator else None
            for turn, batch in enumerate(batches[number::threads]):
                slot = turn % 2
                if busy[slot] is not None:
                    busy[slot].synchronize()
                buffer = buffers[number][slot]
                view, end = memoryview(buffer.numpy()), 0
                for path in batch:
                    fd = os.open(path, os.O_RDONLY)
                    end += os.preadv(fd, [view[end : end + sizes[path]]], 0)
                    os.close(fd)
                if stream is None:
                    target[:end].copy_(buffer[:end])
                else:
                    with torch.Stream(
                        stream_id=stream.stream_id,
                        device_index=stream.device_index,
                        device_type=stream.device_type,
                    ):
                        target[:end].copy_(buffer[:end], non_blocking=True)
                    busy[slot] = stream.record_event()
            if stream is not None:
                stream.synchronize()

        def epoch(number: int) -> Iterable[Any]:
            batches = work.batches[number]
            in_threads(lambda thread: copy_batches(batches, thread), threads)
            return [None] * len(batches)

        yield Run(epoch)

    return Contender(
        f"pinned copies, {threads} threads", "limit", run, cases=("first",), makes_batches=False
    )


_BY_NAME = {contender.name: contender for contender in CONTENDERS}
PEERS = {
    contender.name: contender
    for contender in (
        data_loader(8),
        data_loader(16),
        pinned_copies(4),
        pinned_copies(16),
        *(_BY_NAME[name] for name in ("SPDL", "torchdata ParallelMapper", "grain")),
        _BY_NAME["MONAI CacheDataset"],
    )
}
"""What peers.py compares gpucache_pipes with."""


def first_epochs(
    device: Device, work: Work, contenders: Sequence[Contender], rounds: int
) -> Figures:
    """Median seconds of a first epoch of each contender, in turns, after one that is not timed.

    Those that are not installed, or fail, are named with the reason.
    """
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    problems = {c.name: f"{c.needs} is not installed" for c in contenders if not c.installed}

    def first_epoch(contender: Contender) -> None:
        with contender.open(work, 1.0) as run:
            for batch in run.epoch(0):
                del batch
            device.wait()

    for turn in range(rounds + 1):
        for contender in contenders:
            if contender.name in problems:
                continue
            try:
                taken = device.once(lambda contender=contender: first_epoch(contender))
            except Exception as error:
                if contender.kind == "ours":
                    raise
                problems[contender.name] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            if turn:
                seconds[contender.name].append(taken)
            device.empty_cache()
    files, nbytes = len(work.paths), work.feature_bytes
    figures: Figures = {}
    for name, series in seconds.items():
        if name in problems:
            figures[name] = {"problem": problems[name]}
        else:
            middle = statistics.median(series)
            figures[name] = {
                "seconds": middle,
                "us_per_file": middle / files * 1e6,
                "GBps": nbytes / middle / 1e9,
            }
    return figures
