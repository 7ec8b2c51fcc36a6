"""A simulated device: operations are queued, and run late and in a random order.

`SimulatedRuntime` replaces `device.TorchRuntime`. A store on
`AcceleratorBackend(SimulatedRuntime(seed))` runs unchanged, on the CPU. What real hardware does
once in a thousand runs happens here in most: copies are delayed, streams overtake each other, and
an operation may not have run until the host waits for it. An access that nothing orders after a
conflicting one raises `UnorderedAccessError` when it is issued, even if the data would have been
correct. So does a call that is made while another device is current, if the simulated one is not
device 0.

A copy from memory that is not pinned takes its bytes at once, as on CUDA. Memory that is freed is
given out again to the stream that it was allocated on, as torch's allocator does.
"""

import contextlib
import itertools
import random
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_flatten, tree_map_only

from gpucache_pipes.device import DeviceMemory, Pages, Reservation
from gpucache_pipes.device.runtime import host_bytes
from gpucache_pipes.testing.ordering import HOST, Clock, Interval, OrderChecker, join
from gpucache_pipes.testing.simulated_memory import CurrentDevices, StreamPools
from gpucache_pipes.testing.simulated_streams import SimulatedEvent, SimulatedStream
from gpucache_pipes.testing.simulated_tensor import SimulatedTensor, intervals_of


class SimulatedRuntime:
    """`Runtime` of a simulated device; see the module docstring. Thread-safe.

    Args:
        seed: seed of the order in which operations run.
        haste: probability that a ready operation runs when time passes. With 0, operations run only
            when the host waits.
        index: of the device. A new thread has device 0.

    Attributes:
        devices: which device is current in each thread.
        operations: operations issued so far, copies to the device included.
        waits: how often the host has waited for the device so far.

    >>> runtime = SimulatedRuntime(seed=0, haste=0)
    >>> memory = runtime.empty(4)
    >>> with runtime.on(runtime.new_stream()):
    ...     _ = memory.fill_(1)
    >>> with runtime.on(runtime.new_stream()):
    ...     memory.clone()  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    gpucache_pipes.testing.ordering.UnorderedAccessError: aten::clone on stream 2, reading bytes ...
    """

    returns_memory = True

    def __init__(self, seed: int = 0, haste: float = 0.3, index: int = 0) -> None:
        self.device = torch.device("cpu")
        self.devices = CurrentDevices(index)
        self.lock = threading.RLock()
        self.checker = OrderChecker()
        self.operations = 0
        self.waits = 0
        self._random = random.Random(seed)
        self._haste = haste
        self._host: Clock = {}
        self._streams: list[SimulatedStream] = []
        self._current = threading.local()
        with self.devices.entered():
            self._default = self.new_stream()
        self._pools = StreamPools()
        self._pinned_numbers = itertools.count(-1, -1)
        # Pinned allocations: first address, end address, number.
        self._pinned: list[tuple[int, int, int]] = []

    # The methods of Runtime

    def bind_thread(self) -> None:
        """See Runtime."""
        self.devices.set_current()

    def new_stream(self) -> SimulatedStream:
        """See Runtime."""
        self.devices.require("making a stream")
        with self.lock:
            self._streams.append(SimulatedStream(self, len(self._streams)))
            return self._streams[-1]

    def current_stream(self) -> SimulatedStream:
        """See Runtime."""
        return getattr(self._current, "stream", self._default)

    def new_event(self) -> SimulatedEvent:
        """See Runtime."""
        return SimulatedEvent(self)

    @contextlib.contextmanager
    def on(self, stream: SimulatedStream) -> Iterator[None]:
        """See Runtime."""
        before = self.current_stream()
        with self.devices.entered():
            self._current.stream = stream
            try:
                yield
            finally:
                self._current.stream = before

    def on_device(self) -> contextlib.AbstractContextManager[None]:
        """See Runtime."""
        return self.devices.entered()

    def reserve(self, nbytes: int) -> Reservation:
        """See Runtime."""
        self.devices.require("allocating")
        return Reservation(self.empty(nbytes))

    def empty(self, nbytes: int) -> torch.Tensor:
        """Device memory, uint8 [nbytes], filled with a pattern."""
        return self._allocate(torch.empty(nbytes, dtype=torch.uint8, device="cpu"))

    def memory(self) -> DeviceMemory | None:
        """See Runtime."""
        self.devices.require("looking at memory")
        return None

    def release_pinned(self) -> None:
        """See Runtime."""

    def pinned(self, nbytes: int) -> torch.Tensor:
        """See Runtime."""
        self.devices.require("allocating pinned memory")
        memory = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        first, last = memory.data_ptr(), memory.data_ptr() + nbytes
        with self.lock:
            self._pinned = [p for p in self._pinned if p[1] <= first or last <= p[0]]
            self._pinned.append((first, last, next(self._pinned_numbers)))
        return memory

    def bytes_of(self, pinned: torch.Tensor) -> memoryview:
        """See Runtime. Counts as a write of the host to all of these bytes."""
        with self.lock:
            self._host[HOST] = self._host.get(HOST, 0) + 1
            interval = self._pinned_interval(pinned)
            writes = [] if interval is None else [interval]
            self.checker.check(HOST, self._host[HOST], self._host, "filling staging", [], writes)
        return host_bytes(pinned)

    def index(self, numbers: Pages) -> torch.Tensor:
        """See Runtime."""
        self.devices.require("uploading an index")
        with self.lock:
            values = torch.from_numpy(np.array(numbers))
            index = self._allocate(torch.empty_like(values))
            self._issue("index", [], intervals_of(index), partial(index.content.copy_, values))
            index.numbers = values.tolist()
            return index

    # Operations

    def dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Issue an operation on simulated tensors.

        Views are made at once. Operations that return values to the host, or write to host memory,
        wait for the current stream. All others are queued on it.

        Raises:
            UnorderedAccessError: nothing orders the operation after an earlier one.
        """
        with self.lock:
            self.let_time_pass()
            arguments = func._schema.arguments
            written = [a.alias_info is not None and a.alias_info.is_write for a in arguments]
            aliased = any(a.alias_info is not None for a in arguments)
            if aliased and not any(written):
                real, memory = func(*_reals(args), **_reals(kwargs)), args[0].memory
                if isinstance(real, torch.Tensor):
                    return SimulatedTensor(real, self, memory)
                return [
                    SimulatedTensor(part, self, memory) for part in real
                ]  # the parts of a split
            named = {a.name: value for a, value in zip(arguments, args, strict=False)} | kwargs
            outputs = [
                named[a.name] for a, is_written in zip(arguments, written, strict=True)
                if is_written and a.name in named
            ]  # fmt: skip
            if not all(isinstance(output, SimulatedTensor) for output in outputs):
                return self._on_host(func, args, kwargs, outputs)
            if any(str(r.type) not in ("Tensor", "Tensor[]") for r in func._schema.returns):
                return self._on_host(func, args, kwargs)
            return self._queue(func, args, kwargs, outputs)

    def _queue(self, func: Any, args: Any, kwargs: Any, outputs: list[SimulatedTensor]) -> Any:
        mine = set(map(id, outputs))
        inputs = [leaf for leaf in tree_flatten((args, kwargs))[0] if id(leaf) not in mine]
        rows = next((i.numbers for i in inputs if getattr(i, "numbers", None) is not None), None)
        by_row = func.name().startswith(("aten::index_select", "aten::index_copy"))
        reads: list[Interval] = []
        for tensor in inputs:
            # aten::new_* only use the shape and dtype of their argument.
            if isinstance(tensor, SimulatedTensor) and not func.name().startswith("aten::new_"):
                selected = by_row and func.name().startswith("aten::index_select")
                of_rows = rows if selected and tensor.numbers is None else None
                reads += intervals_of(tensor, of_rows)
        (real_args, real_kwargs), pinned = self._host_memory(args, kwargs)
        reads += pinned
        call = partial(func, *real_args, **real_kwargs)
        if outputs:
            writes = intervals_of(outputs[0], rows if by_row else None)
            self._issue(func.name(), reads, writes, call)
            return outputs[0]
        shapes = func(*_metas(args), **_metas(kwargs))
        results = [self._allocate(torch.empty_like(m, device="cpu"))
                   for m in tree_flatten(shapes)[0]]  # fmt: skip

        def run() -> None:
            for result, value in zip(results, tree_flatten(call())[0], strict=True):
                result.content.copy_(value)

        self._issue(func.name(), reads, [i for r in results for i in intervals_of(r)], run)
        return results[0] if isinstance(shapes, torch.Tensor) else results

    def _host_memory(self, args: Any, kwargs: Any) -> tuple[tuple[Any, Any], list[Interval]]:
        """The arguments as the device will read them, and the pinned memory among them.

        Memory that is not pinned is copied now.
        """
        reads: list[Interval] = []

        def seen(tensor: torch.Tensor) -> torch.Tensor:
            if isinstance(tensor, SimulatedTensor):
                return tensor.content
            if (interval := self._pinned_interval(tensor)) is not None:
                reads.append(interval)
                return tensor
            return tensor.clone()

        return tree_map_only(torch.Tensor, seen, (args, kwargs)), reads

    def _pinned_interval(self, tensor: torch.Tensor) -> Interval | None:
        start = tensor.data_ptr()
        for first, last, memory in self._pinned:
            if first <= start < last:
                return memory, start - first, start - first + tensor.numel() * tensor.itemsize
        return None

    def _on_host(self, func: Any, args: Any, kwargs: Any, outputs: Any = ()) -> Any:
        """Run an operation on the host, after waiting for the current stream."""
        self.current_stream().synchronize()
        reads = [i for t in tree_flatten((args, kwargs))[0] if isinstance(t, SimulatedTensor)
                 for i in intervals_of(t)]  # fmt: skip
        written = tree_flatten(list(outputs))[0]
        writes = [i for t in written if isinstance(t, SimulatedTensor) for i in intervals_of(t)]
        self._host[HOST] = self._host.get(HOST, 0) + 1
        self.checker.check(HOST, self._host[HOST], self._host, func.name(), reads, writes)
        return func(*_reals(args), **_reals(kwargs))

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of `tensor` on the host, after waiting for the current stream."""
        with self.lock:
            real: torch.Tensor = self._on_host(torch.ops.aten.clone.default, (tensor,), {})
            return real

    def _allocate(self, real: torch.Tensor) -> SimulatedTensor:
        # A pattern, so that reading before writing does not give correct data by chance.
        if real.numel():
            real.view(torch.uint8).fill_(0xA5) if real.ndim else real.fill_(1)
        memory = self._pools.allocate(self.current_stream().number, real.numel() * real.itemsize)
        return SimulatedTensor(real, self, memory)

    def _issue(
        self, what: str, reads: list[Interval], writes: list[Interval], run: Callable[[], Any]
    ) -> None:
        stream = self.current_stream()
        join(stream.clock, self._host)
        count = stream.clock.get(stream.number, 0) + 1
        self.checker.check(stream.number, count, stream.clock, what, reads, writes)
        stream.clock[stream.number] = count
        stream.queue.append((run, None))
        self.operations += 1

    # Progress

    def let_time_pass(self) -> None:
        """Run some of the operations that are ready, by chance; with haste=0 none."""
        while self._random.random() < self._haste and self._run_any():
            pass

    def run_one(self) -> None:
        """Run one operation that is ready, because the host waits.

        Raises:
            RuntimeError: none is ready, although the host waits.
        """
        if not self._run_any():
            raise RuntimeError(
                "deadlock: every stream waits for another, or for an event that was never recorded"
            )

    def _run_any(self) -> bool:
        ready = [stream for stream in self._streams if stream.ready]
        if not ready:
            return False
        run, _ = self._random.choice(ready).queue.popleft()
        run()
        return True

    def host_knows(self, clock: Clock) -> None:
        """Record that the host has seen the operations in `clock` to be finished."""
        join(self._host, clock)
        self.checker.forget(self._host)


def _reals(arguments: Any) -> Any:
    """The arguments with the contents of simulated tensors in place of these."""
    return tree_map_only(SimulatedTensor, lambda tensor: tensor.content, arguments)


def _metas(arguments: Any) -> Any:
    """The arguments with tensors on the meta device, which have shapes but no data."""

    def meta(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(
            tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta"
        )

    return tree_map_only(torch.Tensor, meta, arguments)
