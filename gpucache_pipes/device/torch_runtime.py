"""Runtimes of real devices: TorchRuntime, and InOrderRuntime for devices without streams."""

import contextlib
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np
import torch

from gpucache_pipes.device.backend import Pages
from gpucache_pipes.device.runtime import (
    SMALLEST_RESERVATION,
    DeviceMemory,
    Reservation,
    host_bytes,
)


class TorchRuntime:
    """Runtime of a real device, by the device-agnostic API of torch.

    On CUDA each reservation has a memory pool of its own. What does not work without: memory that
    was allocated on the copy stream and freed stays in the cache of that stream, where the model
    gets it only after an allocation has failed, and NCCL never.

    Args:
        device: with an index.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._has_pools = device.type == "cuda" and hasattr(torch.cuda, "MemPool")

    @property
    def returns_memory(self) -> bool:
        """See Runtime."""
        return self._has_pools

    def bind_thread(self) -> None:
        """See Runtime."""
        torch.accelerator.set_device_index(self.device.index)

    def new_stream(self) -> torch.Stream:
        """See Runtime."""
        return torch.Stream(self.device)

    def current_stream(self) -> torch.Stream:
        """See Runtime."""
        return torch.accelerator.current_stream(self.device)

    def new_event(self) -> torch.Event:
        """See Runtime."""
        return torch.Event(self.device)

    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """See Runtime."""
        return _OnStream(self.on_device(), stream)

    def on_device(self) -> contextlib.AbstractContextManager[Any]:
        """See Runtime."""
        return torch.accelerator.device_index(self.device.index)

    def reserve(self, nbytes: int) -> Reservation:
        """See Runtime."""
        if self._has_pools:
            try:
                return self._in_new_pool(nbytes)
            except torch.OutOfMemoryError:
                # For an allocation in a pool, torch does not free its cache before it gives up.
                torch.cuda.empty_cache()
                return self._in_new_pool(nbytes)
            except RuntimeError:
                # A pluggable allocator, cudaMallocAsync, or an old torch with expandable segments.
                self._has_pools = False
        return Reservation(self._empty(nbytes))

    def _in_new_pool(self, nbytes: int) -> Reservation:
        pool = torch.cuda.MemPool()
        with torch.cuda.use_mem_pool(pool, device=self.device):
            return Reservation(self._empty(nbytes), pool)

    def _empty(self, nbytes: int) -> torch.Tensor:
        least = max(nbytes, SMALLEST_RESERVATION)
        return torch.empty(least, dtype=torch.uint8, device=self.device)[:nbytes]

    def memory(self) -> DeviceMemory | None:
        """See Runtime."""
        module: Any = getattr(torch, self.device.type, None)
        try:
            # Raises on some XPUs.
            free, total = module.mem_get_info(self.device)
        except (AttributeError, RuntimeError, NotImplementedError):
            return None
        stats = _known(lambda: module.memory_stats_as_nested_dict(self.device)) or {}
        reserved = _total_of(stats, "reserved_bytes", "current")
        # None where torch has no such function; the driver knows nothing of the fraction.
        share = _known(lambda: module.get_per_process_memory_fraction(self.device))
        if share is not None:
            total = int(total * share)
            free = max(0, min(free, total - reserved))
        return DeviceMemory(
            int(free),
            int(total),
            reserved,
            _total_of(stats, "allocated_bytes", "current"),
            _total_of(stats, "allocated_bytes", "peak"),
            stats.get("num_alloc_retries", 0) + stats.get("num_ooms", 0),
        )

    def pinned(self, nbytes: int) -> torch.Tensor:
        """See Runtime."""
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def release_pinned(self) -> None:
        """See Runtime. Without a torch that can, the memory stays in the cache of its allocator."""
        release: Any = getattr(torch.accelerator, "empty_host_cache", None)
        if release is not None:
            release()

    def bytes_of(self, pinned: torch.Tensor) -> memoryview:
        """See Runtime."""
        return host_bytes(pinned)

    def index(self, numbers: Pages) -> torch.Tensor:
        """See Runtime."""
        # `staged` is freed when this returns, before the copy has run. That is safe: the pinned
        # allocator does not reuse a block before the copies from it have finished.
        staged = torch.empty(len(numbers), dtype=torch.int64, device="cpu", pin_memory=True)
        staged.numpy()[:] = numbers
        return staged.to(self.device, non_blocking=True)


class _OnStream:
    """The device of a stream is current, and the stream. Entered once.

    The device first: leaving a stream makes the device current that was current before. If that
    is another one, CUDA creates a context there.
    """

    def __init__(self, on_device: contextlib.AbstractContextManager[Any], stream: Any) -> None:
        self._on_device = on_device
        # Entering the shared torch.Stream object does not work: it stores the stream to restore in
        # itself, so two threads inside it at the same time restore each other's stream. Each call
        # makes a handle of its own for the same stream.
        self._handle: Any = torch.Stream(
            stream_id=stream.stream_id,
            device_index=stream.device_index,
            device_type=stream.device_type,
        )

    def __enter__(self) -> None:
        self._on_device.__enter__()
        try:
            self._handle.__enter__()
        except BaseException:
            self._on_device.__exit__(None, None, None)
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._handle.__exit__(kind, error, traceback)
        finally:
            self._on_device.__exit__(kind, error, traceback)


def _known(get: Callable[[], Any]) -> Any:
    """What `get` returns, or None: allocators and devices lack one or the other statistic."""
    try:
        return get()
    except (AttributeError, RuntimeError, NotImplementedError):
        return None


def _total_of(stats: Any, name: str, which: str) -> int:
    return int(stats.get(name, {}).get("all", {}).get(which, 0))


class InOrderRuntime:
    """Runtime of a device that runs all operations in the order of issue: MPS, the CPU in tests.

    Operations need no events to be in order. Only the host waits, before it overwrites staging.

    Args:
        device: MPS or the CPU.
    """

    returns_memory = True

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def bind_thread(self) -> None:
        """See Runtime. There is one device."""

    def new_stream(self) -> "_InOrder":
        """See Runtime."""
        return _InOrder(self.device)

    current_stream = new_stream
    new_event = new_stream

    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """See Runtime."""
        return contextlib.nullcontext()

    def on_device(self) -> contextlib.AbstractContextManager[Any]:
        """See Runtime."""
        return contextlib.nullcontext()

    def reserve(self, nbytes: int) -> Reservation:
        """See Runtime."""
        try:
            return Reservation(torch.empty(nbytes, dtype=torch.uint8, device=self.device))
        except RuntimeError as error:
            # MPS has no class for it.
            if isinstance(error, torch.OutOfMemoryError) or "out of memory" not in str(error):
                raise
            raise torch.OutOfMemoryError(str(error)) from error

    def memory(self) -> DeviceMemory | None:
        """See Runtime."""
        return None

    def pinned(self, nbytes: int) -> torch.Tensor:
        """See Runtime."""
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")

    def release_pinned(self) -> None:
        """See Runtime. The memory is not pinned."""

    def bytes_of(self, pinned: torch.Tensor) -> memoryview:
        """See Runtime."""
        return host_bytes(pinned)

    def index(self, numbers: Pages) -> torch.Tensor:
        """See Runtime."""
        return torch.from_numpy(np.array(numbers)).to(self.device)


class _InOrder:
    """Stream and event of `InOrderRuntime`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _InOrder)

    def __hash__(self) -> int:
        return 0

    def wait_event(self, event: "_InOrder") -> None:
        """Does nothing: all operations are in order."""

    def record(self, stream: "_InOrder") -> None:
        """Does nothing: all operations are in order."""

    def query(self) -> bool:
        """True: every operation issued so far runs before any later one."""
        return True

    def synchronize(self) -> None:
        """Let the host wait until the device has finished everything."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
