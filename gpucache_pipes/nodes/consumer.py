"""ConsumerStream: on which stream a pipeline issues its results."""

import contextlib
import threading
from typing import Any

from gpucache_pipes.store import GPUFeatureStore


class ConsumerStream:
    """Remembers the thread and the stream in which a pipeline was reset: those that train.

    Calling it in `next()` returns the context in which to issue device operations:

    - in the thread of the reset, an empty one: the operations go to whichever stream is current
      there, so that a consumer may change streams between two batches;
    - in any other thread, such as that of a torchdata Prefetcher downstream, one that makes the
      stream current that was current at the reset. Such threads have streams of their own, or
      the default one, and the consumer does not wait for either.

    Args:
        store: on whose device the streams are.
    """

    def __init__(self, store: GPUFeatureStore) -> None:
        self._thread = threading.current_thread()
        self._enter = store.bind_stream()

    def __call__(self) -> contextlib.AbstractContextManager[Any]:
        """The context for the calling thread."""
        return _HERE if threading.current_thread() is self._thread else self._enter()


_HERE = contextlib.nullcontext()
