"""On which stream the results of a pipeline come, whichever thread asks for them."""

import contextlib
import threading
from typing import Any

from gpucache_pipes.store import GPUFeatureStore


class ConsumerStream:
    """Where the thread that resets a pipeline is: it is the one that trains.

    Called in `next()`, it gives the context to work in. In the same thread that is whatever stream
    is current there. In another one, such as that of a torchdata Prefetcher behind the node, which
    knows nothing of streams, it is the stream that was current at the reset.
    """

    def __init__(self, store: GPUFeatureStore) -> None:
        self._thread = threading.current_thread()
        self._enter = store.bind_stream()

    def __call__(self) -> contextlib.AbstractContextManager[Any]:
        """The context."""
        return _HERE if threading.current_thread() is self._thread else self._enter()


_HERE = contextlib.nullcontext()
