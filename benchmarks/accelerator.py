"""The cost of the store on an accelerator, compared with the limits of the device.

- warm: a batch of 256 rows of 4 KiB, all cached: host time and total time, compared with
  index_select of a resident tensor with its indices already on the device (the same rows).
- rows: gathers of rows of 256 KiB and 4 MiB, compared with the copy bandwidth of the device.
- cold: files of 4 MiB from the page cache, compared with the smaller of two bandwidths: preadv by
  16 threads into pinned memory, and a copy from there to the device.
- overlap: the fraction of time spent waiting, with a training step as long as the load of a batch.

`scenarios.py --device cuda` compares the store with other loaders.

    python benchmarks/accelerator.py [--device cuda] [--scale 1.0] [--json FILE]

With `--device cpu --scale 0.05` it runs on any machine. That only tests the script.
"""

import os
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from _common import parser_for, save, temporary_directory, write_files

from gpucache_pipes import GPUCollator, GPUFeatureStore, GPUPrefetcher, PathLister

Figures = dict[str, Any]


class Device:
    """The device to measure: waiting, memory and timing."""

    def __init__(self, name: str | None) -> None:
        found = torch.accelerator.current_accelerator(check_available=True)
        self.device = torch.device(name) if name else found or torch.device("cpu")
        self.name = self.device.type
        if self.device.type == "cuda":
            self.name = torch.cuda.get_device_name(self.device)

    def wait(self) -> None:
        """Wait until the device is idle."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def empty_cache(self) -> None:
        """Free the memory that the allocator kept from the previous scenario."""
        if self.device.type != "cpu":
            getattr(torch, self.device.type).empty_cache()

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Pinned host memory; on the CPU, ordinary memory."""
        return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=self.device.type != "cpu")

    def seconds(self, work: Callable[[], Any], repeats: int = 20) -> float:
        """The median seconds of `work`, with the device idle before and after it."""
        times = []
        for _ in range(repeats + 3):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times[3:])


def warm(device: Device, scale: float) -> Figures:
    """Measure a batch of small rows, all cached."""
    files = max(600, int(20_000 * scale))
    data = torch.randn(files, 1024)
    features = {f"/{n}": row for n, row in enumerate(data)}
    resident = data.to(device.device)
    with GPUFeatureStore(device.device, load_fn=features.__getitem__) as store:
        store.warm(list(features), progress=False)
        choices = [torch.randperm(files)[:256] for _ in range(64)]
        on_device = [choice.to(device.device) for choice in choices]
        paths = [[f"/{int(n)}" for n in choice] for choice in choices]
        turn = iter(range(1 << 30))

        def ours() -> torch.Tensor:
            batch: torch.Tensor = store.get_batch(paths[next(turn) % 64]).collate()
            return batch

        assert torch.equal(store.get_batch(paths[0]).collate(), resident[on_device[0]])
        host = []
        for _ in range(200):
            device.wait()
            start = time.perf_counter()
            ours()
            host.append(time.perf_counter() - start)
        whole = device.seconds(ours, 200)
        limit = device.seconds(
            lambda: torch.index_select(resident, 0, on_device[next(turn) % 64]), 200
        )
    return {
        "host_us": statistics.median(host) * 1e6,
        "whole_us": whole * 1e6,
        "index_select_us": limit * 1e6,
        "ratio_to_index_select": whole / limit,
    }


def rows(device: Device, scale: float) -> Figures:
    """Measure the bandwidth of gathers of long rows, as a fraction of that of a device copy."""
    figures = {}
    for nbytes in (256 << 10, 4 << 20):
        count = max(16, int((4 << 30) * scale) // nbytes)
        batch = min(256, count // 2)
        features = {f"/{n}": torch.full((nbytes,), n % 251, dtype=torch.uint8)
                    for n in range(count)}  # fmt: skip
        with GPUFeatureStore(device.device, load_fn=features.__getitem__) as store:
            store.warm(list(features), progress=False)
            chosen = [f"/{int(n)}" for n in torch.randperm(count)[:batch]]
            ours = device.seconds(lambda: store.get_batch(chosen).collate())  # noqa: B023
            source = torch.empty(batch * nbytes, dtype=torch.uint8, device=device.device)
            target = torch.empty_like(source)
            copy = device.seconds(lambda: target.copy_(source))  # noqa: B023
        figures[f"{nbytes >> 10} KiB"] = {
            "gather_GBps": batch * nbytes / ours / 1e9,
            "copy_GBps": batch * nbytes / copy / 1e9,
            "part_of_copy": copy / ours,
        }
    return figures


def cold(device: Device, scale: float, threads: int = 16) -> Figures:
    """Measure a first epoch over files of 4 MiB, which are in the page cache."""
    count = max(16, int(1024 * scale))
    with temporary_directory() as directory:
        paths = write_files(directory, count, 1 << 20)
        nbytes = count << 22
        pinned = device.pinned(min(64, count) << 22)
        view = memoryview(pinned.numpy())

        def read_all() -> None:
            def read(first: int) -> None:
                for number in range(first, count, threads):
                    place = number % (len(view) >> 22)
                    fd = os.open(paths[number], os.O_RDONLY)
                    os.preadv(fd, [view[place << 22 : (place + 1) << 22]], 1024)
                    os.close(fd)

            readers = [threading.Thread(target=read, args=(n,)) for n in range(threads)]
            for reader in readers:
                reader.start()
            for reader in readers:
                reader.join()

        target = torch.empty(pinned.numel(), dtype=torch.uint8, device=device.device)
        disk = nbytes / device.seconds(read_all, 3)
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


def overlap(device: Device, scale: float) -> Figures:
    """Measure a first epoch with a training step that takes as long as the load of a batch."""
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
        matrix = torch.randn(1024, 1024, device=device.device)
        one = device.seconds(lambda: matrix @ matrix)
        repeats = max(1, round(step_seconds / one))

        def train() -> None:
            for _ in range(repeats):
                matrix @ matrix

        alone = device.seconds(lambda: [train() for _ in range(steps)], 3)
        with GPUFeatureStore(device.device, reader_threads=8) as store:
            device.wait()
            start = time.perf_counter()
            for batch in pipeline(store):
                train()
                device.wait()  # as loss.item() does in most loops
                del batch
            total = time.perf_counter() - start
            waited = store.stats().wait_seconds
    return {"waited_part": waited / total, "total_to_compute": total / alone}


SCENARIOS = {"warm": warm, "rows": rows, "cold": cold, "overlap": overlap}


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--device", default=None)
    parser.add_argument("--scale", type=float, default=1.0, help="of the amounts of data")
    parser.add_argument("--only", choices=SCENARIOS, default=None)
    args = parser.parse_args()
    device = Device(args.device)
    figures: Figures = {"device": device.name}
    for name, scenario in SCENARIOS.items():
        if args.only in (None, name):
            figures[name] = scenario(device, args.scale)
            device.empty_cache()
            print(f"{name}: {figures[name]}", flush=True)
            # After each scenario, so that an interrupted run keeps its figures.
            save(args.json, figures)


if __name__ == "__main__":
    main()
