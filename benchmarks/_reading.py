"""Scenarios of accelerator.py that read files: bandwidth, and what readers cost the consumer."""

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from _common import temporary_directory, write_files
from _contenders import PEERS, data_loader, first_epochs, pinned_copies, with_readers
from _device import Device, Figures, read_all, spread_us

from gpucache_pipes import GPUCollator, GPUFeatureStore, GPUPrefetcher, PathLister
from gpucache_pipes.cli.bench import Work


def cold(device: Device, scale: float, threads: int = 16) -> Figures:
    """Measure a first epoch over files of 4 MiB, which are in the page cache."""
    count = max(16, int(1024 * scale))
    with temporary_directory() as directory:
        paths = write_files(directory, count, 1 << 20)
        nbytes = count << 22
        pinned = device.pinned(min(64, count) << 22)
        view = memoryview(pinned.numpy())
        target = torch.empty(pinned.numel(), dtype=torch.uint8, device=device.device)
        disk = nbytes / device.seconds(lambda: read_all(paths, 4 << 20, view, threads), 3)
        bus = pinned.numel() / device.seconds(lambda: target.copy_(pinned, non_blocking=True))

        def epoch() -> None:
            with GPUFeatureStore(device.device, reader_threads=threads) as store:
                lister = PathLister(paths, batch_size=16)
                for batch in GPUCollator(GPUPrefetcher(lister, store, depth=4)):
                    del batch

        ours = nbytes / device.seconds(epoch, 3)
    return {
        "GBps": ours / 1e9,
        "preadv_GBps": disk / 1e9,
        "host_to_device_GBps": bus / 1e9,
        "part_of_limit": ours / min(disk, bus),
    }


def cold_small(device: Device, scale: float) -> Figures:
    """Measure first epochs over files of 6 KB, by number of readers, against other loaders."""
    return _cold_beside_others(device, max(64, int(8000 * scale)), 1024, 256)


def cold_large(device: Device, scale: float) -> Figures:
    """Measure first epochs over files of 4 MB, by number of readers, against other loaders."""
    return _cold_beside_others(device, max(8, int(256 * scale)), 1 << 20, 8)


def _cold_beside_others(device: Device, count: int, width: int, batch_size: int) -> Figures:
    contenders = [
        *(with_readers(threads) for threads in (1, 4, 16)),
        *(pinned_copies(threads) for threads in (1, 4, 16)),
        *(data_loader(workers) for workers in (8, 16)),
        PEERS["SPDL"],
    ]
    with temporary_directory() as directory:
        paths = write_files(directory, count, width)
        with Work(paths, min(batch_size, count // 2), device.device) as work:
            return first_epochs(device, work, contenders, rounds=3)


def overlap(device: Device, scale: float) -> Figures:
    """Measure a first epoch with a training step that takes as long as the load of a batch.

    The step is a few large matrix products: the host only waits for it.
    """
    matrix = torch.randn(1024, 1024, device=device.device)
    return _beside_training(device, scale, lambda: matrix @ matrix)


def small_kernels(device: Device, scale: float) -> Figures:
    """Measure the same with a step of many small kernels, which the host is busy to launch.

    Python of reader threads delays these launches.
    """
    vector = torch.randn(1024, device=device.device)
    return _beside_training(device, scale, lambda: vector.mul(0.5).add(1.0).relu())


def _beside_training(device: Device, scale: float, one: Callable[[], Any]) -> Figures:
    """A first epoch with a step that repeats `one` for as long as the load of a batch takes."""
    count = max(32, int(2048 * scale))
    with temporary_directory() as directory:
        paths = write_files(directory, count, 1 << 18)
        steps = count // 16

        def pipeline(store: GPUFeatureStore) -> GPUCollator:
            return GPUCollator(GPUPrefetcher(PathLister(paths, batch_size=16), store, depth=4))

        def load() -> None:
            with GPUFeatureStore(device.device, reader_threads=8) as store:
                for batch in pipeline(store):
                    del batch

        load()
        step_seconds = device.seconds(load, 3) / steps
        repeats = 1

        def train() -> None:
            for _ in range(repeats):
                one()

        # A single call is too short to be timed.
        while (trained := device.seconds(train, 3)) < min(5e-3, step_seconds):
            repeats *= 4
        repeats = max(1, round(repeats * step_seconds / trained))

        def train_alone() -> None:
            for _ in range(steps):
                train()
                device.wait()

        alone = device.seconds(train_alone, 3)
        with GPUFeatureStore(device.device, reader_threads=8) as store:
            device.wait()
            start = time.perf_counter()
            for batch in pipeline(store):
                train()
                device.wait()  # as loss.item() does in most loops
                del batch
            total = time.perf_counter() - start
            waited = store.stats().wait_seconds
    return {
        "step_us": alone / steps * 1e6,
        "calls_per_step": repeats,
        "waited_part": waited / total,
        "total_to_compute": total / alone,
    }


def small_copies(device: Device, scale: float) -> Figures:
    """Measure a copy of 1 KiB to the device, such as an index: idle, and during uploads.

    The uploads are those of a store that reads files of 4 MiB, and, to compare with, copies of
    32 MiB from pinned memory one after the other.
    """
    index = device.pinned(1024)

    def copy() -> None:
        index.to(device.device, non_blocking=True)
        device.wait_for_stream()

    def latencies(count: int, others: Callable[[], bool] = lambda: True) -> list[float]:
        """Of `count` copies, and of more until `others` are done."""
        times: list[float] = []
        with device.on_a_stream():
            while len(times) < count or not others():
                start = time.perf_counter()
                copy()
                times.append(time.perf_counter() - start)
        return times

    def beside(work: Callable[[], Any]) -> dict[str, float]:
        errors: list[BaseException] = []

        def run() -> None:
            try:
                with device.on_a_stream():
                    work()
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        found = latencies(1, lambda: not thread.is_alive())
        thread.join()
        if errors:
            raise errors[0]
        return {**spread_us(found), "copies": len(found)}

    latencies(100)
    figures: Figures = {"idle": spread_us(latencies(2000))}
    large = device.pinned(32 << 20)
    target = torch.empty_like(large, device=device.device)

    def copy_large() -> None:
        for _ in range(max(4, int(200 * scale))):
            target.copy_(large, non_blocking=True)
        device.wait_for_stream()

    figures["beside copies of 32 MiB"] = beside(copy_large)
    count = max(16, int(512 * scale))
    with temporary_directory() as directory:
        paths = write_files(directory, count, 1 << 20)

        def epochs() -> None:
            for _ in range(2):
                with GPUFeatureStore(device.device, reader_threads=4) as store:
                    lister = PathLister(paths, batch_size=8)
                    for batch in GPUCollator(GPUPrefetcher(lister, store, depth=4)):
                        del batch

        figures["beside uploads of a store"] = beside(epochs)
    return figures
