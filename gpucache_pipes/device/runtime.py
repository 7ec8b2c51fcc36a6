"""Streams, events and memory of one device: the `Runtime` that `AcceleratorBackend` runs on."""

import contextlib
import ctypes
from array import array
from collections.abc import Sequence
from typing import Any, Protocol

import torch


class Runtime(Protocol):
    """What `AcceleratorBackend` needs from a device. Thread-safe.

    Streams and events have the methods of `torch.Stream` and `torch.Event` that the backend uses:
    `stream.wait_event`, `stream.synchronize`, `event.record`, `event.query` and
    `event.synchronize`.

    Attributes:
        device: with an index, if there can be several of its type.
    """

    device: torch.device

    def new_stream(self) -> Any:
        """A new stream, for copies."""

    def current_stream(self) -> Any:
        """The stream on which the calling thread issues operations now."""

    def new_event(self) -> Any:
        """A new event that has not been recorded."""

    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """A context in which the calling thread issues operations on `stream`."""

    def on_device(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which the calling thread issues operations on this device.

        They are issued on its current stream.
        """

    def empty(self, nbytes: int) -> torch.Tensor:
        """New device memory with undefined content, uint8 [nbytes].

        Raises torch.OutOfMemoryError.
        """

    def memory(self) -> tuple[int, int] | None:
        """(free, total) bytes of device memory, or None if that is not known."""

    def pinned(self, nbytes: int) -> torch.Tensor:
        """New pinned host memory, uint8 [nbytes]."""

    def bytes_of(self, pinned: torch.Tensor) -> memoryview:
        """The memory of a tensor of `pinned`, writable. The tensor must outlive the view."""

    def index(self, numbers: Sequence[int]) -> torch.Tensor:
        """A new int64 tensor on the device, filled in the order of the current stream.

        The host does not wait for the copy.
        """


def host_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous host tensor, writable. The tensor must outlive the view."""
    memory = (ctypes.c_char * tensor.numel()).from_address(tensor.data_ptr())
    return memoryview(memory).cast("B")


class TorchRuntime:
    """Runtime of a real device, by the device-agnostic API of torch.

    Args:
        device: with an index.
    """

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
        # Entering the shared torch.Stream object does not work: it stores the stream to restore in
        # itself, so two threads inside it at the same time restore each other's stream. Each call
        # makes a handle of its own for the same stream.
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
        # Memory that the allocator has reserved but not allocated counts as free: the allocator
        # uses or returns it before it reports that memory is exhausted.
        idle = module.memory_reserved(self.device) - module.memory_allocated(self.device)
        return int(free + idle), int(total)

    def pinned(self, nbytes: int) -> torch.Tensor:
        """See Runtime."""
        # Without device="cpu", torch.set_default_device could choose another device.
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def bytes_of(self, pinned: torch.Tensor) -> memoryview:
        """See Runtime."""
        return host_bytes(pinned)

    def index(self, numbers: Sequence[int]) -> torch.Tensor:
        """See Runtime."""
        # `staged` is freed when this returns, before the copy has run. That is safe: the pinned
        # allocator does not reuse a block before the copies from it have finished.
        staged = torch.empty(len(numbers), dtype=torch.int64, device="cpu", pin_memory=True)
        staged.copy_(torch.frombuffer(array("q", numbers), dtype=torch.int64))
        return staged.to(self.device, non_blocking=True)


class InOrderRuntime:
    """Runtime of a device that runs all operations in the order of issue: MPS, the CPU in tests.

    Operations need no events to be in order. Only the host waits, before it overwrites staging.

    Args:
        device: MPS or the CPU.
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
    """Stream and event of `InOrderRuntime`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

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
