"""The device that accelerator.py measures: waiting, memory, copies and timing."""

import os
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from gpucache_pipes.testing.contracts import in_threads

Figures = dict[str, Any]


class Device:
    """A device, or the CPU in its place.

    Attributes:
        device: with an index, if there can be several of its type.
        name: as its maker calls it.
        is_cpu: whether it is the CPU, where streams, pinned memory and an allocator with
            statistics do not exist.
    """

    def __init__(self, name: str | None) -> None:
        found = torch.accelerator.current_accelerator(check_available=True)
        self.device = torch.device(name) if name else found or torch.device("cpu")
        self.is_cpu = self.device.type == "cpu"
        if not self.is_cpu and self.device.index is None:
            index = torch.accelerator.current_device_index()
            self.device = torch.device(self.device.type, index)
        # torch.accelerator has functions for memory since torch 2.9 only.
        self._module: Any = getattr(torch, self.device.type, None)
        self.name = self.device.type
        if self.device.type == "cuda":
            self.name = torch.cuda.get_device_name(self.device)

    def wait(self) -> None:
        """Wait until the device is idle."""
        if not self.is_cpu:
            torch.accelerator.synchronize(self.device)

    def on_a_stream(self) -> AbstractContextManager[Any]:
        """A context whose operations are on a new stream."""
        return nullcontext() if self.is_cpu else torch.Stream(self.device)

    def wait_for_stream(self) -> None:
        """Wait until the current stream of this thread is idle."""
        if not self.is_cpu:
            torch.accelerator.current_stream(self.device).synchronize()

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Pinned host memory; on the CPU, ordinary memory."""
        return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=not self.is_cpu)

    def seconds(self, work: Callable[[], Any], repeats: int = 20) -> float:
        """The median seconds of `work`, with the device idle before and after it."""
        return statistics.median(self.times(work, repeats))

    def times(self, work: Callable[[], Any], repeats: int, *, host: bool = False) -> list[float]:
        """Seconds of each call of `work` after three that are not timed.

        Args:
            work: what to time. The device is idle before it.
            repeats: calls.
            host: time the host only, and not until the device is idle again.
        """
        return [self.once(work, host=host) for _ in range(repeats + 3)][3:]

    def once(self, work: Callable[[], Any], *, host: bool = False) -> float:
        """Seconds of one call, as for `times`."""
        self.wait()
        start = time.perf_counter()
        work()
        if not host:
            self.wait()
        return time.perf_counter() - start

    # Memory

    def empty_cache(self) -> None:
        """Free the memory that the allocator kept from the previous measurement."""
        if not self.is_cpu:
            self._module.empty_cache()

    def forget_peak(self) -> None:
        """Let `peak_reserved_bytes` begin anew."""
        if not self.is_cpu:
            self._module.reset_peak_memory_stats(self.device)

    def peak_reserved_bytes(self) -> int:
        """The most that the allocator has had from the device; on the CPU, of the process."""
        if self.is_cpu:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        return int(self._module.max_memory_reserved(self.device))

    def reserved_bytes(self) -> int:
        """What the allocator has from the device now; on the CPU, the peak of the process."""
        if self.is_cpu:
            return self.peak_reserved_bytes()
        return int(self._module.memory_reserved(self.device))

    def limit_memory(self, nbytes: int) -> None:
        """Let this process take no more than `nbytes` of a CUDA device. Not on other devices."""
        if self.device.type == "cuda":
            total = torch.cuda.mem_get_info(self.device)[1]
            torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / total), self.device)


def spread_us(times: Sequence[float]) -> dict[str, float]:
    """Median, 90% and 99% and the longest of some times, in microseconds."""
    ordered = sorted(times)

    def at(part: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(part * len(ordered)))] * 1e6, 2)

    return {"median_us": at(0.5), "p90_us": at(0.9), "p99_us": at(0.99), "longest_us": at(1)}


def read_all(
    paths: Sequence[str], nbytes: int, into: memoryview, threads: int, offset: int = 1024
) -> None:
    """Read `nbytes` of each file by preadv in several threads, over and over into one buffer.

    Args:
        paths: of the files.
        nbytes: to read of each.
        into: a buffer for some of the files, which are read over each other.
        threads: number of threads.
        offset: where to begin in each file.
    """

    def read(first: int) -> None:
        for number in range(first, len(paths), threads):
            place = number % (len(into) // nbytes)
            fd = os.open(paths[number], os.O_RDONLY)
            os.preadv(fd, [into[place * nbytes : (place + 1) * nbytes]], offset)
            os.close(fd)

    in_threads(read, threads)
