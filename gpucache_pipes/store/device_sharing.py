"""What a store does for others that use its device: graphs, models that need memory, threads."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch

from gpucache_pipes.device import Backend
from gpucache_pipes.store.loader import Loader
from gpucache_pipes.store.shared_cache import SharedCache
from gpucache_pipes.store.yielding import call_twice, require_no_collective


class DeviceSharing:
    """The methods of GPUFeatureStore that concern other users of its device."""

    _backend: Backend
    _shared: SharedCache
    _loader: Loader

    @property
    def device(self) -> torch.device:
        """Where results are."""
        return self._backend.device

    @contextmanager
    def quiesce(self) -> Iterator[None]:
        """A context in which no reader thread reads, and nothing of the store is on the device.

            with store.quiesce(), torch.cuda.graph(graph):
                ...

        CUDA does not allow other threads to allocate or to query events while a graph is captured.
        Waits until the files being read are in memory; other requests are served afterwards. A
        batch that lacks files raises RuntimeError in it. Other consumers must not run meanwhile.
        """
        self._shared.refusal.check()
        with self._loader.gate.held():
            self._loader.drain()
            yield

    def yield_memory_to(
        self,
        function: Callable[..., Any],
        *args: Any,
        zero_grad: Callable[[], object] | None = None,
        collective_free: bool = False,
    ) -> Any:
        """`function(*args)`; if the device runs out of memory, once more without the cache.

            loss = store.yield_memory_to(step, batch, zero_grad=optimizer.zero_grad)

        Between the two calls all features are dropped but those of batches in flight, their memory
        is returned to the device, torch's random numbers are restored, and `zero_grad` is called.
        So `function` may be the forward and the backward pass, but not the optimizer's step. During
        the second call readers are held; then the cache grows again beside what it has needed.

        Raises torch.OutOfMemoryError if there is nothing to drop, or if it still does not suffice;
        RuntimeError with several ranks of torch.distributed, since one alone must not repeat a
        collective operation, unless `collective_free` states that there is none inside.
        """
        require_no_collective(collective_free)
        call, shed = partial(function, *args), self._shared.memory.shed
        return call_twice(call, self.quiesce, shed, zero_grad, self.device)

    def bind_stream(self) -> Callable[[], AbstractContextManager[Any]]:
        """A function whose contexts make any thread work on the stream that is current here.

        For code that gathers in a thread of its own and hands results to this one.
        """
        return self._backend.bind_stream()
