"""Streams, events and memory of one accelerator, by the device-agnostic API of torch."""

import contextlib
import ctypes
from array import array
from collections.abc import Sequence
from typing import Any, Protocol

import torch


class Runtime(Protocol):
    """The few things AcceleratorBackend needs. Streams and events behave like torch's."""

    device: torch.device

    def new_stream(self) -> Any:
        """A stream for copies."""

    def current_stream(self) -> Any:
        """The stream on which this thread would issue an operation now."""

    def new_event(self) -> Any:
        """An event that has not been recorded."""

    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """Operations of this thread go to `stream`."""

    def on_device(self) -> contextlib.AbstractContextManager[Any]:
        """Operations of this thread go to this device, on its current stream."""

    def empty(self, nbytes: int) -> torch.Tensor:
        """Device memory, uint8. Raises torch.OutOfMemoryError."""

    def memory(self) -> tuple[int, int] | None:
        """Bytes of the device that are free, and all of them; None if that is not known."""

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Page-locked host memory, uint8."""

    def bytes_of(self, pinned: torch.Tensor) -> memoryview:
        """The memory of a pinned tensor, writable. The tensor must outlive it."""

    def index(self, numbers: Sequence[int]) -> torch.Tensor:
        """An int64 tensor on the device, filled in stream order without waiting for it."""


def host_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a tensor on the host, writable. The tensor must outlive it."""
    memory = (ctypes.c_char * tensor.numel()).from_address(tensor.data_ptr())
    return memoryview(memory).cast("B")


class TorchRuntime:
    """Runtime of a real device; `device` has an index."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

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
        # A torch.Stream keeps what to restore in itself: threads that enter the same object at
        # the same time would restore each other's stream. So each gets a handle of its own.
        handle: contextlib.AbstractContextManager[Any] = torch.Stream(
            stream_id=stream.stream_id,
            device_index=stream.device_index,
            device_type=stream.device_type,
        )
        return handle

    def on_device(self) -> contextlib.AbstractContextManager[Any]:
        """See Runtime."""
        return torch.accelerator.device_index(self.device.index)

    def empty(self, nbytes: int) -> torch.Tensor:
        """See Runtime."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def memory(self) -> tuple[int, int] | None:
        """See Runtime."""
        module: Any = getattr(torch, self.device.type, None)
        get = getattr(module, "mem_get_info", None)
        if get is None:
            return None
        free, total = get(self.device)
        # What the allocator holds and nobody uses it gives back before it is out of memory.
        idle = module.memory_reserved(self.device) - module.memory_allocated(self.device)
        return int(free + idle), int(total)

    def pinned(self, nbytes: int) -> torch.Tensor:
        """See Runtime."""
        # The device is named, since torch.set_default_device may have named another.
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def bytes_of(self, pinned: torch.Tensor) -> memoryview:
        """See Runtime."""
        return host_bytes(pinned)

    def index(self, numbers: Sequence[int]) -> torch.Tensor:
        """See Runtime."""
        # Freed at once, and safe: the pinned allocator waits for the copy before it hands the
        # memory to anybody else.
        staged = torch.empty(len(numbers), dtype=torch.int64, device="cpu", pin_memory=True)
        staged.copy_(torch.frombuffer(array("q", numbers), dtype=torch.int64))
        return staged.to(self.device, non_blocking=True)


class InOrderRuntime:
    """Runtime of a device that has one queue and runs it in order: MPS, and the CPU in tests.

    Order is given, so events have nothing to do; only the host has to wait, for staging.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

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

    def empty(self, nbytes: int) -> torch.Tensor:
        """See Runtime."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def memory(self) -> tuple[int, int] | None:
        """See Runtime."""
        return None

    def pinned(self, nbytes: int) -> torch.Tensor:
        """See Runtime."""
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")

    def bytes_of(self, pinned: torch.Tensor) -> memoryview:
        """See Runtime."""
        return host_bytes(pinned)

    def index(self, numbers: Sequence[int]) -> torch.Tensor:
        """See Runtime."""
        return torch.frombuffer(array("q", numbers), dtype=torch.int64).to(self.device)


class _InOrder:
    """Stream and event of a device where everything is in order already."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def wait_event(self, event: "_InOrder") -> None:
        """Nothing to wait for."""

    def record(self, stream: "_InOrder") -> None:
        """Nothing to record."""

    def query(self) -> bool:
        """All that was issued comes before all that will be."""
        return True

    def synchronize(self) -> None:
        """Let the host wait for everything."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
