"""Streams, events and memory of one device: the `Runtime` that `AcceleratorBackend` runs on."""

import contextlib
import ctypes
from typing import Any, NamedTuple, Protocol

import torch

from gpucache_pipes.device.backend import Pages

SMALLEST_RESERVATION = 10 << 20
"""Bytes. For less, torch's allocator takes 20 MiB from the driver, to split them."""


class DeviceMemory(NamedTuple):
    """The memory of a device, as this process sees it. All but `shortages` in bytes.

    Attributes:
        free: what the driver would give to this process now. Memory that torch's allocator has
            reserved and not allocated is not in it: between two steps most of that is the
            activations of the model.
        total: what this process may use at most.
        reserved: what torch's allocator has taken from the driver.
        allocated: what tensors take now.
        peak: the most that tensors have taken at one time.
        shortages: how often the allocator had to free its cache to find memory, or found none.
    """

    free: int
    total: int
    reserved: int
    allocated: int
    peak: int
    shortages: int


class Runtime(Protocol):
    """What `AcceleratorBackend` needs from a device. Thread-safe.

    Streams and events have the methods of `torch.Stream` and `torch.Event` that the backend uses:
    `stream.wait_event`, `stream.synchronize`, `event.record`, `event.query` and
    `event.synchronize`. Streams are hashable, and equal if they are the same stream.

    With several devices of one kind each thread has a current one, which is device 0 in a new
    thread. CUDA creates a context, of about 500 MiB, on whichever device is current when certain
    calls are made: recording, querying or destroying an event, leaving a stream. So the backend
    makes every call on streams, events and memory inside `on` or `on_device`, or in a thread that
    has called `bind_thread`.

    Attributes:
        device: with an index, if there can be several of its type.
        returns_memory: whether memory of `reserve` goes back to the driver when it is dropped, and
            not into a cache of the allocator.
    """

    device: torch.device

    @property
    def returns_memory(self) -> bool:
        """See the class."""

    def bind_thread(self) -> None:
        """Make the device current in the calling thread, for good. At the start of a thread."""

    def new_stream(self) -> Any:
        """A new stream, for copies."""

    def current_stream(self) -> Any:
        """The stream on which the calling thread issues operations now."""

    def new_event(self) -> Any:
        """A new event that has not been recorded."""

    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """A context in which the device and the stream are current in the calling thread."""

    def on_device(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which the device is current in the calling thread.

        Operations are issued on the thread's current stream of the device.
        """

    def reserve(self, nbytes: int) -> "Reservation":
        """New device memory with undefined content.

        Raises torch.OutOfMemoryError.
        """

    def memory(self) -> DeviceMemory | None:
        """How much memory there is, or None if that is not known. Takes up to 0.1 ms."""

    def pinned(self, nbytes: int) -> torch.Tensor:
        """New pinned host memory, uint8 [nbytes]."""

    def release_pinned(self) -> None:
        """Return pinned memory that is no longer in use to the system."""

    def bytes_of(self, pinned: torch.Tensor) -> memoryview:
        """The memory of a tensor of `pinned`, writable. The tensor must outlive the view."""

    def index(self, numbers: Pages) -> torch.Tensor:
        """A new int64 tensor on the device, filled in the order of the current stream.

        The host does not wait for the copy.
        """


class Reservation:
    """Device memory, and the pool of the allocator that it came from.

    Args:
        memory: uint8 [nbytes].
        pool: returns its memory to the driver when it is dropped. Views of `memory` must be
            dropped first, or the pool finds it still in use.
    """

    __slots__ = ("memory", "pool")

    def __init__(self, memory: torch.Tensor, pool: object = None) -> None:
        self.memory: torch.Tensor | None = memory
        self.pool = pool

    def __del__(self) -> None:
        # In this order, which the deallocation of attributes does not guarantee.
        self.memory = None
        self.pool = None


def host_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous host tensor, writable. The tensor must outlive the view."""
    memory = (ctypes.c_char * tensor.numel()).from_address(tensor.data_ptr())
    return memoryview(memory).cast("B")
